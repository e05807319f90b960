"""The commands `lockstep generate` and `lockstep serve`."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lockstep.cluster.commands.console import err, json_lines, sentences
from lockstep.cluster.commands.options import CacheGib, Checkpoint, Dtype, Speculate

if TYPE_CHECKING:
    from lockstep.cluster.generation import Answerer, Question
    from lockstep.rl.rollout.config import SamplingParams

TALK_TOKENS = 1024
"""Of an answer in a talk, unless it is said."""

OnOverflow = Annotated[
    Literal["error", "truncate", "roll"],
    typer.Option(help="What is too long for the context is refused, loses the prompt's begin, or rolls as a window."),
]


@sentences
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str | None, typer.Argument(help="What to answer.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk in turns: Ctrl-C stops an answer, Ctrl-D ends.")] = False,
    input_file: Annotated[
        str | None,
        typer.Option("--input", help="Prompts, one a line, or JSON lines with prompt or messages; - for stdin."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write JSON lines here, in the order of the prompts.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Completions of each prompt; several come as JSON lines.")] = 1,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="A message to the model that stands before all others.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the k likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Draw from tokens this likely relative to the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Divides logits of tokens seen, the prompt's too.")] = 1.0,
    frequency_penalty: Annotated[float, typer.Option(help="Taken from a logit for each time it was written.")] = 0.0,
    presence_penalty: Annotated[float, typer.Option(help="Taken from the logits of tokens written.")] = 0.0,
    logit_bias: Annotated[list[str] | None, typer.Option(help="TOKEN=BIAS, added to a logit; may be repeated.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="128; in a talk 1024.")] = None,
    min_new_tokens: Annotated[int, typer.Option(min=0, help="Tokens before the model may end.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    stop_token: Annotated[list[int] | None, typer.Option(help="End at this token; may be repeated.")] = None,
    on_overflow: OnOverflow = "error",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    dtype: Dtype = "bfloat16",
    cache_gib: CacheGib = 1.0,
    speculate: Speculate = 0,
) -> None:
    """Answer a prompt as it is drawn, a file of prompts, or turn by turn.

    Example: lockstep generate runs/quickstart "What is 12 + 34?" --top-p 0.9
    """
    from lockstep.cluster.generation import ANSWER_TOKENS, sampling_of

    _check_chat(chat, raw or output or samples > 1)
    sampling = sampling_of(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        logit_bias=_biases(logit_bias or ()),
        max_new_tokens=max_new_tokens or (TALK_TOKENS if chat else ANSWER_TOKENS),
        min_new_tokens=min_new_tokens,
        stop=tuple(stop or ()),
        stop_tokens=tuple(stop_token or ()),
    )
    questions = _questions(prompt, input_file, chat=chat, raw=raw, system=system)
    limits = {"sequences": 1 if chat else 64, "cache_gib": cache_gib, "speculate": speculate}
    with _answerer(checkpoint, dtype, limits, sampling, seed, on_overflow) as answerer:
        if chat:
            _chat(answerer, system)
        elif prompt is not None and samples == 1 and output is None:
            _stream(answerer, questions[0])
        else:
            _write(answerer, questions, samples, output)


@sentences
def serve(
    checkpoint: Checkpoint,
    host: Annotated[str, typer.Option(help="Other machines are let in with a key only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="LOCKSTEP_API_KEY", help="That clients have to give.", show_default=False)
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the model; the checkpoint's otherwise.")] = None,
    dtype: Dtype = "bfloat16",
    cache_gib: CacheGib = 1.0,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a prompt with its completion.")] = 1 << 20,
    sequences: Annotated[int, typer.Option(min=1, help="Completions that are computed at the same time.")] = 64,
    speculate: Speculate = 0,
    waiting: Annotated[int, typer.Option(min=0, help="Completions that may wait; more are told to come again.")] = 512,
    grace: Annotated[float, typer.Option(min=0.0, help="Seconds that completions have when the server ends.")] = 10.0,
) -> None:
    """Serve OpenAI's endpoints /v1/completions and /v1/chat/completions until Ctrl-C.

    Example: lockstep serve runs/quickstart --port 8000
    """
    from lockstep.cluster.serving.bind import NeedsKey, bound

    try:
        listener = bound(host, port, has_key=bool(api_key))
    except NeedsKey as error:
        raise ValueError(f"{error}: set LOCKSTEP_API_KEY or give --api-key, or leave out --host") from error
    with listener:
        from lockstep.cluster.serving.server import Settings, serve
        from lockstep.rl.rollout.config import EngineConfig
        from lockstep.rl.rollout.loading import open_engine

        settings = Settings(name or Path(checkpoint).resolve().name, api_key or None, sequences + waiting, grace)
        config = EngineConfig(sequences=sequences, length=length, cache_gib=cache_gib, speculate=speculate)
        with open_engine(checkpoint, dtype, config) as (engine, tokenizer):
            serve(engine, tokenizer, listener, settings, lambda line: err.print(line, highlight=False))


def _check_chat(chat: bool, other: object) -> None:
    if chat and other:
        raise ValueError("--chat talks at this terminal: leave out --raw, --output and --samples")


def _biases(pairs: Iterable[str]) -> dict[int, float]:
    try:
        return {int(token): float(bias) for token, bias in (pair.split("=") for pair in pairs)}
    except ValueError as error:
        raise ValueError("--logit-bias is a token's number and what is added, as in --logit-bias 17=-2.5") from error


def _questions(
    prompt: str | None, input_file: str | None, *, chat: bool, raw: bool, system: str | None
) -> "list[Question]":
    """The prompt, or those of a file; none for a chat, whose turns are read later."""
    from lockstep.cluster.generation import Question, conversation, read_questions

    if (prompt is not None) + (input_file is not None) + chat != 1:
        raise ValueError("what to answer comes from one place: give a prompt, --input or --chat")
    if prompt is not None:
        return [Question({"prompt": prompt}, () if raw else conversation(prompt, system), prompt)]
    if input_file is None:
        return []
    with nullcontext(sys.stdin) if input_file == "-" else Path(input_file).open(encoding="utf-8") as lines:
        return read_questions(lines, raw=raw, system=system)


@contextmanager
def _answerer(
    checkpoint: str,
    dtype: str,
    limits: dict[str, Any],
    sampling: "SamplingParams",
    seed: int,
    on_overflow: OnOverflow,
) -> "Iterator[Answerer]":
    """A checkpoint's engine, with how to sample from it."""
    from lockstep.cluster.generation import Answerer
    from lockstep.rl.rollout.config import EngineConfig
    from lockstep.rl.rollout.loading import open_engine

    with open_engine(checkpoint, dtype, EngineConfig(**limits)) as (engine, tokenizer):
        yield Answerer(engine, tokenizer, sampling, seed, on_overflow)


def _chat(answerer: "Answerer", system: str | None) -> None:
    """Talk at this terminal."""
    from lockstep.cluster.generation import talk

    _edit_lines()
    talk(answerer, _turn, _show, err.print, system=system)


def _stream(answerer: "Answerer", question: "Question") -> None:
    """Show one completion as it is generated."""
    for piece in answerer.stream(answerer.tokens(question), sampling=answerer.sampling_of(question)):
        _show(piece)
    _show("\n")


def _write(answerer: "Answerer", questions: "list[Question]", samples: int, output: Path | None) -> None:
    """Write completions as JSON lines."""
    with json_lines(output) as write:
        for row in answerer.rows(questions, samples):
            write(row)


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _edit_lines() -> None:
    """Arrows and history at the prompt, where Python was built with them."""
    with suppress(ImportError):
        import readline  # noqa: F401


def _turn() -> str:
    """What a person says next; only a terminal is asked for it, so that stdout has answers and nothing else."""
    return input("> " if sys.stdin.isatty() else "")
