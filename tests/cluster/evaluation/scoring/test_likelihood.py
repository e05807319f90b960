"""Likelihoods of continuations: those of transformers, in every layout, and in exact numerics the same bits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lockstep.cluster.evaluation.scoring.likelihood import Likelihood, Scoring, likelihoods, score_pairs
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import Numerics
from lockstep.model.formats.huggingface.reader import HuggingFaceFolder, read_text_files
from lockstep.model.loading import build, transformer_of
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.loading import to_lockstep
from lockstep.rl.rollout.protocol import PromptOutput, Request

DRAW = np.random.default_rng(0)
PAIRS = [
    (tuple(DRAW.integers(3, 290, given).tolist()), tuple(DRAW.integers(3, 290, scored).tolist()))
    for given, scored in ((1, 30), (1, 7), (5, 1), (40, 90), (3, 0), (5, 60))
]
ROW = 96


def score_all(groups: Groups, folder: Path, numerics: Numerics) -> tuple[np.ndarray, ...] | None:
    """The scores of all pairs in rows of a few; only where they are known."""
    source = HuggingFaceFolder(folder)
    scores = score_pairs(build(source.config, groups, torch.float32, source, numerics), groups, PAIRS, ROW)
    return scores if groups.is_last_stage else None


def in_order(found: list[tuple[np.ndarray, ...] | None]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and likeliest tokens of all ranks, by number."""
    numbers, *columns = (np.concatenate(column) for column in zip(*filter(None, found), strict=True))
    _, first = np.unique(numbers, return_index=True)
    return columns[0][first], columns[1][first]


def test_they_are_those_of_transformers_and_greedy_tokens_are_found(tiny_folder: Path, tmp_path: Path) -> None:
    naive = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    written = naive.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False, eos_token_id=-1)[0, 3:]
    pairs = [*PAIRS, ((5, 6, 7), tuple(written.tolist())), ((5, 6, 7), (*written.tolist()[:-1], 3))]
    checkpoint = to_lockstep(str(tiny_folder), tmp_path)
    found = list(likelihoods(checkpoint, pairs, Scoring(dtype="float32", row_tokens=16)))
    for (context, continuation), each in zip(pairs, found, strict=True):
        with torch.no_grad():
            logits = naive(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1]
        targets = torch.tensor(continuation, dtype=torch.long)
        expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        np.testing.assert_allclose(each.logp, expected.numpy(), atol=1e-5, rtol=1e-5)
        assert each.total == pytest.approx(expected.double().sum().item(), abs=1e-4)
        assert each.likeliest.tolist() == (logits.argmax(-1) == targets).tolist()
    assert [each.greedy for each in found[-4:]] == [True, False, True, False]
    assert isinstance(found[0], Likelihood)


def test_in_exact_numerics_layouts_and_the_rollout_engine_have_the_same_bits(
    worlds: RankPool, tiny_folder: Path, groups: Groups
) -> None:
    alone, greedy = in_order([score_all(groups, tiny_folder, "exact")])
    for layout in (Layout(pipeline=2), Layout(data=2)):
        logp, likeliest = in_order(worlds.run(layout, score_all, tiny_folder, "exact"))
        assert logp.view(np.int32).tolist() == alone.view(np.int32).tolist(), layout
        assert likeliest.tolist() == greedy.tolist(), layout
    split, sequence = (
        in_order(worlds.run(Layout(tensor=2, sequence=each), score_all, tiny_folder, "exact")) for each in (False, True)
    )
    np.testing.assert_allclose(split[0], alone, atol=1e-5)
    assert sequence[0].view(np.int32).tolist() == split[0].view(np.int32).tolist()
    assert split[1].tolist() == sequence[1].tolist() == greedy.tolist()
    source = HuggingFaceFolder(tiny_folder)
    transformer = transformer_of(build(source.config, groups, torch.float32, source, "exact"))
    engine = RolloutEngine(transformer, decode=Tokenizer(read_text_files(tiny_folder)).decode)
    for key, (context, continuation) in enumerate(PAIRS):
        engine.add(Request(key, (*context, *continuation), SamplingParams(), 0, 0, prompt_logprobs=0, draws=False))
    outputs: dict[str | int, PromptOutput] = {}
    while engine.has_work:
        outputs |= {each.key: each for each in engine.step() if isinstance(each, PromptOutput)}
    reported = [s.logp for key, (given, _) in enumerate(PAIRS) for s in outputs[key].scores[len(given) :]]
    assert np.float32(reported).view(np.int32).tolist() == alone.view(np.int32).tolist()


def test_in_fast_numerics_a_ring_agrees(worlds: RankPool, tiny_folder: Path, groups: Groups) -> None:
    alone, greedy = in_order([score_all(groups, tiny_folder, "fast")])
    logp, likeliest = in_order(worlds.run(Layout(context=2), score_all, tiny_folder, "fast"))
    np.testing.assert_allclose(logp, alone, atol=1e-4)
    assert likeliest.tolist() == greedy.tolist()
