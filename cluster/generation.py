"""Generates for people: a streamed completion, completions of a file of prompts, or a chat."""

import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from pydantic import ValidationError

from lockstep.cluster.recipe.errors import validation_sentence
from lockstep.data.json_text import Bad, parsed_json
from lockstep.data.tokenizer import Tokenizer
from lockstep.rl.rollout.config import SamplingParams
from lockstep.rl.rollout.detokenizer import TextStream
from lockstep.rl.rollout.output_processor import CompletionFailed, generate
from lockstep.rl.rollout.protocol import Engine, FailedOutput, OnOverflow, Request, TokenOutput
from lockstep.rl.types import Prompt, Rollout

Message = dict[str, str]
Write = Callable[[str], object]

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Question:
    """A prompt: a text to continue, or the messages of a conversation."""

    given: dict[str, Any]
    """The line that it came from, to be repeated beside the answer."""
    messages: tuple[Message, ...] = ()
    text: str = ""
    """To be continued as it is, where there are no messages."""


@dataclass(frozen=True)
class Answerer:
    """A rollout engine with its tokenizer and sampling parameters."""

    engine: Engine
    tokenizer: Tokenizer
    sampling: SamplingParams
    seed: int = 0
    on_overflow: OnOverflow = "error"
    """What becomes of a prompt and completion that are longer than the context."""

    def tokens(self, question: Question) -> tuple[int, ...]:
        """Tokenize a question, through the chat template where it has messages.

        Raises:
            ValueError: when there is no chat template, or it refuses the messages.
        """
        if question.messages:
            return tuple(self.tokenizer.encode_chat(question.messages))
        return tuple(self.tokenizer.encode_prompt(question.text))

    def sampling_of(self, question: Question) -> SamplingParams:
        """The sampling parameters of a question: in a chat, an answer also ends where the template ends a turn."""
        ends = self.tokenizer.chat_stop_tokens if question.messages else ()
        return self.sampling.model_copy(update={"stop_tokens": (*self.sampling.stop_tokens, *ends)})

    def stream(
        self, tokens: tuple[int, ...], sample: int = 0, sampling: SamplingParams | None = None
    ) -> Generator[str, None, None]:
        """Generate one completion; yields pieces of text. One that is not read to its end is cancelled."""
        sampling = sampling or self.sampling
        text = TextStream(self.tokenizer.decode, sampling.stop)
        self.engine.add(Request("answer", tokens, sampling, self.seed, sample, on_overflow=self.on_overflow))
        try:
            while self.engine.has_work:
                for output in self.engine.step():
                    if isinstance(output, FailedOutput):
                        raise CompletionFailed(f"the completion cannot be written: {output.reason}")
                    if isinstance(output, TokenOutput):
                        yield text.add(output.token, output.finish_reason)
        finally:
            self.engine.cancel("answer")

    def rows(self, questions: Sequence[Question], samples: int) -> Iterator[dict[str, Any]]:
        """Generate completions of many questions; yields a JSON row for each, in their order, as soon as it can be."""
        prompts = [Prompt(i, q.text, self.tokens(q), "") for i, q in enumerate(questions)]
        found: dict[int, list[Rollout]] = {prompt.index: [] for prompt in prompts}
        following = iter(questions)
        sampling = self.sampling_of(next((q for q in questions if q.messages), Question({})))
        for rollout in generate(
            self.engine, prompts, sampling, samples=samples, seed=self.seed, on_overflow=self.on_overflow
        ):
            found[rollout.prompt.index].append(rollout)
            while found and len(next(iter(found.values()))) == samples:
                rollouts = found.pop(next(iter(found)))
                yield next(following).given | {"completions": [self._row(r) for r in sorted(rollouts, key=_sample)]}

    def _row(self, rollout: Rollout) -> dict[str, Any]:
        return {"text": rollout.text, "finish_reason": rollout.finish_reason, "tokens": len(rollout.tokens)}


def _sample(rollout: Rollout) -> int:
    return rollout.sample


ANSWER_TOKENS = 128
"""Tokens of an answer at most, where nobody says how many."""


def sampling_of(**values: Any) -> SamplingParams:
    """Sampling parameters; those that are not given are the command line's, which takes the likeliest tokens.

    Raises:
        ValueError: names the parameter that is not allowed.
    """
    try:
        return SamplingParams(**{"temperature": 0.0, "max_new_tokens": ANSWER_TOKENS} | values)
    except ValidationError as error:
        raise ValueError(validation_sentence(error, SamplingParams)) from error


def conversation(text: str, system: str | None) -> tuple[Message, ...]:
    """The messages of a first turn, after a system message where there is one."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return (*before, {"role": "user", "content": text})


def read_questions(lines: Iterable[str], *, raw: bool, system: str | None) -> list[Question]:
    """Parse questions, one a line: JSON with `prompt` or `messages`, or else a text; empty lines are skipped.

    Args:
        raw: whether prompts are continued as they are and not put to a chat template.

    Raises:
        ValueError: names the line that is neither.
    """
    return [
        _question(line.strip("\r\n\ufeff"), number, raw, system)
        for number, line in enumerate(lines, start=1)
        if line.strip().strip("\ufeff")
    ]


def _question(line: str, number: int, raw: bool, system: str | None) -> Question:
    given = _parsed(line, number)
    if "messages" in given:
        return Question(given, messages=_messages(given["messages"], number))
    prompt = given.get("prompt")
    if not isinstance(prompt, str):
        raise ValueError(f"line {number} has neither a text 'prompt' nor 'messages': give it one of them")
    return Question(given, text=prompt) if raw else Question(given, messages=conversation(prompt, system))


def _parsed(line: str, number: int) -> dict[str, Any]:
    """The object of a line that begins as one does; any other line is a prompt."""
    if not line.lstrip().startswith("{"):
        return {"prompt": line}
    given = parsed_json(line)
    if isinstance(given, Bad):
        raise ValueError(f"line {number} begins like a JSON object and is none: {given.reason}")
    found: dict[str, Any] = given
    return found


def _messages(given: Any, number: int) -> tuple[Message, ...]:
    fits = isinstance(given, list) and all(
        isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str) for m in given
    )
    if not given or not fits:
        raise ValueError(f"line {number}: messages are a list of objects with a content and a role: {', '.join(ROLES)}")
    return tuple({"role": m["role"], "content": m["content"]} for m in given)


class Stop:
    """A flag that Ctrl-C sets."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self, _: int, __: FrameType | None) -> None:
        """Set the flag; a signal handler."""
        self.asked = True


@contextmanager
def interruptible() -> Iterator[Stop]:
    """Turn Ctrl-C into a flag, so that the engine is never interrupted in the middle of a forward pass."""
    stop = Stop()
    before = signal.signal(signal.SIGINT, stop.ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def talk(answerer: Answerer, read: Callable[[], str], write: Write, note: Write, *, system: str | None = None) -> None:
    """Chat until there is nothing to read; Ctrl-C ends an answer, and what was generated of it counts.

    Each turn's prompt begins with all before it, which the engine still has in its cache.

    Args:
        read: the next turn; EOFError ends the talk.
        write: takes pieces of answers.
        note: takes a sentence on a turn that cannot be answered.
    """
    history: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    while True:
        try:
            said = read()
        except EOFError:
            return
        if not said.strip():
            continue
        asked = [*history, {"role": "user", "content": said}]
        try:
            answer = _turn(answerer, asked, write)
        except ValueError as error:
            note(str(error))
            continue
        write("\n")
        history = [*asked, {"role": "assistant", "content": answer}]


def _room(answerer: Answerer, tokens: tuple[int, ...]) -> int:
    """Tokens that an answer may have behind a talk; raises ValueError where there is no room for one."""
    room = answerer.engine.longest - len(tokens)
    if room < 1:
        raise ValueError(
            f"this talk has {len(tokens)} tokens, and {answerer.engine.longest} are allowed: end it and begin another"
        )
    return room


def _turn(answerer: Answerer, messages: Sequence[Message], write: Write) -> str:
    question = Question({}, messages=tuple(messages))
    tokens = answerer.tokens(question)
    limit = answerer.sampling.max_new_tokens
    if answerer.on_overflow == "error":
        limit = min(limit, _room(answerer, tokens))
    sampling = answerer.sampling_of(question).model_copy(update={"max_new_tokens": limit})
    said = []
    with interruptible() as stop:
        pieces = answerer.stream(tokens, len(messages), sampling)
        for piece in pieces:
            said.append(piece)
            write(piece)
            if stop.asked:
                pieces.close()
                break
    return "".join(said)
