"""Log-probabilities of prompts: the trainer's bits in exact numerics, however prompts are read."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lockstep.cluster.checks.mismatch import compare, rescored
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.attention.kv_cache import kinds
from lockstep.model.transformer import Transformer
from lockstep.rl.rollout.config import EngineConfig, SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.protocol import PromptOutput, PromptTooLong, Request, Score, TokenOutput
from lockstep.rl.types import Prompt, Rollout
from tests.model.exact_rollouts import transformer as exact_transformer
from tests.rl.rollout.test_protocol import completed, whole_logits

LENGTHS = (1, 90, 17, 64, 33, 2, 16)


def requests_of(sampling: SamplingParams, vocabulary: int, top: int = 0, *, draws: bool = True) -> list[Request]:
    """Each prompt twice: with its scores and without."""
    draw = np.random.default_rng(0)
    prompts = [tuple(draw.integers(0, vocabulary, n).tolist()) for n in LENGTHS]
    asked = [Request(i, tokens, sampling, 0, i, prompt_logprobs=top, draws=draws) for i, tokens in enumerate(prompts)]
    return [each for r in asked for each in (r, replace(r, key=-1 - r.sample, prompt_logprobs=None))]


def as_rollout(request: Request, scores: tuple[Score, ...]) -> Rollout:
    """A prompt as a completion of its first token, for the trainer to score again."""
    tokens, logp = request.tokens[1:], tuple(s.logp or 0.0 for s in scores[1:])
    return Rollout(
        request.sample, tokens, logp, "", "stop", (0,) * len(tokens), prompt=Prompt(0, "", request.tokens[:1], "")
    )


def differing_bits(groups: Groups, name: str, dtype: str, blocks: int) -> tuple[int, int]:
    """Of a workload that fights for blocks, in a cache that knows its prompts, and read a part at a time."""
    trainer, model = exact_transformer(groups, name, dtype)
    config = EngineConfig(length=300, sequences=12, budget=50)
    engine = RolloutEngine(model, config, decode=str, blocks=[blocks] * len(kinds(model.model)))
    requests = requests_of(SamplingParams(temperature=0.9, max_new_tokens=20), 301)
    completed(engine, *requests[1::2])
    found = completed(engine, *requests)
    scored = [(r, found[r.key][0]) for r in requests if r.prompt_logprobs is not None and len(r.tokens) > 1]
    rollouts = [as_rollout(request, first.scores) for request, first in scored]
    reported = np.concatenate([np.asarray(r.logp, np.float32) for r in rollouts])
    mismatch = compare(reported, rescored(trainer.stage, groups, rollouts, 0.9))
    assert mismatch.tokens == sum(LENGTHS) - len(LENGTHS)
    for request in requests[::2]:  # what is drawn does not depend on whether the prompt is scored
        tokens, other = (
            [t for t in found[k] if isinstance(t, TokenOutput)] for k in (request.key, -1 - request.sample)
        )
        assert [(t.token, t.logp) for t in tokens] == [(t.token, t.logp) for t in other]
    return mismatch.differing_bits, engine.statistics.preemptions


@pytest.mark.parametrize(("name", "dtype"), [("llama", "float32"), ("gemma", "bfloat16"), ("experts", "bfloat16")])
def test_scores_are_the_trainers_bits(name: str, dtype: str, groups: Groups) -> None:
    bits, preemptions = differing_bits(groups, name, dtype, 14)
    assert bits == 0
    assert preemptions > 0


def test_scores_are_the_trainers_bits_at_two_tensor_ranks(worlds: RankPool) -> None:
    assert worlds.run(Layout(tensor=2), differing_bits, "experts", "bfloat16", 40)[0][0] == 0


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_scores_are_the_policys(temperature: float, transformer: Transformer) -> None:
    engine = RolloutEngine(transformer, EngineConfig(budget=40), decode=str)
    sampling = SamplingParams(temperature=temperature, top_k=3, repetition_penalty=1.5, max_new_tokens=3)
    requests = [r for r in requests_of(sampling, 301, top=4) if r.prompt_logprobs is not None]
    for request, found in zip(requests, completed(engine, *requests).values(), strict=True):
        first, *tokens = found
        assert isinstance(first, PromptOutput)
        assert [s.token for s in first.scores] == list(request.tokens)
        assert first.scores[0] == Score(request.tokens[0], None)
        assert len(tokens) == 3 or found[-1].finish_reason == "stop"
        logp = (whole_logits(transformer, request.tokens).float() / (temperature or 1)).log_softmax(-1)
        for score, row in zip(first.scores[1:], logp, strict=False):
            assert score.logp == pytest.approx(float(row[score.token]), abs=1e-4)
            assert [p for _, p in score.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)


def test_a_request_that_draws_nothing_ends_with_its_prompt(transformer: Transformer) -> None:
    engine = RolloutEngine(transformer, EngineConfig(budget=40), decode=str)
    requests = requests_of(SamplingParams(), 301, draws=False)
    for request, found in zip(requests, completed(engine, *requests).values(), strict=True):
        (only,) = found
        assert only.finish_reason == "length"
        assert len(only.scores) == (0 if request.prompt_logprobs is None else len(request.tokens))
    assert engine.statistics.blocks_used == engine.statistics.generated_tokens == 0
    whole = replace(requests[0], tokens=(5,) * engine.longest)
    assert len(completed(engine, whole)[whole.key][0].scores) == engine.longest
    with pytest.raises(PromptTooLong):
        engine.add(replace(whole, draws=True))


def test_logits_exist_for_a_few_tokens_at_a_time(transformer: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, rows = RolloutEngine(transformer, decode=str), []
    compute = engine.runner.logits
    monkeypatch.setattr(engine.runner, "logits", lambda hidden: rows.append(len(hidden)) or compute(hidden))
    monkeypatch.setitem(__import__("lockstep.model.layers.logprobs", fromlist=["CHUNKS"]).CHUNKS, "fast", 32)
    request = Request(0, tuple(range(3, 203)), SamplingParams(), 0, 0, prompt_logprobs=0, draws=False)
    scores = completed(engine, request)[0][0].scores
    assert rows == [32] * 6 + [7]
    logp = whole_logits(transformer, request.tokens).log_softmax(-1)
    targets = torch.tensor(request.tokens[1:])
    expected = logp[:-1].gather(1, targets[:, None])[:, 0].tolist()
    assert [s.logp for s in scores[1:]] == pytest.approx(expected, abs=1e-4)
