"""Every method, baseline and place of the KL takes a step with β > 0, from judged completions to changed weights.

Models are real and tiny: a policy that has moved away from its reference and wrote the completions, a critic, a
teacher. They, the learner and the batches of groups are those of a run, in one process. Not covered here: Ray and
several ranks (`test_controller.py`), steps of several updates (`algorithms/test_methods.py`), stale samples.
"""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from lockstep.data.packing import PlannedRow
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.model.attention.packed import DocumentAttention
from lockstep.model.layers.value_head import ValueHead
from lockstep.model.training.config import OptimizerConfig, TrainerConfig
from lockstep.rl.algorithms.config import RLConfig
from lockstep.rl.algorithms.methods import METHODS, Signal
from lockstep.rl.algorithms.rewards import Rewards
from lockstep.rl.algorithms.samples import teaches
from lockstep.rl.collector.batch_scheduler import Batch, BatchScheduler
from lockstep.rl.learner import Learned, Learner, Models
from lockstep.rl.remote import ActorHandle, Call
from lockstep.rl.rollout.config import EngineConfig, SamplingParams
from lockstep.rl.rollout.loading import load_rollout_engine, to_lockstep
from lockstep.rl.rollout.output_processor import generate
from lockstep.rl.types import Judged, Prompt, Rollout
from lockstep.rl.verdict import Outcome, Verdict
from lockstep.rl.workers.model_worker import ModelWorker
from lockstep.rl.workers.worker_groups import ModelGroup

BETA, LIMIT, SAMPLES, GROUPS = 0.05, 6, 4, 5
BASELINES: tuple[Signal, ...] = get_args(Signal)
PLACES = ("loss", "reward")

YES, NO, UNKNOWN = Outcome.correct, Outcome.incorrect, Outcome.ungradable
VERDICTS = [
    [YES, NO, NO, YES],
    [YES] * 4,
    [NO, UNKNOWN, YES, NO],
    [NO] * 4,
    [UNKNOWN] * 4,
    [NO, NO, NO, YES],
    [YES, YES, NO, YES],
    [NO, YES, NO, YES],
]
"""Of the completions of each group: the first five are those that a step asks for."""
LENGTHS = [(6, 2, 5, 3), (4,) * 4, (3, 6, 1, 5), (2,) * 4, (5,) * 4, (1, 6, 4, 2), (6, 6, 3, 5), (2, 4, 5, 1)]


class LocalWorker(ModelWorker):
    """The one rank of a model, in the world that this process is part of already."""

    def __init__(self, role: str, groups: Groups) -> None:
        super().__init__(0, role, Layout(), TrainerConfig(row_tokens=512))
        self._world = groups

    def _joined(self, address: str, port: int) -> Groups:
        return self._world


class LocalGroup(ModelGroup):
    """A model of one rank in this process: calls end before they return."""

    def __init__(self, worker: ModelWorker) -> None:
        self.layout, self._config = worker.layout, worker.config

        def call(method: str, *args: Any, **named: Any) -> Any:
            return getattr(worker, method)(*args, **named)

        self.workers = [ActorHandle(worker.role, SimpleNamespace(call=SimpleNamespace(remote=call)))]

    def _stored(self, rows: list[PlannedRow]) -> list[PlannedRow]:
        return rows

    def call(self, method: Callable[..., Any], *args: Any, **named: Any) -> list[Any]:
        return ended([worker.call(method, *args, **named) for worker in self.workers])


def ended(calls: Sequence[Call[Any]]) -> list[Any]:
    return [call.ref for call in calls]


class Written:
    """Completions that were written before, by the number of their group."""

    version = 0

    def __init__(self, groups: Sequence[list[Judged]]) -> None:
        self._groups = groups

    def ask(self, prompts: Mapping[int, Prompt], sampling: SamplingParams, samples: int, seed: int) -> None:
        assert all(prompt == self._groups[number][0].rollout.prompt for number, prompt in prompts.items())

    def take(self, group: int) -> list[Judged]:
        return self._groups[group]


@dataclass(frozen=True)
class Known:
    """Of one completion: its verdict, and by plain forward passes what models say of each of its tokens."""

    judged: Judged
    policy: list[float]
    reference: list[float]
    teacher: list[float]
    value: list[float]

    @property
    def length(self) -> int:
        return len(self.policy)


@dataclass
class World:
    """The models, with weights that each test begins with, and completions that the policy wrote."""

    policy: ModelWorker
    critic: ModelWorker
    teacher: ModelWorker
    start: list[Tensor]
    """The policy's weights when RL began, which the reference has."""
    moved: list[Tensor]
    """Those that wrote the completions."""
    critic_start: list[Tensor]
    groups: list[list[Known]]

    @property
    def written(self) -> Written:
        return Written([[known.judged for known in group] for group in self.groups])


def weights(worker: ModelWorker) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in worker.stage.module.parameters()]


@torch.no_grad()
def load(worker: ModelWorker, values: Sequence[Tensor]) -> None:
    for parameter, value in zip(worker.stage.module.parameters(), values, strict=True):
        parameter.copy_(value)


def near(values: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Weights that differ by a few hundredths of what they are."""
    draw = torch.Generator().manual_seed(seed)
    return [v + 0.02 * torch.randn(v.shape, generator=draw) for v in values]


@torch.no_grad()
def plain(worker: ModelWorker, rollout: Rollout) -> list[float]:
    """Log-probabilities, or values, by a forward pass of this text alone."""
    model: Any = worker.stage.module
    text, first = torch.tensor(rollout.prompt.tokens + rollout.tokens), len(rollout.prompt.tokens)
    hidden = model(text, torch.arange(len(text)), DocumentAttention([[len(text)]], text.device))[first - 1 : -1, 0]
    heads = [module.weight[0] for module in model.modules() if isinstance(module, ValueHead)]
    if heads:
        return (hidden @ heads[0]).tolist()
    logp = (hidden @ model.head_weight.T)[:, : model.model.vocabulary].log_softmax(-1)
    return logp.gather(1, text[first:, None])[:, 0].tolist()


def written_by(policy: ModelWorker, checkpoint: Path, groups: Groups) -> list[Rollout]:
    """Completions of an engine that got its weights from the policy."""
    engine = load_rollout_engine(checkpoint, EngineConfig(length=32, cache_gib=0.01), dtype="float32", groups=groups)[0]
    engine.begin_update(0)
    for number in range(policy.open_weights(1 << 20)):
        engine.take(policy.weights(number))
    policy.close_weights()
    engine.end_update()
    prompts = [Prompt(n, "", tuple(range(20 + n, 24 + 2 * n)), "") for n in range(len(VERDICTS))]
    lengths = tuple(length for group in LENGTHS for length in group)
    sampling = SamplingParams(max_new_tokens=LIMIT, exact_lengths=lengths)
    return sorted(generate(engine, prompts, sampling, samples=SAMPLES, seed=3), key=lambda rollout: rollout.sample)


@pytest.fixture(scope="module")
def world(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, groups: Groups) -> World:
    checkpoint = to_lockstep(str(tiny_folder), tmp_path_factory.mktemp("learner"))
    log = logging.getLogger("lockstep")
    before = list(log.handlers), log.propagate, log.level
    policy, critic, teacher = (LocalWorker(role, groups) for role in ("policy", "critic", "teacher"))
    log.handlers, log.propagate, log.level = before
    policy.start("", 0, checkpoint, "float32", OptimizerConfig(), 1.0)
    critic.start("", 0, checkpoint, "float32", OptimizerConfig(), 1.0, head="value")
    teacher.start("", 0, checkpoint, "float32", None, 1.0)
    start = weights(policy)
    load(teacher, near(start, 1))
    load(critic, near(weights(critic), 2))
    load(policy, near(start, 3))
    found = []
    for rollout in written_by(policy, checkpoint, groups):
        judged = Judged(rollout, Verdict(VERDICTS[rollout.prompt.index][rollout.sample % SAMPLES]))
        found.append((judged, plain(policy, rollout), plain(teacher, rollout), plain(critic, rollout)))
    moved = weights(policy)
    load(policy, start)
    known = [Known(j, p, plain(policy, j.rollout), t, v) for j, p, t, v in found]
    grouped = [known[i : i + SAMPLES] for i in range(0, len(known), SAMPLES)]
    return World(policy, critic, teacher, start, moved, weights(critic), grouped)


def config(method: str, place: str, baseline: str, dynamic: bool = False) -> RLConfig:
    """With the method's own estimator of the KL where it may be in the loss."""
    estimator = METHODS[method].kl_estimator
    return RLConfig.model_validate(
        {
            "method": method,
            "advantage": baseline,
            "kl_beta": BETA,
            "kl_place": place,
            "kl_estimator": "k2" if (estimator, place) == ("k1", "loss") else estimator,
            "prompts_per_step": GROUPS,
            "group_size": SAMPLES,
            "flow": {"dynamic_sampling": dynamic} if dynamic else {},
            "optimizer": {"learning_rate": 1e-3},
            "sampling": {"max_new_tokens": LIMIT},
        }
    )


def step(world: World, chosen: RLConfig) -> tuple[Batch, Learned]:
    """One step of RL, by a policy whose reference is what it was when RL began."""
    models = Models(
        critic=LocalGroup(world.critic) if chosen.advantage == "gae" else None,
        critic_optimizer=chosen.optimizer,
        teacher=LocalGroup(world.teacher) if chosen.advantage == "teacher" else None,
    )
    learner = Learner(LocalGroup(world.policy), models, ended, 0, Rewards())
    load(world.policy, world.start)
    load(world.critic, world.critic_start)
    learner.enter(chosen)
    learner.begin(chosen)
    load(world.policy, world.moved)
    stream = BatchScheduler(
        world.written,
        lambda number: world.groups[number][0].judged.rollout.prompt,
        chosen.flow,
        groups=GROUPS,
        samples=SAMPLES,
        sampling=chosen.sampling,
        seed=0,
        reward=partial(learner.rewarded, config=chosen),
        teaches=partial(teaches, config=chosen),
    )
    batch = stream.batch()
    return batch, learner.learn(1, batch.groups, batch.teaching, chosen)


def reward(known: Known, chosen: RLConfig) -> float | None:
    """1, 0 or none, less what DAPO takes off over the last fifth of the limit."""
    value = {YES: 1.0, NO: 0.0, UNKNOWN: None}[known.judged.verdict.outcome]
    over = (known.length - 0.8 * LIMIT) / (0.2 * LIMIT) if chosen.method == "dapo" else 0.0
    return None if value is None else value - min(1.0, max(0.0, over))


def signals(group: Sequence[Known], chosen: RLConfig) -> bool:
    rewards = [r for known in group if (r := reward(known, chosen)) is not None]
    match chosen.advantage:
        case "teacher":
            return True
        case "gae" | "reinforce_pp":
            return len(rewards) > 0
        case "best":
            return any(r > 0 for r in rewards)
        case _:
            return len(set(rewards)) > 1


def distances(known: Known, estimator: str) -> list[float]:
    gaps = [r - p for p, r in zip(known.policy, known.reference, strict=True)]
    return [{"k1": -g, "k2": g * g / 2, "k3": math.exp(g) - 1 - g}[estimator] for g in gaps]


def costs(known: Known, chosen: RLConfig) -> list[float]:
    """What the KL takes off the reward of each token."""
    return [BETA * (chosen.kl_place == "reward") * d for d in distances(known, chosen.kl_estimator)]


Columns = list[list[float] | None]
"""The advantages of each completion's tokens; None where it has none."""


def baselined(group: Sequence[Known], chosen: RLConfig) -> Columns:
    """Advantages of whole completions, where a method compares those of a group by reward less KL."""
    live, whole = signals(group, chosen), chosen.kl_place == "reward" and chosen.denominator == "batch"
    if not live and not whole:
        return [None] * len(group)
    counts = live or chosen.advantage == "best"
    net = [None if (r := reward(k, chosen)) is None else counts * r - sum(costs(k, chosen)) for k in group]
    found = [n for n in net if n is not None]
    mean = sum(found) / max(1, len(found))

    def advantage(place: int, n: float) -> float | None:
        match chosen.advantage:
            case "grpo":
                return (n - mean) / (np.std(found) + 1e-6 if live else 1.0)
            case "rloo":
                return n - (sum(found) - n) / (len(found) - 1)
            case "best":
                return 1.0 if place == net.index(max(found)) and n > 0 else None
            case _:
                return n - mean

    values = [None if n is None else advantage(place, n) for place, n in enumerate(net)]
    return [None if v is None else [v] * k.length for k, v in zip(group, values, strict=True)]


def returned(known: Known, chosen: RLConfig) -> list[float] | None:
    """Of each token, the reward less the KL from here on."""
    total, cost = reward(known, chosen), costs(known, chosen)
    return None if total is None else [total - sum(cost[t:]) for t in range(known.length)]


def estimated(known: Known, chosen: RLConfig) -> list[float] | None:
    """Generalised advantages with γ = 1 and λ = 0.95, of the critic's values."""
    total, cost = reward(known, chosen), costs(known, chosen)
    if total is None:
        return None
    values = [*known.value, 0.0]
    deltas = [(t == known.length - 1) * total - cost[t] + values[t + 1] - values[t] for t in range(known.length)]
    return [sum(0.95 ** (j - t) * deltas[j] for j in range(t, known.length)) for t in range(known.length)]


def normalised(columns: Columns) -> Columns:
    every = [a for column in columns for a in column or ()]
    return [None if c is None else [(a - np.mean(every)) / math.sqrt(np.var(every) + 1e-8) for a in c] for c in columns]


def advantages(groups: Sequence[Sequence[Known]], chosen: RLConfig) -> Columns:
    """By completion of a batch, the advantages of its tokens by the baseline's definition."""
    every = [known for group in groups for known in group]
    match chosen.advantage:
        case "teacher":
            return [[t - p for t, p in zip(known.teacher, known.policy, strict=True)] for known in every]
        case "gae":
            return normalised([estimated(known, chosen) for known in every])
        case "reinforce_pp":
            return normalised([returned(known, chosen) for known in every])
        case "reinforce_pp_baseline":
            return normalised([column for group in groups for column in baselined(group, chosen)])
        case _:
            return [column for group in groups for column in baselined(group, chosen)]


def learned_from(groups: Sequence[Sequence[Known]], chosen: RLConfig) -> list[tuple[Known, list[float]]]:
    """The completions of a batch that are learned from, and the advantages of their tokens.

    Those without a signal have 0 where their KL is in the loss, unless the mean is over the others alone.
    """
    every = [known for group in groups for known in group]
    held = chosen.kl_place == "loss" and chosen.denominator == "batch" and chosen.advantage != "gae"
    pairs = zip(every, advantages(groups, chosen), strict=True)
    return [(k, a or [0.0] * k.length) for k, a in pairs if held or (a is not None and any(a))]


def loss_of(learned: Sequence[tuple[Known, list[float]]], counted: Sequence[Known], chosen: RLConfig) -> float:
    """Where every ratio is 1: a mean over what counts, of −A (or −2A/τ, or −A log p) + β KL."""
    total = 0.0
    for known, of_tokens in learned:
        gains = of_tokens
        if chosen.gain == "sapo":
            gains = [2 * a / (chosen.tau_pos if a > 0 else chosen.tau_neg) for a in of_tokens]
        elif chosen.gain not in ("clipped", "dppo"):
            gains = [a * p for a, p in zip(of_tokens, known.policy, strict=True)]
        cost = BETA * (chosen.kl_place == "loss") * sum(distances(known, chosen.kl_estimator))
        over = {
            "tokens": sum(each.length for each in counted),
            "sequences": len(counted) * known.length,
            "constant": len(counted) * LIMIT,
        }[chosen.aggregation]
        total += (cost - sum(gains)) / over
    return total


REFUSED = {
    ("teacher", "reward", False): "kl_place='reward' has no effect: a teacher judges tokens, and rewards do not count",
    ("teacher", "reward", True): "kl_place='reward' has no effect: a teacher judges tokens, and rewards do not count",
    ("teacher", "loss", True): "with advantage='teacher' every group teaches",
}
"""By baseline, place of the KL and dynamic sampling: the sentence."""


LIKE_GRPO = ("sapo", "dppo", "icepop")
"""Methods that differ from GRPO in the loss alone, and so are tried with its advantage alone."""
STEPS = [(method, baseline) for method in METHODS for baseline in BASELINES if method not in LIKE_GRPO] + [
    (method, "grpo") for method in LIKE_GRPO
]


@pytest.mark.parametrize("dynamic", [False, True], ids=["all", "dynamic"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("method", "baseline"), STEPS)
def test_a_step_is_the_one_that_the_method_defines(
    method: str, place: str, baseline: str, dynamic: bool, world: World
) -> None:
    refused = REFUSED.get((baseline, place, dynamic))
    if refused:
        with pytest.raises(ValueError, match=re.escape(refused)):
            config(method, place, baseline, dynamic)
        return
    chosen = config(method, place, baseline, dynamic)
    batch, learned = step(world, chosen)

    silent = [number for number, group in enumerate(world.groups) if not signals(group, chosen)]
    replaced = [number for number in silent if number < GROUPS] if dynamic else []
    assert [group[0].rollout.prompt.index for group in batch.groups] == list(range(GROUPS + len(replaced)))
    assert batch.replaced == len(replaced)
    if baseline != "teacher":
        assert silent, "every method has a group without a signal before it"
    asked = [group for number, group in enumerate(world.groups[: GROUPS + len(replaced)]) if number not in replaced]

    expected = learned_from(asked, chosen)
    assert expected
    texts = [(known.judged.rollout.prompt.tokens, known.judged.rollout.tokens) for known, _ in expected]
    assert [(tuple(s.prompt), tuple(s.completion)) for s in learned.samples] == texts
    for found, (known, of_tokens) in zip(learned.samples, expected, strict=True):
        assert found.advantage == pytest.approx(of_tokens, abs=1e-4)
        if baseline == "gae":
            goals = np.add(estimated(known, chosen), known.value)
            assert found.returns == pytest.approx(goals, abs=1e-4)

    measured = [d for known, _ in expected for d in distances(known, "k3")]
    assert learned.metrics["kl"] == pytest.approx(np.mean(measured), rel=1e-3)
    assert learned.metrics["kl"] > 1e-3
    every = [known for group in asked for known in group]
    counted = every if chosen.denominator == "batch" else [known for known, _ in expected]
    assert learned.metrics["loss"] == pytest.approx(loss_of(expected, counted, chosen), abs=1e-4)
    assert learned.metrics["grad_norm"] > 1e-3
    assert not any(torch.equal(a, b) for a, b in zip(weights(world.policy), world.moved, strict=True))
    if baseline == "gae":
        assert learned.metrics["critic_grad_norm"] > 1e-3
        changed = zip(weights(world.critic), world.critic_start, strict=True)
        assert not any(torch.equal(a, b) for a, b in changed)


@pytest.mark.parametrize("method", [name for name, each in METHODS.items() if each.kl_estimator == "k1"])
def test_the_estimator_of_a_reward_is_refused_in_the_loss(method: str) -> None:
    with pytest.raises(ValueError, match="gradient whose mean is 0"):
        RLConfig(method=method, kl_beta=BETA, kl_place="loss")
