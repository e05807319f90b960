"""`lockstep mismatch`: what it prints, and what it refuses."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lockstep.cluster.cli import app

SHORT = ("--count", "3", "--samples", "2", "--max-new-tokens", "6", "--dtype", "float32")


def test_a_file_of_prompts_in_fp32(tiny_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('12 + 34 =\n{"prompt": "State the answer"}\n\n[1, 2]\nnot read\n')
    given = ["mismatch", str(tiny_folder), "--prompts", str(prompts), *SHORT]
    result = CliRunner().invoke(app, [*given, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["numerics"], found["dtype"], found["tensor"]) == ("fast", "float32", 1)
    assert 6 <= found["tokens"] <= 36
    assert found["mean"] <= found["largest"] <= 1e-4
    assert found["differing_tokens"] <= found["differing_bits"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--numerics", "precise"], "use fast or exact"),
        (["--dtype", "float16"], "use bfloat16 or float32"),
        (["--tensor", "4"], "tensor=4"),
        (["--prompts", "EMPTY"], "has no prompts"),
    ],
)
def test_what_does_not_fit_is_a_sentence(options: list[str], words: str, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    given = [str(tmp_path / "empty.txt") if option == "EMPTY" else option for option in options]
    result = CliRunner().invoke(app, ["mismatch", str(tiny_folder), *given])
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
