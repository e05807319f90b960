"""Answers that hang sympy, eat memory or nest without end cost their own row and a restart, and no other verdict."""

import time
from collections.abc import Iterator
from itertools import cycle, islice

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lockstep.rl.verdict import Outcome
from lockstep.rl.verifiers.answer_pool import AnswerPool

HANGING = [
    r"\boxed{(x+y+z+w)^{200}}",
    r"\boxed{\int_0^1 e^{x^{x}} \sin(x^{3}) dx}",
    r"\boxed{\binom{10^9}{10^8}}",
    r"\boxed{\frac{x^{5000}-1}{x-1}}",
]
HOSTILE = [
    r"\boxed{9^{9^{9^9}}}",
    r"\boxed{9**9**9**9}",
    r"\boxed{10^{-10^{10}}}",
    r"\boxed{2^{100000000}}",
    r"\boxed{(10^9)!}",
    r"\boxed{\sum_{i=1}^{10^{9}} \frac{1}{i}}",
    r"\boxed{\prod_{i=1}^{10^9} i}",
    r"\boxed{1.0000001^{10^{12}}}",
    r"\boxed{\sin(\sin(\sin(\sin(10^{10000}))))}",
    r"\boxed{x^{x^{x^{x}}}}",
    r"\boxed{" + "(" * 5000 + "41" + ")" * 5000 + "}",
    r"\boxed{" + "{" * 5000 + "41" + "}" * 4999 + "}",
    "(" * 400 + "1" + ")" * 400,
    r"\boxed{" + r"\sqrt{" * 150 + "2" + "}" * 150 + "}",
    r"\boxed{" + r"\frac{1}{1+" * 60 + "2" + "}" * 60 + "}",
    r"\boxed{" * 100_000,
    "<answer>" * 100_000,
    "1" * 1_000_000,
    r"\boxed{" + "9" * 1_000_000 + "}",
    "x " * 500_000,
    "answer to " * 50_000,
    "the answer is " * 50_000,
    "#### " * 100_000,
    "*a" * 200_000,
    "$1" * 200_000,
    "1," * 200_000,
    "a = " * 100_000,
    "-" * 300_000,
    "\n" * 500_000,
    r"\text{" * 50_000,
    r"\boxed{nan}",
    r"\boxed{\infty}",
    r"\boxed{1e999}",
    r"\boxed{0/0}",
    "\\boxed{\u202e24\u202c}",
    "\\boxed{٤٢}",
    "\x00\\boxed{\x00}",
    "\ud800 \\boxed{\udfff}",
]
PLAIN = [
    (r"\boxed{42}", "42", Outcome.correct),
    (r"\boxed{41}", "42", Outcome.incorrect),
    ("#### 1,234 and more", "1234", Outcome.correct),
    (r"The answer is $\frac{3}{4}$.", "0.75", Outcome.correct),
    (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", Outcome.correct),
    (r"\boxed{x^2-1}", "(x-1)(x+1)", Outcome.correct),
    (r"\boxed{(1, 2]}", "[1, 2]", Outcome.incorrect),
    ("I do not know.", "42", Outcome.incorrect),
    ("42", "???", Outcome.ungradable),
]


@pytest.fixture(scope="module")
def pool() -> Iterator[AnswerPool]:
    with AnswerPool(1, 10.0) as pool:
        yield pool


def grade_among(hostile: list[str], count: int, workers: int, deadline: float) -> float:
    """Seconds for `count` answers with the hostile ones spread among them, all of which are incorrect."""
    plain = list(islice(cycle(PLAIN), count - len(hostile)))
    every = len(plain) // len(hostile)
    rows = [(response, answer, outcome) for response, answer, outcome in plain]
    items: list[tuple[str, str, Outcome | None]] = []
    for place, response in enumerate(hostile):
        items += [*rows[place * every : (place + 1) * every], (response, "42", None)]
    items += rows[len(hostile) * every :]
    with AnswerPool(workers, deadline) as pool:
        pool.grade([(response, answer) for response, answer, _ in items[:1]] * workers)
        start = time.monotonic()
        verdicts = pool.grade([(response, answer) for response, answer, _ in items])
        seconds = time.monotonic() - start
    found = list(zip(items, verdicts, strict=True))
    assert len(found) == count
    assert [(i, v) for i, v in found if i[2] is not None and v.outcome is not i[2]] == []
    assert [(i[0][:60], v) for i, v in found if i[2] is None and v.outcome is not Outcome.incorrect] == []
    return seconds


@pytest.mark.timeout(120)
def test_a_hanging_answer_and_hostile_ones_cost_no_neighbour() -> None:
    grade_among([HANGING[1], *HOSTILE[:14], *HOSTILE[-8:]], 200, workers=1, deadline=3.0)


@pytest.mark.timeout(120)
def test_a_hanging_reference_is_ungradable_and_the_same_as_an_answer_incorrect() -> None:
    integral = r"\int_0^1 e^{x^{x}} \sin(x^{3}) dx"
    with AnswerPool(2, 1.0) as pool:
        verdicts = pool.grade(
            [("42", integral), (rf"\boxed{{{integral}}}", "42"), (rf"\boxed{{{integral}}}", integral)]
        )
    assert [str(verdict.outcome) for verdict in verdicts] == ["ungradable", "incorrect", "correct"]


FRAGMENTS = r"""
    \boxed{ } { ( ) [ ] \frac \sqrt \sqrt[3] ^ _ - + * / = < > \le \ne \cup \in \pm , . ; : | \{ \} \\ & \text{ \mathrm{
    \begin{cases} \end{cases} \begin{pmatrix} \end{pmatrix} \infty \pi \ldots \mid \mathbb{R} or and otherwise i e x t 0
    1 7 42 0.5 1.5M % \% $ # #### <think> </think> <answer> </answer> answer: ! \sin \ln \log \circ \overline{ \left
    \right
"""
ANY_FRAGMENTS = st.lists(st.sampled_from(FRAGMENTS.split()), max_size=14).map(" ".join) | st.text(max_size=30)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(ANY_FRAGMENTS, ANY_FRAGMENTS), min_size=20, max_size=40))
@pytest.mark.timeout(300)
def test_no_fragments_raise_or_hang_whether_answer_or_reference(pool: AnswerPool, pairs: list[tuple[str, str]]) -> None:
    for verdict in pool.grade(pairs):
        assert not verdict.reason.startswith(("deadline", "grader", "nothing heard"))
    for response, _ in pairs:
        assert pool.grade([(response, "42")])[0].outcome is not Outcome.ungradable


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_ten_thousand_answers_with_one_in_a_hundred_pathological() -> None:
    hostile = list(islice(cycle(HANGING + HOSTILE), 100))
    seconds = grade_among(hostile, 10_000, workers=2, deadline=4.0)
    print(f"10,000 answers in {seconds:.1f} s")
    assert seconds < 600
