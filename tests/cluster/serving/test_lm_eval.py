"""lm-eval's models of an OpenAI-compatible server against its own `hf`; skipped where it is not installed."""

from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from tests.cluster.evaluation.lm_eval_tasks import hugging_face, outcome, same
from tests.cluster.servers import Running

CONTEXT = 256
"""Tokens that the tiny model takes. The client leaves one of them for an answer, and one more for its windows."""


def test_numbers_through_completions_are_those_of_hf(server: Running, tiny_folder: Path, tmp_path: Path) -> None:
    given = {
        "model": "tiny",
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": str(tiny_folder),
        "tokenizer_backend": "huggingface",
        "max_length": CONTEXT,
    }
    same(
        outcome("local-completions", tmp_path, model_args=given, batch_size=2),
        hugging_face(tiny_folder, tmp_path, settings={"max_length": CONTEXT - 2}),
    )


def test_chats_are_answered_as_hf_answers_them(server: Running, tiny_folder: Path, tmp_path: Path) -> None:
    given = {"model": "tiny", "base_url": f"{server.url}/v1/chat/completions", "max_length": CONTEXT}
    options = {"apply_chat_template": True, "names": ("answers",)}
    ours = outcome("local-chat-completions", tmp_path, model_args=given, **options)
    theirs = hugging_face(tiny_folder, tmp_path, **options)
    assert ours["responses"] == theirs["responses"]
    assert any(text for [text] in ours["responses"]["answers"])
