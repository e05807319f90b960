"""Plans of random workloads: nothing is computed twice at once, nothing leaks, everything ends."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.model.attention.paged_kernel import BLOCK
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.protocol import Request
from lockstep.rl.rollout.scheduling.block_pool import BlockPool, blocks_alone, chained, pool_sizes
from lockstep.rl.rollout.scheduling.plan import Chunk, Plan, SequenceState
from lockstep.rl.rollout.scheduling.scheduler import Scheduler

Cell = tuple[int, int]
"""A block and a place in it."""


def texts(chunk: Chunk) -> list[tuple[int, tuple[int, ...]]]:
    """The position of each token of a chunk, those on trial included, and the text up to it."""
    whole = chunk.sequence.part(0, chunk.start) + chunk.tokens
    return [(position, whole[: position + 1]) for position in range(chunk.start, len(whole))]


def follower(text: tuple[int, ...], sample: int) -> int:
    """The token behind a text, which often repeats itself."""
    return hash((text[-2:], len(text) % 23 == 0, sample)) % 7


class Memory:
    """What the blocks of one kind of layer hold: the text up to each token, which its keys and values depend on."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.cells: dict[Cell, tuple[int, ...]] = {}

    def write(self, chunk: Chunk, kind: int) -> None:
        table = chunk.sequence.tables[kind]
        for position, text in texts(chunk):
            self.cells[table[position // BLOCK], position % BLOCK] = text

    def check(self, chunk: Chunk, kind: int) -> None:
        """Each token sees the keys and values of its own text, as far as its window."""
        table = chunk.sequence.tables[kind]
        for position, text in texts(chunk):
            first = 0 if self.window is None else max(0, position - self.window + 1)
            for seen in range(first, position + 1):
                assert self.cells[table[seen // BLOCK], seen % BLOCK] == text[: seen + 1]

    def copy(self, source: int, target: int) -> None:
        for place in range(BLOCK):
            if (source, place) in self.cells:
                self.cells[target, place] = self.cells[source, place]


def run_pass(scheduler: Scheduler, memories: list[Memory], plan: Plan) -> list[SequenceState]:
    """Carry out a plan and append tokens, which depend on the text alone, to each sequence that draws."""
    for kind, memory in enumerate(memories):
        for chunk in plan.chunks:
            memory.write(chunk, kind)
        for chunk in plan.chunks:
            memory.check(chunk, kind)
        for fork in plan.forks:
            copied = fork.copies[kind]
            if copied:
                memory.copy(*copied)
    for sequence, proposed in plan.drawing:
        extend(scheduler, sequence, proposed)
    return [sequence for sequence, _ in plan.drawing]


def extend(scheduler: Scheduler, sequence: SequenceState, proposed: tuple[int, ...]) -> None:
    """Append the token behind the text, and behind those on trial as long as they are right."""
    for trial in (*proposed, None):
        sequence.tokens.append(follower(sequence.part(0, sequence.known), sequence.request.sample))
        if sequence.tokens[-1] != trial or len(sequence.tokens) == sequence.request.sampling.max_new_tokens:
            break
    if proposed:
        scheduler.settle(sequence, len(proposed))


def begun(text: int, length: int) -> tuple[int, ...]:
    """The beginning of one of some texts."""
    return tuple(random.Random(text).choices(range(5), k=length))


def expected(request: Request) -> list[int]:
    text, tokens = list(request.tokens), []
    for _ in range(request.sampling.max_new_tokens):
        tokens.append(follower(tuple(text + tokens), request.sample))
    return tokens


REQUESTS = st.lists(
    st.tuples(st.integers(1, 70), st.integers(0, 2), st.integers(1, 40), st.integers(1, 3)), min_size=1, max_size=8
)
"""Tokens of the prompt, which of three texts it begins, tokens to write, samples."""


@settings(max_examples=40)
@given(
    REQUESTS,
    st.sampled_from([(None,), (20,), (None, 5), (None, 33)]),
    st.integers(0, 12),
    st.integers(1, 90),
    st.sampled_from([0, 3, 15]),
    st.data(),
)
def test_any_workload_ends_with_the_right_tokens_and_no_block_held(
    wanted: list[tuple[int, int, int, int]],
    windows: tuple[int | None, ...],
    spare: int,
    budget: int,
    speculate: int,
    data: st.DataObject,
) -> None:
    requests = [
        Request(f"{i}.{s}", begun(text, length), SamplingParams(max_new_tokens=new), 0, s)
        for i, (length, text, new, samples) in enumerate(wanted)
        for s in range(samples)
    ]
    most = max(len(r.tokens) + r.sampling.max_new_tokens - 1 for r in requests)
    pools = [BlockPool(blocks_alone(most, window) + spare) for window in windows]
    scheduler = Scheduler(windows, pools, sequences=5, budget=budget, speculate=speculate)
    memories = [Memory(window) for window in windows]
    sequences = [SequenceState(r) for r in requests]
    arriving, cancelled = list(sequences), set()
    passes = 0
    while arriving or scheduler.waiting or scheduler.running:
        passes += 1
        assert passes < 5000
        if arriving and (passes % 2 or not (scheduler.waiting or scheduler.running)):
            assert scheduler.lacking(most) is None
            scheduler.waiting.append(arriving.pop(0))
        plan = scheduler.plan()
        assert plan.chunks, "a pass without work"
        assert sum(chunk.length for chunk in plan.chunks) <= max(budget, 5)
        for sequence in run_pass(scheduler, memories, plan):
            if len(sequence.tokens) == sequence.request.sampling.max_new_tokens:
                scheduler.finish(sequence)
        alive = [*scheduler.running, *scheduler.waiting]
        if alive and passes % 7 == 0 and data.draw(st.booleans()):
            victim = data.draw(st.sampled_from(alive))
            cancelled.add(victim.request.key)
            scheduler.finish(victim)
    for sequence in sequences:
        if sequence.request.key not in cancelled:
            assert sequence.tokens == expected(sequence.request)
    assert [pool.free for pool in pools] == [pool.count for pool in pools]


def finished(scheduler: Scheduler, *sequences: SequenceState) -> list[Plan]:
    """The plans until these sequences, which are added now, have all their tokens."""
    scheduler.waiting.extend(sequences)
    plans = []
    while scheduler.running or scheduler.waiting:
        plans.append(scheduler.plan())
        for sequence, proposed in plans[-1].drawing:
            sequence.tokens += [1] * (len(proposed) + 1)
            if proposed:
                scheduler.settle(sequence, len(proposed))
            if len(sequence.tokens) == sequence.request.sampling.max_new_tokens:
                scheduler.finish(sequence)
    return plans


def sequence(tokens: tuple[int, ...], new: int, sample: int = 0) -> SequenceState:
    return SequenceState(Request(sample, tokens, SamplingParams(max_new_tokens=new), 0, sample))


def computed(plans: list[Plan]) -> int:
    return sum(chunk.count for plan in plans for chunk in plan.chunks)


def test_a_prompt_is_computed_once_for_its_group_and_found_by_later_turns() -> None:
    scheduler = Scheduler((None,), (BlockPool(100),), sequences=8, budget=2048)
    prompt = tuple(range(40))
    assert computed(finished(scheduler, *(sequence(prompt, 9, s) for s in range(6)))) == 40 + 6 * 8
    turn = (*prompt, *[1] * 9, 7, 7)
    assert computed(finished(scheduler, sequence(turn, 1))) == len(turn) - 48, "the first turn's three full blocks"
    scheduler.forget()
    assert computed(finished(scheduler, sequence(turn, 1))) == len(turn)


def test_what_was_right_on_trial_is_computed_once_and_found_by_others() -> None:
    scheduler = Scheduler((None,), (BlockPool(100),), sequences=1, budget=2048, speculate=15)
    prompt = (1,) * 20
    plans = finished(scheduler, sequence(prompt, 100))
    assert [chunk.length for plan in plans for chunk in plan.chunks] == [20, *[16] * 6, 3], (
        "one token, then 16 at a time"
    )
    assert (scheduler.proposed, scheduler.accepted) == (92, 92)
    assert scheduler.pools[0].free == 100
    assert computed(finished(scheduler, sequence((*prompt, *[1] * 100), 1))) == 120 - 112, "seven full blocks"


def test_tokens_are_on_trial_only_where_rows_and_blocks_are_left() -> None:
    for sequences, blocks, budget, expected in [
        (3, 100, 2048, (10, 10, 9)),  # up to 32 rows
        (3, 100, 8, (2, 2, 1)),  # up to the budget
        (40, 100, 2048, (0,) * 40),
        (3, 6, 2048, (9, 9, 9)),  # up to the block's end: each may need one of the three that are free
    ]:
        scheduler = Scheduler((None,), (BlockPool(blocks),), sequences=sequences, budget=budget, speculate=10)
        scheduler.waiting.extend(sequence((1,) * 6, 80, s) for s in range(sequences))
        while not all(s.tokens for s in scheduler.running) or scheduler.waiting:
            for each, _ in scheduler.plan().drawing:
                each.tokens.append(1)
        assert tuple(len(chunk.proposed) for chunk in scheduler.plan().chunks) == expected


def test_layers_with_a_window_hold_no_more_than_it_needs() -> None:
    pools = BlockPool(200), BlockPool(200)
    scheduler = Scheduler((None, 40), pools, sequences=1, budget=2048)
    long = sequence(tuple(range(30)), 500)
    scheduler.waiting.append(long)
    most = 0
    while len(long.tokens) < 499:
        scheduler.plan()
        long.tokens.append(1)
        most = max(most, pools[1].count - pools[1].free)
    assert most == blocks_alone(529, 40) == 4
    assert pools[0].count - pools[0].free == -(-528 // BLOCK)


def test_the_least_recently_left_content_goes_first() -> None:
    pool = BlockPool(3)
    names = [chained(b"", (i,)) for i in range(4)]
    for name in names[:3]:
        pool.name(pool.take(), name)
    for block in (1, 0, 2):
        pool.release(block)
    assert pool.free == 3
    pool.share(1)
    pool.release(1)
    assert pool.take() == 0
    assert [pool.find(name) is not None for name in names] == [False, True, True, False]


@given(
    st.sampled_from([(None,), (128,), (None, 64), (None, 2000)]),
    st.integers(1, 40),
    st.integers(20, 5000),
    st.integers(1, 3000),
)
def test_pools_stay_within_the_memory_that_they_are_given(
    windows: tuple[int | None, ...], sequences: int, length: int, budget: int
) -> None:
    sizes = [3000, 9000][: len(windows)]
    memory = 30_000_000
    pools = pool_sizes(windows, sizes, memory=memory, sequences=sequences, length=length, budget=budget)
    assert sum(count * size for count, size in zip(pools, sizes, strict=True)) <= memory
    for window, count in zip(windows, pools, strict=True):
        assert count >= blocks_alone(length, window)
        assert count <= sequences * -(-length // BLOCK) + -(-budget // BLOCK)


def test_an_engine_without_memory_has_blocks_to_name() -> None:
    assert pool_sizes((None,), [1000], memory=10, sequences=4, length=100, budget=10) == [1]


@pytest.mark.parametrize(
    ("tokens", "window", "blocks"), [(1, None, 1), (17, None, 2), (500, 1, 1), (500, 17, 2), (20, 64, 2)]
)
def test_the_least_that_a_sequence_needs(tokens: int, window: int | None, blocks: int) -> None:
    assert blocks_alone(tokens, window) == blocks
