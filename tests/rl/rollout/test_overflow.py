"""What is longer than the context: refused, cut at its beginning, or drawn from a window that rolls (equation 10)."""

from pathlib import Path

import pytest
import torch

from lockstep.data.tokenizer import Tokenizer
from lockstep.model.transformer import Transformer
from lockstep.rl.rollout.config import EngineConfig, SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.output_processor import generate
from lockstep.rl.rollout.protocol import OnOverflow, PromptTooLong, Request, TokenOutput
from lockstep.rl.types import Prompt, Rollout

DELTA = 24
GREEDY = SamplingParams(temperature=0, max_new_tokens=30, logit_bias={2: -100.0})
DRAWN = SamplingParams(temperature=1.3, max_new_tokens=30, logit_bias={2: -100.0})
PROMPTS = [Prompt(i, "", tuple((7 * i + 11 * k) % 250 + 5 for k in range(n)), "") for i, n in enumerate((9, 24, 40, 3))]
"""One that overflows while it goes on, one that fills the window, one that is longer, and one that never overflows
before the others' windows roll."""


def engine_of(transformer: Transformer, tokenizer: Tokenizer, **config: int) -> RolloutEngine:
    return RolloutEngine(transformer, EngineConfig(**{"length": DELTA} | config), decode=tokenizer.decode)


def completions(engine: RolloutEngine, sampling: SamplingParams, on_overflow: OnOverflow) -> dict[int, Rollout]:
    found = generate(engine, PROMPTS, sampling, samples=1, seed=5, on_overflow=on_overflow)
    return {rollout.prompt.index: rollout for rollout in found}


def test_each_token_is_what_transformers_says_behind_the_last_tokens(
    transformer: Transformer, tokenizer: Tokenizer, tiny_folder: Path
) -> None:
    from transformers import LlamaForCausalLM

    reference = LlamaForCausalLM.from_pretrained(tiny_folder).eval()
    rolled = completions(engine_of(transformer, tokenizer), GREEDY, "roll")
    for prompt in PROMPTS:
        text = list(prompt.tokens)
        for token, logp in zip(rolled[prompt.index].tokens, rolled[prompt.index].logp, strict=True):
            with torch.no_grad():
                logits = reference(torch.tensor([text[-DELTA:]])).logits[0, -1].double()
            assert logp == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-4)
            logits[2] = -torch.inf
            assert token == int(logits.argmax())
            text.append(int(token))
        assert len(text) == len(prompt.tokens) + GREEDY.max_new_tokens


@pytest.mark.parametrize("config", [{}, {"budget": 7, "sequences": 2}, {"speculate": 4}])
def test_what_is_drawn_is_that_of_a_loop_that_runs_the_last_tokens_again(
    transformer: Transformer, tokenizer: Tokenizer, config: dict[str, int]
) -> None:
    engine, rolled = engine_of(transformer, tokenizer, length=DELTA + 1), {}
    for prompt in PROMPTS:
        text = list(prompt.tokens)
        for n in range(DRAWN.max_new_tokens):
            one = DRAWN.model_copy(update={"max_new_tokens": 1})
            engine.add(Request("naive", tuple(text[-DELTA:]), one, 5, prompt.index, begun=n))
            (output,) = engine.step()
            assert isinstance(output, TokenOutput)
            text.append(output.token)
        rolled[prompt.index] = text[len(prompt.tokens) :]
    found = completions(engine_of(transformer, tokenizer, **config), DRAWN, "roll")
    assert {index: list(rollout.tokens) for index, rollout in found.items()} == rolled


def test_a_window_rolls_where_the_cache_has_room_for_it_alone(transformer: Transformer, tokenizer: Tokenizer) -> None:
    wide = completions(engine_of(transformer, tokenizer), DRAWN, "roll")
    config = EngineConfig(length=DELTA)
    narrow = completions(RolloutEngine(transformer, config, decode=tokenizer.decode, blocks=[2]), DRAWN, "roll")
    assert {i: tuple(r.tokens) for i, r in narrow.items()} == {i: tuple(r.tokens) for i, r in wide.items()}


def test_truncation_keeps_the_last_tokens_of_a_prompt(transformer: Transformer, tokenizer: Tokenizer) -> None:
    engine, short = engine_of(transformer, tokenizer), GREEDY.model_copy(update={"max_new_tokens": 10})
    cut = completions(engine, short, "truncate")
    last = [Prompt(p.index, "", p.tokens[-(DELTA - 10) :], "") for p in PROMPTS]
    by_hand = {r.prompt.index: r for r in generate(engine, last, short, samples=1, seed=5)}
    assert {i: tuple(r.tokens) for i, r in cut.items()} == {i: tuple(r.tokens) for i, r in by_hand.items()}
    assert {len(r.tokens) for r in cut.values()} == {10}


def test_what_cannot_be_cut_is_refused(transformer: Transformer, tokenizer: Tokenizer) -> None:
    engine, tokens = engine_of(transformer, tokenizer), tuple(range(5, 35))
    short = SamplingParams(max_new_tokens=2)
    with pytest.raises(PromptTooLong, match="a prompt of 30 tokens and 2 new ones need a context of 32"):
        engine.check(Request("a", tokens, short, 0, 0))
    with pytest.raises(PromptTooLong, match="30 new tokens leave no room for a prompt in a context of 24"):
        engine.check(Request("a", tokens, GREEDY, 0, 0, on_overflow="truncate"))
    with pytest.raises(ValueError, match="cannot lose its first 6"):
        engine.check(Request("a", tokens, short, 0, 0, prompt_logprobs=0, on_overflow="roll"))
    assert not engine.has_work
