"""Makes the environments that a recipe names, and owns the processes that they share."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from lockstep.data.tasks.user_function import BadFunction, load
from lockstep.rl.environments.config import EnvironmentConfig
from lockstep.rl.environments.prime_verifiers import PrimeEnvironment, is_foreign
from lockstep.rl.environments.protocol import Opening
from lockstep.rl.environments.python_tool import PYTHON, python_tool
from lockstep.rl.environments.tool_calls import described
from lockstep.rl.environments.tools import CALCULATOR, Tool, ToolEnvironment
from lockstep.rl.verifiers.code_pool import CodePool


class NoEnvironment(ValueError):
    """`environment.kind` names a class that cannot be imported."""


@contextmanager
def opened(config: EnvironmentConfig) -> Iterator[Opening]:
    """A factory of episodes of the recipe's kind; the processes that they share end with the context.

    Raises:
        NoEnvironment: when `kind` names a class that cannot be imported.
        SandboxError: when programs are to run and this machine cannot isolate them as required.
    """
    with ExitStack() as stack:
        if config.kind == "tools":
            tools = [_tool(name, config, stack) for name in config.tools]
            yield lambda: ToolEnvironment(tools)
        elif config.kind == "gym":
            # Sympy, which graders load, takes most of a second, and a driver only asks what is `told`.
            from lockstep.rl.environments.reasoning_gym import ReasoningGymEnvironment
            from lockstep.rl.verifiers.answer_pool import AnswerPool
            from lockstep.rl.verifiers.judge import grader_of

            graders = stack.enter_context(AnswerPool(config.processes, config.deadline, grader_of("gym"), examples=()))
            yield lambda: ReasoningGymEnvironment(graders)
        else:
            yield _own(config)


def told(config: EnvironmentConfig) -> str:
    """What an environment adds to the system message: its tools; empty for environments without tools."""
    if config.kind != "tools":
        return ""
    known = {"calculator": CALCULATOR.signature, "python": PYTHON}
    return described([known[name].schema for name in config.tools])


def _tool(name: str, config: EnvironmentConfig, stack: ExitStack) -> Tool:
    if name == "calculator":
        return CALCULATOR
    return python_tool(stack.enter_context(CodePool(config.processes)))


def _own(config: EnvironmentConfig) -> Opening:
    """A factory over the user's class: an object for each episode, or one of `verifiers` that serves all."""
    try:
        found = load(config.kind)
    except BadFunction as error:
        raise NoEnvironment(f"environment.kind={config.kind!r}: {error}") from error
    first = found(**config.settings)
    if is_foreign(first):
        return lambda: PrimeEnvironment(first)
    return lambda: found(**config.settings)
