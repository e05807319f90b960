"""Prompt-lookup speculation changes no output of an engine: in exact numerics not one bit, whatever is proposed."""

import random
from collections.abc import Sequence

import pytest
import torch

from lockstep.distributed.world.groups import Groups
from lockstep.model.config import ModelConfig, Numerics
from lockstep.model.loading import build, transformer_of
from lockstep.model.transformer import Transformer
from lockstep.model.weights.initialization import RandomWeights
from lockstep.rl.rollout.config import EngineConfig, SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.protocol import Output, Request, TokenOutput
from lockstep.rl.rollout.scheduling.prompt_lookup import PromptLookup
from tests.model.exact_rollouts import WAYS, by_way
from tests.rl.rollout.test_failures import MODEL as WINDOWS
from tests.rl.rollout.test_failures import outputs

DECODED = ModelConfig(layers=2, width=64, heads=4, kv_heads=2, head_dim=32, intermediate=96, vocabulary=48, context=256)
"""In bf16 one that the CPU decoder serves."""
FEW = dict.fromkeys((5, 6), 20.0)
"""A bias that leaves so few tokens that what is written repeats itself."""
OPTIONS: list[dict[str, object]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.0, "logit_bias": {}},
    {"top_k": 2, "support": True, "repetition_penalty": 1.2},
    {"top_p": 0.8, "temperature": 1.3, "logprobs": 2},
    {"min_p": 0.05, "min_new_tokens": 9, "stop_tokens": (6,), "frequency_penalty": 0.01},
    {"stop": ("fgfgff",)},
    {"exact_lengths": (25, 20)},
]


def model_of(groups: Groups, model: ModelConfig, dtype: torch.dtype, numerics: Numerics) -> Transformer:
    return transformer_of(build(model, groups, dtype, RandomWeights(model, 0, deviation=0.3), numerics)).eval()


def text(tokens: Sequence[int]) -> str:
    return "".join(chr(97 + t % 26) for t in tokens)


def workload(seed: int) -> list[Request]:
    """Completions of prompts that repeat themselves, one for each way to draw; one of them has begun before."""
    chance, found = random.Random(seed), list[Request]()
    for i, options in enumerate(OPTIONS):
        sampling = SamplingParams.model_validate(
            {"max_new_tokens": chance.randrange(20, 30), "logit_bias": FEW} | options
        )
        prompt = tuple(chance.choices((5, 6), k=chance.randrange(1, 30)))
        scored = 1 if i == 3 else None
        begun = min(4, len(prompt)) if i == 4 else 0
        found.append(Request(i, prompt, sampling, seed, i, begun, scored))
    return found


def written(engine: RolloutEngine, requests: Sequence[Request]) -> dict[str | int, list[Output]]:
    """All outputs of each request; no block is left in use."""
    found = outputs(engine, requests)
    assert engine.statistics.blocks_used == 0
    return found


def engine_of(model: Transformer, speculate: int, blocks: Sequence[int] | None = None) -> RolloutEngine:
    config = EngineConfig(sequences=5, budget=48, speculate=speculate)
    return RolloutEngine(model, config, decode=text, blocks=blocks)


@WAYS
def test_in_exact_numerics_no_bit_changes(groups: Groups, compiled: bool) -> None:
    with by_way(compiled):
        model = model_of(groups, WINDOWS, torch.float32, "exact")
        for speculate, blocks in ((1, None), (4, (9, 9)), (15, None)):
            requests = workload(speculate)
            engine = engine_of(model, speculate, blocks)
            assert written(engine, requests) == written(engine_of(model, 0, blocks), requests)
            assert engine.statistics.accepted_tokens > 20
            assert engine.statistics.preemptions > 0 or not blocks


def test_the_decoder_computes_tokens_on_trial_with_the_same_bits(groups: Groups) -> None:
    model, requests = model_of(groups, DECODED, torch.bfloat16, "exact"), workload(0)
    engine = engine_of(model, 7)
    assert written(engine, requests) == written(engine_of(model, 0), requests)
    assert engine.runner.decoder is not None
    assert engine.statistics.accepted_tokens > 20


@WAYS
def test_in_fast_numerics_the_same_tokens_are_drawn(groups: Groups, compiled: bool) -> None:
    """Other shapes of products may round other last bits."""
    with by_way(compiled):
        model, requests = model_of(groups, WINDOWS, torch.float32, "fast"), workload(2)
        engine = engine_of(model, 5)
        found, expected = written(engine, requests), written(engine_of(model, 0), requests)
    assert engine.statistics.accepted_tokens > 20
    for key, each in expected.items():
        ours, theirs = ([token for token in given if isinstance(token, TokenOutput)] for given in (found[key], each))
        assert [(t.token, t.finish_reason, t.support) for t in ours] == [
            (t.token, t.finish_reason, t.support) for t in theirs
        ]
        assert [t.logp for t in ours] == pytest.approx([t.logp for t in theirs], abs=1e-4)


def test_a_completion_that_repeats_itself_takes_few_passes(groups: Groups) -> None:
    """Greedy, of one token for ever: after it is seen to repeat, each pass adds the tokens on trial and one more."""
    engine = engine_of(model_of(groups, WINDOWS, torch.float32, "fast"), 7)
    sampling = SamplingParams(temperature=0.0, logit_bias={9: 1e6}, max_new_tokens=84)
    engine.add(Request(0, (1, 2), sampling, 0, 0))
    counts = []
    while engine.has_work:
        found = engine.step()
        assert all(isinstance(each, TokenOutput) and each.token == 9 for each in found)
        counts.append(len(found))
    assert counts == [1, 1, 1, 1, *[8] * 10]
    assert (engine.statistics.proposed_tokens, engine.statistics.accepted_tokens) == (70, 70)


@WAYS
def test_proposals_that_cannot_be_computed_cost_nothing(
    groups: Groups, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of what is proposed at random is wrong, and 47 leaves keys and values that are not numbers."""
    chance = random.Random(0)

    def at_random(lookup: PromptLookup, new: Sequence[int], most: int) -> tuple[int, ...]:
        asked, lookup._pause = not lookup._pause, 0
        return tuple(chance.choices((5, 5, 6, 47), k=most)) if asked else ()

    with by_way(compiled):
        model = model_of(groups, WINDOWS, torch.float32, "exact")
        with torch.no_grad():
            model.embedding.weight[47] = torch.nan
        expected = written(engine_of(model, 0), workload(1))
        monkeypatch.setattr(PromptLookup, "propose", at_random)
        engine = engine_of(model, 2)
        assert written(engine, workload(1)) == expected
        assert engine.statistics.accepted_tokens > 0
