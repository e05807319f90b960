"""Weights on their way from the ranks of a policy that own them to teams of rollout workers, message by message.

On one host messages lie in shared memory, where each worker reads what it holds of them, and the next is made while one
is taken. To other hosts every rank that owns weights broadcasts them (`lockstep.rl.weight_sync.broadcast`).
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from lockstep.rl.remote import ActorHandle, Call, WorkerDied, WorkerFailed, gather, wait_for
from lockstep.rl.weight_sync.config import WeightSyncConfig

TRIES = 3
"""How often a broadcast is begun; in a team that died while it went on, others' connections end, too."""

Teams = Mapping[int, Sequence[ActorHandle]]
"""The tensor ranks of each model that writes, by its number."""


class WeightTransfer:
    """Gives weights to teams, as often as there are new ones."""

    def __init__(self, config: WeightSyncConfig) -> None:
        """
        Args:
            config: its transport `auto` is shared memory where all processes are on one host, and broadcasts otherwise.
        """
        self._size, self._transport = int(config.bucket_mib * 2**20), config.transport
        self._linked: list[Any] = []
        self._nodes: dict[Any, str] = {}

    def give(self, policy: Sequence[ActorHandle], teams: Teams, version: int) -> list[int]:
        """Give teams the weights of the policy as this version; returns the numbers of those that are alive then.

        Raises:
            WorkerFailed: when a rank of the policy fails, or broadcasts do though nobody died.
        """
        counts = gather([w.call("open_weights", self._size) for w in policy])
        owners = [member for member, count in zip(policy, counts, strict=True) if count]
        if self._transport == "broadcast" or (self._transport == "auto" and self._crosses(owners, teams)):
            teams = self._broadcast(owners, teams, version)
        else:
            teams = _share(owners, teams, version, max(counts))
        gather([w.call("close_weights") for w in policy])
        return list(teams)

    def _crosses(self, owners: Sequence[ActorHandle], teams: Teams) -> bool:
        """Whether some of these processes are on other hosts than others; those that died are on none."""
        members = [*owners, *chain(*teams.values())]
        new = [member for member in members if member.handle not in self._nodes]
        for member in new:
            try:
                self._nodes[member.handle] = gather([(member, member.handle.node.remote())])[0]
            except WorkerDied:
                continue
        return len({self._nodes[m.handle] for m in members if m.handle in self._nodes}) > 1

    def _broadcast(self, owners: Sequence[ActorHandle], teams: Teams, version: int) -> Teams:
        for _ in range(TRIES):
            teams = _told(teams, "begin_update", version)
            members = list(chain(*teams.values()))
            if not members:
                return teams
            if self._link(owners, members) and _all([m.call("broadcast_weights") for m in [*owners, *members]]):
                return _told(teams, "end_update")
            self._linked = []
        raise WorkerFailed(f"weights did not come whole by a broadcast in {TRIES} tries: is the network in order?")

    def _link(self, owners: Sequence[ActorHandle], members: Sequence[ActorHandle]) -> bool:
        """Form a group of each owner and all members, if that has not happened; whether it stands."""
        wanted = [member.handle for member in (*owners, *members)]
        if wanted == self._linked:
            return True
        addresses = gather([(owner, owner.handle.address.remote()) for owner in owners])
        ports = gather([o.call("host", address, "broadcast") for o, address in zip(owners, addresses, strict=True)])
        meetings, size = list(zip(addresses, ports, strict=True)), 1 + len(members)
        calls = [o.call("open_broadcasts", 0, size, [own]) for o, own in zip(owners, meetings, strict=True)]
        calls += [m.call("open_broadcasts", rank, size, meetings) for rank, m in enumerate(members, 1)]
        stands = _all(calls)
        self._linked = wanted if stands else []
        return stands


def _share(owners: Sequence[ActorHandle], teams: Teams, version: int, count: int) -> Teams:
    """Messages through shared memory; what was taken may be freed there."""
    teams = _told(teams, "begin_update", version)
    coming = [owner.keep("weights", 0) for owner in owners]
    for number in range(1, count + 1):
        messages = coming
        wait_for([ended for ended, _ in messages])
        coming = [owner.keep("weights", number) for owner in owners] if number < count else []
        teams = _told(teams, "take", *(result for _, result in messages))
    return _told(teams, "end_update")


def _told(teams: Teams, method: str, *args: Any) -> Teams:
    """Have teams do something; returns those that are alive then."""
    calls = {number: [member.call(method, *args) for member in team] for number, team in teams.items()}
    return {number: team for number, team in teams.items() if _lives(calls[number])}


def _lives(calls: Sequence[Call]) -> bool:
    """Whether who was called is alive when all calls have ended."""
    try:
        gather(calls)
    except WorkerDied:
        return False
    return True


def _all(calls: Sequence[Call]) -> bool:
    """Whether all say yes; who died does not."""
    try:
        return all(gather(calls))
    except WorkerDied:
        return False
