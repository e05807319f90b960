"""The grader reads what a completion states as its answer, never a number that merely stands in it."""

import re
import threading
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lockstep.rl.verdict import Outcome, Verdict, of_credit
from lockstep.rl.verifiers.math.extraction import candidates, final_answer
from lockstep.rl.verifiers.math.grader import grade

pytestmark = pytest.mark.filterwarnings("error")

CORRECT = [
    (r"First \boxed{7}. Wait: \boxed{42}", "42"),
    (r"\boxed{42}, as asked: put it in \boxed{}", "42"),
    (r"\boxed{\boxed{5}}", "5"),
    ("#### 42", "42"),
    ("#### 42\nIs that so? 7, 8 and 9 say yes.", "42"),
    ("#### 42 and more text", "42"),
    ("#### 42 Let me check: 40 + 2", "42"),
    ("**Answer: $42$**", "42"),
    ("**Answer:** 42 apples.", "42"),
    ("The final answer is:\n\\[\n42\n\\]", "42"),
    ("The answer is 42 because 40 + 2 = 42.", "42"),
    (r"The answer is $\frac{3}{4}$ of the pie.", "0.75"),
    ("The answer is 41. No, the answer is 42.", "42"),
    ("12 + 34 = 46; 46 + 21 = 67", "67"),
    ("12 + 34 = 46\nso 46 + 21 = 67 apples.", "67"),
    ("42", "42"),
    ("x = 5", "5"),
    ("She has 42 apples.", "42"),
    (r"\boxed{50\%}", "50"),
    (r"\boxed{50\%}", "1/2"),
    (r"\boxed{1{,}234.50}", "1234.5"),
    ("$1,234.50", "1234.5"),
    (r"\boxed{1\frac{1}{2}}", "3/2"),
    ("1 1/2", "1.5"),
    (r"\boxed{1.5\times 10^{3}}", "1500"),
    ("−7", "-7"),
    (r"\boxed{5\text{ cm}}", "5"),
    (r"\boxed{5\text{ apples}}", "5 apple"),
    (r"\boxed{\sqrt{8}}", r"2\sqrt{2}"),
    (r"\boxed{x^2-1}", "(x-1)(x+1)"),
    ("x**2", "x^2"),
    ("2*pi", r"2\pi"),
    (r"\boxed{\{1, 2\}}", "2, 1"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{2^{10}}", "1024"),
    ("(B)", "B"),
    (r"\boxed{\sqrt8}", r"2\sqrt2"),
    ("The answer is no solution.", "No solution"),
    ("12:30", "12:30"),
    ("There are 42 million of them", "42,000,000"),
]

INCORRECT = [
    (r"\boxed{41}", "42"),
    (r"First \boxed{42}. Wait: \boxed{7}", "42"),
    ("The answer is not 42.", "42"),
    ("#### 3 or 4", "3"),
    ("#### 2 million", "2"),
    ("the answer is 3 hours and 20 minutes", "3"),
    ("1, 2, 3, 7, 42", "42"),
    (r"\boxed{x = 1, y = 2}", "2"),
    (r"\boxed{1 2 3}", "6"),
    (r"\boxed{12 + 34}", "46"),
    (r"\boxed{6xy}", "6"),
    ("6", "6xy"),
    (r"\boxed{5!}", "5"),
    (r"\boxed{5\text{ cm}}", r"5\text{ m}"),
    (r"\boxed{0.5\%}", r"50\%"),
    ("0.333", "1/3"),
    ("0.333...", "1/3"),
    ("Paris", "siraP"),
    (r"\boxed{1/0}", "42"),
    (r"\boxed{(1, 2)}", "[1, 2]"),
    ("9" * 5000, "42"),
]

NO_FINAL_ANSWER = [
    "",
    "Numbers: 1 2 3 7 42",
    "1 2 3 7 42",
    "I do not know.",
    "It is not 42.",
    "The sum of x and 42 is wanted",
    r"\boxed{}",
    r"\boxed{42",
    "40 + 2 = 42. Then I add 3",
]


@pytest.mark.parametrize(("response", "answer"), CORRECT)
def test_stated_answer_is_found_and_equal(response: str, answer: str) -> None:
    assert grade(response, answer).outcome is Outcome.correct


@pytest.mark.parametrize(("response", "answer"), INCORRECT)
def test_other_answer_is_incorrect(response: str, answer: str) -> None:
    assert grade(response, answer).outcome is Outcome.incorrect


def rows_of(name: str) -> str:
    """The rows of a file beside this one, without its heading."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8").partition("\n")[2]


def misjudged(rows: str) -> list[tuple[str, Verdict]]:
    """The rows with another verdict than their sign says."""
    wrong = []
    for row in rows.splitlines():
        sign, response, answer = row.split(" | ")
        verdict = grade(re.sub(r"\\n(?![a-z])", "\n", response), answer)
        if verdict.outcome is not (Outcome.correct if sign == "+" else Outcome.incorrect):
            wrong.append((row, verdict))
    return wrong


def test_answers_in_every_usual_form() -> None:
    assert misjudged(rows_of("math_answers.txt")) == []


KINDS = dict(part.split("\n", 1) for part in rows_of("math_kinds.txt").removeprefix("# ").split("\n# "))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_a_kind_that_graders_misjudge(kind: str) -> None:
    assert misjudged(KINDS[kind]) == []


@pytest.mark.parametrize("response", NO_FINAL_ANSWER)
def test_without_a_final_answer_nothing_is_guessed(response: str) -> None:
    assert grade(response, "42") == Verdict(Outcome.incorrect, "no final answer")


@pytest.mark.parametrize("answer", ["", "???", "1/0", r"\frac{1}{", "9" * 5000])
def test_unreadable_reference_is_ungradable_and_has_no_reward(answer: str) -> None:
    verdict = grade("42", answer)
    assert verdict.outcome is Outcome.ungradable
    assert verdict.reward is None
    assert "reference answer" in verdict.reason


def test_rewards_and_extracted_text() -> None:
    assert grade(r"\boxed{42}", "42") == Verdict(Outcome.correct, extracted="42")
    assert [Verdict(outcome).reward for outcome in Outcome] == [1.0, 0.0, None]


def test_partial_credit_is_the_reward_and_only_all_of_it_is_correct() -> None:
    assert [(v.outcome, v.reward) for v in map(of_credit, (0.0, 0.25, 1.0))] == [
        (Outcome.incorrect, 0.0),
        (Outcome.incorrect, 0.25),
        (Outcome.correct, 1.0),
    ]
    for credit in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 1"):
            of_credit(credit)
    with pytest.raises(ValueError, match="could not be graded"):
        Verdict(Outcome.ungradable, credit=0.5)


def test_every_rule_names_its_own_candidate() -> None:
    assert candidates("It is \\boxed{7}. No, the answer is 42.") == {"boxed": "7", "phrase": "42"}
    assert candidates("<think>41</think><answer>40 + 2 = 42</answer>") == {
        "bare": "40 + 2 = 42",
        "equation": "42",
        "tag": "40 + 2 = 42",
    }
    assert candidates("nothing") == {"bare": "nothing"}


@pytest.mark.parametrize(
    "response",
    ["answer:" + "\n" * 20_000, r"\boxed{" * 5_000, r"\text{" * 9_000, "1 " * 9_000, r"\frac{1" * 5_000, "-" * 20_000],
)
@pytest.mark.timeout(20)
def test_long_hostile_text_takes_no_quadratic_time(response: str) -> None:
    assert grade(response, "42").outcome is Outcome.incorrect


def test_formulas_are_graded_off_the_main_thread() -> None:
    verdicts: list[Verdict] = []
    thread = threading.Thread(target=lambda: verdicts.append(grade(r"\boxed{\sqrt{8}}", r"2\sqrt{2}")))
    thread.start()
    thread.join()
    assert verdicts[0].outcome is Outcome.correct


def test_numbers_too_large_to_compute_are_refused_at_once() -> None:
    for tower in ("9^{9^{9^9}}", "10^{10^{10}}", "(10^9)!", "10^{-10^{10}}", r"\frac{1}{9^{9^{9}}}", "1.5^{10^8}"):
        verdict = grade(rf"\boxed{{{tower}}}", "42")
        assert verdict.outcome is Outcome.incorrect
        assert "digits" in verdict.reason
        assert grade("42", tower).outcome is Outcome.ungradable
        assert grade(rf"\boxed{{{tower}}}", tower).outcome is Outcome.correct


def test_what_reading_an_answer_raises_is_incorrect() -> None:
    nested = "x+(" * 300 + "1" + ")" * 300
    assert grade(rf"\boxed{{{nested}}}", "x").outcome is Outcome.incorrect


MARKERS = [r"So \boxed{{{}}} it is, not 7.", "work: 1 + 1\n#### {}\nDone, 100%.", "1, 2, 3. The answer is {}.", "{}"]


@given(st.integers(), st.sampled_from(MARKERS), st.sampled_from(["{}", "{:,}", "{}.0", "${}$", "{}%", "{}/1"]))
def test_every_integer_in_every_spelling_and_place(number: int, marker: str, spelling: str) -> None:
    response = marker.format(spelling.format(number))
    assert grade(response, str(number)).outcome is Outcome.correct
    assert grade(response, str(number + 1)).outcome is Outcome.incorrect


@given(st.fractions(), st.sampled_from(MARKERS))
def test_every_fraction(number: Fraction, marker: str) -> None:
    sign, top, bottom = "-" if number < 0 else "", abs(number.numerator), number.denominator
    response = marker.format(rf"{sign}\frac{{{top}}}{{{bottom}}}")
    assert grade(response, f"{sign}{top}/{bottom}").outcome is Outcome.correct
    assert grade(response, f"{sign}{top + 1}/{bottom}").outcome is Outcome.incorrect


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6), st.sampled_from(MARKERS))
def test_every_decimal_with_separators(number: object, marker: str) -> None:
    assert grade(marker.format(f"{number:,f}"), f"{number:f}").outcome is Outcome.correct


@given(st.lists(st.integers(0, 999), min_size=2))
def test_a_row_of_numbers_is_no_answer(numbers: list[int]) -> None:
    text = "Numbers: " + " ".join(map(str, numbers))
    assert final_answer(text) is None


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(-99, 99), min_size=2, max_size=5, unique=True),
    st.sampled_from([", ", " and ", r" \text{ or } "]),
    st.data(),
)
def test_a_list_is_right_in_any_order_and_only_whole(numbers: list[int], joint: str, data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(numbers))
    reference = ", ".join(map(str, numbers))
    assert grade(rf"\boxed{{{joint.join(map(str, shuffled))}}}", reference).outcome is Outcome.correct
    assert grade(rf"\boxed{{{joint.join(map(str, [*shuffled[1:], 100]))}}}", reference).outcome is Outcome.incorrect
    assert grade(rf"\boxed{{{joint.join(map(str, shuffled[1:]))}}}", reference).outcome is Outcome.incorrect


@settings(max_examples=15, deadline=None)
@given(*[st.integers(-9, 9), st.integers(1, 9)], *[st.sampled_from(["[", "("]), st.sampled_from(["]", ")"])] * 2)
def test_an_interval_is_its_ends_and_its_brackets(low: int, size: int, a: str, b: str, c: str, d: str) -> None:
    given_one, reference = f"{a}{low}, {low + size}{b}", rf"\left{c}{low}, {low + size}\right{d}"
    wanted = Outcome.correct if (a, b) == (c, d) else Outcome.incorrect
    assert grade(rf"\boxed{{{given_one}}}", reference).outcome is wanted
    assert grade(rf"\boxed{{{a}{low}, {low + size + 1}{b}}}", reference).outcome is Outcome.incorrect


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(-9, 9), min_size=2, max_size=2), min_size=1, max_size=3), st.data())
def test_a_matrix_is_its_entries(rows: list[list[int]], data: st.DataObject) -> None:
    def matrix(kind: str, entries: list[list[int]]) -> str:
        return rf"\begin{{{kind}}} " + r" \\ ".join(" & ".join(map(str, row)) for row in entries) + rf" \end{{{kind}}}"

    changed = [list(row) for row in rows]
    changed[data.draw(st.integers(0, len(rows) - 1))][data.draw(st.integers(0, 1))] += 1
    assert grade(rf"\boxed{{{matrix('bmatrix', rows)}}}", matrix("pmatrix", rows)).outcome is Outcome.correct
    assert grade(rf"\boxed{{{matrix('pmatrix', changed)}}}", matrix("pmatrix", rows)).outcome is Outcome.incorrect


@given(st.integers(1, 99), st.integers(1, 99), st.integers(2, 99), st.sampled_from(["", "-"]))
def test_mixed_numbers_and_their_fractions(whole: int, top: int, bottom: int, sign: str) -> None:
    value = f"{sign}{whole * bottom + top}/{bottom}"
    for spelled in (rf"{sign}{whole}\frac{{{top}}}{{{bottom}}}", f"{sign}{whole} {top}/{bottom}"):
        assert grade(rf"\boxed{{{spelled}}}", value).outcome is Outcome.correct


ANY_TEXT = st.text(max_size=60) | st.text(r"\boxed{}frac123 =+^*/.,$#%()[]x", max_size=40)


@settings(max_examples=300, deadline=None)
@example(r"\boxed{\frac{1}{0}}", "42")
@given(ANY_TEXT, st.sampled_from(["42", r"\pi", "x"]))
def test_no_text_raises_and_no_text_makes_a_good_reference_bad(response: str, answer: str) -> None:
    verdict = grade(response, answer)
    assert "reference" not in verdict.reason
