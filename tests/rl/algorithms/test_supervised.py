"""Conversations are read as the recipe says and learned as in `transformers`, whatever rows they are packed in."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lockstep.data.conversations.assistant_mask import MaskedTokens
from lockstep.data.conversations.token_table import TokenTable
from lockstep.data.packing import rows_for_ranks
from lockstep.data.row_reader import BadRow
from lockstep.data.tasks.problem import Problem
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups, join, leave
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.formats.huggingface.reader import HuggingFaceFolder, read_text_files
from lockstep.model.loading import build, transformer_of
from lockstep.model.objectives.token_loss import nll
from lockstep.model.state_dict import pieces
from lockstep.model.training.config import OptimizerConfig, row_rules
from lockstep.model.training.trainer import Trainer
from lockstep.rl.algorithms.aggregation import weighted
from lockstep.rl.algorithms.supervised import (
    SupervisedConfig,
    TooFewConversations,
    read_conversations,
    split_conversations,
)
from lockstep.rl.controller import Controller
from tests.data.tokenizers import CHATML
from tests.rl.conftest import Actors

TALKS: list[list[str]] = [
    ["12 + 34 =", "State 46."],
    ["State the problem:", "34 + 12", "And the answer?", "It is\n\n46", "So?", "the following"],
    ["12 + 34 =", "the final answer"],
    ["arithmetic", "12 <|im_end|> 34"],
]
MARKED = CHATML.replace(
    "{{ m['content'] }}<|im_end|>\n",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\\n' }}",
)


def messages(talk: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(talk)]


def a_file(folder: Path, talks: Sequence[Sequence[str]]) -> Path:
    path = folder / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": messages(talk)}) + "\n" for talk in talks))
    return path


def naive(folder: Path, talks: Sequence[Sequence[str]]) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of transformers, with labels of −100 where the assistant does not speak.

    So TRL computes them with `assistant_only_loss`, as a mean over the tokens of the whole batch.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, chat_template=MARKED)
    total, count = torch.zeros(()), 0
    for talk in talks:
        told = tokenizer.apply_chat_template(messages(talk), return_dict=True, return_assistant_tokens_mask=True)
        ids = torch.tensor([told["input_ids"]])
        labels = torch.where(torch.tensor([told["assistant_masks"]]) == 1, ids, -100)[:, 1:]
        logits = model(ids).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels[0], ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    (total / count).backward()
    return float(total.detach() / count), {
        n: p.grad.double().numpy() for n, p in model.named_parameters() if p.grad is not None
    }


def ours(groups: Groups, folder: Path, path: Path, row_tokens: int) -> tuple[float, dict[str, Any]]:
    """The same, of rows that are packed."""
    source = HuggingFaceFolder(folder)
    config = SupervisedConfig(source=str(path), held_out=0)
    table = read_conversations(config, Tokenizer(read_text_files(folder)), source.config.context)
    samples = weighted([each for number in range(len(table)) for each in table.samples(number)])
    trainer = Trainer(build(source.config, groups, torch.float32, source), groups, OptimizerConfig(clip_norm=0.0))
    found: dict[str, Any] = {}

    def keep(*_: Any) -> None:
        for parameter, piece in pieces(transformer_of(trainer.stage)):
            assert parameter.grad is not None
            found[piece.name] = piece.view(parameter.grad).double().numpy().copy()

    hook = register_optimizer_step_pre_hook(keep)
    rows = rows_for_ranks(samples, row_rules(groups.layout, row_tokens))
    result = trainer.step(rows[groups.data_rank], nll, 1e-3)
    hook.remove()
    return result.values["loss"], found


def check_parity(found: tuple[float, dict[str, Any]], expected: tuple[float, dict[str, Any]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert np.linalg.norm(found[1][name] - gradient) <= 1e-5 * np.linalg.norm(gradient), name


@pytest.fixture(scope="module")
def unsharded() -> Iterator[Groups]:
    """A world of this process alone, whose optimizer has whole gradients."""
    yield join(Layout(zero=0), rank=0, meeting=HashStore())
    leave()


SOUND = TALKS[:3]
"""Of the fourth, transformers takes what it spells for a control token."""


@pytest.mark.parametrize("row_tokens", [1, 64, 1000])
def test_loss_and_gradients_are_those_of_transformers(
    row_tokens: int, tiny_folder: Path, unsharded: Groups, tmp_path: Path
) -> None:
    check_parity(ours(unsharded, tiny_folder, a_file(tmp_path, SOUND), row_tokens), naive(tiny_folder, SOUND))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "layout", [Layout(data=2, zero=0), Layout(tensor=2, zero=0), Layout(context=2, zero=0)], ids=str
)
def test_any_layout_learns_the_same(layout: Layout, tiny_folder: Path, worlds: RankPool, tmp_path: Path) -> None:
    expected = naive(tiny_folder, SOUND)
    for loss, found in worlds.run(layout, ours, tiny_folder, a_file(tmp_path, SOUND), 64):
        assert loss == pytest.approx(expected[0], rel=1e-6)
        if layout.tensor == 1:
            check_parity((loss, found), expected)


def table_of(folder: Path, tokenizer: Tokenizer, context: int = 256, **given: Any) -> tuple[TokenTable, list[str]]:
    said: list[str] = []
    config = SupervisedConfig.model_validate({"source": str(a_file(folder, TALKS))} | given)
    return read_conversations(config, tokenizer, context, said.append), said


def test_all_turns_or_the_last_are_learned(tmp_path: Path, tokenizer: Tokenizer) -> None:
    whole, said = table_of(tmp_path, tokenizer)
    last, _ = table_of(tmp_path, tokenizer, train_on="last")
    assert np.array_equal(whole.tokens, last.tokens)
    assert said == [
        f"4 conversations of {len(whole.tokens)} tokens, {whole.taught.mean():.0%} of which are the assistant's"
    ]
    for number, talk in enumerate(TALKS):
        for table, texts in ((whole, talk[1::2]), (last, talk[-1:])):
            [sample] = table.samples(number)
            taught = tokenizer.decode(sample.completion[sample.weight > 0], skip_special=False)
            assert taught == "".join(f"{text}<|im_end|>" for text in texts)


@pytest.mark.parametrize("on_long", ["stop", "skip", "truncate"])
def test_long_conversations_are_refused_left_out_or_cut_off(on_long: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    whole, _ = table_of(tmp_path, tokenizer)
    lengths = [len(s.prompt) + len(s.completion) for n in range(4) for s in whole.samples(n)]
    longest = max(lengths) - 3
    for keys, context in (({"longest": longest}, 256), ({}, longest)):
        if on_long == "stop":
            with pytest.raises(
                BadRow, match=rf"jsonl:2: the conversation has {max(lengths)} tokens, and may have {longest}"
            ):
                table_of(tmp_path, tokenizer, context, on_long=on_long, **keys)
            continue
        found, said = table_of(tmp_path, tokenizer, context, on_long=on_long, **keys)
        cut = on_long == "truncate"
        assert said[0] == f"Conversations of more than {longest} tokens: 1 {'cut off' if cut else 'left out'}"
        assert len(found.tokens) == sum(lengths) - (3 if cut else max(lengths))
        assert len(found) == (4 if cut else 3)
    found, said = table_of(tmp_path, tokenizer, 256, on_long="truncate", longest=min(lengths) - 4)
    assert "left out" in said[0] or len(found) == 4


def test_bad_rows_stop_or_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = a_file(tmp_path, TALKS)
    path.write_text(path.read_text() + '{"messages": [{"role": "user", "content": "x"}]}\n')
    config = SupervisedConfig(source=str(path))
    with pytest.raises(BadRow, match=r"talks\.jsonl:5: the field 'messages' has no message of the assistant"):
        read_conversations(config, tokenizer, 256)
    said: list[str] = []
    assert len(read_conversations(config.model_copy(update={"on_bad": "skip"}), tokenizer, 256, said.append)) == 4
    assert said[0].startswith(f"Bad rows left out: 1; the first: {path}:5:")
    path.write_text("")
    with pytest.raises(TooFewConversations, match="has no conversation to learn from"):
        read_conversations(config, tokenizer, 256)


def test_conversations_of_which_a_template_marks_nothing_are_bad_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    marked = "{% if messages|length > 2 %}{% generation %}x{% endgeneration %}{% endif %}" + CHATML
    other = Tokenizer(tokenizer.files | {"chat_template.jinja": marked})
    with pytest.raises(BadRow, match=r"jsonl:1: the chat template's generation blocks mark nothing to learn"):
        table_of(tmp_path, other)


@pytest.mark.parametrize("key", ["held_out", "longest"])
def test_keys_of_conversations_need_some(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} is of conversations, and source=''"):
        SupervisedConfig.model_validate({key: 7})


@settings(max_examples=40)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 8), st.integers(0, 3))
def test_no_prompt_is_on_both_sides(prompts: list[int], held_out: int, seed: int) -> None:
    table = TokenTable.of([[MaskedTokens([prompt, 7], [False, True])] for prompt in prompts])
    try:
        train, kept = split_conversations(table, held_out, seed)
    except TooFewConversations:
        assert held_out > 0
        return
    assert sorted(train + kept) == list(range(len(prompts)))
    assert len(kept) >= min(held_out, len(prompts))
    assert not {prompts[number] for number in train} & {prompts[number] for number in kept}


def controller(actors: Actors) -> Controller:
    return actors.controller([Problem(1, "2?", "2"), Problem(0, "1?", "1")], held_out=1)


def test_a_policy_learns_conversations_and_is_measured_on_others(tmp_path: Path, actors: Actors) -> None:
    talks = [[f"What is {a} + {b}?", "4", "Sure?", "yes"] for a in range(8) for b in range(a)]
    config = SupervisedConfig.model_validate(
        {"steps": 6, "problems_per_step": 8, "source": str(a_file(tmp_path, talks)), "held_out": 6, "evaluate_every": 3}
        | {"optimizer": {"learning_rate": 3e-3}}
    )
    table = read_conversations(config, actors.tokenizer, 256)
    before = actors.rollouts.version
    records = list(controller(actors).supervised(config, 0, table))
    found = [record.metrics for record in records]
    assert [record.step for record in records if "held_out_loss" in record.metrics] == [3, 6]
    assert found[5]["loss"] < found[2]["loss"] < found[0]["loss"]
    assert found[5]["held_out_loss"] < found[2]["held_out_loss"] < found[0]["loss"]
    assert actors.rollouts.version == before + 1, "the rollout workers have the weights"
    rest = SupervisedConfig.model_validate(config.model_dump() | {"optimizer": {"learning_rate": 1e-12}})
    again = [record.metrics["loss"] for record in controller(actors).supervised(rest, 4, table)]
    order = [record.metrics["loss"] for record in controller(actors).supervised(rest, 0, table)]
    assert again == pytest.approx(order[4:], rel=1e-4), "steps have their conversations, wherever a run goes on"
