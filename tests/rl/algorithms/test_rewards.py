"""A reward is the sum of its terms; each is reported, and what could not be graded earns nothing."""

import pytest
from pydantic import ValidationError

from lockstep.rl.algorithms.rewards import RewardConfig, Rewards, means, reward_of, rewarded, share_of_script
from lockstep.rl.types import Judged, Prompt, Reward, Rollout
from lockstep.rl.verdict import Outcome, Verdict, of_credit

PROMPT = Prompt(0, "1 + 1?", (1, 2), "2")
ALL = RewardConfig.model_validate(
    {
        "correctness": 2.0,
        "format": {"weight": 0.5, "pattern": r"(?s)<think>.*</think>.*"},
        "overlong": {"weight": 1.0, "maximum": 100, "cache": 40},
        "length": {"weight": 0.25, "low": 10, "high": 90},
        "language": {"weight": 0.1, "script": "latin"},
    }
)


def judged(text: str, length: int, verdict: Verdict, score: float | None = None) -> Judged:
    rollout = Rollout(0, (1,) * length, (-0.5,) * length, text, "stop", (0,) * length, prompt=PROMPT)
    return Judged(rollout, verdict, score=score)


def test_the_plain_reward_is_the_verdicts() -> None:
    for verdict in (Verdict(Outcome.correct), Verdict(Outcome.incorrect), of_credit(0.25)):
        reward = reward_of(judged("2", 3, verdict), RewardConfig())
        assert reward.total == verdict.reward
        assert reward.terms == {"correctness": verdict.reward}


def test_terms_are_named_weighted_and_add_up() -> None:
    reward = reward_of(judged("<think>да</think>no", 80, of_credit(0.5)), ALL)
    assert reward.terms == pytest.approx(
        {"correctness": 1.0, "format": 0.5, "overlong": -0.5, "length": 0.25, "language": 0.1 * 12 / 14}
    )
    assert reward.total == pytest.approx(sum(reward.terms.values()))


def test_what_could_not_be_graded_has_terms_but_no_reward_and_no_part_in_the_means() -> None:
    lost = reward_of(judged("<think></think>", 95, Verdict(Outcome.ungradable, "the grader died")), ALL)
    assert lost.total is None
    assert "correctness" not in lost.terms
    kept = [reward_of(judged("no", 20, Verdict(outcome)), ALL) for outcome in (Outcome.correct, Outcome.incorrect)]
    assert means([*kept, lost]) == pytest.approx(
        {
            "reward/correctness": 1.0,
            "reward/format": 0.0,
            "reward/overlong": 0.0,
            "reward/length": 0.25,
            "reward/language": 0.1,
        }
    )
    assert means([lost]) == {}


def test_a_reward_models_score_takes_the_place_of_the_verdict_and_the_other_terms_stay() -> None:
    group = [
        judged("<think></think>", 20, Verdict(Outcome.correct)),
        judged("<think></think>", 20, Verdict(Outcome.correct), score=-1.5),
        judged("<think></think>", 20, Verdict(Outcome.ungradable), score=-1.5),
    ]
    by_verdict, *by_model = rewarded(group, ALL)
    assert by_verdict.reward.total == pytest.approx(2.0 + 0.5 + 0.25 + 0.1 * 1)
    for one in by_model:
        assert one.reward.terms == pytest.approx(
            {"score": -3.0, "format": 0.5, "overlong": 0, "length": 0.25, "language": 0.1}
        )
        assert one.reward.total == pytest.approx(-2.15)
    assert group[1].grade == -1.5


def test_the_language_is_that_of_the_letters() -> None:
    assert share_of_script("x = 1, 2, 3", "latin") == 1.0
    assert share_of_script("12 + 34 = 46", "cyrillic") == 1.0
    assert share_of_script("ab де", "latin") == 0.5
    assert share_of_script("答えは42です", "japanese") == 1.0
    assert share_of_script("答えは42です", "chinese") == 0.2
    assert share_of_script("नमस्ते", "devanagari") == 1.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"format": {"pattern": "("}}, "no regular expression"),
        ({"overlong": {"weight": 1.0, "maximum": 10, "cache": 11}}, "cache=11 is above maximum=10"),
        ({"correctness": float("nan")}, "finite"),
        ({"langauge": {}}, "Extra inputs"),
    ],
)
def test_a_bad_reward_is_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        RewardConfig.model_validate(values)


FUNCTIONS = RewardConfig.model_validate(
    {
        "functions": [
            {"function": "mine:brevity", "weight": 0.5},
            {"function": "dir/own.py:rate", "name": "style", "weight": -2},
            {"function": "mine:unused", "weight": 0},
        ]
    }
)


def test_functions_are_terms_by_their_names_and_weights() -> None:
    assert FUNCTIONS.user_functions == {"brevity": "mine:brevity", "style": "dir/own.py:rate"}
    verdict = Verdict(Outcome.correct, terms={"brevity": 0.5, "style": 0.25})
    reward = reward_of(judged("2", 3, verdict), FUNCTIONS)
    assert reward.terms == {"correctness": 1.0, "brevity": 0.25, "style": -0.5}
    assert reward.total == pytest.approx(0.75)


def test_a_task_may_have_a_reward_of_its_own() -> None:
    rewards = Rewards(ALL, {"code": FUNCTIONS, "plain": RewardConfig(correctness=0.5)})
    assert [rewards.of(task) for task in ("", "sums", "code")] == [ALL, ALL, FUNCTIONS]
    assert rewards.user_functions == {"": {}, "code": FUNCTIONS.user_functions, "plain": {}}
    assert Rewards().of("any") == RewardConfig()


def test_means_are_of_the_completions_that_have_a_term() -> None:
    given = [
        Reward(3.0, {"correctness": 1.0, "brevity": 2.0}),
        Reward(0.0, {"correctness": 0.0}),
        Reward(None, {"correctness": 9.0, "style": 1.0}),
    ]
    assert means(given) == {"reward/correctness": 0.5, "reward/brevity": 2.0}


def test_a_rollout_of_which_a_function_says_nothing_has_no_reward() -> None:
    partly = Verdict(Outcome.correct, "reward function style failed", terms={"brevity": 0.5})
    assert reward_of(judged("2", 3, partly), FUNCTIONS).total is None
    assert reward_of(judged("2", 3, partly, score=0.5), FUNCTIONS).total is None
    assert reward_of(judged("2", 3, partly), RewardConfig()).total == 1.0


@pytest.mark.parametrize(
    ("functions", "said"),
    [
        ([{"function": "brevity"}], "'brevity' names no function: write module:function, or file.py:function"),
        ([{"function": "a:f"}, {"function": "b:f"}], "two terms are called f: give a function another name"),
        ([{"function": "a:length"}], "two terms are called length"),
        ([{"weight": 1.0}], "Field required"),
    ],
)
def test_functions_without_names_of_their_own_are_refused(functions: list[dict[str, object]], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RewardConfig.model_validate({"functions": functions})
