"""PromptSource: the prompts of one task or a mixture of several, by their number in a phase."""

from collections.abc import Sequence
from dataclasses import replace

from lockstep.data.tasks.mixture import Mixture, ProblemSet
from lockstep.data.tokenizer import Tokenizer
from lockstep.rl.prompts import demonstration_tokens, make_prompt
from lockstep.rl.types import Prompt


class PromptSource:
    """Prompts of training problems in an endless order, and those of held-out problems, task after task."""

    def __init__(self, problems: Sequence[ProblemSet], tokenizer: Tokenizer, seed: int, rules: str = "") -> None:
        """
        Args:
            rules: of the environment, at the end of each system message.
        """
        self._problems, self._rules = tuple(problems), rules
        self._tokenizers = [tokenizer.with_template_kwargs(each.config.chat_template_kwargs) for each in problems]
        self._mixture = Mixture([each.weight for each in problems], [len(each.split.train) for each in problems], seed)
        self._train = _numbered([self._made(task, "train") for task in range(len(problems))])
        self.held_out = [
            prompt
            for prompts in _numbered([self._made(task, "held_out") for task in range(len(problems))])
            for prompt in prompts
        ]
        """Numbered through all tasks."""

    def train(self, number: int, phase: str) -> Prompt:
        """The n-th prompt of a phase; see `Mixture.place`."""
        task, index = self._mixture.place(number, phase)
        return self._train[task][index]

    def demonstration(self, number: int, phase: str) -> tuple[Prompt, list[int]]:
        """The n-th prompt of a phase, and the tokens that supervised tuning teaches behind it."""
        task, index = self._mixture.place(number, phase)
        problems = self._problems[task]
        tokens = demonstration_tokens(
            problems.split.train[index], problems.config, self._tokenizers[task], problems.split.shots, self._rules
        )
        return self._train[task][index], tokens

    def _made(self, task: int, side: str) -> list[Prompt]:
        problems, tokenizer = self._problems[task], self._tokenizers[task]
        given = problems.config, tokenizer, problems.split.shots, self._rules, problems.name
        return [make_prompt(problem, *given) for problem in getattr(problems.split, side)]


def _numbered(tasks: Sequence[list[Prompt]]) -> list[list[Prompt]]:
    """The prompts of tasks with indices that go on from one task to the next."""
    found, first = [], 0
    for prompts in tasks:
        found.append([replace(prompt, index=first + prompt.index) for prompt in prompts] if first else prompts)
        first += len(prompts)
    return found
