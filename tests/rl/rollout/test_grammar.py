"""Completions that are written in a grammar: what they may contain, where they end, and that nobody else is touched."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.world.groups import Groups
from lockstep.model.transformer import Transformer
from lockstep.rl.rollout.config import EngineConfig, SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.grammar import BadGrammar, Grammar, GrammarCompiler
from lockstep.rl.rollout.protocol import Request, TokenOutput
from lockstep.rl.rollout.sampling.sampler import Row, draw
from tests.data.tokenizers import KINDS, files_of
from tests.model.random_transformer import random_transformer

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Zürich", "東京"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["city", "days", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
LARK = f"start: %json {json.dumps(SCHEMA)}"


@pytest.fixture(scope="module")
def grammar(tokenizer: Tokenizer) -> Grammar:
    return GrammarCompiler(tokenizer.tokenizer_json)(LARK)


@pytest.fixture(scope="module")
def exact(tokenizer: Tokenizer, groups: Groups) -> Transformer:
    """In exact numerics, so that a token's bits depend on its own sequence alone."""
    return random_transformer(groups, vocabulary=tokenizer.numbers + 3, context=512, numerics="exact")


def written(engine: RolloutEngine, requests: list[Request]) -> dict[str | int, list[TokenOutput]]:
    for request in requests:
        engine.add(request)
    found: dict[str | int, list[TokenOutput]] = {request.key: [] for request in requests}
    while engine.has_work:
        for output in engine.step():
            assert isinstance(output, TokenOutput), output
            found[output.key].append(output)
    return found


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 3.0, "top_p": 0.7},
    {"top_k": 3, "repetition_penalty": 1.3},
    {"min_p": 0.2, "logprobs": 2},
]


def workload(grammar: Grammar, prompt: tuple[int, ...]) -> list[Request]:
    """Completions of one prompt, so that they fork; each with a grammar stands beside the same one without."""
    found: list[Request] = []
    for i, options in enumerate(OPTIONS):
        plain = Request(f"plain {i}", prompt, SamplingParams(max_new_tokens=120, **options), 5, i)
        found += [plain, replace(plain, key=f"grammar {i}", grammar=grammar)]
    return found


@pytest.mark.parametrize(("blocks", "speculate"), [(None, 0), ([17], 4)], ids=["room", "preempted, tokens on trial"])
def test_what_is_written_is_in_the_grammar_and_others_keep_their_bits(
    exact: Transformer, tokenizer: Tokenizer, grammar: Grammar, blocks: list[int] | None, speculate: int
) -> None:
    prompt = tuple(tokenizer.encode("State the final answer " * 3))
    requests = workload(grammar, prompt)

    def engine() -> RolloutEngine:
        return RolloutEngine(exact, EngineConfig(speculate=speculate), decode=tokenizer.decode, blocks=blocks)

    crowded = engine()
    together = written(crowded, requests)
    assert (crowded.statistics.preemptions > 0) == (blocks is not None)
    alone = written(engine(), [request for request in requests if request.grammar is None])
    assert alone == {key: tokens for key, tokens in together.items() if key in alone}
    for i in range(len(OPTIONS)):
        tokens = together[f"grammar {i}"]
        said = json.loads(tokenizer.decode([t.token for t in tokens]))
        assert list(said) == ["city", "days", "tags"]
        assert said["city"] in SCHEMA["properties"]["city"]["enum"]
        assert 1 <= said["days"] <= 14
        assert len(said["tags"]) <= 3
        assert [t.finish_reason for t in tokens] == [None] * (len(tokens) - 1) + ["stop"]
        assert tokens == written(engine(), [replace(requests[2 * i + 1], key=f"grammar {i}")])[f"grammar {i}"]


def test_the_mask_is_the_sampling_distribution(tokenizer: Tokenizer, grammar: Grammar) -> None:
    state, vocabulary = grammar.begin(), tokenizer.numbers + 3
    allowed = state.allowed((2,), vocabulary)
    for token in np.flatnonzero(allowed):
        assert '{"city": "'.startswith(tokenizer.decode([token]))
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(1))
    expected = torch.where(torch.from_numpy(allowed), logits, -torch.inf).log_softmax(-1)[0]
    for uniform in np.linspace(0, 0.999, 20):
        found = draw(logits, [Row(SamplingParams(), uniform, allowed=allowed)])
        assert allowed[found.tokens[0]]
        assert float(found.sampling_logp[0]) == pytest.approx(float(expected[found.tokens[0]]), abs=1e-5)


def test_end_tokens_are_allowed_where_the_grammar_may_end_only(tokenizer: Tokenizer) -> None:
    """Whichever tokens end a completion: also one that is a text the grammar has."""
    state = GrammarCompiler(tokenizer.tokenizer_json)('start: "1" ("2" "1")*').begin()
    one, two = (tokenizer.encode(digit)[0] for digit in "12")
    assert np.flatnonzero(state.allowed((2, two), tokenizer.numbers)).tolist() == [one]
    assert not state.take(one)
    assert np.flatnonzero(state.allowed((2, 5), tokenizer.numbers)).tolist() == sorted((2, 5, two))
    assert not state.take(two)
    assert np.flatnonzero(state.allowed((2, 5), tokenizer.numbers)).tolist() == [one]
    with pytest.raises(BadGrammar, match="cannot go on"):
        state.take(two)


@pytest.mark.parametrize("kind", ["byte level", "byte level, greedy", "metaspace first", "metaspace always"])
def test_tokenizers_of_all_kinds_spell_the_grammar(kind: str) -> None:
    """Characters that no token has are written byte by byte."""
    tokenizer = Tokenizer(files_of(KINDS[kind]))
    state = GrammarCompiler(tokenizer.tokenizer_json)(LARK).begin()
    tokens: list[int] = []
    chance = np.random.default_rng(0)
    ended = False
    while not ended:
        allowed = np.flatnonzero(state.allowed((), tokenizer.numbers))
        tokens.append(int(chance.choice(allowed)))
        ended = state.take(tokens[-1])
    assert json.loads(tokenizer.decode(tokens))["city"] in SCHEMA["properties"]["city"]["enum"]


def test_what_cannot_be_compiled_is_refused(tokenizer: Tokenizer, grammar: Grammar, exact: Transformer) -> None:
    with pytest.raises(BadGrammar, match="tokenizer: can't determine decoder"):
        GrammarCompiler(Tokenizer(files_of(KINDS["unigram"])).tokenizer_json)
    with pytest.raises(BadGrammar, match=r"^Invalid type: objct$"):
        GrammarCompiler(tokenizer.tokenizer_json)('start: %json {"type": "objct"}')
    engine = RolloutEngine(exact, decode=tokenizer.decode)
    sampling = SamplingParams(min_new_tokens=3)
    with pytest.raises(ValueError, match="a grammar says where its completion may end"):
        engine.check(Request(0, (1,), sampling, 0, 0, grammar=grammar))
