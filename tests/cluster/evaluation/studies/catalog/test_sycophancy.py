"""What the study finds of a model that was taught to follow every hint, and of one that was taught to follow none."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lockstep.cluster.evaluation.studies.catalog.sycophancy import (
    STUDY,
    SycophancySettings,
    hinted_problem,
    measure,
    wrong_answers,
)
from lockstep.cluster.evaluation.studies.continuations import log_likelihoods
from lockstep.cluster.evaluation.studies.study import Subject, Workload
from lockstep.data.batch import sample
from lockstep.data.packing import rows_for_ranks
from lockstep.data.tasks.task import TaskConfig, held_out_split
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.model.formats.huggingface.reader import HuggingFaceFolder, read_text_files
from lockstep.model.loading import build, transformer_of
from lockstep.model.objectives.token_loss import nll
from lockstep.model.training.config import OptimizerConfig, row_rules
from lockstep.model.training.trainer import Trainer
from lockstep.model.transformer import Transformer
from lockstep.rl.prompts import demonstration_tokens, make_prompt
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.verifiers.config import VerifierConfig
from lockstep.rl.verifiers.judge import Judge
from tests.rl.rollout.test_protocol import whole_logits

SETTINGS = SycophancySettings(problems=6, max_new_tokens=4)


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge(VerifierConfig(), note=lambda _: None) as judge:
        yield judge


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TaskConfig:
    file = tmp_path_factory.mktemp("problems") / "letters.jsonl"
    rows = [{"question": f"{letter}?", "answer": str(number)} for number, letter in enumerate("abcdef")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TaskConfig(
        generator=str(file),
        held_out_from=str(file),
        train=1,
        held_out=6,
        chat=False,
        prompt="{question}",
        instruction="",
    )


def subject(folder: Path, groups: Groups, task: TaskConfig, judge: Judge, follows: bool) -> Subject:
    """The tiny model, taught the answers to all questions, and to follow every hint or none."""
    source = HuggingFaceFolder(folder)
    tokenizer, problems = Tokenizer(read_text_files(folder)), held_out_split(task, 0).held_out
    samples = []
    for seed in range(3):
        for problem, wrong in zip(problems, wrong_answers(problems, task, seed), strict=True):
            for hint in (None, problem.answer, wrong):
                prompt = make_prompt(hinted_problem(problem, SETTINGS.hint, hint), task, tokenizer).tokens
                said = replace(problem, answer=hint if follows and hint else problem.answer)
                samples.append(sample(prompt, demonstration_tokens(said, task, tokenizer), weight=1 / 54))
    stage = build(source.config, groups, torch.float32, source)
    trainer = Trainer(stage, groups, OptimizerConfig())
    [rows] = rows_for_ranks(samples, row_rules(Layout(), 1024))
    for _ in range(60):
        trainer.step(rows, nll, 3e-3)
    engine = RolloutEngine(transformer_of(stage), decode=tokenizer.decode, special=tokenizer.special)
    return Subject(engine, tokenizer, Workload(task, 0, VerifierConfig()), judge)


@pytest.mark.parametrize("follows", [True, False])
def test_who_was_taught_to_follow_is_told_from_who_was_not(
    follows: bool, tiny_folder: Path, groups: Groups, task: TaskConfig, judge: Judge
) -> None:
    found = measure(subject(tiny_folder, groups, task, judge, follows), SETTINGS, 0.0, 1)
    assert found.keys() == STUDY.units.keys()
    assert found["accuracy"] == found["accuracy, right hint"] == 1
    assert found["accuracy, wrong hint"] == (0 if follows else 1)
    assert found["agreement, no hint"] == 0
    assert found["agreement"] == found["sycophancy"] == (1 if follows else 0)
    assert found["confidence"] > 0.9
    assert found["Brier score"] < 0.01
    assert (found["confidence, wrong hint"] < 0.1) == (found["Brier score, wrong hint"] > 0.8) == follows


def test_wrong_answers_are_those_of_others_and_depend_on_the_seed(task: TaskConfig) -> None:
    problems = held_out_split(task, 0).held_out
    drawn = [wrong_answers(problems, task, seed) for seed in range(4)]
    assert len(set(drawn)) > 1
    for answers in drawn:
        assert all(answer != problem.answer for answer, problem in zip(answers, problems, strict=True))
        assert {*answers} <= {problem.answer for problem in problems}
    with pytest.raises(ValueError, match="all problems have the same answer"):
        wrong_answers([replace(problem, answer=" 1") for problem in problems], task, 0)
    with pytest.raises(ValueError, match="take a task whose verifier compares answers"):
        wrong_answers(problems, task.model_copy(update={"grader": "gym"}), 0)
    with pytest.raises(ValueError, match="where the answer stands"):
        SycophancySettings(hint="I know it.")


def test_log_likelihoods_are_sums_over_the_continuation(transformer: Transformer) -> None:
    pairs = [((3, 4, 5), (6, 7)), ((3, 4), (9,))]
    engine = RolloutEngine(transformer, decode=str)
    expected = []
    for prompt, continuation in pairs:
        logp = whole_logits(transformer, prompt + continuation).log_softmax(-1)
        expected.append(sum(float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(continuation)))
    assert log_likelihoods(engine, pairs) == pytest.approx(expected, abs=1e-4)
    assert not engine.has_work
