"""Tasks of lm-eval that are made here, and what a model answers to them; imported where lm-eval is installed."""

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest

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


def outcome(
    model: Any, folder: Path, names: tuple[str, ...] = ("choice", "pages", "answers"), **options: Any
) -> dict[str, Any]:
    """Responses to all requests and metrics by task; metrics of few samples have no error to bootstrap."""
    chosen = [task for task in tasks(folder) if task["task"] in names]
    found = lm_eval.simple_evaluate(model=model, tasks=chosen, bootstrap_iters=0, verbosity="ERROR", **options)
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


def hugging_face(model: Path, folder: Path, **options: Any) -> dict[str, Any]:
    """What lm-eval's own model of `transformers` answers in fp32."""
    given = {"pretrained": str(model), "dtype": "float32", "device": "cpu", **options.pop("settings", {})}
    return outcome("hf", folder, model_args=given, **options)
