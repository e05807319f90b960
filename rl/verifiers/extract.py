"""The code of a completion: the last fenced block that is Python or says nothing, else the whole text."""

import re

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^\n]*\n", re.MULTILINE)
_PYTHON = ("python", "py", "python3", "")


def code_of(completion: str) -> str:
    """The code that a completion offers.

    A block begins with a line of three or more backticks or tildes and ends with a line of as many; one that never
    ends, as where the completion was cut off, goes to the end of the text. Of blocks that are named python, py, python3
    or nothing the last counts; where there is none, the whole text is the code, as base models write it.
    """
    found = None
    position = 0
    while opening := _FENCE.search(completion, position):
        fence, language = opening.groups()
        closing = re.compile(rf"^ {{0,3}}{re.escape(fence)}{re.escape(fence[0])}*[ \t]*$", re.MULTILINE)
        end = closing.search(completion, opening.end())
        if language.lower() in _PYTHON:
            found = completion[opening.end() : end.start() if end else None]
        if end is None:
            break
        position = end.end()
    return completion if found is None else found
