"""A secret is in neither half of what travels, and whole in the job's first process."""

import json
from pathlib import Path

import pytest

from lockstep.cluster.jobs.sealed_environment import BITS, SUM, NotSet, seal, unseal
from lockstep.cluster.jobs.spec import BadSpec, JobSpec
from lockstep.cluster.recipe.schema import Recipe
from lockstep.rl.remote import PASSED_ON

SECRET = "hf_naïve-0123456789"


def test_a_value_comes_out_of_two_halves_that_do_not_have_it(tmp_path: Path) -> None:
    sent = seal(["HF_TOKEN", "OF_CLUSTER"], {"HF_TOKEN": SECRET, "OTHER": "stays"}, tmp_path)
    again = seal(["HF_TOKEN"], {"HF_TOKEN": SECRET}, tmp_path / ".")
    for text in (sent[SUM], again[SUM], (tmp_path / BITS).read_text()):
        assert SECRET not in text
        assert SECRET.encode().hex() not in text
    assert sent[SUM] != again[SUM], "the same bits hid two values"
    there = {**again, "OF_CLUSTER": "of the cluster"}
    unseal(["HF_TOKEN", "OF_CLUSTER"], there, tmp_path)
    assert there == {
        "HF_TOKEN": SECRET,
        "OF_CLUSTER": "of the cluster",
        PASSED_ON: "HF_TOKEN,OF_CLUSTER",
    }


def test_what_is_set_nowhere_is_refused(tmp_path: Path) -> None:
    sent = seal(["HF_TOKEN"], {}, tmp_path)
    assert json.loads(sent[SUM]) == {}
    with pytest.raises(NotSet, match="env=HF_TOKEN is set neither where the job was submitted nor on "):
        unseal(["HF_TOKEN"], dict(sent), tmp_path)


def test_a_value_in_the_place_of_a_name_is_refused_and_specs_have_names_alone() -> None:
    with pytest.raises(BadSpec, match=r"env='HF_TOKEN=hf_1' is not the name of an environment variable"):
        JobSpec(Recipe(), "job", environment=("HF_TOKEN=hf_1",))
    spec = JobSpec(Recipe(seed=7), "a b/ä", resume=True, max_hours=0.5, retries=2, environment=("HF_TOKEN",))
    assert JobSpec.of_json(spec.to_json()) == spec
    assert spec.new_id().rpartition("-")[0] == "a-b"
    assert spec.new_id() != spec.new_id()
