"""Builds prompts from problems: few-shot examples, instruction and chat template, as the task says."""

import re
from collections.abc import Mapping, Sequence

from lockstep.data.tasks.problem import Problem, entry_text
from lockstep.data.tasks.task import TaskConfig
from lockstep.data.tokenizer import Tokenizer
from lockstep.rl.types import Prompt

_PLACE = re.compile(r"\{([a-z]+)\}")


def make_prompt(
    problem: Problem, task: TaskConfig, tokenizer: Tokenizer, shots: Sequence[Problem] = (), rules: str = ""
) -> Prompt:
    """The prompt of a problem, with its tokens and what its verifier needs.

    Args:
        shots: solved problems to show before it, one more than `task.shots`: where it is one of them, the others serve.
        rules: of the environment, at the end of the system message.
    """
    system = "\n\n".join(filter(None, (task.system or problem.system, rules)))
    shown = [shot for shot in shots if shot.question != problem.question][: task.shots]
    text = _conversation(problem, task, tokenizer, shown, system) if task.chat else _plain(problem, task, shown, system)
    scored = problem.entry if task.grader == "gym" else None
    answer = entry_text(scored, task.settings) if scored else problem.answer
    tokens = tuple(tokenizer.encode(text))
    return Prompt(problem.index, text, tokens, answer, problem.tests, demonstration(problem, task))


def asked(problem: Problem, task: TaskConfig) -> str:
    """The user's message: the problem in the task's template, then the instruction."""
    text = _filled(task.prompt, {"question": problem.question, "examples": problem.examples})
    return f"{text}\n\n{task.instruction}" if task.instruction else text


def demonstration(problem: Problem, task: TaskConfig) -> str:
    """The answer in the task's template, for few-shot examples and supervised fine-tuning."""
    solution = problem.solution or problem.answer
    return _filled(task.completion, {"answer": problem.answer, "solution": solution, "program": problem.program})


def _filled(template: str, values: Mapping[str, str]) -> str:
    """Fills the template's fields; braces around anything else stay, and so do those in the values."""
    return _PLACE.sub(lambda place: values.get(place[1], place[0]), template)


def _conversation(
    problem: Problem, task: TaskConfig, tokenizer: Tokenizer, shown: Sequence[Problem], system: str
) -> str:
    messages = [{"role": "system", "content": system}] if system else []
    for shot in shown:
        messages.append({"role": "user", "content": asked(shot, task)})
        messages.append({"role": "assistant", "content": demonstration(shot, task)})
    return tokenizer.chat([*messages, {"role": "user", "content": asked(problem, task)}])


def _plain(problem: Problem, task: TaskConfig, shown: Sequence[Problem], system: str) -> str:
    solved = [asked(shot, task) + demonstration(shot, task) for shot in shown]
    return "\n\n".join([*([system] if system else []), *solved, asked(problem, task)])
