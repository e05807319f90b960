"""What goes to engines and verifiers, and what comes back, is small whatever a problem's tests are."""

import pickle
from dataclasses import replace

from lockstep.data.tasks.code_tests import CodeTests
from lockstep.data.tokenizer import Tokenizer
from lockstep.model.transformer import Transformer
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.output_processor import OutputProcessor, RolloutRequest, generate
from lockstep.rl.types import Completion, Prompt

PLAIN = Prompt(3, "def f(x):\n", (5, 6, 7), "")
TESTED = replace(PLAIN, tests=CodeTests("assert f(2) == 4\n" * 62_000))
"""With a megabyte of tests."""
SAMPLING = SamplingParams(exact_lengths=(40,))


def completions(engine: RolloutEngine, prompt: Prompt) -> tuple[bytes, bytes]:
    """What a worker is sent and what it returns for four samples of a prompt, pickled."""
    requests = [RolloutRequest(number, prompt.tokens, SAMPLING, 0) for number in range(4)]
    processor, found = OutputProcessor(engine), list[Completion]()
    for request in requests:
        processor.add(request)
    while processor.has_work:
        found += processor.step()
    return pickle.dumps(requests), pickle.dumps(found)


def test_engines_neither_get_nor_return_the_tests_of_a_problem(transformer: Transformer, tokenizer: Tokenizer) -> None:
    engine = RolloutEngine(transformer, decode=tokenizer.decode)
    sent, returned = completions(engine, TESTED)
    assert len(pickle.dumps(TESTED)) > 1_000_000
    assert len(sent) < 2_000
    assert len(returned) < 10_000
    assert (sent, returned) == completions(engine, PLAIN)


def test_completions_are_joined_with_their_prompts(transformer: Transformer, tokenizer: Tokenizer) -> None:
    engine = RolloutEngine(transformer, decode=tokenizer.decode)
    prompts = [TESTED, replace(PLAIN, index=8, tokens=(9, 9))]
    found = {r.sample: r for r in generate(engine, prompts, SAMPLING, samples=2, seed=0)}
    assert {number: r.prompt for number, r in found.items()} == {6: TESTED, 7: TESTED, 16: prompts[1], 17: prompts[1]}
    assert found[6].completion.with_prompt(TESTED) == found[6]
    assert not isinstance(found[6].completion, type(found[6]))


def test_a_call_of_a_verifier_carries_the_tests_of_a_problem_once() -> None:
    items = [("    return 2 * x\n", TESTED.answer_key) for _ in range(8)]
    assert len(pickle.dumps(items)) < 1.1 * len(pickle.dumps(TESTED.tests))
