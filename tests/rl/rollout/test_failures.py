"""A request that cannot be computed ends alone: no other request's bits change, and no block stays behind."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import ModelConfig
from lockstep.model.loading import build, transformer_of
from lockstep.model.transformer import Transformer
from lockstep.model.weights.initialization import RandomWeights
from lockstep.rl.rollout.config import EngineConfig, SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.model_runner import PassOutput
from lockstep.rl.rollout.output_processor import CompletionFailed, generate
from lockstep.rl.rollout.protocol import FailedOutput, Output, Request
from lockstep.rl.rollout.sampling.sampler import Row, draw, draw_isolated
from lockstep.rl.rollout.scheduling.plan import Plan
from lockstep.rl.types import Prompt
from tests.model.exact_rollouts import WAYS, by_way

SPOILT = 47
"""A token whose embedding is not a number."""
MODEL = ModelConfig(
    layers=3,
    width=44,
    heads=4,
    kv_heads=2,
    head_dim=12,
    intermediate=76,
    vocabulary=48,
    context=256,
    window=20,
    full_layers=(1,),
    tied=False,
)
SAMPLING = SamplingParams(temperature=1.3, top_p=0.9, max_new_tokens=12, logit_bias={SPOILT: -1e9})
GOOD = [Request(f"good {i}", tuple(range(1 + i, 1 + i + n)), SAMPLING, 3, i) for i, n in enumerate((5, 30, 1, 17, 41))]


@pytest.fixture(scope="module")
def spoilt(groups: Groups) -> Transformer:
    """In exact numerics, so that a token's bits depend on its own sequence alone."""
    made = transformer_of(build(MODEL, groups, torch.float32, RandomWeights(MODEL, 0, deviation=0.3), "exact"))
    with torch.no_grad():
        made.embedding.weight[SPOILT] = math.nan
    return made


def text(tokens: Sequence[int]) -> str:
    return "".join(chr(97 + t % 26) for t in tokens)


def engine_of(model: Transformer, budget: int = 24) -> RolloutEngine:
    return RolloutEngine(model, EngineConfig(sequences=6, budget=budget), decode=text)


def outputs(engine: RolloutEngine, requests: Sequence[Request]) -> dict[str | int, list[Output]]:
    """All outputs of each request; two requests arrive in each pass."""
    found: dict[str | int, list[Output]] = {request.key: [] for request in requests}
    arriving = list(requests)
    while arriving or engine.has_work:
        for request in arriving[:2]:
            engine.add(request)
        del arriving[:2]
        for output in engine.step():
            found[output.key].append(output)
    return found


def spoils(tokens: Sequence[int], **options: object) -> Request:
    return replace(GOOD[0], key=f"bad {options}", tokens=tuple(tokens), sampling=SAMPLING.model_copy(update=options))


def refuses_to_decode(tokens: Sequence[int]) -> str:
    if 9 in tokens:
        raise UnicodeError("nine is no letter")
    return text(tokens)


BAD = {
    "a first token": (spoils([SPOILT, 4, 5]), "activations are not numbers"),
    "a token in the middle": (spoils([*range(10), SPOILT, *range(8)]), "activations are not numbers"),
    "a late token": (spoils([*[6] * 85, SPOILT, 3]), "activations are not numbers"),
    "a drawn token": (spoils([1, 2], logit_bias={SPOILT: 1e9}), "are not numbers"),
    "a text": (spoils([1, 2, 3], stop=("never",), logit_bias={9: 1e9}), "nine is no letter"),
}


@WAYS
def test_others_keep_their_bits_and_all_blocks_come_back(spoilt: Transformer, compiled: bool) -> None:
    with by_way(compiled):
        expected = outputs(engine_of(spoilt), GOOD)
        for name, (bad, reason) in BAD.items():
            engine = engine_of(spoilt)
            engine.decode = refuses_to_decode
            found = outputs(engine, [bad, *GOOD])  # the first block is the bad one's, to which padded tables point
            last = found.pop(bad.key)[-1]
            assert isinstance(last, FailedOutput), name
            assert reason in last.reason, name
            assert found == expected, name
            assert engine.statistics.blocks_used == 0, name
            assert not engine.has_work


def raising(engine: RolloutEngine, when: Callable[[Plan, PassOutput], bool]) -> None:
    """Has passes raise, after they have written into the cache."""
    run = engine.runner.run

    def computed(plan: Plan) -> PassOutput:
        found = run(plan)
        if when(plan, found):
            raise RuntimeError("the kernel refuses")
        return found

    engine.runner.run = computed  # type: ignore[method-assign]


def meets_what_is_no_number(plan: Plan, found: PassOutput) -> bool:
    return not all(part is None or part.isfinite().all() for part in (found.hidden_TD, found.logits_BV))


def has_company(plan: Plan, found: PassOutput) -> bool:
    return len(plan.chunks) + len(plan.forks) > 1


@WAYS
@pytest.mark.parametrize("name", [name for name in BAD if name != "a text"])
def test_a_pass_that_raises_costs_only_who_raises_alone(spoilt: Transformer, name: str, compiled: bool) -> None:
    bad, _ = BAD[name]
    with by_way(compiled):
        engine = engine_of(spoilt)
        raising(engine, meets_what_is_no_number)
        found = outputs(engine, [bad, *GOOD])
        assert found.pop(bad.key)[-1] == FailedOutput(bad.key, "the kernel refuses")
        assert found == outputs(engine_of(spoilt), GOOD)
        assert engine.statistics.blocks_used == 0
        assert not engine.has_work


MIXED = [
    *GOOD,
    *(replace(GOOD[1], key=f"twin {i}", sample=10 + i) for i in range(3)),
    *(replace(GOOD[4], key=f"scored {i}", sample=20 + i, prompt_logprobs=i) for i in range(2)),
    replace(GOOD[3], key="read", draws=False, prompt_logprobs=1),
]
"""With prompts that are shared, that are scored, and that are read only."""


@WAYS
@pytest.mark.parametrize("budget", [24, 200])
@pytest.mark.parametrize("blocks", [None, (6, 6)], ids=["room", "no room"])
def test_passes_that_raise_where_each_alone_does_not_cost_nothing(
    spoilt: Transformer, blocks: tuple[int, int] | None, budget: int, compiled: bool
) -> None:
    limits = EngineConfig(sequences=6, budget=budget)
    with by_way(compiled):
        engine = RolloutEngine(spoilt, limits, decode=text, blocks=blocks)
        raising(engine, has_company)
        assert outputs(engine, MIXED) == outputs(engine_of(spoilt), MIXED)
    assert engine.statistics.blocks_used == 0


@WAYS
def test_no_request_is_lost_where_no_pass_can_be_computed(spoilt: Transformer, compiled: bool) -> None:
    with by_way(compiled):
        engine = engine_of(spoilt)
        broken = False
        raising(engine, lambda plan, found: broken)
        found: dict[str | int, list[Output]] = {request.key: [] for request in MIXED}
        for request in MIXED:
            engine.add(request)
        passes = 0
        while engine.has_work:
            passes += 1
            broken = passes % 20 == 5
            if broken:
                with pytest.raises(RuntimeError, match="the kernel refuses"):
                    engine.step()
                continue
            for output in engine.step():
                found[output.key].append(output)
        assert passes > 25
        assert found == outputs(engine_of(spoilt), MIXED)
    assert engine.statistics.blocks_used == 0


def of_two_ranks(groups: Groups) -> tuple[str, bool]:
    """What a pass that raises does."""
    model = transformer_of(build(MODEL, groups, torch.float32, RandomWeights(MODEL, 0), "exact"))
    engine = engine_of(model)
    raising(engine, has_company)
    for request in GOOD[:2]:
        engine.add(request)
    try:
        return str(engine.step()), engine.has_work
    except RuntimeError as error:
        return str(error), engine.has_work


def test_a_rank_of_several_computes_nothing_again_that_the_others_do_not(worlds: RankPool) -> None:
    assert worlds.run(Layout(tensor=2), of_two_ranks) == [("the kernel refuses", True)] * 2


@pytest.mark.parametrize("numerics", ["exact", "fast"])
@WAYS
def test_what_failed_leaves_nothing_that_spreads(groups: Groups, numerics: str, compiled: bool) -> None:
    """In the very blocks that a failure held, with prompts that are read in parts."""
    model = transformer_of(build(MODEL, groups, torch.float32, RandomWeights(MODEL, 0, 0.3), numerics))
    with torch.no_grad():
        model.embedding.weight[SPOILT] = math.nan
    bad = [replace(spoils([SPOILT, *range(40)]), key=i, sample=i) for i in range(6)]
    with by_way(compiled):
        engine = engine_of(model)
        assert all(isinstance(each[-1], FailedOutput) for each in outputs(engine, bad).values())
        assert outputs(engine, GOOD) == outputs(engine_of(model), GOOD)


def test_options_that_leave_no_token_are_refused_or_fail_alone(spoilt: Transformer) -> None:
    with pytest.raises(ValueError, match="all 48 tokens end a completion"):
        engine_of(spoilt).add(spoils([1, 2], stop_tokens=tuple(range(48)), min_new_tokens=2))
    logits, rows = rows_of(torch.zeros(700))
    found, errors = draw_isolated(logits, [*rows[:-1], replace(rows[-1], forbidden=tuple(range(700)))])
    assert {i: str(error) for i, error in errors.items()} == {len(rows) - 1: "the options leave no token to draw"}
    assert torch.equal(found.tokens[:-1], draw(logits, rows).tokens[:-1])


def test_a_completion_that_fails_in_training_is_an_error(spoilt: Transformer) -> None:
    engine = engine_of(spoilt)
    with pytest.raises(CompletionFailed, match=r"completion 1 cannot be written: .* not numbers"):
        list(generate(engine, [Prompt(0, "", (3,), ""), Prompt(1, "", (SPOILT,), "")], SAMPLING, samples=1, seed=0))
    assert not engine.has_work
    assert engine.statistics.blocks_used == 0


def rows_of(spoil: Tensor) -> tuple[Tensor, list[Row]]:
    """Logits of rows with all kinds of options, of which the last is spoilt."""
    asked = [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.5, "temperature": 0.7}, {"frequency_penalty": 1.0}]
    logits = torch.randn(2 * len(asked) + 1, 700, generator=torch.Generator().manual_seed(0)) * 4
    logits[-1] += spoil
    return logits, [Row(SamplingParams(**asked[i % len(asked)]), i / 11, (3,), (5, 5)) for i in range(len(logits))]


@WAYS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("places", [slice(None), slice(5, 6), slice(600, 700)], ids=str)
def test_a_row_that_is_not_numbers_changes_no_other(value: float, places: slice, compiled: bool) -> None:
    spoil = torch.zeros(700)
    spoil[places] = value
    with by_way(compiled):
        logits, rows = rows_of(spoil)
        drawable = value == -math.inf and places != slice(None)
        found, errors = draw_isolated(logits, rows)
        expected = draw(logits[:-1], rows[:-1])
    assert list(errors) == ([] if drawable else [len(rows) - 1])
    assert torch.equal(found.tokens[:-1], expected.tokens)
    assert torch.equal(found.sampling_logp[:-1].nan_to_num(7), expected.sampling_logp.nan_to_num(7))


WRONG = (
    [
        {"temperature": value}
        for value in (1e-300, 5e-324, 1e-40, 1e-4, -1e-9, 1e10, math.nan, math.inf, 10**400, True, "1")
    ]
    + [{"repetition_penalty": value} for value in (1e-40, 5e-324, 0, -1, 1e38, math.nan, math.inf, True)]
    + [
        {"presence_penalty": 1e300},
        {"frequency_penalty": -1e38},
        {"frequency_penalty": math.nan},
        {"logit_bias": {1: math.inf}},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: -1e30}},
        {"top_p": math.nan},
        {"top_p": True},
        {"min_p": math.nan},
        {"min_p": "0.5"},
        {"top_k": True},
        {"top_k": 10**30},
        {"max_new_tokens": 10**4000},
        {"max_new_tokens": 1.0},
        {"min_new_tokens": -1},
        {"exact_lengths": (0,)},
        {"stop": ("",)},
        {"stop_tokens": (True,)},
        {"logprobs": -1},
    ]
)


@pytest.mark.parametrize("options", WRONG, ids=lambda o: str(o)[:40])
def test_options_out_of_bounds_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SamplingParams(**options)


@WAYS
@pytest.mark.parametrize("options", [
    {"temperature": 1e-3},
    {"temperature": 1e9},
    {"temperature": 1e-3, "repetition_penalty": 1e-9},
    {"temperature": 1e9, "repetition_penalty": 1e9, "frequency_penalty": 1e9, "logit_bias": {3: -1e9}},
    {"temperature": 1e-3, "frequency_penalty": -1e9, "presence_penalty": 1e9, "top_k": 2**31, "min_p": 5e-324},
    {"temperature": 1e-3, "repetition_penalty": 1e-9, "logit_bias": {3: 1e9}, "top_p": 5e-324},
], ids=str)  # fmt: skip
def test_options_at_their_bounds_draw(options: dict[str, object], compiled: bool) -> None:
    logits = torch.randn(1, 700, generator=torch.Generator().manual_seed(1)) * 100
    with by_way(compiled):
        found = draw(logits, [Row(SamplingParams(**options), 0.5, (3,), (5, 5, 3))])
    assert 0 <= int(found.tokens) < 700
    assert not found.sampling_logp.isinf().any()
