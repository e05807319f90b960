"""An LLM judge grades in order, asks equal questions once, and never fails for more than its own completions."""

from dataclasses import replace
from threading import Thread
from time import monotonic, sleep

import pytest

from lockstep.rl.algorithms.rewards import FunctionTerm, RewardConfig, reward_of
from lockstep.rl.types import AnswerKey, Judged, Prompt, Rollout, Submission
from lockstep.rl.verdict import Outcome, Verdict, of_credit
from lockstep.rl.verifiers.config import VerifierConfig
from lockstep.rl.verifiers.judge import Judge
from lockstep.rl.verifiers.llm_judge.client import EndpointError
from lockstep.rl.verifiers.llm_judge.grader import LLMJudge, LLMJudgeClosed, trial
from tests.rl.verifiers.llm_judge.scripted_endpoint import CLOSE, HANG, refuses, says, scripted


def submission(text: str) -> Submission:
    return Submission(text, AnswerKey("4", grader="llm_judge"), "2 + 2 =", 1, "stop")


def silent(sentence: str) -> None:
    """Takes notes."""


def test_scores_are_credits_in_order_and_reasons_are_the_judges() -> None:
    texts = ["a", "b", "c"]
    with scripted(says("Fine.\nSCORE: 10"), says("Half.\nSCORE: 5"), says("SCORE: 0")) as server:
        with LLMJudge(server.config(concurrent=1), silent) as judge:
            found = judge.grade([(text, submission(text)) for text in texts])
            assert judge.grade([]) == []
        asked = [body["messages"][0]["content"] for body in server.asked]
    assert [(v.outcome, v.credit) for v in found] == [
        (Outcome.correct, 1.0),
        (Outcome.incorrect, 0.5),
        (Outcome.incorrect, 0.0),
    ]
    assert [v.reason for v in found] == ["LLM judge: Fine.", "LLM judge: Half.", ""]
    assert all(f"\n{text}\n</completion-" in each for text, each in zip(texts, asked, strict=True))


def test_equal_questions_are_asked_once_and_ungradable_ones_again() -> None:
    with scripted(refuses(400), says("SCORE: 3")) as server, LLMJudge(server.config(concurrent=1), silent) as judge:
        first = judge.grade([("a", submission("a"))])
        found = judge.grade([(text, submission(text)) for text in ("a", "b", "a")])
        again = judge.grade([("b", submission("b"))])
        assert len(server.asked) == 3
    assert first[0].outcome is Outcome.ungradable
    assert first[0].reason.startswith("LLM judge: http://127.0.0.1")
    assert [v.credit for v in (*found, *again)] == [0.3] * 4


def test_an_answer_without_a_score_is_asked_for_once_more() -> None:
    script = says("Good!"), says("SCORE: 8"), says("Great!"), says("SCORE: 1", "length")
    with scripted(*script) as server, LLMJudge(server.config(concurrent=1), silent) as judge:
        graded = judge.grade([("a", submission("a"))])[0]
        given_up = judge.grade([("b", submission("b"))])[0]
    assert graded.credit == 0.8
    assert given_up.outcome is Outcome.ungradable
    assert given_up.reason == ("LLM judge: its answer was cut off, at 'SCORE: 1': raise verifier.llm_judge.max_tokens")
    assert [len(body["messages"]) for body in server.asked] == [1, 3, 1, 3]
    assert [message["role"] for message in server.asked[1]["messages"]] == ["user", "assistant", "user"]


def test_a_spent_budget_is_said_once_and_shared_by_the_workers() -> None:
    notes: list[str] = []
    with scripted(says("SCORE: 10")) as server:
        config = VerifierConfig(workers=3, llm_judge=server.config(budget=8))
        with Judge(config, notes.append) as judge:
            found = judge.grade([submission(str(n)) for n in range(6)])
            found += judge.grade([submission("0"), submission("last")])
    outcomes = [v.outcome for v in found]
    assert outcomes.count(Outcome.correct) == 3  # 8 answers are 2 for each of three workers, and one verdict is known
    assert outcomes[-2:] == [found[0].outcome, Outcome.ungradable]
    assert notes[0].startswith("LLM judge: the budget of 2 answers is spent")
    assert notes[1:] == ["the LLM judge judge gave 2 answers, of 20 tokens with their questions"]


def test_a_reward_term_is_added_to_verdicts_of_others() -> None:
    right, wrong = Verdict(Outcome.correct, "because"), of_credit(0.25)
    given = [replace(submission("4"), verdict=right), replace(submission("5"), verdict=wrong), submission("6")]
    with scripted(says("Nice.\nSCORE: 7"), says("Poor.\nSCORE: 2"), says("SCORE: 5"), refuses(400, "long")) as server:
        config = VerifierConfig(llm_judge=server.config(concurrent=1))
        with Judge(config, silent, {"": {"helpful": "llm_judge"}}) as judge:
            found = judge.grade(given)
            asked = len(server.asked)
            lost = judge.grade([given[0], replace(given[1], text="7")])
    assert [(v.outcome, v.credit, dict(v.terms)) for v in found] == [
        (Outcome.correct, None, {"helpful": 0.2}),
        (Outcome.incorrect, 0.25, {"helpful": 0.5}),
        (Outcome.incorrect, 0.7, {"helpful": 0.7}),
    ]
    assert asked == 3  # what graded the last one is its term, too
    assert [v.reason for v in found] == ["because; LLM judge: Poor.", "", "LLM judge: Nice."]
    assert lost[0] == found[0]
    assert (lost[1].credit, dict(lost[1].terms)) == (0.25, {})
    assert "answered 400 (long)" in lost[1].reason


def test_a_task_alone_may_ask_for_a_score() -> None:
    given = [replace(submission(text), task=task) for text, task in (("4", "essay"), ("5", "sums"), ("6", "other"))]
    functions = {
        "": {},
        "essay": {"style": "llm_judge", "tone": "llm_judge"},
        "other": {"length": f"{__name__}:length"},
    }
    with scripted(says("SCORE: 7")) as server:
        with Judge(VerifierConfig(llm_judge=server.config()), silent, functions) as judge:
            found = judge.grade([replace(each, verdict=Verdict(Outcome.correct)) for each in given])
        assert len(server.asked) == 1
    assert [dict(verdict.terms) for verdict in found] == [{"style": 0.7, "tone": 0.7}, {}, {"length": 1.0}]


def length(completion: str) -> float:
    return float(len(completion))


def test_a_missing_score_leaves_no_reward_and_the_accuracy_as_it_is() -> None:
    config = RewardConfig(functions=(FunctionTerm(function="llm_judge", weight=0.5),))
    assert config.user_functions == {"llm_judge": "llm_judge"}
    rollout = Rollout(0, (2,), (-1.0,), "4", "stop", (0,), prompt=Prompt(0, "2 + 2 =", (1,), "4"))
    found = []
    with scripted(says("SCORE: 4"), refuses(400)) as server:
        for _ in range(2):
            with Judge(VerifierConfig(llm_judge=server.config()), silent, {"": config.user_functions}) as judge:
                found += judge.grade([rollout.submission(Verdict(Outcome.correct))])
    graded, lost = (reward_of(Judged(rollout, verdict), config) for verdict in found)
    assert graded.terms == {"correctness": 1.0, "llm_judge": 0.2}
    assert graded.total == 1.2
    assert lost.total is None
    assert found[1].outcome is Outcome.correct


def test_closing_ends_what_is_being_asked() -> None:
    with scripted(HANG) as server:
        judge = LLMJudge(server.config(timeout_s=600), silent)
        raised: list[BaseException] = []

        def grade() -> None:
            try:
                judge.grade([("a", submission("a"))])
            except LLMJudgeClosed as error:
                raised.append(error)

        thread = Thread(target=grade)
        thread.start()
        while not server.asked:
            sleep(0.01)
        before = monotonic()
        judge.close()
        judge.close()
        thread.join(10)
        assert monotonic() - before < 5
        assert [type(error) for error in raised] == [LLMJudgeClosed]
        with pytest.raises(LLMJudgeClosed, match="make a new one"):
            judge.grade([("a", submission("a"))])


def test_a_trial_says_what_a_judge_answers_or_what_to_change() -> None:
    with scripted(CLOSE, says("SCORE: 9")) as server:
        assert trial(server.config()).endswith("gave 9, from 0 to 10, to a right answer of 2 + 2")
    with scripted(says("yes")) as server:
        assert "gave no score to a right answer of 2 + 2 (its last line is no SCORE: n" in trial(server.config())
    with scripted(refuses(401)) as server, pytest.raises(EndpointError, match="give api_key_env"):
        trial(server.config())
