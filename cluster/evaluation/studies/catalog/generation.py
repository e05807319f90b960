"""Temperature sweep: distinct n-grams, self-BLEU, entropy and verified accuracy of sampled completions.

Tokens are drawn one after the other, x_{t+1} ~ p(· | x_{1..t}) (equation 1 of arXiv:2602.00426), from the softmax of
the logits divided by the temperature τ: p_i ∝ exp(z_i / τ) (Part 3.1). The measures, of the completions of one seed:

- distinct-n: different n-grams as a share of all, over the completions of all prompts (arXiv:1510.03055);
- self-BLEU: each completion against the others of its prompt (arXiv:1802.01886), mean over prompts;
- entropy: −log p of the drawn tokens under the policy at τ, mean over tokens. Its expectation is the entropy of that
  policy at the places that it reaches itself, in nats;
- accuracy: share of graded completions that the task's verifier finds correct.
"""

import math
from collections import defaultdict
from typing import Annotated

from pydantic import Field

from lockstep.cluster.evaluation.studies.answers import accuracy_of, answers
from lockstep.cluster.evaluation.studies.diversity import distinct, self_bleu
from lockstep.cluster.evaluation.studies.study import Study, StudySettings, Subject, Values
from lockstep.data.tasks.task import held_out_split
from lockstep.rl.prompts import make_prompt
from lockstep.rl.rollout.config import COLDEST, LARGEST
from lockstep.rl.types import Prompt, Rollout


class GenerationSettings(StudySettings):
    """Settings of the study."""

    temperature: tuple[Annotated[float, Field(ge=COLDEST, le=LARGEST)], ...] = Field(
        (0.3, 0.7, 1.0, 1.5), min_length=1, description="temperatures to sample at"
    )
    samples: int = Field(4, ge=2, description="completions of each prompt, which self-BLEU compares")
    problems: int = Field(16, ge=1, description="held-out problems of the task, at most")
    max_new_tokens: int = Field(64, ge=1, description="tokens of a completion at most")


def measure(subject: Subject, settings: GenerationSettings, temperature: float, seed: int) -> Values:
    """Sample completions of the task's problems at a temperature, and measure them."""
    assert subject.judge is not None
    prompts = _prompts(subject, settings.problems)
    found = answers(
        subject.engine,
        prompts,
        temperature=temperature,
        max_new_tokens=settings.max_new_tokens,
        samples=settings.samples,
        seed=seed,
    )
    accuracy = accuracy_of(subject.judge, found)
    return measures(found) | {"accuracy": accuracy.value, "ungradable": len(found) - accuracy.problems}


def measures(rollouts: list[Rollout]) -> Values:
    """Diversity, entropy and length of completions."""
    by_prompt, texts = defaultdict(list), []
    for rollout in sorted(rollouts, key=lambda each: each.sample):
        texts.append(rollout.tokens.array.tolist())
        by_prompt[rollout.prompt.index].append(texts[-1])
    bleus = [value for value in map(self_bleu, by_prompt.values()) if not math.isnan(value)]
    logps = [logp for rollout in rollouts for logp in rollout.logp.array.tolist()]
    return {
        **{f"distinct-{n}": distinct(texts, n) for n in (1, 2, 3)},
        "self-BLEU": sum(bleus) / len(bleus) if bleus else math.nan,
        "entropy": -sum(logps) / len(logps),
        "length": sum(map(len, texts)) / len(texts),
    }


def _prompts(subject: Subject, most: int) -> list[Prompt]:
    assert subject.workload is not None
    task = subject.workload.task
    split = held_out_split(task, subject.workload.seed)
    tokenizer = subject.tokenizer.with_template_kwargs(task.chat_template_kwargs)
    return [make_prompt(problem, task, tokenizer, split.shots) for problem in split.held_out[:most]]


STUDY = Study(
    settings=GenerationSettings,
    axis="temperature",
    units={
        "distinct-1": "share",
        "distinct-2": "share",
        "distinct-3": "share",
        "self-BLEU": "",
        "entropy": "nats per token",
        "accuracy": "share correct",
        "ungradable": "completions",
        "length": "tokens",
    },
    measure=measure,
    needs_problems=True,
)
