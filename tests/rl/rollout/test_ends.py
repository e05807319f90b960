"""What ends a completion: all end tokens that a folder names, stop tokens, and special tokens named as stop strings."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lockstep.data.tokenizer import Tokenizer
from lockstep.model.config import UnknownModel
from lockstep.model.formats.huggingface.reader import read_config
from lockstep.model.transformer import Transformer
from lockstep.rl.rollout.config import EngineConfig, SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.loading import open_engine
from lockstep.rl.rollout.protocol import Request, TokenOutput

END = SamplingParams(logit_bias={2: 1e9}, max_new_tokens=6)
"""Draws the token 2, which is <|im_end|>."""


def folder_with(tiny_folder: Path, at: Path, config: Any, generation: Any) -> Path:
    """The tiny model, with these end tokens in config.json and in generation_config.json."""
    shutil.copytree(tiny_folder, at)
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        words = json.loads((at / name).read_text())
        (at / name).write_text(json.dumps(words | {"eos_token_id": value}))
    return at


def drawn(engine: RolloutEngine, sampling: SamplingParams) -> list[TokenOutput]:
    engine.add(Request("it", (5, 6), sampling, 0, 0))
    found = []
    while engine.has_work:
        found += engine.step()
    return found


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        (0, [0, 2], (0, 2)),
        (0, 2, (0, 2)),
        ([0, 5], [2, 0], (0, 5, 2)),
        (None, [2], (2,)),
        (2, None, (2,)),
        ([0, 2], [], (0, 2)),
        (None, None, ()),
    ],
)
def test_all_end_tokens_of_both_files_count(
    config: Any, generation: Any, ends: tuple[int, ...], tiny_folder: Path, tmp_path: Path
) -> None:
    assert read_config(folder_with(tiny_folder, tmp_path / "model", config, generation)).eos_tokens == ends


@pytest.mark.parametrize("wrong", ["two", [[2]], {"id": 2}])
def test_end_tokens_that_are_no_tokens_are_refused(wrong: Any, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"eos_token_id is .*, and a token or a list of tokens was needed"):
        read_config(folder_with(tiny_folder, tmp_path / "model", 0, wrong))


def test_an_end_token_of_the_generation_config_ends_a_completion(tiny_folder: Path, tmp_path: Path) -> None:
    folder = folder_with(tiny_folder, tmp_path / "model", 0, [0, 2, 9999])
    with open_engine(str(folder), "float32", EngineConfig()) as (engine, _):
        assert [(t.token, t.finish_reason) for t in drawn(engine, END)] == [(2, "stop")]
        late = drawn(engine, END.model_copy(update={"min_new_tokens": 3}))
        assert [t.token == 2 for t in late] == [False, False, False, True]


def test_a_stop_string_that_names_a_special_token_ends_at_it(transformer: Transformer, tokenizer: Tokenizer) -> None:
    start = SamplingParams(logit_bias={1: 1e9, 2: -1e9}, max_new_tokens=6)  # <|im_start|> again and again
    engine = RolloutEngine(transformer, decode=tokenizer.decode, special=tokenizer.special)
    for stop, length in (((), 6), (("<|im_start|>",), 1), (("never", "<|im_start|>"), 1), (("im_start",), 6)):
        found = drawn(engine, start.model_copy(update={"stop": stop}))
        assert (len(found), found[-1].finish_reason) == (length, "stop" if length == 1 else "length")
