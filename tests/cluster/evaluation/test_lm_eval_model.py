"""The model of lm-eval against lm-eval's own `hf` on tasks made here; skipped where lm-eval is not installed."""

import json
from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval")

from lockstep.cluster.evaluation.lm_eval_model import LockstepModel  # noqa: E402

ROWS = [
    {"question": f"{a} + {b} =", "choices": [f" {a + b}", f" {a + b + 1} or so", " naïve 🦊"], "answer": a % 3}
    for a, b in ((1, 2), (12, 34), (5, 60), (7, 7))
]
LONG = "State the final answer to the following problem: 12 + 34 = naïve 🦊. "


def tasks(folder: Path) -> list[dict[str, Any]]:
    """Multiple choice, perplexity of texts beyond the model's context, and generation."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row | {"page": LONG * n}) + "\n" for n, row in enumerate(ROWS, start=5)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    return [
        common
        | {
            "task": "choice",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
        },
        common
        | {
            "task": "pages",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{page}}",
            "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
        common
        | {
            "task": "answers",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False},
        },
    ]


def outcome(model: Any, folder: Path, **options: Any) -> dict[str, Any]:
    """Responses to all requests and metrics by task; metrics of few samples have no error to bootstrap."""
    found = lm_eval.simple_evaluate(model=model, tasks=tasks(folder), bootstrap_iters=0, verbosity="ERROR", **options)
    responses = {name: [row["filtered_resps"] for row in rows] for name, rows in found["samples"].items()}
    return {"responses": responses, "metrics": found["results"]}


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Texts and greedy flags are equal, numbers to 1e-4."""
    assert ours["responses"]["answers"] == theirs["responses"]["answers"]
    assert any(theirs["responses"]["answers"][0])
    for mine, reference in zip(ours["responses"]["choice"], theirs["responses"]["choice"], strict=True):
        assert [greedy for _, greedy in mine] == [greedy for _, greedy in reference]
        assert [total for total, _ in mine] == pytest.approx([total for total, _ in reference], abs=1e-4, rel=1e-6)
    for mine, reference in zip(ours["responses"]["pages"], theirs["responses"]["pages"], strict=True):
        assert mine == pytest.approx(reference, abs=1e-4, rel=1e-6)
    assert ours["metrics"]["choice"]["acc,none"] == theirs["metrics"]["choice"]["acc,none"]
    for name in ("byte_perplexity,none", "bits_per_byte,none"):
        assert ours["metrics"]["pages"][name] == pytest.approx(theirs["metrics"]["pages"][name], rel=1e-5)


@pytest.mark.parametrize("chat", [False, True])
def test_numbers_are_those_of_hf_in_any_layout(tiny_folder: Path, tmp_path: Path, chat: bool) -> None:
    options = {"apply_chat_template": chat}
    theirs = outcome("hf", tmp_path, model_args=f"pretrained={tiny_folder},dtype=float32,device=cpu", **options)
    layouts = [{"tensor": 2, "pipeline": 2}] if chat else [{}, {"tensor": 2}, {"pipeline": 2}]
    for layout in layouts:
        ours = LockstepModel(str(tiny_folder), dtype="float32", **layout)
        same(outcome(ours, tmp_path, **options), theirs)


def test_what_does_not_fit_is_refused_in_a_sentence(tiny_folder: Path) -> None:
    for given, words in (
        ({"tensor": 4}, "tensor=4"),
        ({"tensr": 2}, "tensr"),
        ({"dtype": "float16"}, "dtype='float16' is not supported: use bfloat16 or float32"),
        ({"numerics": "exactly"}, "numerics='exactly' is not supported: use fast or exact"),
    ):
        with pytest.raises(ValueError, match=words):
            LockstepModel(str(tiny_folder), **given)
