"""The server is an endpoint for an LLM judge: it takes its requests, and refuses what it has not got in its words."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.world.groups import Groups
from lockstep.model.formats.huggingface.reader import HuggingFaceFolder, read_text_files
from lockstep.model.loading import build, transformer_of
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.types import AnswerKey, Submission
from lockstep.rl.verdict import Outcome, Verdict
from lockstep.rl.verifiers.llm_judge.client import EndpointError
from lockstep.rl.verifiers.llm_judge.config import LLMJudgeConfig
from lockstep.rl.verifiers.llm_judge.grader import LLMJudge, trial
from tests.cluster.servers import MODEL, Running, serving

KEY = "sk-of-the-server"


@pytest.fixture(scope="module")
def long_server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, groups: Groups) -> Iterator[Running]:
    """A server of the tiny model with a context of 4,096 tokens, which asks for a key."""
    folder = tmp_path_factory.mktemp("long") / "model"
    shutil.copytree(tiny_folder, folder)
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | {"max_position_embeddings": 4096}))
    source = HuggingFaceFolder(folder)
    transformer = transformer_of(build(source.config, groups, torch.float32, source))
    tokenizer = Tokenizer(read_text_files(folder))
    engine = RolloutEngine(transformer, decode=tokenizer.decode, special=tokenizer.special)
    with serving(engine, tokenizer, api_key=KEY) as running:
        yield running


def config(server: Running, **given: object) -> LLMJudgeConfig:
    return LLMJudgeConfig.model_validate({"url": f"{server.url}/v1", "model": MODEL, "api_key_env": "KEY"} | given)


def verdict(judge: LLMJudgeConfig) -> Verdict:
    with LLMJudge(judge, note=lambda sentence: None) as asked:
        return asked.grade([("4", Submission("4", AnswerKey("4"), "2 + 2 ="))])[0]


def test_what_the_server_answers_is_read_or_said(long_server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", KEY)
    said = verdict(config(long_server, max_tokens=4))
    assert said.outcome is Outcome.ungradable  # a random model writes no score, and was asked twice
    assert "its answer was cut off, at" in said.reason
    assert long_server.engine.statistics.generated_tokens == 8
    assert "gave no score to a right answer of 2 + 2" in trial(config(long_server, max_tokens=4))
    refused = verdict(config(long_server, max_tokens=5000))
    assert "answered 400 (" in refused.reason
    assert "change what it names" in refused.reason


@pytest.mark.parametrize(
    ("key", "given", "said"),
    [
        ("wrong", {}, r"answered 401 .*: set KEY to a key that may ask for it"),
        (KEY, {"model": "huge"}, r"answered 404 .*huge.*model is a name that it serves"),
        (KEY, {"url": "http://127.0.0.1:9/v1"}, "cannot be reached"),
        (KEY, {"structured": True, "body": {"min_tokens": 1}}, r"answered 400 .*response_format.*structured"),
    ],
)
def test_a_trial_says_what_is_to_be_changed(
    long_server: Running, monkeypatch: pytest.MonkeyPatch, key: str, given: dict[str, object], said: str
) -> None:
    monkeypatch.setenv("KEY", key)
    with pytest.raises(EndpointError, match=said):
        trial(config(long_server, **given))
