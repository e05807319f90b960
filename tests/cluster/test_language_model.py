"""A model that is loaded generates what the command generates, alone in its process."""

from pathlib import Path
from typing import Any

import pytest

import lockstep
from tests.cluster import cli_process

GIVEN: dict[str, Any] = {"temperature": 0.7, "top_k": 9, "max_new_tokens": 8, "seed": 3}
OPTIONS = [part for name, value in GIVEN.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def test_a_model_generates_what_the_command_does(tiny_folder: Path) -> None:
    with lockstep.load(tiny_folder, dtype="float32") as model:
        assert model.config.layers == 4
        answer = model.generate("12 + 34 =", **GIVEN)
        assert model.generate("12 + 34 =", raw=True, **GIVEN) != answer
        assert model.generate(["12 + 34 =", "1"], **GIVEN)[0] == answer
        assert model.generate([], **GIVEN) == []
        pieces = list(model.stream("12 + 34 =", **GIVEN))
        with pytest.raises(ValueError, match=r"top_p=0 is not allowed"):
            model.generate("12", top_p=0)
        with pytest.raises(ValueError, match="context"):
            model.generate("12", max_new_tokens=10_000)
        with pytest.raises(ValueError, match="a model is open in this process already"):
            lockstep.load(tiny_folder)
        assert model.generate("12 + 34 =", **GIVEN) == answer
    assert "".join(pieces) == answer
    shown = cli_process.lockstep("generate", str(tiny_folder), "12 + 34 =", "--dtype", "float32", *OPTIONS)
    assert shown.stdout == f"{answer}\n"


def test_what_cannot_be_opened_leaves_the_process_as_it_was(tiny_folder: Path, tmp_path: Path) -> None:
    for given, options in ((tmp_path, {}), (tiny_folder, {"dtype": "int8"})):
        with pytest.raises(ValueError, match=r"holds no checkpoint|dtype='int8' is not supported"):
            lockstep.load(given, **options)
    lockstep.load(tiny_folder).close()
