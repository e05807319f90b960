"""What every rollout engine keeps: one suite for all implementations of `Engine`.

An implementation is a function that makes an engine over a model; a new one is added to ENGINES. That of vLLM is in
another process, with an interpreter of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.world.groups import Groups
from lockstep.model.attention.packed import DocumentAttention
from lockstep.model.formats.huggingface.reader import HuggingFaceFolder
from lockstep.model.layers.logprobs import local_logits
from lockstep.model.loading import build, transformer_of
from lockstep.model.transformer import Transformer
from lockstep.model.weights.initialization import RandomWeights
from lockstep.rl.rollout.config import EngineConfig, OnUpdate, SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.output_processor import generate
from lockstep.rl.rollout.protocol import Clause, Engine, FailedOutput, PromptOutput, PromptTooLong, Request, TokenOutput
from lockstep.rl.types import Prompt, Rollout
from lockstep.rl.weight_sync.protocol import Shard
from lockstep.rl.weight_sync.shards import shards_of
from tests.rl.rollout.vllm_engines import IS_THERE, LEFT_OUT, VllmProcess

Make = Callable[[Transformer, EngineConfig, Tokenizer], Engine]


def ours(transformer: Transformer, config: EngineConfig, tokenizer: Tokenizer) -> Engine:
    return RolloutEngine(transformer, config, decode=tokenizer.decode)


def speculating(transformer: Transformer, config: EngineConfig, tokenizer: Tokenizer) -> Engine:
    return ours(transformer, config.model_copy(update={"speculate": 4}), tokenizer)


OURS = {"lockstep": ours, "speculating": speculating}
ENGINES = [*OURS, pytest.param("vllm", marks=pytest.mark.skipif(not IS_THERE, reason=LEFT_OUT))]

LENGTHS = [3, 40, 1, 12, 25, 7, 2]
CONFIG = EngineConfig(sequences=4, length=100)
SAMPLING = SamplingParams(temperature=1.2, max_new_tokens=20)
UNEVEN = SAMPLING.model_copy(update={"stop": tuple("aeiounst 123")})
"""A random model seldom ends by itself, so that anything that looks like a text ends it here."""


@pytest.fixture(scope="module")
def transformer(wide_folder: Path, groups: Groups) -> Transformer:
    return model_of(wide_folder, groups)


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmProcess]:
    process = VllmProcess(tmp_path_factory.mktemp("vllm"))
    yield process
    process.close()


@pytest.fixture(params=ENGINES)
def make(request: pytest.FixtureRequest, vllm: VllmProcess) -> Iterator[Make]:
    yield OURS.get(request.param, vllm.make)
    vllm.free()


@pytest.fixture
def engine(make: Make, transformer: Transformer, tokenizer: Tokenizer) -> Engine:
    return make(transformer, CONFIG, tokenizer)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(3)
    drawn = [tuple(torch.randint(3, 260, (n,), generator=generator).tolist()) for n in LENGTHS]
    return [Prompt(i, "", tokens, "") for i, tokens in enumerate(drawn)]


def run(
    engine: Engine, prompts: Sequence[Prompt], sampling: SamplingParams, samples: int = 1
) -> dict[tuple[int, int], Rollout]:
    found = list(generate(engine, prompts, sampling, samples=samples, seed=6))
    by_place = {(r.prompt.index, r.sample): r for r in found}
    assert len(by_place) == len(found) == len(prompts) * samples
    return by_place


def completed(engine: Engine, *requests: Request) -> dict[str | int, list[Any]]:
    """The outputs of requests that are added together."""
    found: dict[str | int, list[Any]] = {request.key: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            found[output.key].append(output)
    return found


def exactly(length: int, temperature: float = 1.0) -> SamplingParams:
    """For completions of this length, whatever they say."""
    return SamplingParams(temperature=temperature, max_new_tokens=length, exact_lengths=(length,))


def ids(tokens: Sequence[TokenOutput]) -> list[int]:
    return [token.token for token in tokens]


@torch.no_grad()
def whole_logits(transformer: Transformer, tokens: Sequence[int]) -> Tensor:
    """Logits [T, V] of one forward pass without a cache."""
    text = torch.tensor(tokens)
    hidden = transformer(text, torch.arange(len(text)), DocumentAttention([[len(text)]], text.device))
    return local_logits(hidden[:, 0], transformer.head_weight, 0, transformer.model.vocabulary)


@pytest.mark.parametrize(("sequences", "budget"), [(1, 2048), (2, 2048), (5, 30), (64, 2048), (64, 1)])
def test_batching_changes_no_completion(
    sequences: int, budget: int, make: Make, transformer: Transformer, tokenizer: Tokenizer, prompts: list[Prompt]
) -> None:
    batched = make(transformer, EngineConfig(sequences=sequences, length=100, budget=budget), tokenizer)
    together = run(batched, prompts, UNEVEN, samples=3)
    alone: dict[tuple[int, int], Rollout] = {}
    for prompt in prompts:
        single = make(transformer, EngineConfig(sequences=1, length=100), tokenizer)
        alone |= run(single, [prompt], UNEVEN, samples=3)
    assert {k: r.tokens for k, r in together.items()} == {k: r.tokens for k, r in alone.items()}
    for place, rollout in together.items():
        assert rollout.logp == pytest.approx(alone[place].logp, abs=1e-4)
        assert (rollout.text, rollout.finish_reason) == (alone[place].text, alone[place].finish_reason)
    assert len({r.tokens for r in together.values()}) > len(prompts)
    assert len({len(r.tokens) for r in together.values()}) > 4


def test_greedy_equals_a_loop_of_whole_forward_passes(
    engine: Engine, transformer: Transformer, prompts: list[Prompt]
) -> None:
    found = run(engine, prompts, SamplingParams(temperature=0, max_new_tokens=10))
    for prompt in prompts:
        tokens: list[int] = []
        while len(tokens) < 10 and not (tokens and tokens[-1] in transformer.model.eos_tokens):
            tokens.append(int(whole_logits(transformer, [*prompt.tokens, *tokens])[-1].argmax()))
        assert found[prompt.index, prompt.index].tokens == tuple(tokens)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_new_tokens=12),
        SamplingParams(temperature=0.7, max_new_tokens=12),
        SamplingParams(temperature=0, max_new_tokens=12),
        SamplingParams(temperature=1.3, top_k=20, top_p=0.8, max_new_tokens=12),
        SamplingParams(repetition_penalty=1.5, logit_bias={9: 4.0}, min_new_tokens=6, max_new_tokens=12),
    ],
    ids=["plain", "temperature", "greedy", "truncated", "altered"],
)
def test_logp_is_the_policys_over_the_whole_vocabulary(
    sampling: SamplingParams, engine: Engine, transformer: Transformer, prompts: list[Prompt]
) -> None:
    for rollout in run(engine, prompts, sampling, samples=2).values():
        logits = whole_logits(transformer, [*rollout.prompt.tokens, *rollout.tokens])
        at_tokens = (logits[len(rollout.prompt.tokens) - 1 : -1].float() / (sampling.temperature or 1)).log_softmax(-1)
        expected = at_tokens.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]
        assert rollout.logp == pytest.approx(expected.tolist(), abs=1e-4)
        if not sampling.temperature:
            assert set(rollout.sampling_logp) == {0.0}
        elif sampling.top_k:
            pairs = list(zip(rollout.sampling_logp, rollout.logp, strict=True))
            assert all(drawn > policy - 1e-4 for drawn, policy in pairs), "what was cut off has no probability"
            assert sum(drawn - policy for drawn, policy in pairs) > 0.1
        elif not sampling.logit_bias:
            assert rollout.sampling_logp == rollout.logp


def test_likeliest_tokens_and_supports_are_reported(engine: Engine, transformer: Transformer) -> None:
    sampling = SamplingParams(top_k=4, logprobs=3, support=True, max_new_tokens=6)
    tokens = completed(engine, Request("it", (5, 6, 7), sampling, 0, 0))["it"]
    logp = whole_logits(transformer, [5, 6, 7, *ids(tokens)]).float().log_softmax(-1)[2:-1]
    for token, row in zip(tokens, logp, strict=True):
        best = row.topk(4)
        assert [t for t, _ in token.top] == best.indices[:3].tolist()
        assert [p for _, p in token.top] == pytest.approx(best.values[:3].tolist(), abs=1e-4)
        assert token.support == tuple(sorted(best.indices.tolist()))
        assert token.token in token.support


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_prompts_are_scored_under_the_policy(temperature: float, engine: Engine, transformer: Transformer) -> None:
    prompt = tuple(range(5, 45))
    asked = Request("drawn", prompt, exactly(2, temperature), 0, 0, prompt_logprobs=3)
    found = completed(engine, asked, replace(asked, key="scored", draws=False))
    logp = (whole_logits(transformer, prompt).float() / temperature).log_softmax(-1)
    for key, outputs in found.items():
        assert isinstance(outputs[0], PromptOutput)
        first, *rest = outputs[0].scores
        assert (first.token, first.logp, len(outputs)) == (prompt[0], None, 3 if key == "drawn" else 1)
        for score, token, row in zip(rest, prompt[1:], logp, strict=False):
            best = row.topk(3)
            assert (score.token, score.logp) == (token, pytest.approx(float(row[token]), abs=1e-4))
            assert [t for t, _ in score.top] == best.indices.tolist()
            assert [p for _, p in score.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert outputs[-1].finish_reason == "length"


def test_a_request_that_is_not_numbers_ends_alone(
    make: Make, transformer: Transformer, groups: Groups, tokenizer: Tokenizer
) -> None:
    model = transformer.model.model_copy(update={"tied": False})
    spoilt = transformer_of(build(model, groups, torch.float32, RandomWeights(model, 0)))
    with torch.no_grad():
        spoilt.get_parameter("embedding.weight")[9] = float("nan")
    good = [Request(f"good {i}", tuple(range(20 + i, 60)), exactly(8), 0, i) for i in range(3)]
    spoils = Request("spoilt", (*range(20, 50), 9), exactly(8), 0, 3)
    engine, alone = (make(spoilt, CONFIG, tokenizer) for _ in range(2))
    found = completed(engine, good[0], spoils, *good[1:])
    (failed,) = found.pop("spoilt")
    assert isinstance(failed, FailedOutput)
    assert "not numbers" in failed.reason
    expected = completed(alone, *good)
    for _ in range(2):
        assert {key: ids(tokens) for key, tokens in found.items()} == {k: ids(e) for k, e in expected.items()}
        found = completed(engine, *good)


def test_limits_and_ends_are_reported(
    engine: Engine, transformer: Transformer, tokenizer: Tokenizer, prompts: list[Prompt]
) -> None:
    found = run(engine, prompts, SamplingParams(temperature=2, max_new_tokens=9), 40)
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
    engine: Engine, tokenizer: Tokenizer, prompts: list[Prompt]
) -> None:
    free = run(engine, prompts, SAMPLING)
    longest = max(free.values(), key=lambda r: len(r.tokens))
    cut = next(i for i in range(5, 20) if "\ufffd" not in tokenizer.decode(longest.tokens[i - 2 : i]))
    stop = tokenizer.decode(longest.tokens[cut - 2 : cut])
    stopped = run(engine, prompts, SAMPLING.model_copy(update={"stop": (stop,)}))
    assert len(stop) >= 2
    for place, rollout in free.items():
        ends = [n for n in range(1, len(rollout.tokens) + 1) if stop in tokenizer.decode(rollout.tokens[:n])]
        assert stopped[place].tokens == rollout.tokens[: ends[0] if ends else None]
        assert stopped[place].text == rollout.text.partition(stop)[0]
        assert stopped[place].finish_reason == ("stop" if ends else rollout.finish_reason)
    assert len(stopped[longest.prompt.index, longest.sample].tokens) <= cut < len(longest.tokens)


def test_a_completion_goes_on_where_it_was_left(engine: Engine) -> None:
    request = Request("whole", (5, 6, 7), exactly(12), 3, 1)
    whole = completed(engine, request)["whole"]
    begun = (*request.tokens, *ids(whole[:5]))
    rest = replace(request, key="rest", tokens=begun, begun=5, sampling=exactly(7))
    assert ids(completed(engine, rest)["rest"]) == ids(whole[5:])


def test_what_an_engine_does_not_keep_is_documented(engine: Engine) -> None:
    page = Path(__file__).parents[3].joinpath("docs/rollout.md").read_text()
    assert engine.exceptions <= set(get_args(Clause))
    assert {clause for clause in engine.exceptions if f"| `{clause}` |" not in page} == set()


def test_no_prompts_give_no_completions(engine: Engine) -> None:
    assert run(engine, [], SAMPLING) == {}


def test_what_can_never_run_is_refused(make: Make, transformer: Transformer, tokenizer: Tokenizer) -> None:
    engine = make(transformer, EngineConfig(sequences=1), tokenizer)
    few = SamplingParams(max_new_tokens=7)
    assert engine.longest == transformer.model.context == 256
    for tokens, error, words in (
        (
            (5,) * 250,
            PromptTooLong,
            "a prompt of 250 tokens and 7 new ones need a context of 257, and rollouts have 256",
        ),
        ((), ValueError, "a prompt without tokens"),
        ((5, 301), ValueError, "there is no token 301"),
    ):
        for refuse in (engine.check, engine.add):
            with pytest.raises(error, match=words):
                refuse(Request("it", tokens, few, 0, 0))
    assert not engine.has_work
    engine.add(Request("it", (5,) * 249, few, 0, 0))
    with pytest.raises(ValueError, match="key 'it' is running already"):
        engine.add(Request("it", (5,), few, 0, 0))


def test_a_cancelled_request_is_never_heard_of_again(engine: Engine) -> None:
    sampling = exactly(30)
    for key in ("kept", "cancelled"):
        engine.add(Request(key, (5, 6), sampling, 0, 0))
    before = [token for _ in range(3) for token in engine.step()]
    assert {token.key for token in before} == {"kept", "cancelled"}
    for key in ("cancelled", "cancelled", "never added"):
        engine.cancel(key)
    assert (engine.holds("kept"), engine.holds("cancelled"), engine.has_work) == (True, False, True)
    after = []
    while engine.has_work:
        after += engine.step()
    assert {token.key for token in after} == {"kept"}
    assert [t.finish_reason for t in (*before, *after) if t.key == "kept"] == [None] * 29 + ["length"]
    assert not engine.holds("kept")


def test_statistics_count_requests_blocks_and_tokens(engine: Engine) -> None:
    sampling = exactly(5)
    for key in range(6):
        engine.add(Request(key, tuple(range(3 + key, 43 + key)), sampling, 0, key))
    engine.step()
    during = engine.statistics
    assert (during.running, during.waiting) == (4, 2)
    assert during.blocks_used > 0
    while engine.has_work:
        engine.step()
    after = engine.statistics
    assert after.running == after.waiting == after.blocks_used == 0
    assert (after.prompt_tokens, after.generated_tokens) == (6 * 40, 6 * 5)


def test_forget_empties_the_prefix_cache(engine: Engine) -> None:
    request = Request("it", tuple(range(3, 60)), exactly(2), 0, 0)
    cached = []
    for _ in range(2):
        completed(engine, request)
        cached.append(engine.statistics.cached_prompt_tokens)
    engine.forget()
    completed(engine, request)
    assert cached[1] > cached[0]
    assert engine.statistics.cached_prompt_tokens == cached[1]


def test_released_memory_costs_no_token(engine: Engine) -> None:
    request = Request("it", tuple(range(3, 43)), exactly(20), 0, 0)
    expected = ids(completed(engine, request)["it"])
    engine.add(request)
    found = [token for _ in range(7) for token in engine.step()]
    engine.release()
    while engine.has_work:
        found += engine.step()
    assert ids(found) == expected


def model_of(folder: Path, groups: Groups, scale: float = 1.0) -> Transformer:
    """The tiny model; one with its matrices scaled draws other tokens."""
    source = HuggingFaceFolder(folder)
    made = transformer_of(build(source.config, groups, torch.float32, source))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(scale)
    return made


def shards(of: Transformer) -> list[Shard]:
    return list(shards_of(of))


@pytest.mark.parametrize("on_update", ["finish", "pause", "restart"])
def test_every_token_carries_the_version_that_drew_it(
    on_update: OnUpdate, make: Make, wide_folder: Path, groups: Groups, tokenizer: Tokenizer
) -> None:
    new = model_of(wide_folder, groups, 1.3)
    request = Request("running", tuple(range(4, 40)), exactly(12, temperature=0), 0, 0)
    old, renewed = (
        completed(make(model_of(wide_folder, groups, scale), CONFIG, tokenizer), request)["running"]
        for scale in (1.0, 1.3)
    )
    config = EngineConfig(sequences=1, on_update=on_update)
    engine = make(model_of(wide_folder, groups), config, tokenizer)
    engine.add(request)
    engine.add(replace(request, key="waiting"))
    tokens = [token for _ in range(5) for token in engine.step()]
    if on_update == "finish":
        with pytest.raises(RuntimeError, match="requests are to end under the old weights first"):
            engine.begin_update(7)
    while not engine.ready_for_update():
        tokens += engine.step()
    engine.begin_update(7)
    with pytest.raises(RuntimeError, match="weights of version 7 have come in part only"):
        engine.step()
    for shard in shards(new):
        engine.take([shard])
    assert engine.weight_version == 0
    engine.end_update()
    assert engine.weight_version == 7
    while engine.has_work:
        tokens += engine.step()
    versions = {key: [t.weight_version for t in tokens if t.key == key] for key in ("running", "waiting")}
    assert versions == {"running": [0] * 12 if on_update == "finish" else [0] * 5 + [7] * 7, "waiting": [7] * 12}
    running = ids([t for t in tokens if t.key == "running"])
    assert running[:5] == ids(old)[:5]
    assert ids([t for t in tokens if t.key == "waiting"]) == ids(renewed) != ids(old)
    turn = replace(request, tokens=(*request.tokens, *running[:5]), begun=5, sampling=exactly(7, temperature=0))
    recomputed = ids(completed(make(new, CONFIG, tokenizer), turn)["running"])
    assert {
        "finish": running == ids(old),
        "pause": running[5:] != ids(old)[5:],
        "restart": running[5:] == recomputed != ids(old)[5:],
    }[on_update]


def test_released_weights_come_back_with_an_update(
    make: Make, wide_folder: Path, groups: Groups, tokenizer: Tokenizer
) -> None:
    new = model_of(wide_folder, groups, 1.3)
    engine, fresh = (make(model, CONFIG, tokenizer) for model in (model_of(wide_folder, groups), new))
    request = Request("it", (5, 6, 7), exactly(9), 0, 0)
    assert engine.weights_digest() != fresh.weights_digest()
    engine.release(weights=True)
    engine.add(request)
    with pytest.raises(RuntimeError, match="the weights have been given back: update them first"):
        engine.step()
    engine.cancel("it")
    engine.begin_update(1)
    engine.take(shards(new))
    engine.end_update()
    assert engine.weights_digest() == fresh.weights_digest()
    found, expected = (completed(each, request)["it"] for each in (engine, fresh))
    assert [(t.token, t.logp) for t in found] == [(t.token, t.logp) for t in expected]
