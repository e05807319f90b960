"""The Python tool: runs each call as a program of its own in the code verifier's sandbox, without state."""

import asyncio

from lockstep.rl.environments.tools import Signature, Tool, ToolError
from lockstep.rl.verifiers.code_pool import CodePool

PYTHON = Signature(
    "python",
    "Runs a Python program that starts anew with each call, and returns what it prints.",
    {"code": "the whole program; it has Python's standard library, no network and a few seconds"},
)


def python_tool(pool: CodePool) -> Tool:
    """A tool that runs a program in a sandbox of the pool, within its limits, and returns what it printed."""

    async def run(code: str) -> str:
        seen = await asyncio.to_thread(pool.run, code)
        if seen.problem:
            raise ToolError(f"the program {seen.problem}" + (f"; it printed:\n{seen.output}" if seen.output else ""))
        return seen.output or "(it printed nothing)"

    return Tool(PYTHON, run)
