"""The program is found in what completions are like: thoughts, fences that were forgotten, usage, tests and output."""

import pytest

from lockstep.data.tasks.code_tests import Case, CodeTests
from lockstep.rl.verifiers.code_extraction import code_of

F = CodeTests("assert f(2) == 4", "f")
FREE = CodeTests("candidate = Solution().twice\nassert candidate(2) == 4")
STREAMS = CodeTests(cases=(Case("2\n", "4\n"),))
SOLUTION = "def f(x):\n    return x * 2\n"
READS = "n = int(input())\nprint(2 * n)\n"
METHOD = "class Solution:\n    def twice(self, x):\n        return 2 * x\n"


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("x = 1", "x = 1"),
        ("A\n```python\nx = 1\n```\nB", "x = 1\n"),
        ("```\nx = 1\n```\n```py\nx = 2\n```\n```text\nout\n```", "x = 2\n"),
        ("```python\nx = 1\ny = 2", "x = 1\ny = 2"),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''\n"),
        ("```bash\nls\n```", "```bash\nls\n```"),
        ("~~~Python3\nx = 1\n~~~\n", "x = 1\n"),
        ("```{.python}\r\nx = 1\r\n```\r\n", "x = 1\r\n"),
        ("1. So:\n    ```python\n    if x:\n        y = 1\n    ```\n2. Done.", "if x:\n    y = 1\n"),
        ('```python\ns = """\n    ```\n"""\n```', 's = """\n    ```\n"""\n'),
        ("```python\nx = 1```\nThat is all.", "x = 1"),
        ("", ""),
    ],
)
def test_the_code_is_a_block_of_python_or_the_whole_text(completion: str, code: str) -> None:
    assert code_of(completion, CodeTests()) == code


@pytest.mark.parametrize(
    ("completion", "tests"),
    [
        (SOLUTION + "```\n", F),
        (SOLUTION + "```", F),
        (SOLUTION.rstrip() + "```", F),
        (SOLUTION + "```\n\nThis doubles its argument.", F),
        (SOLUTION + "```\n\nOutput:\n```\n4\n```\n", F),
        (SOLUTION + "```\nUsage:\n```python\nprint(f(2))\n```\n", F),
        (SOLUTION + "\n```python\nassert f(2) == 4\n```\n", F),
        (METHOD + "```\n", FREE),
        (READS + "~~~\n", STREAMS),
        (READS + "```\nInput\n```\n2\n```\nOutput\n```\n4\n```", STREAMS),
    ],
)
def test_a_fence_that_none_has_opened_closes_the_code_before_it(completion: str, tests: CodeTests) -> None:
    assert code_of(completion, tests).strip() in (SOLUTION.strip(), READS.strip(), METHOD.strip())


def test_the_end_of_a_function_that_the_prompt_has_begun_may_have_a_fence_behind_it() -> None:
    begun = CodeTests("def check(c):\n    assert c(2) == 4", "f", prefix="def f(x):\n    '''Doubles.'''\n")
    body = "    return 2 * x\n"
    for completion in (body + "```\n", body + "```\nSo `f(2)` is 4.\n", f"```python\n{body}```\n```\n4\n```\n"):
        assert code_of(completion, begun) == body


@pytest.mark.parametrize(
    "after",
    [
        "Output for 2:\n\n```\n4\n```\n",
        "Usage:\n```python\nprint(f(2))  # 4\n```\n",
        "Tests:\n```python\nimport unittest\nclass T(unittest.TestCase):\n    def test(self): pass\n```\n",
        "```python\nassert f(2) == 4\nassert f(0) == 0\n```\nAll pass.",
        "```py\n>>> f(2)\n4\n```",
        "```\nf(2) = 4\n```",
        "```python\nresult = f(2)\nprint(result)\n",
        "```\nTrue\n```\n```\n[1, 2]\n```",
        "Complexity:\n```\nO(1)\n```",
        "```console\n$ python f.py\n4\n```",
    ],
)
def test_what_follows_a_solution_does_not_take_its_place(after: str) -> None:
    for name in ("python", ""):
        assert code_of(f"Here:\n```{name}\n{SOLUTION}```\n\n{after}", F) == SOLUTION
    assert code_of(f"```python\n{METHOD}```\n{after}", FREE) == METHOD
    assert code_of(f"```python\n{READS}```\n{after}", STREAMS) == READS
    assert code_of(f"```\n{READS}```\n{after}", STREAMS) == READS


def test_a_later_version_and_a_block_that_is_said_to_be_python_count() -> None:
    better = SOLUTION.replace("x * 2", "2 * x")
    assert code_of(f"```python\n{SOLUTION}```\nBetter:\n```\n{better}```", F) == better
    assert code_of("```python\nprint('4')\n```\n```\n4\n```\n", STREAMS) == "print('4')\n"
    assert code_of("```\nprint('4')\n```\n```\n4\n```\n", STREAMS) == "print('4')\n"
    pieces = f"```python\nclass Node: pass\n```\nand\n```python\nclass Node: pass\n{METHOD}```\n```python\nNode()\n```"
    assert code_of(pieces, CodeTests("assert Solution().twice(Node())")) == f"class Node: pass\n{METHOD}"


IDEA = "I could write\n```python\ndef f(x):\n    return 2*x\n```\nbut I am not sure that"


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        (f"<think>\n{IDEA}", ""),
        (f"<think>{IDEA} </think>\n<think>\n{IDEA}", ""),
        (f"Let me see. <thinking>\n{IDEA}", "Let me see."),
        (f"[THINK]{IDEA}", ""),
        (f"<think>{IDEA}</think>\n```python\nx = 1\n```", "x = 1"),
        (f"{IDEA} it is\n</think>\n\n```python\nx = 1\n```", "x = 1"),
        ("<think>\nno\n</think>\nx = 1\n```", "x = 1"),
        ("```python\nx = '</think>'.replace('<think>', '')\n```", "x = '</think>'.replace('<think>', '')"),
    ],
)
def test_thoughts_are_no_answer(completion: str, code: str) -> None:
    assert code_of(completion, F).strip() == code
