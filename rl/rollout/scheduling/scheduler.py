"""Schedules forward passes: which tokens of which sequences are computed next, and in which KV blocks they lie.

Sequences run in the order of their arrival. Where blocks run out, the youngest gives all of its own back and is
computed again later; the oldest can always go on, because a request that does not fit alone is refused. Layers that
see a window give back the blocks behind it, so each kind of layer (window or none) has a pool and tables of its own.
"""

from collections import deque
from collections.abc import Sequence as Many
from dataclasses import replace

from lockstep.model.attention.paged_kernel import BLOCK, first_seen
from lockstep.rl.rollout.scheduling.block_pool import ROOT, BlockPool, blocks_alone, chained
from lockstep.rl.rollout.scheduling.plan import Chunk, Fork, Plan, SequenceState

TRIAL_ROWS = 32
"""Tokens of a pass up to which it takes tokens on trial. Up to there a pass of a small model on a CPU waits for its
weights, and trials cost little; beyond it each costs about what it may save."""


class Scheduler:
    """The running and the waiting sequences, and the blocks that they hold."""

    def __init__(
        self, windows: Many[int | None], pools: Many[BlockPool], *, sequences: int, budget: int, speculate: int = 0
    ) -> None:
        """
        Args:
            windows: of each kind of layer, in tokens.
            pools: of each kind of layer.
            sequences: that may run at the same time.
            budget: tokens of one forward pass.
            speculate: tokens that a sequence may have computed on trial in one pass.
        """
        self._windows, self.pools = tuple(windows), tuple(pools)
        self._sequences, self._budget, self._speculate = sequences, max(budget, sequences), speculate
        self.waiting: deque[SequenceState] = deque()
        self.running: list[SequenceState] = []
        self.admits = True
        """Whether sequences that wait may begin."""
        self.preemptions = self.found = self.proposed = self.accepted = 0

    def lacking(self, tokens: int) -> tuple[int, int] | None:
        """Blocks that a sequence of this many tokens needs and the pool has, where that is too few; else None."""
        for window, pool in zip(self._windows, self.pools, strict=True):
            if blocks_alone(tokens, window) > pool.count:
                return blocks_alone(tokens, window), pool.count
        return None

    def plan(self) -> Plan:
        """Plan the next forward pass; the keys and values of its tokens count as cached from now on."""
        plan, left = Plan(), self._budget
        for place in range(len(self.running)):
            if place >= len(self.running):  # the others were preempted for those before
                break
            sequence = self.running[place]
            count = self._granted(sequence, min(left, sequence.known - sequence.cached))
            if count:
                plan.chunks.append(self._computed(sequence, count))
                left -= count
        ends: dict[tuple[int, ...], Chunk] = {}
        while self.admits and self.waiting and left and len(self.running) < self._sequences:
            sequence = self.waiting[0]
            fresh = not sequence.tokens and sequence.scores is None
            source = ends.get(sequence.request.tokens) if fresh else None
            if source is not None:
                fork = self._forked(sequence, source)
                if fork is None:
                    break
                plan.forks.append(fork)
            else:
                count = self._begun(sequence, left)
                if not count:
                    break
                chunk = self._computed(sequence, count)
                plan.chunks.append(chunk)
                left -= count
                if chunk.draws and not sequence.tokens:
                    ends[sequence.request.tokens] = chunk
            self.running.append(self.waiting.popleft())
        if self._speculate:
            self._add_trials(plan, min(left, TRIAL_ROWS - (self._budget - left)))
        return plan

    def settle(self, sequence: SequenceState, proposed: int) -> None:
        """Count as cached which of so many tokens that a sequence had on trial have been added to it since."""
        start, accepted = sequence.cached, sequence.known - sequence.cached - 1
        sequence.cached += accepted
        self._name_full(sequence, start)
        sequence.lookup.verified(accepted)
        self.proposed += proposed
        self.accepted += accepted

    def plan_alone(self, sequence: SequenceState) -> Plan | None:
        """Plan a pass of one sequence that runs or waits; None where it finds no room, and waits."""
        if sequence in self.running:
            count = self._granted(sequence, min(self._budget, sequence.known - sequence.cached))
        else:
            count = self._begun(sequence, self._budget)
            if count:
                self.waiting.remove(sequence)
                self.running.append(sequence)
        return Plan([self._computed(sequence, count)]) if count else None

    def finish(self, sequence: SequenceState) -> None:
        """Remove a running or waiting sequence, and release its blocks."""
        self._release(sequence)
        self._remove(sequence)

    def discard(self, sequence: SequenceState) -> list[list[int]]:
        """Remove a sequence whose keys and values are in doubt.

        Returns:
            For each kind of layer the blocks that nobody else holds.
        """
        pairs = zip(self.pools, sequence.tables, strict=False)
        alone = [[block for block in table if block >= 0 and pool.drop(block)] for pool, table in pairs]
        sequence.tables, sequence.cached = [], 0
        self._remove(sequence)
        return alone

    def roll(self, sequence: SequenceState) -> None:
        """Leave a running sequence's first token behind; all behind it is computed again, at the positions before."""
        sequence.passed += 1
        sequence.names = []
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)

    def redo(self, sequence: SequenceState) -> list[list[int]]:
        """Have a running sequence wait, to be computed again without tokens on trial; returns what `discard` does."""
        alone = self.discard(sequence)
        self.waiting.appendleft(sequence)
        sequence.lookup.verified(0)
        return alone

    def _remove(self, sequence: SequenceState) -> None:
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def restart(self) -> None:
        """Preempt all running sequences, which are computed again, and empty the prefix cache."""
        while self.running:
            self._preempt()
        self.forget()

    def forget(self) -> None:
        """Empty the prefix cache: nothing that was computed so far is found by other sequences."""
        for pool in self.pools:
            pool.forget_all()

    def _preempt(self) -> None:
        """The youngest running sequence waits again, before all others."""
        victim = self.running.pop()
        self._release(victim)
        self.waiting.appendleft(victim)
        self.preemptions += 1

    def _release(self, sequence: SequenceState) -> None:
        """Later blocks first, so that they are also the first to go: beginnings are found more often."""
        for pool, table in zip(self.pools, sequence.tables, strict=False):
            for block in reversed(table):
                if block >= 0:
                    pool.release(block)
        sequence.tables, sequence.cached = [], 0
        if sequence.scores:
            sequence.scores = []

    def _granted(self, sequence: SequenceState, wanted: int) -> int:
        """As many of the wanted tokens as find room; younger ones make room for the first of them."""
        self._pass_windows(sequence)
        while wanted and not self._room(sequence):
            last = self.running[-1]
            self._preempt()
            if last is sequence:
                return 0
        return min(wanted, self._room(sequence))

    def _room(self, sequence: SequenceState) -> int:
        """Tokens for which a sequence has blocks, or could take some."""
        pairs = zip(self.pools, sequence.tables, strict=True)
        return min((len(table) + pool.free) * BLOCK for pool, table in pairs) - sequence.cached

    def _begun(self, sequence: SequenceState, left: int) -> int:
        """How many tokens of a sequence that waits can be computed, after those that are found in the cache.

        Each running sequence keeps the chance of one more block, so that what begins does not soon have to end.
        """
        self._find(sequence)
        wanted = min(left, sequence.known - sequence.cached)
        reserve = len(self.running) * BLOCK
        count = min(wanted, self._room(sequence) - reserve)
        if count > 0 and (count == wanted or not self.running):
            if not sequence.tokens:
                self.found += sequence.cached
            return count
        self._release(sequence)
        return 0

    def _find(self, sequence: SequenceState) -> None:
        """Share the longest beginning that is cached in all kinds of layers; at least one token is left to compute.

        The scores of a prompt come out of its computation, so that a prompt with scores to report shares nothing.
        """
        longest = (sequence.known - 1) // BLOCK if sequence.scores is None else 0
        self._name_up_to(sequence, longest)
        found = [[pool.find(name) for name in sequence.names[:longest]] for pool in self.pools]
        for window, blocks in zip(self._windows, found, strict=True):
            if window is None:
                longest = next((i for i, block in enumerate(blocks[:longest]) if block is None), longest)
        shared = next(n for n in range(longest, -1, -1) if self._covers(found, n))
        sequence.cached = shared * BLOCK
        for window, pool, blocks in zip(self._windows, self.pools, found, strict=True):
            first = first_seen(sequence.cached, window)
            table = [-1 if i < first or block is None else block for i, block in enumerate(blocks[:shared])]
            for block in table[first:]:
                pool.share(block)
            sequence.tables.append(table)

    def _covers(self, found: list[list[int | None]], blocks: int) -> bool:
        """Whether all that a token after so many blocks sees through a window has been found."""
        return all(
            window is None or None not in each[first_seen(blocks * BLOCK, window) : blocks]
            for window, each in zip(self._windows, found, strict=True)
        )

    def _computed(self, sequence: SequenceState, count: int) -> Chunk:
        """Take blocks for a sequence's next tokens; those that become full can be found, in this very pass."""
        start, stop = sequence.cached, sequence.cached + count
        self._take_up_to(sequence, stop)
        sequence.cached = stop
        self._name_full(sequence, start)
        return Chunk(sequence, start, count, stop == sequence.known)

    def _add_trials(self, plan: Plan, room: int) -> None:
        """Add what sequences propose to the chunks that decode, in blocks that no running sequence may need soon."""
        for i, chunk in enumerate(plan.chunks):
            if room <= 0:
                break
            sequence, share = chunk.sequence, -(-room // (len(plan.chunks) - i))
            left = sequence.request.new - len(sequence.tokens) - 1  # one more is drawn behind those on trial
            most = min(self._speculate, share, left, self._spare(sequence))
            if chunk.decodes and most > 0 and _may_try(sequence):
                new = sequence.part(sequence.lookup.read, sequence.known)
                proposed = sequence.lookup.propose(new, most)
                self._take_up_to(sequence, sequence.cached + len(proposed))
                plan.chunks[i] = replace(chunk, proposed=proposed)
                room -= len(proposed)

    def _spare(self, sequence: SequenceState) -> int:
        """Tokens for which a sequence could have blocks, where each running sequence may need one more."""
        pairs = zip(self.pools, sequence.tables, strict=True)
        blocks = min(len(table) + max(0, pool.free - len(self.running)) for pool, table in pairs)
        return blocks * BLOCK - sequence.cached

    def _take_up_to(self, sequence: SequenceState, stop: int) -> None:
        """Take blocks for the tokens of a sequence before this one."""
        for pool, table in zip(self.pools, sequence.tables, strict=True):
            while len(table) * BLOCK < stop:
                table.append(pool.take())

    def _name_full(self, sequence: SequenceState, start: int) -> None:
        """Have the blocks of a sequence be found that its cached tokens from this one on have filled."""
        full = sequence.cached // BLOCK
        self._name_up_to(sequence, full)
        for i in range(start // BLOCK, full):
            for pool, table in zip(self.pools, sequence.tables, strict=True):
                pool.name(table[i], sequence.names[i])

    def _forked(self, sequence: SequenceState, source: Chunk) -> Fork | None:
        """Share a prompt's full blocks and take one for the rest of it."""
        other = source.sequence
        full, rest = divmod(len(sequence.request.tokens), BLOCK)
        if rest and any(pool.free <= len(self.running) for pool in self.pools):
            return None
        copies: list[tuple[int, int] | None] = []
        for pool, table in zip(self.pools, other.tables, strict=True):
            own = table[:full]
            for block in own:
                if block >= 0:
                    pool.share(block)
            copies.append((table[full], pool.take()) if rest else None)
            sequence.tables.append([*own, copies[-1][1]] if copies[-1] else own)
        sequence.names, sequence.cached = other.names[:full], other.cached
        self.found += sequence.cached
        return Fork(sequence, source, tuple(copies))

    def _pass_windows(self, sequence: SequenceState) -> None:
        """Give back blocks that no later token sees."""
        for window, pool, table in zip(self._windows, self.pools, sequence.tables, strict=True):
            if window is None:
                continue
            for i in range(first_seen(sequence.cached, window) - 1, -1, -1):
                if table[i] < 0:
                    break
                pool.release(table[i])
                table[i] = -1

    def _name_up_to(self, sequence: SequenceState, blocks: int) -> None:
        names = sequence.names
        for i in range(len(names), blocks):
            names.append(chained(names[-1] if names else ROOT, sequence.part(i * BLOCK, (i + 1) * BLOCK)))


def _may_try(sequence: SequenceState) -> bool:
    """Whether a sequence may have tokens on trial: a window has not rolled behind them, and a grammar not read them."""
    return sequence.request.on_overflow != "roll" and sequence.grammar is None
