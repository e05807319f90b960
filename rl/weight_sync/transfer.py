"""Transfer of new weights from the ranks of a policy that own them to teams of rollout workers, message by message.

On one host messages lie in shared memory, where each worker reads what it holds of them, and the next is made while one
is taken. To other hosts every rank that owns weights broadcasts them (`lockstep.rl.weight_sync.broadcast`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Concatenate, ParamSpec

from lockstep.rl.remote import ActorHandle, Call, WorkerDied, WorkerFailed, gather, wait_for
from lockstep.rl.weight_sync.config import WeightSyncConfig
from lockstep.rl.weight_sync.protocol import BroadcastMember, WeightReceiver, WeightSender

TRIES = 3
"""How often a broadcast is begun; in a team that died while it went on, others' connections end, too."""

Policy = Sequence[ActorHandle[WeightSender]]
"""The ranks of a policy, or those of them that own weights."""

Teams = Mapping[int, Sequence[ActorHandle[WeightReceiver]]]
"""The tensor ranks of each rollout model, by the number of its team."""

Params = ParamSpec("Params")


@dataclass(frozen=True)
class WeightSession:
    """A policy whose ranks hold their weights open for workers to fetch; see `weight_session`."""

    owners: Policy
    """The ranks that have any messages of weights."""
    messages: int
    """The highest number of messages that one of them has."""


@contextmanager
def weight_session(policy: Policy, size: int) -> Iterator[WeightSession]:
    """Opens the weights on all ranks of a policy within a block, and closes them however the block ends.

    With ZeRO-3 the weights of the whole model are in every rank's memory meanwhile.

    Args:
        size: bytes of a message at most.

    Raises:
        WorkerFailed: when a rank of the policy fails.
    """
    try:
        counts = gather([rank.call(WeightSender.open_weights, size) for rank in policy])
        owners = [rank for rank, count in zip(policy, counts, strict=True) if count]
        yield WeightSession(owners, max(counts))
    except BaseException:
        # Nobody waits here: a rank that hangs or died would hide the error. A worker does what it is asked in order,
        # so that whatever it is asked next finds the session closed.
        _close(policy)
        raise
    gather(_close(policy))


def _close(policy: Policy) -> list[Call[None]]:
    return [rank.call(WeightSender.close_weights) for rank in policy]


class WeightTransfer:
    """Gives weights to teams, as often as there are new ones."""

    def __init__(self, config: WeightSyncConfig) -> None:
        """
        Args:
            config: its transport `auto` is shared memory where all processes are on one host, and broadcasts otherwise.
        """
        self._size, self._transport = int(config.bucket_mib * 2**20), config.transport
        self._linked: list[Any] = []

    def give(self, policy: Policy, teams: Teams, version: int) -> list[int]:
        """Gives teams the weights of the policy as this version; returns the numbers of those that are alive then.

        Raises:
            WorkerFailed: when a rank of the policy fails, or broadcasts do though nobody died.
        """
        with weight_session(policy, self._size) as session:
            if self._transport == "broadcast" or (self._transport == "auto" and self._crosses(session.owners, teams)):
                return list(self._broadcast(session.owners, teams, version))
            return list(_share(session, teams, version))

    def _crosses(self, owners: Policy, teams: Teams) -> bool:
        """Whether some of these processes are on other hosts than others."""
        members: list[ActorHandle[BroadcastMember]] = [*owners, *chain(*teams.values())]
        return len({place[0] for member in members if (place := member.known_place())}) > 1

    def _broadcast(self, owners: Policy, teams: Teams, version: int) -> Teams:
        for _ in range(TRIES):
            teams = _told(teams, WeightReceiver.begin_update, version)
            members = list(chain(*teams.values()))
            if not members:
                return teams
            if self._link(owners, members) and self._sent(owners, members):
                return _told(teams, WeightReceiver.end_update)
        raise WorkerFailed(f"weights did not come whole by a broadcast in {TRIES} tries: is the network in order?")

    def _sent(self, owners: Policy, members: Sequence[ActorHandle[WeightReceiver]]) -> bool:
        """Broadcasts all messages; whether all members have them. Otherwise the group is not used again."""
        linked, self._linked = self._linked, []  # so that it is not either where an exception ends this
        sent = _all(
            [
                *[owner.call(WeightSender.broadcast_weights) for owner in owners],
                *[member.call(WeightReceiver.broadcast_weights) for member in members],
            ]
        )
        self._linked = linked if sent else []
        return sent

    def _link(self, owners: Policy, members: Sequence[ActorHandle[WeightReceiver]]) -> bool:
        """Forms a group of each owner and all members, if that has not happened; whether it stands."""
        wanted = [member.handle for member in (*owners, *members)]
        if wanted == self._linked:
            return True
        self._linked = []
        addresses = gather([owner.address() for owner in owners])
        ports = gather(
            [o.call(WeightSender.host, address, "broadcast") for o, address in zip(owners, addresses, strict=True)]
        )
        meetings, size = list(zip(addresses, ports, strict=True)), 1 + len(members)
        calls = [o.call(WeightSender.open_broadcasts, 0, size, [own]) for o, own in zip(owners, meetings, strict=True)]
        calls += [m.call(WeightReceiver.open_broadcasts, rank, size, meetings) for rank, m in enumerate(members, 1)]
        stands = _all(calls)
        self._linked = wanted if stands else []
        return stands


def _share(session: WeightSession, teams: Teams, version: int) -> Teams:
    """Gives messages through shared memory; what was taken may be freed there."""
    teams = _told(teams, WeightReceiver.begin_update, version)
    coming = [owner.store(WeightSender.weights, 0) for owner in session.owners]
    for number in range(1, session.messages + 1):
        stored = coming
        wait_for([message.ended for message in stored])
        more = session.owners if number < session.messages else []
        coming = [owner.store(WeightSender.weights, number) for owner in more]
        teams = _told(teams, WeightReceiver.take, *[message.value for message in stored])
    return _told(teams, WeightReceiver.end_update)


def _told(
    teams: Teams,
    method: Callable[Concatenate[WeightReceiver, Params], None],
    *args: Params.args,
    **named: Params.kwargs,
) -> Teams:
    """Calls a method of all ranks of teams; returns those teams that are alive then."""
    calls = {n: [member.call(method, *args, **named) for member in team] for n, team in teams.items()}
    return {number: team for number, team in teams.items() if _lives(calls[number])}


def _lives(calls: Sequence[Call[Any]]) -> bool:
    """Whether the workers that were called are alive when all calls have ended."""
    try:
        gather(calls)
    except WorkerDied:
        return False
    return True


def _all(calls: Sequence[Call[bool]]) -> bool:
    """Whether all calls return True; that of a worker that died does not."""
    try:
        return all(gather(calls))
    except WorkerDied:
        return False
