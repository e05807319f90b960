"""Our engine's passes, its packed weights and its memory; what every engine keeps is in test_protocol.py."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor, nn

from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.world.groups import Groups
from lockstep.model.attention.packed import DocumentAttention
from lockstep.model.config import ModelConfig
from lockstep.model.formats.huggingface.reader import HuggingFaceFolder
from lockstep.model.layers.logprobs import local_logits
from lockstep.model.loading import build, transformer_of
from lockstep.model.ops.linear import PackedWeight
from lockstep.model.transformer import Transformer
from lockstep.model.weights.initialization import RandomWeights
from lockstep.rl.rollout.config import EngineConfig, SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.output_processor import OutputProcessor, RolloutRequest, generate
from lockstep.rl.rollout.protocol import PromptTooLong
from lockstep.rl.types import Prompt, Rollout
from lockstep.rl.weight_sync.shards import shards_of

LENGTHS = [3, 40, 1, 12, 25, 7, 2]


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(3)
    drawn = [tuple(torch.randint(3, 260, (n,), generator=generator).tolist()) for n in LENGTHS]
    return [Prompt(i, "", tokens, "") for i, tokens in enumerate(drawn)]


def engine_of(transformer: Transformer, tokenizer: Tokenizer, slots: int, prefill: int = 2048) -> RolloutEngine:
    config = EngineConfig(sequences=slots, length=100, budget=prefill)
    return RolloutEngine(transformer, config, decode=tokenizer.decode)


def run(
    engine: RolloutEngine, prompts: Sequence[Prompt], sampling: SamplingParams, samples: int = 1
) -> dict[tuple[int, int], Rollout]:
    found = list(generate(engine, prompts, sampling, samples=samples, seed=6))
    by_place = {(r.prompt.index, r.sample): r for r in found}
    assert len(by_place) == len(found) == len(prompts) * samples
    return by_place


SAMPLING = SamplingParams(temperature=1.2, max_new_tokens=20)


class Passes:
    """Counts the rows of every forward pass."""

    def __init__(self, module: nn.Module) -> None:
        self.rows: list[int] = []
        self._handle = module.register_forward_pre_hook(lambda _, args: self.rows.append(len(args[0])))

    def close(self) -> None:
        self._handle.remove()


@pytest.fixture
def passes(transformer: Transformer) -> Iterator[Passes]:
    counter = Passes(transformer)
    yield counter
    counter.close()


def test_a_sequence_that_ends_makes_room_at_once(
    transformer: Transformer, tokenizer: Tokenizer, prompts: list[Prompt], passes: Passes
) -> None:
    lengths = (1, 9, 2, 2, 2, 1, 3)
    sampling = SamplingParams(max_new_tokens=9, exact_lengths=lengths)
    found = run(engine_of(transformer, tokenizer, 2), prompts, sampling)
    assert tuple(len(found[i, i].tokens) for i in range(7)) == lengths
    assert sum(passes.rows) - sum(LENGTHS) == sum(n - 1 for n in lengths), "a token was computed twice or in vain"
    # Sample 1 takes one of two places for 9 passes; the others pass through the other place one after the other.
    assert len(passes.rows) == 1 + 2 + 2 + 2 + 1 + 3


def test_a_prompt_is_read_once_for_all_its_samples(
    transformer: Transformer, tokenizer: Tokenizer, prompts: list[Prompt], passes: Passes
) -> None:
    list(generate(engine_of(transformer, tokenizer, 64), prompts, SamplingParams(max_new_tokens=1), samples=5, seed=0))
    assert passes.rows == [sum(LENGTHS)]


def test_a_prompt_that_is_too_long_is_refused_before_anything_runs(
    transformer: Transformer, tokenizer: Tokenizer, prompts: list[Prompt], passes: Passes
) -> None:
    engine = engine_of(transformer, tokenizer, 2)
    with pytest.raises(PromptTooLong, match=r"a prompt of 40 tokens and 61 new ones need a context of 101, and .* 100"):
        list(generate(engine, prompts, SamplingParams(max_new_tokens=61), samples=1, seed=0))
    assert passes.rows == []
    rollouts = run(engine, prompts[1:2], SamplingParams(temperature=1, max_new_tokens=60, exact_lengths=(60,)))
    assert [len(r.tokens) for r in rollouts.values()] == [60]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_weights_give_the_same_logits_and_follow_new_ones(
    dtype: torch.dtype, tiny_folder: Path, groups: Groups, tokenizer: Tokenizer, prompts: list[Prompt]
) -> None:
    source = HuggingFaceFolder(tiny_folder)
    worker, policy = (transformer_of(build(source.config, groups, dtype, source)) for _ in range(2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    engine = engine_of(worker, tokenizer, slots=4)
    assert isinstance(worker.inference_head, PackedWeight)
    engine.receive(1, shards_of(policy))
    text = torch.tensor(prompts[1].tokens)
    attend = DocumentAttention([[len(text)]], text.device)

    def logits(of: Transformer) -> Tensor:
        hidden = of(text, torch.arange(len(text)), attend)
        return local_logits(hidden[:, 0], of.inference_head, 0, of.model.vocabulary).float()

    with torch.no_grad():
        found, expected = logits(worker), logits(policy)
    scale = expected.std()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
    hidden = worker(text, torch.arange(len(text)), attend)
    assert hidden.requires_grad, "training must not go through packed weights"


def test_released_memory_is_given_back_and_what_was_running_goes_on(groups: Groups, tokenizer: Tokenizer) -> None:
    sizes = {"layers": 2, "width": 64, "heads": 8, "kv_heads": 8, "head_dim": 64, "intermediate": 64}
    model = ModelConfig(**sizes, vocabulary=300, context=256, tied=True)
    wide = transformer_of(build(model, groups, torch.float32, RandomWeights(model, seed=0)))
    engine = RolloutEngine(wide, EngineConfig(sequences=80), decode=tokenizer.decode, blocks=[1400])
    long = [Prompt(i, "", (3 + i,) * 240, "") for i in range(64)]
    requests = [RolloutRequest(p.index, p.tokens, SamplingParams(max_new_tokens=8), 0) for p in long]
    wanted = {r.sample: r.tokens for r in generate(engine, long, requests[0].sampling, samples=1, seed=0)}
    processor, found = OutputProcessor(engine), {}
    for request in requests:
        processor.add(request)
    for passes in range(30):
        found |= {r.sample: r.tokens for r in processor.step()}
        if passes == 3:
            assert not found
            before = psutil.Process().memory_info().rss
            engine.release()
            held = 64 * 240 * 8192
            assert before - psutil.Process().memory_info().rss > 0.9 * held
    assert found == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_were_given_back_come_again_with_an_update(
    dtype: torch.dtype, groups: Groups, tokenizer: Tokenizer
) -> None:
    sizes = {"layers": 2, "width": 512, "heads": 8, "kv_heads": 8, "head_dim": 64, "intermediate": 2048}
    model = ModelConfig(**sizes, vocabulary=8000, context=64, tied=True)
    policy, worker = (transformer_of(build(model, groups, dtype, RandomWeights(model, seed=i))) for i in (0, 1))
    engine, fresh = (
        RolloutEngine(each, EngineConfig(sequences=4), decode=tokenizer.decode) for each in (worker, policy)
    )
    prompt, sampling = [Prompt(0, "", (3, 5, 9), "")], SamplingParams(max_new_tokens=8)
    before = psutil.Process().memory_info().rss
    engine.release(weights=True)
    size = model.parameters * dtype.itemsize
    assert before - psutil.Process().memory_info().rss > 0.9 * size
    with pytest.raises(RuntimeError, match="given back: update them first"):
        list(generate(engine, prompt, sampling, samples=2, seed=0))
    engine.release(weights=True)
    engine.receive(1, shards_of(policy))
    found, wanted = (list(generate(each, prompt, sampling, samples=2, seed=0)) for each in (engine, fresh))
    assert [(r.tokens, r.logp) for r in found] == [(r.tokens, r.logp) for r in wanted]
