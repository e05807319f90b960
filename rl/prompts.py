"""Builds prompts from problems: few-shot examples, instruction and chat template, as the task says; and their order.

A chat's messages are text whatever they spell. In a plain prompt the recipe's own words may spell control tokens, and
what comes from the data is text.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lockstep.data.control_tokens import Marked
from lockstep.data.tasks.mixture import Mixture, ProblemSet, curriculum_of, trained_on
from lockstep.data.tasks.problem import Problem, entry_text
from lockstep.data.tasks.task import TaskConfig
from lockstep.data.tokenizer import Tokenizer
from lockstep.rl.types import Prompt

_PLACE = re.compile(r"\{([a-z]+)\}")

Mark = Callable[[str], str]
Render = Callable[[Tokenizer, Sequence[dict[str, Any]]], Marked]


def make_prompt(
    problem: Problem,
    task: TaskConfig,
    tokenizer: Tokenizer,
    shots: Sequence[Problem] = (),
    rules: str = "",
    name: str = "",
    *,
    render: Render = Tokenizer.render,
) -> Prompt:
    """The prompt of a problem, with its tokens, what ends its completions and what its verifier needs.

    Args:
        name: of the task, where there are several.
        shots: solved problems to show before it, one more than `task.shots`: where it is one of them, the others serve.
        rules: of the environment, at the end of the system message.
        render: a chat's messages as text, up to where the model begins, or an environment that speaks first.

    Raises:
        BadTemplate, RefusedChat: when there is no chat template, or it refuses the messages.
    """
    if task.chat:
        text = render(tokenizer, _messages(problem, task, shots, rules))
    else:
        text = _plain(problem, task, tokenizer, shots, rules)
    tokens = tuple(tokenizer.encode_marked(text, begin=not task.chat))
    scored = problem.entry if task.grader == "gym" else None
    answer = entry_text(scored, task.settings) if scored else problem.answer
    stop_tokens = tokenizer.chat_stop_tokens if task.chat else ()
    return Prompt(
        problem.index,
        tokenizer.plain(text),
        tokens,
        answer,
        problem.tests,
        grader=task.grader,
        task=name,
        stop=tuple(task.stop),
        stop_tokens=stop_tokens,
    )


def demonstration_tokens(
    problem: Problem, task: TaskConfig, tokenizer: Tokenizer, shots: Sequence[Problem] = (), rules: str = ""
) -> list[int]:
    """What supervised tuning teaches behind the tokens of `make_prompt`: the demonstration, and the turn's end."""
    if task.chat:
        return tokenizer.chat_answer(_messages(problem, task, shots, rules), demonstration(problem, task))
    text = _plain(problem, task, tokenizer, shots, rules)
    return tokenizer.text_answer(text, Marked(demonstration(problem, task, tokenizer.marked)))


class PromptSource:
    """Prompts of training problems in an endless order, and those of held-out problems, task after task."""

    def __init__(
        self,
        problems: Sequence[ProblemSet],
        tokenizer: Tokenizer,
        seed: int,
        rules: str = "",
        *,
        render: Render = Tokenizer.render,
    ) -> None:
        """
        Args:
            problems: those that are evaluated alone come last.
            rules: of the environment, at the end of each system message.
            render: see `make_prompt`; demonstrations have no environment.
        """
        self._problems, self._rules, self._render = tuple(problems), rules, render
        self._seed = seed
        self._tokenizers = [tokenizer.with_template_kwargs(each.config.chat_template_kwargs) for each in problems]
        trained = trained_on(problems)
        self._mixture = Mixture([each.weight for each in trained], [len(each.split.train) for each in trained], seed)
        self._train = _numbered([self._made(task, "train") for task in range(len(trained))])
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

    def in_steps(self, phase: str, prompts: int, steps: int) -> Callable[[int], Prompt]:
        """The prompt of each number in a phase of so many steps, of so many prompts each.

        It is that of `train`, or, where tasks have a curriculum, that of `Curriculum.place`.
        """
        curriculum = curriculum_of(self._problems, self._seed, phase, prompts, steps)
        if curriculum is None:
            return partial(self.train, phase=phase)

        def prompt(number: int) -> Prompt:
            task, index = curriculum.place(number)
            return self._train[task][index]

        return prompt

    def demonstration(self, number: int, phase: str) -> tuple[Prompt, list[int]]:
        """The n-th prompt of a phase, and the tokens that supervised tuning teaches behind it."""
        task, index = self._mixture.place(number, phase)
        problems = self._problems[task]
        given = problems.config, self._tokenizers[task], problems.split.shots, self._rules
        problem, prompt = problems.split.train[index], self._train[task][index]
        if self._render is not Tokenizer.render:
            prompt = replace(prompt, tokens=make_prompt(problem, *given).tokens)
        return prompt, demonstration_tokens(problem, *given)

    def _made(self, task: int, side: str) -> list[Prompt]:
        problems, tokenizer = self._problems[task], self._tokenizers[task]
        given = problems.config, tokenizer, problems.split.shots, self._rules, problems.name
        return [make_prompt(problem, *given, render=self._render) for problem in getattr(problems.split, side)]


def asked(problem: Problem, task: TaskConfig, mark: Mark = str) -> str:
    """The user's message: the problem in the task's template, then the instruction.

    Args:
        mark: applied to what comes from the data.
    """
    text = _filled(task.prompt, {"question": problem.question, "examples": problem.examples}, mark)
    return f"{text}\n\n{task.instruction}" if task.instruction else text


def demonstration(problem: Problem, task: TaskConfig, mark: Mark = str) -> str:
    """The answer in the task's template, for few-shot examples and supervised fine-tuning; `mark` as in `asked`."""
    solution = problem.solution or problem.answer
    return _filled(task.completion, {"answer": problem.answer, "solution": solution, "program": problem.program}, mark)


def _filled(template: str, values: Mapping[str, str], mark: Mark) -> str:
    """Fills the template's fields; braces around anything else stay, and so do those in the values."""
    return _PLACE.sub(lambda place: mark(values[place[1]]) if place[1] in values else place[0], template)


def _shown(problem: Problem, task: TaskConfig, shots: Sequence[Problem]) -> list[Problem]:
    return [shot for shot in shots if shot.question != problem.question][: task.shots]


def _system(problem: Problem, task: TaskConfig, rules: str, mark: Mark = str) -> str:
    return "\n\n".join(filter(None, (task.system or mark(problem.system), rules)))


def _messages(problem: Problem, task: TaskConfig, shots: Sequence[Problem], rules: str) -> list[dict[str, str]]:
    system = _system(problem, task, rules)
    messages = [{"role": "system", "content": system}] if system else []
    for shot in _shown(problem, task, shots):
        messages.append({"role": "user", "content": asked(shot, task)})
        messages.append({"role": "assistant", "content": demonstration(shot, task)})
    return [*messages, {"role": "user", "content": asked(problem, task)}]


def _plain(problem: Problem, task: TaskConfig, tokenizer: Tokenizer, shots: Sequence[Problem], rules: str) -> Marked:
    mark = tokenizer.marked
    system = _system(problem, task, rules, mark)
    solved = [asked(shot, task, mark) + demonstration(shot, task, mark) for shot in _shown(problem, task, shots)]
    return Marked("\n\n".join([*([system] if system else []), *solved, asked(problem, task, mark)]))


def _numbered(tasks: Sequence[list[Prompt]]) -> list[list[Prompt]]:
    """The prompts of tasks with indices that go on from one task to the next."""
    found, first = [], 0
    for prompts in tasks:
        found.append([replace(prompt, index=first + prompt.index) for prompt in prompts] if first else prompts)
        first += len(prompts)
    return found
