"""Finds the program in a completion: of its fenced blocks the one that solves the problem, and nothing of its thoughts.

Blocks of usage, tests or output often follow a solution. So the tests decide which block is meant: the last one that
defines what they call or, where they are cases of input and output, the last one that reads input.
"""

import ast
import builtins
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lockstep.data.tasks.code_tests import CodeTests, tested_name

_TAG = r"(?:think|thinking|thoughts?|reasoning)"
_CLOSED = rf"(?:</{_TAG}>|\[/THINK\])"
_THOUGHT = re.compile(rf"(?:^[ \t]*<{_TAG}>|<{_TAG}>(?=\s)|^\[THINK\]).*?(?:{_CLOSED}|\Z)", re.DOTALL | re.MULTILINE)
_END_OF_THOUGHT = re.compile(rf"{_CLOSED}[ \t]*$", re.MULTILINE)
"""Of a thought that the prompt has begun; the same within a line of code is text."""

_FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})[ \t]*([^\n`]*?)[ \t\r]*(?:\n|\Z)", re.MULTILINE)
_PYTHON = re.compile(r"\{?\.?(?:python|py)[\d.]*(?![\w-])", re.IGNORECASE)
_FENCE_BEHIND_CODE = re.compile(r"`{3,}[ \t\r]*$", re.MULTILINE)
_READS_INPUT = re.compile(r"\binput\s*\(|\bstdin\b|\bopen\s*\(\s*0|/dev/stdin|\bos\.read\s*\(\s*0")


@dataclass(frozen=True)
class _Block:
    """Code, and what its fence calls it; None for code that no fence opens."""

    code: str
    language: str | None

    @property
    def named(self) -> bool:
        """Whether it is said to be Python."""
        return self.language is None or bool(_PYTHON.match(self.language))


def code_of(completion: str, tests: CodeTests) -> str:
    """The program in a completion: a block of Python, or the whole text as base models write it.

    A block begins with a line of three or more backticks or tildes and ends with a line of as many; one that never
    ends goes to the end of the text. A fence behind code that none has opened closes what the prompt has opened.
    Thoughts in tags are no part of the answer, and what follows a tag that nothing closes is none.
    """
    answer = _THOUGHT.sub("", completion)
    if begun := _END_OF_THOUGHT.search(answer):
        answer = answer[begun.end() :]
    blocks = list(_blocks(answer, tests.prefix))
    python = [block for block in blocks if block.named or not block.language]
    if not python:
        return _FENCE_BEHIND_CODE.sub("", answer) if not blocks else answer
    return _chosen(python, tests).code if len(python) > 1 else python[0].code


def _blocks(answer: str, prefix: str) -> Iterator[_Block]:
    """All blocks in order; the first may be code that stands before every fence."""
    fence = _FENCE.search(answer)
    if fence is None:
        return
    before, closes = answer[: fence.start()], not fence[3]
    if _is_code(before, prefix) or (closes and before.strip() and not answer[fence.end() :].strip()):
        yield _Block(before, None)
        fence = _FENCE.search(answer, fence.end()) if closes else fence
    while fence:
        code, end = _fenced(answer, fence)
        yield _Block(code, fence[3])
        fence = _FENCE.search(answer, end)


def _fenced(answer: str, fence: re.Match[str]) -> tuple[str, int]:
    """The code behind an opening fence, moved to the left by the fence's own indentation, and where it ends."""
    indent, marks, _ = fence.groups()
    closing = re.compile(rf"^[ \t]{{0,{len(indent) + 3}}}{marks}{marks[0]}*[ \t\r]*$", re.MULTILINE)
    end = closing.search(answer, fence.end()) or _FENCE_BEHIND_CODE.search(answer, fence.end())
    code = answer[fence.end() : end.start() if end else None]
    moved = re.sub(rf"^[ \t]{{0,{len(indent)}}}", "", code, flags=re.MULTILINE) if indent else code
    return moved, end.end() if end else len(answer)


def _chosen(blocks: list[_Block], tests: CodeTests) -> _Block:
    """Of several blocks of Python the one that solves the problem; later ones improve on earlier ones."""
    if tests.program:
        names = _tested_names(tests)
        found = [sum(map(bool, (_definition(name).search(block.code) for name in names))) for block in blocks]
        if most := max(found):
            return [block for block, count in zip(blocks, found, strict=True) if count == most][-1]
    elif reading := [block for block in blocks if _READS_INPUT.search(block.code)]:
        return reading[-1]
    named = [block for block in blocks if block.named] or blocks
    return ([block for block in named if _is_code(block.code, tests.prefix)] or named)[-1]


def _tested_names(tests: CodeTests) -> Iterable[str]:
    """What the program has to define: the entry point, or what the tests read and do not define themselves."""
    if tests.entry_point:
        return [tested_name(tests.entry_point)]
    try:
        nodes = list(ast.walk(ast.parse(tests.program)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    names = [node for node in nodes if isinstance(node, ast.Name)]
    own = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    return {node.id for node in names} - own - set(vars(builtins))


def _definition(name: str) -> re.Pattern[str]:
    """Matches where a source defines a name at its top, be the rest of it whole or not."""
    name = re.escape(name)
    return re.compile(rf"^(?:async[ \t]+)?(?:def|class)[ \t]+{name}\b|^{name}[ \t]*(?::[^=\n]*)?=[^=]", re.MULTILINE)


def _is_code(text: str, prefix: str) -> bool:
    """Whether a text does something as Python, alone or where it continues the prefix: prose and output do not."""
    begun = prefix + text if prefix and text[:1] in (" ", "\t") else text
    try:
        body = ast.parse(begun).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(map(_does_something, body))


def _does_something(node: ast.stmt) -> bool:
    """Not so a value on its own, as "42" or "yes", nor a remark with a colon, as "Output: x"."""
    if isinstance(node, ast.Expr):
        return any(isinstance(part, ast.Call) for part in ast.walk(node))
    return not (isinstance(node, ast.AnnAssign) and node.value is None)
