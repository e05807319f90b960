"""Blocks, preemption, prefix caching, tensor ranks and new weights change no token, and nothing leaks."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import ModelConfig
from lockstep.model.loading import build, transformer_of
from lockstep.model.transformer import Transformer
from lockstep.model.weights.initialization import RandomWeights
from lockstep.rl.rollout.config import EngineConfig, SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.output_processor import generate
from lockstep.rl.rollout.protocol import PromptTooLong, Request, TokenOutput
from lockstep.rl.types import Prompt

FULL = ModelConfig(
    layers=2, width=16, heads=4, kv_heads=2, head_dim=4, intermediate=24, vocabulary=48, context=256, eos_tokens=(3,)
)
MODELS = {
    "all": FULL,
    "windows": FULL.model_copy(update={"window": 20, "layers": 3}),
    "both": FULL.model_copy(update={"window": 20, "layers": 3, "full_layers": (1,)}),
}


def transformer(groups: Groups, model: ModelConfig = FULL, seed: int = 0) -> Transformer:
    made = transformer_of(build(model, groups, torch.float32, RandomWeights(model, seed)))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter *= 8  # so that what is drawn depends on what is seen
    return made


@pytest.fixture(scope="module")
def models(groups: Groups) -> dict[str, Transformer]:
    return {name: transformer(groups, model) for name, model in MODELS.items()}


def text(tokens: Sequence[int]) -> str:
    return "".join(chr(97 + t % 26) for t in tokens)


def engine_of(model: Transformer, blocks: Sequence[int] | None = None, **limits: object) -> RolloutEngine:
    config = EngineConfig.model_validate({"sequences": 6, "budget": 64, **limits})
    return RolloutEngine(model, config, decode=text, blocks=blocks)


def answers(engine: RolloutEngine, requests: Sequence[Request]) -> dict[str | int, list[TokenOutput]]:
    """All tokens of each request; requests arrive while others run."""
    found: dict[str | int, list[TokenOutput]] = {request.key: [] for request in requests}
    arriving = list(requests)
    while arriving or engine.has_work:
        for _ in range(2):
            if arriving:
                engine.add(arriving.pop(0))
        for token in engine.step():
            found[token.key].append(token)
    return found


def drawn(found: dict[str | int, list[TokenOutput]]) -> dict[str | int, list[int]]:
    return {key: [token.token for token in tokens] for key, tokens in found.items()}


def workload(seed: int, count: int, longest: int = 90) -> list[Request]:
    """Groups that share prompts, prompts that share beginnings, and every way to sample."""
    chance = random.Random(seed)
    ways = [
        {},
        {"temperature": 0.0},
        {"top_k": 5, "repetition_penalty": 1.2},
        {"top_p": 0.8, "temperature": 1.3},
        {"min_p": 0.05, "min_new_tokens": 4, "frequency_penalty": 0.3},
        {"stop": ("ab", "zz"), "stop_tokens": (7,), "logit_bias": {9: 1.5}, "logprobs": 2},
    ]
    begin = chance.choices(range(4, 48), k=longest)
    found = []
    while len(found) < count:
        shared = chance.randrange(longest)
        prompt = (*begin[:shared], *chance.choices(range(4, 48), k=chance.randrange(1, 12)))
        sampling = SamplingParams(max_new_tokens=chance.randrange(1, 30), **chance.choice(ways))  # type: ignore[arg-type]
        for sample in range(chance.choice((1, 1, 4))):
            found.append(Request(len(found), prompt, sampling, seed, sample))
    return found[:count]


@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=4)
@given(seed=st.integers(0, 1000), spare=st.integers(0, 4), budget=st.integers(5, 80))
def test_a_pool_far_too_small_ends_with_the_tokens_of_a_large_one(
    kind: str, seed: int, spare: int, budget: int, models: dict[str, Transformer]
) -> None:
    requests = workload(seed, 12)
    large = engine_of(models[kind])
    expected: dict[str | int, list[int]] = {}
    for request in requests:
        expected |= drawn(answers(large, [request]))
    most = -(-max(len(r.tokens) + r.sampling.longest - 1 for r in requests) // 16)
    small = engine_of(models[kind], blocks=[most + spare] * (2 if kind == "both" else 1), budget=budget)
    found = answers(small, requests)
    assert drawn(found) == expected
    assert small.statistics.blocks_used == small.statistics.running == small.statistics.waiting == 0
    assert all(tokens[-1].finish_reason in ("stop", "length") for tokens in found.values())


def test_small_pools_do_preempt_and_repeat_every_number(models: dict[str, Transformer]) -> None:
    requests = workload(5, 30)
    small, large = engine_of(models["all"], blocks=[9]), engine_of(models["all"])
    few, many = answers(small, requests), answers(large, requests)
    assert small.statistics.preemptions > 0
    assert large.statistics.preemptions == 0
    for key, tokens in many.items():
        assert drawn(few)[key] == drawn(many)[key]
        for a, b in zip(tokens, few[key], strict=True):
            assert a.logp == pytest.approx(b.logp, abs=1e-4)
            assert a.sampling_logp == pytest.approx(b.sampling_logp, abs=1e-4)
            assert (a.finish_reason, [t for t, _ in a.top]) == (b.finish_reason, [t for t, _ in b.top])


def test_prompts_are_found_again_and_say_the_same(models: dict[str, Transformer]) -> None:
    engine = engine_of(models["both"], sequences=3)
    request = Request("first", tuple(range(4, 47)), SamplingParams(temperature=0.9, max_new_tokens=20), 3, 1)
    first = drawn(answers(engine, [request]))["first"]
    before = engine.statistics.cached_prompt_tokens
    again = drawn(answers(engine, [replace(request, key="again")]))["again"]
    assert again == first
    assert engine.statistics.cached_prompt_tokens - before == 32
    turn = (*request.tokens, *first, 9, 9)
    greedy = SamplingParams(temperature=0, max_new_tokens=12)
    found = drawn(answers(engine, [Request("turn", turn, greedy, 0, 0)]))["turn"]
    assert found == drawn(answers(engine_of(models["both"]), [Request(0, turn, greedy, 0, 0)]))[0]
    assert engine.statistics.cached_prompt_tokens - before > 32 + 43


def test_nothing_is_left_of_ten_thousand_requests_many_of_them_cancelled(models: dict[str, Transformer]) -> None:
    engine = engine_of(models["both"], sequences=128, budget=512, blocks=[160, 90])
    chance = random.Random(0)
    prompts = [tuple(chance.choices(range(4, 48), k=chance.randrange(1, 20))) for _ in range(50)]
    sampling = SamplingParams(max_new_tokens=2)
    added = 0
    ended: set[str | int] = set()
    while added < 10_000 or engine.has_work:
        while added < 10_000 and engine.statistics.waiting < 150:
            engine.add(Request(added, chance.choice(prompts), sampling, 0, added))
            added += 1
        for number in range(max(0, added - 200), added, 7):
            if chance.random() < 0.05:
                engine.cancel(number)
        ended |= {token.key for token in engine.step() if token.finish_reason}
    assert 5_000 < len(ended) < 10_000
    assert engine.statistics.blocks_used == engine.statistics.running == engine.statistics.waiting == 0
    assert not engine._sequences


def test_a_failure_loses_nothing(models: dict[str, Transformer]) -> None:
    requests = workload(2, 8)
    engine = engine_of(models["all"])
    expected = drawn(answers(engine_of(models["all"]), requests))
    for request in requests:
        engine.add(request)
    found: dict[str | int, list[int]] = {request.key: [] for request in requests}
    for passes in range(10_000):
        if not engine.has_work:
            break
        if passes % 3 == 1:
            hook = models["all"].norm.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.step()
            hook.remove()
        for token in engine.step():
            found[token.key].append(token.token)
    assert found == expected


def test_what_cannot_be_run_is_refused_in_a_sentence(models: dict[str, Transformer]) -> None:
    engine = engine_of(models["all"], blocks=[4])
    few = SamplingParams(max_new_tokens=10)
    engine.add(Request("there", (5,), few, 0, 0))
    for request, error, words in (
        (Request(0, (5,) * 60, few, 0, 0), PromptTooLong, "need 5 blocks of 16 tokens, and the cache has 4"),
        (Request(0, (5,) * 250, few, 0, 0), PromptTooLong, "need a context of 260, and rollouts have 256"),
        (Request(0, (), few, 0, 0), ValueError, "without tokens"),
        (Request(0, (5, 48), few, 0, 0), ValueError, r"no token 48: the vocabulary has 0 … 47"),
        (Request(0, (5,), few.model_copy(update={"logit_bias": {-1: 2.0}}), 0, 0), ValueError, "no token -1"),
        (Request("there", (5,), few, 0, 0), ValueError, "key 'there' is running"),
    ):
        with pytest.raises(error, match=words):
            engine.add(request)
    assert engine.statistics.waiting == 1


def test_a_completion_that_is_cancelled_is_handed_out_as_it_is(models: dict[str, Transformer]) -> None:
    engine = engine_of(models["all"])
    sampling = SamplingParams(max_new_tokens=30, exact_lengths=(30, 2))
    rollouts = []
    for rollout in generate(engine, [Prompt(0, "", (5, 6), "")], sampling, samples=2, seed=0):
        rollouts.append(rollout)
        engine.cancel(0)
    assert [(r.sample, r.finish_reason) for r in rollouts] == [(1, "length"), (0, "abort")]
    assert 2 <= len(rollouts[1].tokens) == len(rollouts[1].logp) < 30


def rank_answers(groups: Groups, kind: str, speculate: int = 0) -> dict[str | int, list[tuple[int, float]]]:
    model = transformer(groups, MODELS[kind])
    engine = engine_of(model, blocks=[12] * (2 if kind == "both" else 1), speculate=speculate)
    return {key: [(t.token, t.logp) for t in tokens] for key, tokens in answers(engine, workload(11, 20)).items()}


def test_tensor_ranks_say_what_one_process_says(worlds: RankPool) -> None:
    for kind in ("all", "both"):
        (expected,) = worlds.run(Layout(), rank_answers, kind)
        first, second = worlds.run(Layout(tensor=2), rank_answers, kind, 4)
        assert first == second
        for key, tokens in expected.items():
            assert [t for t, _ in first[key]] == [t for t, _ in tokens]
            assert [p for _, p in first[key]] == pytest.approx([p for _, p in tokens], abs=1e-4)
