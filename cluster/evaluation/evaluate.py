"""Evaluates a model on problems: greedy and sampled completions, judged, resumable; behind `lockstep eval`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from lockstep.cluster.evaluation.accuracy import Estimate, Tally, estimate_accuracy, mean_pass_at_k, tally
from lockstep.cluster.evaluation.answer_folder import Answer, AnswerFolder
from lockstep.data.row_reader import left_out
from lockstep.data.tasks.problem import Problem
from lockstep.data.tasks.task import Split, TaskConfig, held_out_split, make_split
from lockstep.data.tasks.user_function import LLM_JUDGE
from lockstep.data.tokenizer import Tokenizer
from lockstep.rl.prompts import make_prompt
from lockstep.rl.rollout.config import EngineConfig, SamplingParams
from lockstep.rl.rollout.loading import open_engine
from lockstep.rl.rollout.output_processor import generate
from lockstep.rl.rollout.protocol import Engine
from lockstep.rl.types import Prompt, Rollout
from lockstep.rl.verifiers.config import VerifierConfig
from lockstep.rl.verifiers.judge import Judge, Note
from lockstep.rl.verifiers.llm_judge.config import SCORING

GREEDY, SAMPLED = "greedy", "sampled"
TOGETHER = 16
"""Completions that are judged and saved together."""


@dataclass(frozen=True)
class Evaluation:
    """Settings of an evaluation: checkpoint, task, sampling, verifier."""

    checkpoint: str
    task: TaskConfig
    seed: int
    sampling: SamplingParams
    """How samples are drawn; greedy completions take its longest length only."""
    verifier: VerifierConfig
    """Of which one worker judges."""
    samples: int = 0
    """Completions of each problem beside the greedy one."""
    ks: tuple[int, ...] = ()
    """For which pass@k is estimated, each at most `samples`."""
    dtype: str = "bfloat16"
    cache_gib: float = 1.0
    train: bool = False
    """Whether the training problems are answered, in the place of the held-out ones, to know their pass rates."""

    def problems(self, split: Split) -> tuple[Problem, ...]:
        """The problems of a split that are answered."""
        return split.train if self.train else split.held_out


UNSEEN = {"pass_rates", "pass_rate", "curriculum", "reward"}
"""Keys of a task that choose what is trained on, and change no completion."""


@dataclass(frozen=True)
class Findings:
    """The results of an evaluation: greedy accuracy, pass@k, and what was not graded."""

    greedy: Estimate
    correct: int
    problems: int
    pass_at: dict[int, Estimate]
    samples: int
    ungradable: int
    """Completions of both kinds without a verdict."""
    overlap: int | None
    """Held-out problems that stand among the training problems, where those were read."""

    @property
    def lines(self) -> list[str]:
        """The results as lines for a terminal."""
        said = [f"{self.correct} of {self.greedy.problems} correct: {_interval(self.greedy)}"]
        for k, estimate in self.pass_at.items():
            said.append(f"pass@{k}: {_interval(estimate)} of {estimate.problems} problems, {self.samples} samples each")
        if self.ungradable:
            said.append(f"ungradable and left out: {self.ungradable} completions")
        if self.overlap:
            said.append(f"of the held-out problems {self.overlap} stand among the training problems, too")
        return said


def evaluate_checkpoint(work: Evaluation, folder: Path, progress: Callable[[int, int], None], note: Note) -> Findings:
    """Generate and judge every completion that the folder lacks, and summarise all of them.

    Args:
        progress: told of completions that are there, and of all that there will be.
        note: takes sentences, on rows that were left out and on what programs are kept in by.

    Raises:
        ValueError: one sentence on what does not fit, before anything is written.
    """
    split = (make_split if work.train else held_out_split)(work.task, work.seed)
    if split.skipped:
        note(left_out(split.skipped))
    config = EngineConfig(cache_gib=work.cache_gib)
    with open_engine(work.checkpoint, work.dtype, config) as (engine, tokenizer):
        tokenizer = tokenizer.with_template_kwargs(work.task.chat_template_kwargs)
        work = _stopped(work, tokenizer)
        prompts = [make_prompt(problem, work.task, tokenizer, split.shots) for problem in work.problems(split)]
        answers = AnswerFolder(folder, _settings(work, prompts, engine))
        with Judge(work.verifier, note) as judge:
            sitting = _Sitting(work, prompts, engine, judge, answers)
            for done in sitting.answer():
                progress(done, len(prompts) * (1 + work.samples))
    findings = _findings(work, split, answers)
    answers.finish(_counts(answers, work.problems(split)), _summary(findings))
    return findings


@dataclass(frozen=True)
class _Sitting:
    """An evaluation in progress: the engine, the prompts, the judge, and the folder for answers."""

    work: Evaluation
    prompts: Sequence[Prompt]
    engine: Engine
    judge: Judge
    answers: AnswerFolder

    def answer(self) -> Iterator[int]:
        """Generate and judge what is missing; yields how many completions there are, now and then."""
        drawn = self.work.sampling
        greedy = SamplingParams(
            temperature=0, max_new_tokens=drawn.max_new_tokens, stop=drawn.stop, stop_tokens=drawn.stop_tokens
        )
        passes = [(GREEDY, greedy, 1), (SAMPLED, self.work.sampling, self.work.samples)]
        yield len(self.answers)
        for mode, sampling, samples in passes:
            for some in _bundles(self._rollouts(mode, sampling, samples)):
                self.answers.add(self._judged(mode, samples, some))
                yield len(self.answers)

    def _rollouts(self, mode: str, sampling: SamplingParams, samples: int) -> Iterator[Rollout]:
        """Completions of the problems of which some are missing; those that are there are drawn alike again."""
        has = self.answers.has
        missing = [p for p in self.prompts if not all(has(mode, p.index, s) for s in range(samples))]
        return generate(self.engine, missing, sampling, samples=samples, seed=self.work.seed)

    def _judged(self, mode: str, samples: int, rollouts: Sequence[Rollout]) -> Iterator[Answer]:
        verdicts = self.judge.grade([rollout.submission() for rollout in rollouts])
        for rollout, verdict in zip(rollouts, verdicts, strict=True):
            yield {
                "mode": mode,
                "problem": rollout.prompt.index,
                "sample": rollout.sample - rollout.prompt.index * samples,
                "outcome": str(verdict.outcome),
                "reward": verdict.reward,
                "reason": verdict.reason,
                "extracted": verdict.extracted,
                "answer": rollout.prompt.answer,
                "finish_reason": rollout.finish_reason,
                "tokens": len(rollout.tokens),
                "prompt": rollout.prompt.text,
                "completion": rollout.text,
            }


def _bundles(rollouts: Iterable[Rollout]) -> Iterator[list[Rollout]]:
    """A few at a time, so that little is lost when the process is killed."""
    some: list[Rollout] = []
    for rollout in rollouts:
        some.append(rollout)
        if len(some) == TOGETHER:
            yield some
            some = []
    if some:
        yield some


def _stopped(work: Evaluation, tokenizer: Tokenizer) -> Evaluation:
    """The evaluation, whose completions also end where the chat template ends a turn."""
    ends = tokenizer.chat_stop_tokens if work.task.chat else ()
    return replace(work, sampling=work.sampling.model_copy(update={"stop_tokens": (*work.sampling.stop_tokens, *ends)}))


def _settings(work: Evaluation, prompts: Sequence[Prompt], engine: Engine) -> dict[str, Any]:
    """All that completions and verdicts depend on; weights and problems by their digests."""
    asked = "".join(f"{p.text}\0{p.answer}\0{p.tests}\0" for p in prompts)
    return {
        "checkpoint": work.checkpoint,
        "weights": engine.weights_digest(),
        "dtype": work.dtype,
        "task": work.task.model_dump(mode="json", exclude=UNSEEN),
        "problems": xxhash.xxh3_64_hexdigest(asked.encode("utf-8", "surrogatepass")),
        "seed": work.seed,
        "samples": work.samples,
        "sampling": work.sampling.model_dump(mode="json"),
    } | _judge_settings(work)


def _judge_settings(work: Evaluation) -> dict[str, Any]:
    """What verdicts depend on where an LLM gives them."""
    judge = work.verifier.llm_judge if work.task.grader == LLM_JUDGE else None
    return {"llm_judge": judge.model_dump(mode="json", include=set(SCORING))} if judge else {}


def _findings(work: Evaluation, split: Split, answers: AnswerFolder) -> Findings:
    tallies = {mode: [_tally(some) for _, some in answers.of(mode)] for mode in (GREEDY, SAMPLED)}
    return Findings(
        greedy=estimate_accuracy(tallies[GREEDY]),
        correct=sum(t.correct for t in tallies[GREEDY]),
        problems=len(work.problems(split)),
        pass_at={k: mean_pass_at_k(tallies[SAMPLED], k, work.seed) for k in work.ks},
        samples=work.samples,
        ungradable=sum(t.ungradable for some in tallies.values() for t in some),
        overlap=split.overlap if split.train and not work.train else None,
    )


def _tally(answers: Sequence[Answer]) -> Tally:
    return tally([answer["outcome"] for answer in answers])


def _counts(answers: AnswerFolder, problems: Sequence[Problem]) -> list[Answer]:
    """Verdicts of each problem, counted; `task.pass_rates` finds a problem by its digest."""
    found: dict[int, dict[str, Any]] = {}
    for mode in (GREEDY, SAMPLED):
        for number, some in answers.of(mode):
            counted = found.setdefault(number, {"problem": number, "digest": problems[number].digest})
            counted[mode] = asdict(_tally(some))
    return list(found.values())


def _summary(findings: Findings) -> dict[str, Any]:
    """As JSON, which has no NaN: an estimate of nothing is null."""
    plain = asdict(findings)
    for estimate in (plain["greedy"], *plain["pass_at"].values()):
        estimate["value"] = estimate["value"] if estimate["problems"] else None
    return plain


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.1%} (95% interval {estimate.low:.1%} to {estimate.high:.1%})"
