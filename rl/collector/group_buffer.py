"""GroupBuffer: holds the prompt and the judged completions of each group until all of them have come."""

from lockstep.rl.types import Judged, Prompt


class GroupBuffer:
    """Groups that were asked for, by number, with those of their completions that have been judged."""

    def __init__(self) -> None:
        self._groups: dict[int, list[Judged | None]] = {}
        self._prompts: dict[int, Prompt] = {}
        self._places: dict[int, tuple[int, int]] = {}

    def open(self, group: int, prompt: Prompt, samples: int) -> range:
        """Makes room for a group of so many completions of a prompt; returns the sample numbers of its completions.

        Sample s of group g has the number g · samples + s.
        """
        numbers = range(group * samples, (group + 1) * samples)
        self._groups[group], self._prompts[group] = [None] * samples, prompt
        self._places |= {number: (group, sample) for sample, number in enumerate(numbers)}
        return numbers

    def prompt_of(self, sample: int) -> Prompt:
        """The prompt of a completion that has not been judged, by its sample number."""
        return self._prompts[self._places[sample][0]]

    def put(self, judged: Judged) -> None:
        """Stores a completion at its place in its group."""
        group, sample = self._places.pop(judged.rollout.sample)
        self._groups[group][sample] = judged

    def is_whole(self, group: int) -> bool:
        """Whether all completions of a group have come."""
        return None not in self._groups[group]

    def take(self, group: int) -> list[Judged]:
        """Removes a whole group and returns its completions by sample number."""
        del self._prompts[group]
        return [judged for judged in self._groups.pop(group) if judged is not None]

    def clear(self) -> None:
        """Forgets all groups."""
        self._groups, self._prompts, self._places = {}, {}, {}
