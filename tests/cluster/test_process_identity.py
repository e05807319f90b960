"""A process is known to be gone on its own host, and everywhere where its scheduler's job runs again."""

from dataclasses import replace

import pytest

from lockstep.cluster.process_identity import JOB, ProcessIdentity


def test_this_process_is_there_and_an_earlier_one_with_its_number_is_gone() -> None:
    here = ProcessIdentity.this_process()
    assert not here.is_gone()
    assert replace(here, started=here.started - 100).is_gone()


def test_on_another_host_only_that_of_the_same_job_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(ProcessIdentity.this_process(), host="elsewhere")
    assert not other.is_gone()
    monkeypatch.setenv(JOB, "slurm-5")
    assert not other.is_gone()
    assert not replace(other, job="slurm-6").is_gone()
    assert replace(other, job="slurm-5").is_gone()
    assert not ProcessIdentity.this_process().is_gone()
