"""An evaluation goes on from its own completions, and from nothing that a failed one left."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lockstep.cluster.evaluation.answer_folder import COMPLETIONS, SETTINGS, AnswerFolder, OtherSettings

SETTING: Mapping[str, Any] = {"samples": 2, "sampling": {"temperature": 1.0}}
OTHERS = [
    pytest.param({"samples": 3, "sampling": {"temperature": 1.0}}, "begun with samples=2, and now it is 3", id="value"),
    pytest.param({"samples": 2, "sampling": {"temperature": 0.5}}, "begun with sampling.temperature=1.0", id="nested"),
    pytest.param(SETTING | {"seed": 1}, "begun with seed=None, and now it is 1", id="one more"),
    pytest.param({"samples": 2}, "begun with sampling.temperature=1.0, and now it is None", id="one less"),
]


def answer(sample: int) -> dict[str, Any]:
    return {"mode": "greedy", "problem": 0, "sample": sample, "completion": "4"}


@pytest.mark.parametrize(("corrected", "_"), OTHERS)
def test_an_evaluation_that_failed_before_its_first_answer_refuses_no_other(
    corrected: Mapping[str, Any], _: str, tmp_path: Path
) -> None:
    folder = tmp_path / "eval"
    AnswerFolder(folder, SETTING)
    AnswerFolder(folder, SETTING).add([])
    assert not folder.exists()
    AnswerFolder(folder, corrected).add([answer(0)])
    assert json.loads((folder / SETTINGS).read_text()) == corrected


@pytest.mark.parametrize(("corrected", "_"), OTHERS)
def test_settings_without_an_answer_are_replaced(corrected: Mapping[str, Any], _: str, tmp_path: Path) -> None:
    (tmp_path / SETTINGS).write_text(json.dumps(SETTING))
    (tmp_path / COMPLETIONS).write_text('{"mode": "greedy", "prob')  # killed in its first line
    answers = AnswerFolder(tmp_path, corrected)
    answers.add([answer(0)])
    assert json.loads((tmp_path / SETTINGS).read_text()) == corrected
    assert len(AnswerFolder(tmp_path, corrected)) == 1


@pytest.mark.parametrize(("changed", "sentence"), OTHERS)
def test_answers_are_never_mixed_with_those_of_other_settings(
    changed: Mapping[str, Any], sentence: str, tmp_path: Path
) -> None:
    AnswerFolder(tmp_path, SETTING).add([answer(0)])
    with pytest.raises(OtherSettings, match=sentence):
        AnswerFolder(tmp_path, changed)
    assert len(AnswerFolder(tmp_path, SETTING)) == 1


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    for path in (tmp_path, tmp_path / "mine"):
        with pytest.raises(OtherSettings, match="holds no evaluation"):
            AnswerFolder(path, SETTING)
