"""An interpreter without vLLM, or with one that was not tried, is refused in a sentence before a run begins."""

import sys
from pathlib import Path

import pytest

from lockstep.rl.rollout.vllm.interpreter import WrongInterpreter, check_interpreter, check_version
from tests.rl.rollout.vllm_engines import IS_THERE, LEFT_OUT, PYTHON


@pytest.mark.parametrize("version", ["0.32", "0.32.0", "0.32.1"])
def test_versions_that_were_tried_are_taken(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.3", "0.31.2", "0.33.0", "0.320.0", "1.0"])
def test_others_are_refused_with_the_one_to_install(version: str) -> None:
    with pytest.raises(WrongInterpreter, match=rf"tried with vLLM 0\.32 and not with {version}: install vllm==0\.32"):
        check_version(version)


def test_an_interpreter_that_lacks_vllm_or_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongInterpreter, match="has no vLLM: install it there"):
        check_interpreter(Path(sys.executable))
    for missing in (tmp_path / "python", tmp_path):
        with pytest.raises(WrongInterpreter, match=f"rollout.python={missing} does not run"):
            check_interpreter(missing)


@pytest.mark.skipif(not IS_THERE, reason=LEFT_OUT)
def test_the_environment_of_make_vllm_is_taken() -> None:
    check_interpreter(PYTHON)
