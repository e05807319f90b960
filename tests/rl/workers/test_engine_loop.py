"""An engine writes in its own thread, without waiting for anybody, what it writes when it is stepped by hand."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Semaphore

import pytest
import torch

from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import ModelConfig
from lockstep.model.loading import build, transformer_of
from lockstep.model.weights.initialization import RandomWeights
from lockstep.rl.rollout.config import EngineConfig, SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.output_processor import RolloutRequest, Written, generate
from lockstep.rl.rollout.protocol import Output, PromptTooLong
from lockstep.rl.types import Completion, Prompt
from lockstep.rl.weight_sync.shards import shards_of
from lockstep.rl.workers.rollout_worker import EngineLoop
from tests.cluster.cli_process import until

MODEL = ModelConfig(
    layers=2, width=32, heads=4, kv_heads=2, head_dim=8, intermediate=48, vocabulary=48, context=256, tied=False
)
SAMPLING = SamplingParams(max_new_tokens=40, exact_lengths=(40,))
PROMPTS = [Prompt(i, "", tuple(range(1 + i, 4 + 3 * i)), "") for i in range(6)]
REQUESTS = [RolloutRequest(p.index, p.tokens, SAMPLING, 5) for p in PROMPTS]


def engine_of(groups: Groups, seed: int = 0, speculate: int = 0) -> RolloutEngine:
    """In exact numerics, so that a completion's bits depend on nothing else."""
    model = transformer_of(build(MODEL, groups, torch.float32, RandomWeights(MODEL, seed, deviation=0.3), "exact"))
    config = EngineConfig(sequences=4, budget=24, speculate=speculate)
    return RolloutEngine(model, config, decode=lambda tokens: " ".join(map(str, tokens)))


def expected(groups: Groups, seed: int = 0) -> dict[int, Completion]:
    found = generate(engine_of(groups, seed), PROMPTS, SAMPLING, samples=1, seed=5)
    return {rollout.sample: rollout.completion for rollout in found}


def fetched(loop: EngineLoop, count: int) -> dict[int, Completion]:
    """So many completions, as they come."""
    found: dict[int, Completion] = {}
    while len(found) < count:
        found |= {each.sample: each for each in loop.written(3).completions}
    return found


def test_tokens_on_trial_are_counted_once(groups: Groups) -> None:
    loop = EngineLoop(partial(engine_of, groups, speculate=4))
    few = SAMPLING.model_copy(update={"logit_bias": {1: 50.0, 2: 50.0}})  # so that pairs occur again
    loop.add([RolloutRequest(number, (1, 2, 3), few, 5) for number in range(2)])
    found = []
    while sum(len(each.completions) for each in found) < 2:
        found.append(loop.written(3))
    proposed, accepted = (sum(getattr(each, name) for each in found) for name in ("proposed", "accepted"))
    said = loop.ask(lambda: loop.engine.statistics)
    assert (proposed, accepted) == (said.proposed_tokens, said.accepted_tokens)
    assert 0 <= accepted <= proposed
    assert proposed > 4


def test_it_goes_on_while_nobody_asks(groups: Groups) -> None:
    loop = EngineLoop(partial(engine_of, groups))
    loop.add(REQUESTS)
    until(lambda: not loop.engine.has_work, 30)
    loop.ask(lambda: None)  # behind the last pass
    written = loop.written(1)
    assert {each.sample: each for each in written.completions} == expected(groups)
    assert written.tokens == 6 * 40
    assert written.proposed == written.accepted == 0
    assert written.seconds > 0
    assert loop.written(1) == Written()


def test_requests_that_come_while_it_writes_change_no_other(groups: Groups) -> None:
    loop = EngineLoop(partial(engine_of, groups))
    for request in REQUESTS:
        loop.add([request])
    assert fetched(loop, 6) == expected(groups)


def paced(groups: Groups, allowed: Semaphore) -> RolloutEngine:
    """An engine each pass of which has to be allowed: by itself it goes on while nobody asks."""
    engine = engine_of(groups)
    step = engine.step

    def wait() -> list[Output]:
        allowed.acquire()
        return step()

    engine.step = wait
    return engine


def test_a_call_returns_after_so_many_passes(groups: Groups) -> None:
    allowed = Semaphore(0)
    loop = EngineLoop(partial(paced, groups, allowed))
    loop.add(REQUESTS[:1])
    with ThreadPoolExecutor(1) as calls:
        for passes in (4, 8, 12):
            call = calls.submit(loop.written, 4)
            until(lambda wanted=passes: loop._until == wanted, 30)
            allowed.release(4)
            assert call.result(60).tokens == 4
    allowed.release(100)
    assert fetched(loop, 1) == {0: expected(groups)[0]}


def test_new_weights_come_between_two_passes(groups: Groups) -> None:
    new = engine_of(groups, seed=1).transformer
    loop = EngineLoop(partial(engine_of, groups))
    loop.add(REQUESTS)
    assert not loop.written(12).completions
    first = loop.settle()
    loop.ask(partial(loop.engine.begin_update, 1))
    time.sleep(0.05)  # a pass now would raise
    loop.ask(lambda: [loop.engine.take([shard]) for shard in shards_of(new)])
    loop.ask(loop.engine.end_update)
    before = loop.engine.statistics.generated_tokens
    assert first.tokens <= before < 6 * 40
    loop.add([])
    found = fetched(loop, 6)
    old, renewed = expected(groups), expected(groups, seed=1)
    for number, completion in found.items():
        kept = completion.weight_versions.count(0)
        assert completion.weight_versions == (0,) * kept + (1,) * (40 - kept)
        assert completion.tokens[:kept] == old[number].tokens[:kept]
        assert kept or completion.tokens == renewed[number].tokens


def test_what_is_dropped_is_never_heard_of(groups: Groups) -> None:
    loop = EngineLoop(partial(engine_of, groups))
    loop.add(REQUESTS)
    until(lambda: not loop.engine.holds(0), 30)
    loop.drop()
    assert not loop.engine.has_work
    assert loop.written(1).completions == []
    loop.add(REQUESTS[2:3])
    assert fetched(loop, 1) == {2: expected(groups)[2]}


def test_errors_reach_who_asked(groups: Groups) -> None:
    loop = EngineLoop(partial(engine_of, groups))
    with pytest.raises(PromptTooLong):
        loop.add([RolloutRequest(9, (1,) * 300, SAMPLING, 5)])
    loop.ask(lambda: loop.engine.release(weights=True))
    loop.add(REQUESTS[:1])
    with pytest.raises(RuntimeError, match="the weights have been given back: update them first"):
        loop.written(1)
    assert loop.written(1) == Written()

    def refused() -> RolloutEngine:
        raise ValueError("no model")

    with pytest.raises(ValueError, match="no model"):
        EngineLoop(refused)


def two_ranks(groups: Groups) -> list[tuple[int, tuple[int, ...]]]:
    """What a rank writes whose calls come at other times than those of the other."""
    loop = EngineLoop(partial(engine_of, groups))

    def late(rank: int) -> Callable[[], None]:
        return lambda: time.sleep(0.02) if groups.tensor_rank == rank else None

    found: dict[int, Completion] = {}
    for number, request in enumerate(REQUESTS):
        late(number % 2)()
        loop.add([request])
        loop.ask(late((number + 1) % 2))
        loop.add([])
        found |= {each.sample: each for each in loop.written(2 if groups.tensor_rank else 5).completions}
    found |= fetched(loop, 6 - len(found))
    return sorted((number, each.tokens) for number, each in found.items())


def test_tensor_ranks_make_the_same_passes(worlds: RankPool) -> None:
    first, second = worlds.run(Layout(tensor=2), two_ranks)
    assert first == second
    (alone,) = worlds.run(Layout(), two_ranks)
    assert [number for number, _ in first] == [number for number, _ in alone] == list(range(6))
