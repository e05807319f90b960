"""Prompts: what a task says stands in them, in chat and plain, and nothing of the problem's own solution does."""

from pathlib import Path

import pytest

from lockstep.data.tasks.code_tests import CodeTests
from lockstep.data.tasks.mixture import ProblemSet, curriculum_of
from lockstep.data.tasks.presets import PRESETS
from lockstep.data.tasks.problem import Problem
from lockstep.data.tasks.task import Split, TaskConfig, draw_shots, make_split
from lockstep.data.tokenizer import Tokenizer, train_tokenizer
from lockstep.rl.prompts import PromptSource, demonstration, make_prompt
from lockstep.rl.verifiers import reasoning_gym
from tests.conftest import TEMPLATE

DATASETS = Path(__file__).parents[3] / "shared" / "datasets"
GSM8K, HUMANEVAL = DATASETS / "gsm8k" / "train.jsonl", DATASETS / "humaneval" / "HumanEval.jsonl.gz"
absent = pytest.mark.skipif(
    not GSM8K.is_file(), reason="GSM8K does not lie in ../shared/datasets beside the repository"
)
SUMS = [Problem(i, f"{i} + 1 =", str(i + 1), solution=f"One after {i}.\n#### {i + 1}") for i in range(6)]


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer(train_tokenizer([TEMPLATE], 300) | {"chat_template.jinja": TEMPLATE})


def test_a_chat_has_the_system_the_shots_as_turns_and_the_instruction(words: Tokenizer) -> None:
    task = TaskConfig(system="You add.", instruction="Answer.", shots=2, completion="So {answer}")
    prompt = make_prompt(SUMS[0], task, words, SUMS[1:4])
    assert prompt.text == (
        "<|im_start|>system\nYou add.<|im_end|>\n"
        "<|im_start|>user\n1 + 1 =\n\nAnswer.<|im_end|>\n<|im_start|>assistant\nSo 2<|im_end|>\n"
        "<|im_start|>user\n2 + 1 =\n\nAnswer.<|im_end|>\n<|im_start|>assistant\nSo 3<|im_end|>\n"
        "<|im_start|>user\n0 + 1 =\n\nAnswer.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.tokens == tuple(words.encode(prompt.text))
    assert (prompt.answer, demonstration(SUMS[0], task)) == ("1", "So 1")


def test_a_plain_text_goes_on_after_the_shots(words: Tokenizer) -> None:
    task = TaskConfig(prompt="Q: {question}\nA:", completion=" {solution}", shots=1, chat=False)
    prompt = make_prompt(SUMS[0], task, words, SUMS[1:3])
    assert prompt.text == "Q: 1 + 1 =\nA: One after 1.\n#### 2\n\nQ: 0 + 1 =\nA:"


def test_a_problem_never_shows_itself(words: Tokenizer) -> None:
    task = TaskConfig(shots=3, completion="{solution}")
    shots = draw_shots(task, SUMS, 0)
    for problem in SUMS:
        text = make_prompt(problem, task, words, shots).text
        assert problem.solution not in text
        assert text.count("####") == 3


def test_braces_are_left_alone(words: Tokenizer) -> None:
    task = TaskConfig(prompt=r"{question} Use {braces} and \boxed{}.", chat=False)
    problem = Problem(0, "Is {answer} {examples}?", "no")
    assert make_prompt(problem, task, words).text == r"Is {answer} {examples}? Use {braces} and \boxed{}."
    assert demonstration(problem, TaskConfig(completion="{answer} {solution}")) == "no no"


def test_what_stands_in_the_data_is_kept_unless_the_task_says_otherwise(words: Tokenizer) -> None:
    problem = Problem(0, "q", "a", system="From the data.")
    assert "From the data." in make_prompt(problem, TaskConfig(), words).text
    text = make_prompt(problem, TaskConfig(system="From the task."), words).text
    assert "From the task." in text
    assert "From the data." not in text


def test_gym_scores_need_the_whole_entry(words: Tokenizer) -> None:
    task = TaskConfig(generator="chain_sum", settings={"max_terms": 2}, grader="gym", train=2, held_out=2)
    for problem in make_split(task, 0).train:
        prompt = make_prompt(problem, task, words)
        assert demonstration(problem, task) == problem.answer
        assert reasoning_gym.grade(f"<answer>{problem.answer}</answer>", prompt.answer).reward == 1.0
        assert reasoning_gym.grade("<answer>no number</answer>", prompt.answer).reward != 1.0
    with pytest.raises(ValueError, match="scores what reasoning-gym made"):
        TaskConfig(generator="sums.jsonl", grader="gym")


def test_prompts_come_as_the_curricula_of_their_tasks_say(words: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "curricula.py").write_text("def first(answer, step, steps): return int(answer) == step\n")
    config = TaskConfig(curriculum=f"{tmp_path}/curricula.py:first")
    sets = [
        ProblemSet(TaskConfig(), Split(tuple(SUMS), (), ""), "all"),
        ProblemSet(config, Split(tuple(SUMS), (), ""), "one"),
    ]
    curriculum = curriculum_of(sets, 3, "rl", 14, 6)
    assert curriculum
    prompt = PromptSource(sets, words, 3).in_steps("rl", 14, 6)
    for number in range(6 * 14):
        task, index = curriculum.place(number)
        found = prompt(number)
        assert (found.task, found.answer, found.index) == (("all", "one")[task], SUMS[index].answer, 6 * task + index)
        assert task == 0 or int(found.answer) == 1 + number // 14
    source = PromptSource(sets[:1], words, 3)
    assert [source.in_steps("rl", 4, 9)(n) for n in range(20)] == [source.train(n, "rl") for n in range(20)]


def test_problems_that_are_evaluated_alone_are_asked_behind_the_others(words: Tokenizer) -> None:
    held_out = [Problem(i, f"{i} − 1 =", str(i - 1)) for i in range(2)]
    split, late = Split(tuple(SUMS), tuple(held_out), ""), Split((), tuple(held_out), "")
    sets = [ProblemSet(TaskConfig(), split, "sums"), ProblemSet(TaskConfig(system="Late."), late, "late", 0.0)]
    with_late, without = (PromptSource(some, words, 0) for some in (sets, sets[:1]))
    assert [(prompt.task, prompt.index) for prompt in with_late.held_out] == [
        ("sums", 0),
        ("sums", 1),
        ("late", 2),
        ("late", 3),
    ]
    assert "Late." in with_late.held_out[2].text
    assert with_late.held_out[:2] == without.held_out
    assert [with_late.train(n, "rl") for n in range(9)] == [without.train(n, "rl") for n in range(9)]


@absent
@pytest.mark.parametrize("name", ["gsm8k", "gsm8k-plain"])
def test_gsm8k_is_asked_as_its_preset_says(name: str, words: Tokenizer) -> None:
    task = TaskConfig(preset=name, generator=str(GSM8K), held_out_from=str(GSM8K.with_name("test.jsonl")), train=50)
    split = make_split(task, 0)
    prompt = make_prompt(split.held_out[0], task, words, split.shots)
    assert prompt.text.count("####") == (5 if name == "gsm8k-plain" else 1)
    assert split.held_out[0].question in prompt.text
    assert demonstration(split.held_out[0], task).endswith("\n#### 18")


@pytest.mark.skipif(
    not HUMANEVAL.is_file(), reason="HumanEval does not lie in ../shared/datasets beside the repository"
)
@pytest.mark.parametrize("name", ["humaneval", "humaneval-plain"])
def test_humaneval_is_asked_as_its_preset_says(name: str, words: Tokenizer) -> None:
    task = TaskConfig(preset=name, generator=str(HUMANEVAL))
    for problem in make_split(task, 0).held_out[:3]:
        prompt = make_prompt(problem, task, words)
        assert isinstance(prompt.tests, CodeTests)
        assert problem.question in prompt.text
        assert problem.solution not in prompt.text
        taught = (problem.solution, f"```python\n{problem.question}{problem.solution}\n```")
        assert demonstration(problem, task) in taught


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_asks_the_question_and_shows_its_places(name: str, words: Tokenizer) -> None:
    task = TaskConfig(preset=name, shots=1)
    tests = CodeTests("assert f()", "f", prefix="def f():\n")
    shot, problem = (Problem(i, f"question {i}", "7", tests, "    return 7", "assert f()") for i in (1, 2))
    prompt = make_prompt(problem, task, words, [shot])
    assert prompt.text.index("question 1") < prompt.text.index("question 2")
    assert not any(
        place in prompt.text for place in ("{question}", "{examples}", "{answer}", "{solution}", "{program}")
    )
