"""Episodes of several turns: what the model writes keeps its bits, and an environment harms its own rollouts only."""

import asyncio
import os
import re
import signal
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import reasoning_gym
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lockstep.cluster.checks.mismatch import compare, rescored
from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.load import parse
from lockstep.data.tasks.problem import Problem, entry_text
from lockstep.data.tasks.task import TaskConfig
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.world.groups import Groups
from lockstep.model.attention.kv_cache import kinds
from lockstep.model.config import Numerics
from lockstep.rl.algorithms.config import RLConfig
from lockstep.rl.algorithms.samples import samples_of, teaches
from lockstep.rl.collector.collector import Collector
from lockstep.rl.environments.calculator import NoArithmetic, calculate
from lockstep.rl.environments.chat_form import ChatForm
from lockstep.rl.environments.config import EnvironmentConfig
from lockstep.rl.environments.factory import NoEnvironment, told
from lockstep.rl.environments.protocol import EnvironmentResponse, Message, Reply, Turn
from lockstep.rl.environments.python_tool import python_tool
from lockstep.rl.environments.tools import CALCULATOR, ToolEnvironment
from lockstep.rl.remote import WorkerDied, gather
from lockstep.rl.rollout.config import EngineConfig, RolloutConfig, SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.output_processor import OutputProcessor, RolloutRequest
from lockstep.rl.sandbox.isolation import NOTHING, SandboxLimits
from lockstep.rl.types import Judged, Prompt, Rollout, answered, continued, last_turn, own_logp, turns
from lockstep.rl.verdict import Outcome, Verdict
from lockstep.rl.verifiers.code_pool import CodePool
from lockstep.rl.workers.environment_worker import EnvironmentWorker
from lockstep.rl.workers.worker_groups import EnvironmentGroup, RolloutGroup
from tests.cluster.cli_process import lockstep
from tests.model.exact_rollouts import transformer as random_transformer
from tests.rl.conftest import Actors

ENDS = tuple(range(0, 301, 9))
"""Tokens that end a turn of a random model."""


def test_arithmetic_is_exact() -> None:
    for expression, value in {
        "1/3": "1/3 ≈ 0.333333333333",
        "0.1 + 0.2": "3/10 = 0.3",
        "-2^2": "-4",
        "2**-2": "1/4 = 0.25",
        "2^3^2": "512",
        "7 // 2 * 2 + 7 % 2": "7",
        "1,000,000 × (2 − −3)": "5000000",
        "((1.50))": "3/2 = 1.5",
    }.items():
        assert calculate(expression) == value


NUMBERS = st.integers(0, 999).map(str) | st.decimals(0, 99, places=2).map(str)
FORMULAS = st.recursive(
    NUMBERS,
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda p: f"({p[0]} {p[1]} {p[2]})"),
    max_leaves=8,
)


@given(FORMULAS)
def test_the_calculator_agrees_with_python(formula: str) -> None:
    exact = "".join(f"Fraction('{part}')" if part[0].isdigit() else part for part in _parts(formula))
    try:
        expected = eval(exact, {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(NoArithmetic, match="division by zero"):
            calculate(formula)
        return
    assert Fraction(calculate(formula).split(" ")[0]) == expected


def _parts(formula: str) -> list[str]:
    return formula.replace("(", " ( ").replace(")", " ) ").split()


@given(st.text("0123456789.+-*/%^() ex_,", max_size=60) | st.text(max_size=20))
def test_no_text_is_more_than_arithmetic_or_an_error(text: str) -> None:
    with suppress(NoArithmetic):
        assert calculate(text)


def test_what_cannot_be_calculated_says_why() -> None:
    for text, words in {
        "": "a number is missing at the end",
        "2 +": "missing at the end",
        "__import__('os')": "no arithmetic",
        "9^9^9": "more than 8192 bits",
        "2^0.5": "not whole",
        "(" * 400: "inside of each other",
        "-".join("9" * 3000): "longer than 2000",
        "1 2": "'2' stands where",
        "0^-1": "division by zero",
        "(1": "not closed",
    }.items():
        with pytest.raises(NoArithmetic, match=words):
            calculate(text)


def call(name: str, **arguments: str) -> str:
    spelled = ", ".join(f'"{key}": "{value}"' for key, value in arguments.items())
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{{spelled}}}}}\n</tool_call>'


def heard(environment: ToolEnvironment, text: str) -> list[str]:
    reply: Reply = asyncio.run(environment.step(Turn(text, 1)))
    assert all(m.role == "tool" for m in reply.messages)
    return [m.content for m in reply.messages]


def test_tools_answer_and_errors_are_text() -> None:
    with CodePool(1, SandboxLimits(seconds=1), requires=NOTHING) as pool:
        environment = ToolEnvironment([CALCULATOR, python_tool(pool)])
        sums = call("calculator", expression="2 + 2")
        assert heard(environment, f"So {sums}{call('calculator', expression='1/0')}") == [
            "4",
            "error: division by zero",
        ]
        assert heard(environment, call("python", code="print('é' * 3)")) == ["ééé\n"]
        assert heard(environment, call("python", code="x = 1")) == ["(it printed nothing)"]
        (failed,) = heard(environment, call("python", code="print(1); 1/0"))
        assert failed.startswith("error: the program ended with exit code 1 ZeroDivisionError")
        assert failed.endswith("it printed:\n1\n")
        assert heard(environment, call("python", code="while 1: pass")) == ["error: the program ran longer than 1 s"]
        (long,) = heard(environment, call("python", code="print('a' * 100000)"))
        assert len(long) <= 4000
        assert heard(environment, call("sql", query="x"))[0].startswith("error: there is no tool 'sql'")
        assert heard(environment, call("python"))[0] == "error: python takes code, and nothing came"
        assert heard(environment, "<tool_call>4</tool_call>")[0].startswith("error: a call is JSON")
        assert heard(environment, "The answer is 4.") == []


def rollout(tokens: list[int], number: int = 0, answer: str = "", reason: str = "stop") -> Rollout:
    count = len(tokens)
    prompt = Prompt(number, "", (1,), answer)
    return Rollout(number, tuple(tokens), (-1.0,) * count, "", reason, (0,) * count, prompt=prompt)


def worker_of(tokenizer: Tokenizer, **given: object) -> EnvironmentWorker:
    return EnvironmentWorker(0, EnvironmentConfig.model_validate(given), tokenizer.files, True)


def verdict(answer: EnvironmentResponse) -> Verdict:
    assert answer.verdict is not None
    return answer.verdict


def reason(answer: EnvironmentResponse) -> str:
    return verdict(answer).reason


def notes(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_slow_or_failing_environment_harms_its_own_rollouts_only(tokenizer: Tokenizer, tmp_path: Path) -> None:
    kinds = ["slow", "failing", "fine", "slow", "fine"]
    kind, settings = "tests.rl.environments.episodes:Troubled", {"folder": str(tmp_path)}
    worker = worker_of(tokenizer, kind=kind, deadline=0.5, settings=settings)
    first: list[str] = []

    async def ask(number: int, how: str) -> EnvironmentResponse:
        answer = await worker.answer(rollout([7], number, how), 100)
        first.append(how)
        return answer

    async def all_of(hows: list[str]) -> list[EnvironmentResponse]:
        return list(await asyncio.gather(*(ask(i, how) for i, how in enumerate(hows))))

    answers = asyncio.run(all_of(kinds))
    reasons = dict(zip(kinds, map(reason, answers), strict=True))
    assert [verdict(a).outcome == Outcome.correct for a in answers] == [k == "fine" for k in kinds]
    assert reasons["slow"] == "the environment did not answer within 0.5 s"
    assert reasons["failing"] == "the environment raised OSError: the disk is full"
    assert first[-2:] == ["slow", "slow"], "the others did not wait"
    assert [name for name in notes(tmp_path) if "ended" in name] == [f"{i}-ended" for i in range(5)]
    (blocked,) = asyncio.run(all_of(["blocking"]))
    assert reason(blocked) == "the environment did not answer within 0.5 s"


def test_dropped_episodes_are_closed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    worker = worker_of(
        tokenizer, kind="tests.rl.environments.episodes:Troubled", deadline=30.0, settings={"folder": str(tmp_path)}
    )

    async def dropped() -> EnvironmentResponse:
        asked = asyncio.create_task(worker.answer(rollout([7], 3, "slow"), 100))
        while not notes(tmp_path):
            await asyncio.sleep(0.01)
        await worker.drop()
        return await asked

    answer = asyncio.run(dropped())
    assert verdict(answer).outcome is Outcome.ungradable
    assert notes(tmp_path) == ["3-began", "3-ended"]


def test_episodes_end_where_turns_or_tokens_do(tokenizer: Tokenizer) -> None:
    worker = worker_of(tokenizer, kind="tests.rl.environments.episodes:Asking", turns=2)

    async def play() -> list[EnvironmentResponse]:
        first = await worker.answer(rollout([7]), 100)
        grown = answered(rollout([7]), first.tokens)
        second = replace(grown, tokens=(*grown.tokens, 8), written=(*grown.written, True))
        lost = replace(second, sample=9)
        cut = rollout([7], 2, reason="length")
        return [
            first,
            *[await worker.answer(r, 100) for r in (second, lost, cut)],
            await worker.answer(rollout([7]), 5),
        ]

    first, last, lost, cut, full = asyncio.run(play())
    assert tokenizer.decode(first.tokens).endswith("And 1?\nassistant\n")
    assert (last.tokens, last.finish_reason, last.final) == ((), "", tokenizer.decode([8]))
    assert verdict(last).credit == 0.2
    assert lost == EnvironmentResponse(is_lost=True)
    assert cut.tokens == ()
    assert (full.tokens, full.finish_reason, full.verdict) == ((), "length", None)


def test_an_environment_that_speaks_first_depends_on_the_sample_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    kind, settings = "tests.rl.environments.episodes:Greeting", {"folder": str(tmp_path)}
    first, other = (worker_of(tokenizer, kind=kind, settings=settings, turns=2) for _ in range(2))
    assert first.speaks_first()
    assert not worker_of(tokenizer, kind="tools", tools=("calculator",)).speaks_first()

    async def began(worker: EnvironmentWorker, samples: list[int], most: int = 100) -> list[EnvironmentResponse]:
        nothing = [replace(rollout([], sample, reason="stop"), final="") for sample in samples]
        return [await worker.begin(each, 11, most) for each in nothing]

    samples = [number for number in range(12) if number != 4]
    answers = asyncio.run(began(first, samples))
    assert answers == asyncio.run(began(other, samples[::-1]))[::-1]
    at_once = [sample for sample, answer in zip(samples, answers, strict=True) if not answer.tokens]
    assert 0 < len(at_once) < 8
    assert {verdict(answer).credit for answer in answers if not answer.tokens} == {0.5}
    assert len({answer.tokens for answer in answers}) > 5
    assert [name for name in notes(tmp_path) if "ended" in name] == sorted(f"{sample}-ended" for sample in at_once)
    [failed] = asyncio.run(began(first, [4]))
    assert reason(failed) == "the environment raised OSError: the disk is full"
    going = next(sample for sample in samples if sample not in at_once)
    [full] = asyncio.run(began(first, [going], most=5))
    assert (full.tokens, full.finish_reason) == ((), "length")


def test_a_first_observation_begins_the_completion_and_its_episode_goes_on(tokenizer: Tokenizer) -> None:
    worker = worker_of(tokenizer, kind="tests.rl.environments.episodes:Greeting", turns=2)

    async def play() -> list[EnvironmentResponse]:
        opening = await worker.begin(rollout([], 3), 11, 100)
        before = answered(rollout([], 3).completion, opening.tokens)
        assert turns(before) == 0
        grown = continued(before, rollout([7], 3).completion, tokenizer.decode)
        assert grown.written == (False,) * len(opening.tokens) + (True,)
        assert grown.weight_versions == (0,) * len(grown.tokens)
        assert continued(before, replace(rollout([7], 3), weight_versions=(3,)), tokenizer.decode).weight_version == 3
        assert (last_turn(grown), turns(grown), own_logp(grown)) == ((7,), 1, (-1.0,))
        second = await worker.answer(grown.with_prompt(rollout([7], 3).prompt), 100)
        await worker.end(3)
        return [opening, second, await worker.answer(grown.with_prompt(rollout([7], 3).prompt), 100)]

    opening, second, lost = asyncio.run(play())
    assert tokenizer.decode(opening.tokens).startswith("user\nRound ")
    assert tokenizer.decode(second.tokens).endswith("And 1?\nassistant\n")
    assert lost == EnvironmentResponse(is_lost=True)


def test_the_game_of_the_page_is_played(
    tokenizer: Tokenizer, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[3].joinpath("docs/environments.md").read_text()
    shown = re.findall(r"\n\n((?:    .*\n|\n(?=    ))+)", page)
    for name, begin in (("guess.py", "from random"), ("guess.toml", 'name = "guess"')):
        Path(name).write_text(next(text for text in map(textwrap.dedent, shown) if text.startswith(begin)))
    check = next(line.split() for line in page.splitlines() if line.startswith("    lockstep recipe check"))
    result = lockstep(*check[1:], "--set", f"model.source={tiny_folder}")
    assert result.exit_code == 0, result.output
    worker = worker_of(tokenizer, kind="guess.py:GuessTheNumber", turns=3)

    async def played() -> list[EnvironmentResponse]:
        found = [await worker.begin(rollout([], 0, "70"), 5, 400)]
        grown = answered(rollout([], 0, "70"), found[0].tokens)
        for guess in ("50", "70"):
            grown = continued(grown, rollout(tokenizer.encode(guess), 0, "70"), tokenizer.decode)
            found.append(await worker.answer(grown, 400))
            grown = answered(grown, found[-1].tokens)
        return found

    first, hint, right = asyncio.run(played())
    assert re.search(r"user\nIt is (above|at most) \d+\.\nassistant", tokenizer.decode(first.tokens))
    assert "It is above 50." in tokenizer.decode(hint.tokens)
    assert verdict(right).reward == 1


def test_an_environment_of_verifiers_shape_plays(tokenizer: Tokenizer) -> None:
    worker = worker_of(tokenizer, kind="tests.rl.environments.episodes:load_guessing")

    async def play() -> list[EnvironmentResponse]:
        grown, found = rollout(tokenizer.encode("3"), 0, "7"), []
        for guess in ("9", "7", ""):
            found.append(await worker.answer(grown, 100))
            grown = answered(grown, found[-1].tokens)
            said = tuple(tokenizer.encode(guess))
            grown = replace(grown, tokens=grown.tokens + said, written=grown.written + (True,) * len(said))
        return found

    higher, lower, right = asyncio.run(play())
    assert "higher" in tokenizer.decode(higher.tokens)
    assert "lower" in tokenizer.decode(lower.tokens)
    assert verdict(right).reward == 1


def test_reasoning_gym_scores_an_answer(tokenizer: Tokenizer) -> None:
    entry = reasoning_gym.create_dataset("spell_backward", size=1, seed=1)[0]
    worker = worker_of(tokenizer, kind="gym", deadline=60.0)

    async def scored(text: str) -> float | None:
        answer = await worker.answer(rollout(tokenizer.encode(text), 0, entry_text(entry)), 100)
        return verdict(answer).reward

    try:
        assert asyncio.run(scored(f"<answer>{entry['answer']}</answer>")) == 1
        assert (asyncio.run(scored("<answer>?</answer>")) or 0) < 1
    finally:
        asyncio.run(worker.close())


def test_what_is_wrong_with_a_section_is_said(tokenizer: Tokenizer) -> None:
    for values, words in (({"kind": "tool"}, "use none, tools, gym, module:Class"), ({"tools": ("sql",)}, "has 'sql'")):
        with pytest.raises(ValidationError, match=words):
            EnvironmentConfig.model_validate(values)
    with pytest.raises(NoEnvironment, match="cannot be loaded"):
        worker_of(tokenizer, kind="tests.rl.environments.episodes:Nobody")
    with pytest.raises(RecipeError, match=r"set task\.grader='gym'"):
        parse({"environment": {"kind": "gym"}})
    assert '"name": "calculator"' in told(EnvironmentConfig(kind="tools"))


def played(engine: RolloutEngine, form: ChatForm, prompts: list[Prompt], sampling: SamplingParams) -> list[Rollout]:
    """Episodes of three turns, as a producer has them written."""
    processor = OutputProcessor(engine)
    done: list[Rollout] = []
    requests = {prompt.index: RolloutRequest(prompt.index, prompt.tokens, sampling, 5) for prompt in prompts}
    for request in requests.values():
        processor.add(request)
    while processor.has_work:
        for ended in processor.step():
            tokens = form.answer(ended.tokens, [Message("tool", f"That makes {ended.sample}.")])
            room = len(ended.tokens) + len(tokens) < sampling.max_new_tokens
            if turns(ended) == 3 or ended.finish_reason == "length" or not room:
                done.append(ended.with_prompt(prompts[ended.sample]))
            else:
                processor.add(replace(requests[ended.sample], begun=answered(ended, tokens)))
    return sorted(done, key=lambda r: r.sample)


@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_log_probabilities_of_all_turns_are_the_trainers(
    numerics: Numerics, groups: Groups, tokenizer: Tokenizer
) -> None:
    trainer, model = random_transformer(groups, "llama", "float32", numerics)
    draw = np.random.default_rng(0)
    prompts = [
        Prompt(i, "", tuple(draw.integers(0, 301, n).tolist()), "") for i, n in enumerate((1, 40, 17, 64, 33, 5))
    ]
    sampling = SamplingParams(temperature=0.9, stop_tokens=ENDS, max_new_tokens=150, frequency_penalty=0.2)
    form = ChatForm(tokenizer, chat=True)
    engine = RolloutEngine(
        model,
        EngineConfig(length=300, sequences=4),
        decode=tokenizer.decode,
        blocks=[60] * len(kinds(model.model)),
    )
    found = played(engine, form, prompts, sampling)
    assert engine.statistics.cached_prompt_tokens > 100, "keys and values of earlier turns were not found"
    assert sum(turns(r) == 3 for r in found) >= 4
    assert all(len(r.tokens) <= 150 for r in found)
    for each in found:
        assert len({len(c) for c in (each.tokens, each.logp, each.weight_versions, each.sampling_logp)}) == 1
    again = rescored(trainer.stage, groups, found, 0.9)
    own = np.concatenate([r.written or (True,) * len(r.tokens) for r in found])
    assert 0 < own.sum() < len(own)
    mismatch = compare(np.asarray([p for r in found for p in own_logp(r)], np.float32), again[own])
    assert mismatch.largest <= 1e-4
    if numerics == "exact":
        assert mismatch.differing_bits == 0
        alone = RolloutEngine(model, EngineConfig(length=300, sequences=1), decode=tokenizer.decode)
        assert [r.tokens for r in played(alone, form, prompts, sampling)] == [r.tokens for r in found]


@pytest.fixture
def start(actors: Actors) -> Iterator[Callable[..., EnvironmentGroup]]:
    """Starts environments in processes of their own."""
    groups = list[EnvironmentGroup]()

    def started(kind: str, workers: int = 1) -> EnvironmentGroup:
        config = EnvironmentConfig(
            kind=f"tests.rl.environments.episodes:{kind}", workers=workers, turns=3, stop=tuple("0123456789aeiou")
        )
        groups.append(EnvironmentGroup(config, actors.tokenizer.files, chat=False))
        gather(groups[-1].ready())
        return groups[-1]

    yield started
    for group in groups:
        with suppress(WorkerDied):
            group.close()
        for worker in group.workers:
            worker.end()


def check_episode(judged: Judged, tokenizer: Tokenizer, first: str = "") -> None:
    """Answers stand where they should, and nothing else was not written by the model."""
    rollout = judged.rollout
    assert len(rollout.tokens) <= 56
    assert rollout.final is not None
    if rollout.written:
        form, place = ChatForm(tokenizer, chat=False), 0
        if first:
            place = rollout.written.index(True)
            assert tokenizer.decode(rollout.tokens[:place]).startswith(first)
        for number in range(1, turns(rollout)):
            begin = rollout.written.index(False, place)
            expected = form.answer(rollout.tokens[:begin], [Message("user", f"And {number}?")])
            assert list(rollout.tokens[begin : begin + len(expected)]) == expected
            place = begin + len(expected)
            assert rollout.written[place]
        assert all(rollout.written[place:])


def test_rollouts_have_the_same_bits_with_any_number_of_environment_workers(
    actors: Actors, start: Callable[..., EnvironmentGroup]
) -> None:
    exact = RolloutGroup(RolloutConfig(workers=1, sequences=4, length=64), threads=1)
    gather(exact.start(actors.checkpoint, "float32", "exact"))
    prompts = {n: Prompt(n, f"{n}?", tuple(actors.tokenizer.encode(f"{n}?")), "1") for n in range(3)}

    def played(environments: EnvironmentGroup, lost: int | None = None) -> list[tuple[object, ...]]:
        collector = Collector(actors.policy, exact, actors.verifiers, environments=environments)
        collector.ask(prompts, SamplingParams(max_new_tokens=50), samples=4, seed=5)
        if lost is not None:
            os.kill(gather(environments.ready())[lost], signal.SIGKILL)
        found = [judged for number in prompts for judged in collector.take(number)]
        collector.drop()
        columns = [(each.rollout.tokens, each.rollout.logp, each.rollout.written) for each in found]
        return [(*map(tuple, three), each.verdict) for three, each in zip(columns, found, strict=True)]

    alone, three = played(start("Greeting")), start("Greeting", workers=3)
    assert len({tokens for tokens, *_ in alone}) > 6
    assert {written[:1] for _, _, written, _ in alone} == {(), (False,)}, "some end at once"  # type: ignore[index]
    assert played(three) == alone
    assert played(three, lost=1) == alone, "what a process had that died begins again, alike"
    exact.end(0)


@pytest.mark.parametrize(("kind", "first"), [("Asking", ""), ("Greeting", "\nRound ")])
def test_two_steps_of_rl_learn_from_what_the_model_wrote(
    kind: str, first: str, actors: Actors, start: Callable[..., EnvironmentGroup]
) -> None:
    problems = [Problem(i, f"{i}?", "1") for i in range(12)]
    environments = start(kind)
    controller = actors.controller(problems, held_out=4, task=TaskConfig(chat=False), environments=environments)
    sampling = SamplingParams(max_new_tokens=56)
    config = RLConfig(method="rloo", steps=2, prompts_per_step=4, group_size=4, sampling=sampling)
    records = list(controller.reinforce(config))
    for record in records:
        assert record.metrics["grad_norm"] > 0
        assert record.metrics["mismatch_max"] < 1e-4
        for completion in record.completions:
            check_episode(completion, actors.tokenizer, first)
    found = [s for record in records for s in record.completions]
    assert sum(turns(s.rollout) > 1 for s in found) > 8
    groups = [found[i : i + 4] for i in range(0, len(found), 4)]
    parts = samples_of(groups, [teaches(group, config) for group in groups], config)
    samples = [sample for part in parts for sample in part.samples]
    masks = {s.rollout.tokens: s.rollout.written or (True,) * len(s.rollout.tokens) for s in found}
    assert any(not all(masks[tuple(sample.completion.tolist())]) for sample in samples)
    for sample in samples:
        assert (sample.weight != 0).tolist() == list(masks[tuple(sample.completion.tolist())])
