"""Continuous batching against drawing one prompt at a time, and against whole forward passes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor, nn

from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.groups import Groups
from lockstep.model.attention.packed import DocumentAttention
from lockstep.model.config import ModelConfig
from lockstep.model.formats.huggingface.reader import HuggingFaceFolder
from lockstep.model.layers.logprobs import local_logits, token_logprobs
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


@torch.no_grad()
def whole_logits(transformer: Transformer, tokens: Sequence[int]) -> Tensor:
    """Logits [T, V] of one forward pass without a cache."""
    text = torch.tensor(tokens)
    hidden = transformer(text, torch.arange(len(text)), DocumentAttention([[len(text)]], text.device))
    return local_logits(hidden[:, 0], transformer.head_weight, 0, transformer.model.vocabulary)


SAMPLING = SamplingParams(temperature=1.2, max_new_tokens=20)
UNEVEN = SAMPLING.model_copy(update={"stop": tuple("aeiounst 123")})
"""A random model seldom ends by itself, so that anything that looks like a text ends it here."""


@pytest.mark.parametrize(("slots", "prefill"), [(1, 2048), (2, 2048), (5, 30), (64, 2048), (64, 1)])
def test_batching_changes_no_completion(
    slots: int, prefill: int, transformer: Transformer, tokenizer: Tokenizer, prompts: list[Prompt]
) -> None:
    together = run(engine_of(transformer, tokenizer, slots, prefill), prompts, UNEVEN, samples=3)
    alone: dict[tuple[int, int], Rollout] = {}
    for prompt in prompts:
        alone |= run(engine_of(transformer, tokenizer, 1), [prompt], UNEVEN, samples=3)
    assert {k: r.tokens for k, r in together.items()} == {k: r.tokens for k, r in alone.items()}
    for place, rollout in together.items():
        assert rollout.logp == pytest.approx(alone[place].logp, abs=1e-4)
        assert (rollout.text, rollout.finish_reason) == (alone[place].text, alone[place].finish_reason)
    assert len({r.tokens for r in together.values()}) > len(prompts)
    assert len({len(r.tokens) for r in together.values()}) > 4


def test_greedy_equals_a_loop_of_whole_forward_passes(
    transformer: Transformer, tokenizer: Tokenizer, prompts: list[Prompt]
) -> None:
    sampling = SamplingParams(temperature=0, max_new_tokens=10)
    found = run(engine_of(transformer, tokenizer, 3), prompts, sampling)
    for prompt in prompts:
        tokens: list[int] = []
        while len(tokens) < 10 and not (tokens and tokens[-1] in transformer.model.eos_tokens):
            tokens.append(int(whole_logits(transformer, [*prompt.tokens, *tokens])[-1].argmax()))
        assert found[prompt.index, prompt.index].tokens == tuple(tokens)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reported_log_probabilities_are_the_trainers(
    temperature: float, transformer: Transformer, tokenizer: Tokenizer, prompts: list[Prompt], groups: Groups
) -> None:
    sampling = SamplingParams(temperature=temperature, max_new_tokens=12)
    for rollout in run(engine_of(transformer, tokenizer, 4), prompts, sampling, samples=2).values():
        text = torch.tensor([*rollout.prompt.tokens, *rollout.tokens])
        start = len(rollout.prompt.tokens)
        with torch.no_grad():
            hidden = transformer(text, torch.arange(len(text)), DocumentAttention([[len(text)]], text.device))
            logp = token_logprobs(
                hidden[start - 1 : -1, 0],
                transformer.head_weight,
                text[start:],
                vocabulary=transformer.model.vocabulary,
                group=groups.tensor,
                temperature=temperature,
            )
        assert rollout.logp == pytest.approx(logp.tolist(), abs=1e-4)


def test_limits_and_ends_are_reported(transformer: Transformer, tokenizer: Tokenizer, prompts: list[Prompt]) -> None:
    found = run(engine_of(transformer, tokenizer, 8), prompts, SamplingParams(temperature=2, max_new_tokens=9), 40)
    eos = set(transformer.model.eos_tokens)
    for rollout in found.values():
        assert not eos & set(rollout.tokens[:-1])
        assert rollout.finish_reason == ("stop" if rollout.tokens[-1] in eos else "length")
        assert len(rollout.tokens) == len(rollout.logp) <= 9
        assert rollout.finish_reason == "stop" or len(rollout.tokens) == 9
        assert rollout.text == tokenizer.decode(rollout.tokens)
        assert rollout.weight_version == 0
    assert {r.finish_reason for r in found.values()} == {"stop", "length"}


def test_a_stop_string_ends_a_completion_where_it_is_whole(
    transformer: Transformer, tokenizer: Tokenizer, prompts: list[Prompt]
) -> None:
    free = run(engine_of(transformer, tokenizer, 4), prompts, SAMPLING)
    longest = max(free.values(), key=lambda r: len(r.tokens))
    cut = next(i for i in range(5, 20) if "\ufffd" not in tokenizer.decode(longest.tokens[i - 2 : i]))
    stop = tokenizer.decode(longest.tokens[cut - 2 : cut])
    stopped = run(engine_of(transformer, tokenizer, 4), prompts, SAMPLING.model_copy(update={"stop": (stop,)}))
    assert len(stop) >= 2
    for place, rollout in free.items():
        ends = [n for n in range(1, len(rollout.tokens) + 1) if stop in tokenizer.decode(rollout.tokens[:n])]
        assert stopped[place].tokens == rollout.tokens[: ends[0] if ends else None]
        assert stopped[place].text == rollout.text.partition(stop)[0]
        assert stopped[place].finish_reason == ("stop" if ends else rollout.finish_reason)
    assert len(stopped[longest.prompt.index, longest.sample].tokens) <= cut < len(longest.tokens)


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


def test_no_prompts_give_no_completions(transformer: Transformer, tokenizer: Tokenizer) -> None:
    assert run(engine_of(transformer, tokenizer, 2), [], SAMPLING) == {}


def test_the_context_of_the_model_bounds_the_cache(transformer: Transformer, tokenizer: Tokenizer) -> None:
    engine = RolloutEngine(transformer, EngineConfig(sequences=1), decode=tokenizer.decode)
    prompt = Prompt(0, "", (5,) * 250, "")
    with pytest.raises(PromptTooLong, match="rollouts have 256"):
        list(generate(engine, [prompt], SamplingParams(max_new_tokens=7), samples=1, seed=0))


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
    assert isinstance(worker.inference_head, PackedWeight) == (dtype == torch.bfloat16)
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
    orders = [RolloutRequest(p.index, p, SamplingParams(max_new_tokens=8), 0) for p in long]
    wanted = {r.sample: r.tokens for r in generate(engine, long, orders[0].sampling, samples=1, seed=0)}
    writer, found = OutputProcessor(engine), {}
    for order in orders:
        writer.add(order)
    for passes in range(30):
        found |= {r.sample: r.tokens for r in writer.step()}
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
