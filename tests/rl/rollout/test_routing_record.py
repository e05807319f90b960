"""In exact numerics engines record what the trainer would choose; in others the trainer takes what they record."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lockstep.cluster.checks.mismatch import reported
from lockstep.data.batch import TokenBatch
from lockstep.data.packing import RowRules, documents, rows_for_ranks
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.attention.kv_cache import kinds
from lockstep.model.config import ModelConfig, MoEConfig
from lockstep.model.layers.routing import Recorder
from lockstep.model.loading import build, transformer_of
from lockstep.model.objectives.token_loss import nll
from lockstep.model.training.config import OptimizerConfig
from lockstep.model.training.device_batch import to_device
from lockstep.model.training.forward import score
from lockstep.model.training.trainer import Trainer
from lockstep.model.weights.initialization import RandomWeights
from lockstep.rl.algorithms.estimates import columns, of_tokens, scores_of, with_experts
from lockstep.rl.rollout.config import EngineConfig, RolloutConfig, SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.output_processor import OutputProcessor, RolloutRequest, generate
from lockstep.rl.types import Completion, Prompt, Rollout, answered
from lockstep.rl.weight_sync.shards import shards_of

MODEL = ModelConfig(
    layers=3,
    width=24,
    heads=4,
    kv_heads=2,
    head_dim=12,
    intermediate=16,
    vocabulary=61,
    context=256,
    window=21,
    full_layers=(1,),
    moe=MoEConfig(experts=7, experts_per_token=3, intermediate=20),
)
"""Two of its layers see a window, whose blocks are given back."""
FEW = dict.fromkeys((5, 6), 20.0)
"""A bias that leaves so few tokens that what is written repeats itself."""
DRAW = np.random.default_rng(0)
PROMPTS = [Prompt(i, "", tuple(DRAW.integers(0, 61, n).tolist()), "") for i, n in enumerate((1, 60, 17, 48, 33, 5))]


def trainer_of(groups: Groups, dtype: torch.dtype, numerics: Any, seed: int = 3) -> Trainer:
    stage = build(MODEL, groups, dtype, RandomWeights(MODEL, seed, deviation=0.3), numerics)
    return Trainer(stage, groups, OptimizerConfig(), temperature=0.9)


def engine_of(trainer: Trainer, blocks: int = 60, **options: Any) -> RolloutEngine:
    config = EngineConfig.model_validate({"length": 200, "sequences": 8, "budget": 50} | options)
    counts = [blocks] * len(kinds(MODEL))
    return RolloutEngine(trainer.transformer, config, decode=str, blocks=counts, records_routing=True)


def row_of(rollouts: Sequence[Rollout]) -> TokenBatch:
    """All rollouts and their records in one row, in which groups are trees."""
    [[row]] = rows_for_ranks(with_experts(of_tokens(rollouts), rollouts), RowRules(budget=1 << 20))
    return row


@torch.no_grad()
def own_choice(trainer: Trainer, row: TokenBatch) -> np.ndarray:
    """Experts of the tokens of a row that the trainer's routers choose, [T, L, K]."""
    transformer, recorder = trainer.transformer, Recorder()
    batch = to_device(row, trainer.groups, MODEL.kv_heads, torch.device("cpu"), transformer.numerics)
    transformer(batch.tokens, batch.positions, batch.attend, route=recorder)
    return recorder.experts(torch.int16).numpy()


def logp(trainer: Trainer, row: TokenBatch, rollouts: Sequence[Rollout]) -> np.ndarray:
    scores = [each.numpy() for each in score(trainer.stage, trainer.groups, [row], 0.9)]
    return np.concatenate(columns([scores_of([row], scores)], [len(r.tokens) for r in rollouts]))


def check(trainer: Trainer, rollouts: Sequence[Rollout]) -> None:
    """Every token of a row has a record, which is the trainer's own choice, and replay changes no bit."""
    for each in rollouts:
        assert each.experts is not None
        assert each.experts.dtype == np.uint8
        assert each.experts.shape == (len(each.prompt.tokens) + len(each.tokens) - 1, MODEL.layers, 3)
    row = row_of(rollouts)
    assert row.experts is not None
    known = (row.experts >= 0).all((1, 2))
    assert known.sum() == sum(map(len, documents(of_tokens(rollouts))))
    np.testing.assert_array_equal(row.experts[known], own_choice(trainer, row)[known])
    replayed, own = logp(trainer, row, rollouts), logp(trainer, replace(row, experts=None), rollouts)
    np.testing.assert_array_equal(replayed.view(np.uint32), own.view(np.uint32))
    said, by_model = reported(rollouts), np.concatenate([r.written or (True,) * len(r.tokens) for r in rollouts])
    np.testing.assert_array_equal(replayed[by_model].view(np.uint32), said[by_model].view(np.uint32))


def recorded_equals_recomputed(groups: Groups, dtype: torch.dtype, blocks: int, speculate: int) -> tuple[int, ...]:
    trainer = trainer_of(groups, dtype, "exact")
    engine = engine_of(trainer, blocks, speculate=speculate)
    sampling = SamplingParams(temperature=0.9, max_new_tokens=20, logit_bias=FEW if speculate else {})
    rollouts = list(generate(engine, PROMPTS, sampling, samples=2, seed=1))
    check(trainer, rollouts)
    found = engine.statistics
    return found.preemptions, found.cached_prompt_tokens, found.accepted_tokens


@pytest.mark.parametrize(("dtype", "blocks", "speculate"), [(torch.float32, 9, 0), (torch.bfloat16, 60, 4)], ids=str)
def test_recorded_equals_recomputed(dtype: torch.dtype, blocks: int, speculate: int, groups: Groups) -> None:
    preemptions, shared, accepted = recorded_equals_recomputed(groups, dtype, blocks, speculate)
    assert preemptions > 0 or speculate
    assert accepted > 20 or not speculate
    assert shared > 90


def test_recorded_equals_recomputed_at_two_tensor_ranks(worlds: RankPool) -> None:
    worlds.run(Layout(tensor=2), recorded_equals_recomputed, torch.float32, 60, 0)


def test_a_prefix_that_another_request_left_has_its_record(groups: Groups) -> None:
    trainer = trainer_of(groups, torch.float32, "exact")
    engine, sampling = engine_of(trainer), SamplingParams(temperature=0.9, max_new_tokens=10)
    first = list(generate(engine, PROMPTS[1:2], sampling, samples=1, seed=1))
    again = list(generate(engine, PROMPTS[1:2], sampling, samples=1, seed=2))
    assert engine.statistics.cached_prompt_tokens >= 48
    check(trainer, first)
    check(trainer, again)


def written(engine: RolloutEngine, requests: Sequence[RolloutRequest]) -> list[Completion]:
    processor, found = OutputProcessor(engine), list[Completion]()
    for request in requests:
        processor.add(request)
    while processor.has_work:
        found += processor.step()
    return sorted(found, key=lambda completion: completion.sample)


def test_tokens_of_environments_are_recorded_by_the_pass_that_reads_them(groups: Groups) -> None:
    trainer = trainer_of(groups, torch.float32, "exact")
    engine, other = engine_of(trainer), engine_of(trainer)
    sampling = SamplingParams(temperature=0.9, max_new_tokens=40, exact_lengths=(7, 5))
    requests = [RolloutRequest(i, prompt.tokens, sampling, 1) for i, prompt in enumerate(PROMPTS)]
    first = [answered(c, [9, 8, 7]) for c in written(engine, requests)]
    for each, prompt in zip(first, PROMPTS, strict=True):
        assert each.experts is not None
        assert len(each.experts) == len(prompt.tokens) + len(each.tokens) - 4
    going_on = [replace(request, begun=begun) for request, begun in zip(requests, first, strict=True)]
    whole = [*written(engine, going_on[:3]), *written(other, going_on[3:])]
    check(trainer, [c.with_prompt(p) for c, p in zip(whole, PROMPTS, strict=True)])


@pytest.mark.parametrize("on_update", ["restart", "pause"])
def test_a_record_is_that_of_the_weights_behind_which_the_next_token_was_drawn(on_update: str, groups: Groups) -> None:
    old, new = (trainer_of(groups, torch.float32, "exact", seed) for seed in (3, 4))
    engine = engine_of(trainer_of(groups, torch.float32, "exact"), on_update=on_update)
    processor, prompt = OutputProcessor(engine), PROMPTS[2]
    processor.add(RolloutRequest(0, prompt.tokens, SamplingParams(temperature=0.9, max_new_tokens=12), 1))
    for _ in range(5):
        processor.step()
    engine.receive(1, shards_of(new.transformer))
    done: list[Completion] = []
    while processor.has_work:
        done += processor.step()
    versions = list(done[0].weight_versions)
    assert versions == [0] * 5 + [1] * 7
    row = row_of([done[0].with_prompt(prompt)])
    assert row.experts is not None
    by_old, by_new = own_choice(old, row), own_choice(new, row)
    before = len(prompt.tokens) + 4
    np.testing.assert_array_equal(row.experts[:before], by_old[:before])
    assert (by_old[:before] != by_new[:before]).any()
    if on_update == "restart":
        np.testing.assert_array_equal(row.experts[before : before + 7], by_new[before : before + 7])


class Counted(Recorder):
    """A route to given experts that counts naively which tokens routers would have sent elsewhere."""

    def __init__(self, experts: np.ndarray) -> None:
        super().__init__()
        self.given, self.differs, self.known = experts.tolist(), 0, 0

    def __call__(self, layer: int, chosen_TK: Tensor) -> Tensor:
        routed = chosen_TK.clone()
        for place, own in enumerate(chosen_TK.tolist()):
            recorded = self.given[place][layer]
            if recorded[0] >= 0:
                self.known += 1
                self.differs += {*recorded} != {*own}
                routed[place] = torch.tensor(recorded)
        return super().__call__(layer, routed)


def test_a_trainer_takes_the_record_of_rollouts_in_another_dtype(groups: Groups) -> None:
    trainer = trainer_of(groups, torch.float32, "fast")
    engine = engine_of(trainer_of(groups, torch.bfloat16, "fast"))
    sampling = SamplingParams(temperature=0.9, max_new_tokens=12)
    rollouts = list(generate(engine, PROMPTS, sampling, samples=3, seed=1))
    row = row_of(rollouts)
    assert row.experts is not None
    assert (row.experts != own_choice(trainer, row)).any()
    naive = Counted(row.experts)
    batch = to_device(replace(row, experts=None), groups, MODEL.kv_heads, torch.device("cpu"))
    with torch.no_grad():
        hidden = trainer.transformer(batch.tokens, batch.positions, batch.attend, route=naive)
        expected = (hidden[:, 0] @ trainer.transformer.head_weight.T)[:, : MODEL.vocabulary] / 0.9
    at_targets = expected.log_softmax(-1)[torch.from_numpy(row.predictors), torch.from_numpy(row.targets)]
    [found] = score(trainer.stage, groups, [row], 0.9)
    torch.testing.assert_close(found, at_targets, rtol=1e-5, atol=1e-5)
    [own] = score(trainer.stage, groups, [replace(row, experts=None)], 0.9)
    assert (found - own).abs().max() > 1e-3
    rows = row, replace(row, experts=None)
    gaps = [np.abs(reported(rollouts) - logp(trainer, each, rollouts)).mean() for each in rows]
    assert gaps[0] < gaps[1], "replay brings the trainer nearer to the rollouts"
    values = trainer.step([row], nll, 0.0).values
    assert 0 < naive.differs < naive.known
    assert values["routing_differs"] == pytest.approx(naive.differs / naive.known)
    assert "routing_differs" not in trainer.step([replace(row, experts=None)], nll, 0.0).values


def test_what_cannot_be_recorded_is_refused(groups: Groups) -> None:
    for changed, sentence in (
        ({"moe": None}, "is for a model with experts, and this one has none"),
        ({"full_layers": ()}, "all 3 layers of this model see 21 tokens"),
    ):
        model = MODEL.model_copy(update=changed)
        transformer = transformer_of(build(model, groups, torch.float32, RandomWeights(model, 3)))
        RolloutEngine(transformer, decode=str)
        with pytest.raises(ValueError, match=sentence):
            RolloutEngine(transformer, decode=str, records_routing=True)
    with pytest.raises(ValueError, match="engine='vllm' does not say which experts tokens went to"):
        RolloutConfig(engine="vllm", python="python", replay_routing=True)
