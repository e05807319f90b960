"""Texts to be scored, from JSON lines, and their tokens: what is scored of each, and what it is conditioned on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.data.json_text import Bad, parsed_json, whole_characters
from lockstep.data.tokenizer import Tokenizer
from lockstep.model.config import ModelConfig

FORMS = "'text', 'prompt' with 'completion', or 'messages'"


class BadText(ValueError):
    """A line of the input that cannot be scored."""


@dataclass(frozen=True)
class Text:
    """A line of the input, as it was given."""

    where: str
    """The line, counted from 1, or the file, as sentences name it."""
    given: dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Tokens that are scored, and those before them."""

    context: tuple[int, ...]
    scored: tuple[int, ...]
    characters: str
    """The text of the tokens that are scored."""


def read_texts(lines: Iterable[bytes]) -> list[Text]:
    """Parse JSON lines of texts to be scored; empty lines are skipped.

    Raises:
        BadText: names the line that is not UTF-8, is no JSON object, or has not one of the forms.
    """
    numbered = ((f"line {number}", line) for number, line in enumerate(lines, start=1) if line.strip())
    return [Text(where, _given(line, where)) for where, line in numbered]


def read_document(content: bytes, name: str) -> Text:
    """A plain text, which is scored as one document.

    Raises:
        BadText: when it is not UTF-8.
    """
    return Text(name, {"text": _decoded(content, name)})


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadText(f"{where} is not UTF-8 at byte {error.start}: convert the file to UTF-8") from error


def _given(line: bytes, where: str) -> dict[str, Any]:
    given = parsed_json(_decoded(line, where))
    if isinstance(given, Bad):
        raise BadText(f"{where} is {given.reason}: give a JSON object with {FORMS}")
    if not isinstance(given, dict):
        raise BadText(f"{where} is no JSON object: give one with {FORMS}")
    keys = given.keys() & {"text", "prompt", "completion", "messages"}
    if keys not in ({"text"}, {"prompt", "completion"}, {"messages"}):
        raise BadText(f"{where} has {', '.join(sorted(keys)) or 'nothing to score'}: give one of {FORMS}")
    for key in sorted(keys - {"messages"}):
        if not isinstance(given[key], str):
            raise BadText(f"{where} has {key!r} that is no text: give a string")
    if "messages" in keys:
        _check_messages(given["messages"], where)
    return given


def _check_messages(messages: Any, where: str) -> None:
    fits = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not fits:
        raise BadText(f"{where}: messages are a list of objects with a role and a text as content")
    if not any(m["role"] == "assistant" for m in messages):
        raise BadText(f"{where} has no message of the assistant, which are those that are scored: give one")
    if messages[0]["role"] == "assistant":
        raise BadText(f"{where} begins with a message of the assistant: put a question before it")


def parts_of(text: Text, tokenizer: Tokenizer, model: ModelConfig) -> list[Part]:
    """The tokens of a text that are scored, each part with its context.

    A text, and a completion whose prompt has no tokens, is conditioned on BOS, or on the end-of-text token where the
    tokenizer has no BOS, as in lm-eval; where it has neither, the first token is not scored. Of messages, each turn of
    the assistant is a part, with the token that ends it.

    Raises:
        BadText: names the line whose tokens the model does not have, or whose messages the chat template refuses.
    """
    parts = _parts(text, tokenizer)
    largest = max((token for part in parts for token in (*part.context, *part.scored)), default=0)
    if largest >= model.vocabulary:
        raise BadText(
            f"{text.where} has token {largest}, and the model's vocabulary has {model.vocabulary}: take the "
            "tokenizer that belongs to the model"
        )
    return parts


def _parts(text: Text, tokenizer: Tokenizer) -> list[Part]:
    given = text.given
    if "messages" in given:
        try:
            return _turns(given["messages"], tokenizer)
        except ValueError as error:
            raise BadText(f"{text.where}: {error}") from error
    if "text" in given:
        return [_document(given["text"], tokenizer)]
    prompt, said = map(tokenizer.verbatim, (given["prompt"], given["completion"]))
    if not tokenizer.encode_marked(prompt):
        return [_document(given["completion"], tokenizer)]
    context, scored = tokenizer.encode_marked(prompt, begin=True), tokenizer.continuation(prompt, said)
    return [Part(tuple(context), tuple(scored), given["completion"])]


def _turns(messages: Sequence[dict[str, str]], tokenizer: Tokenizer) -> list[Part]:
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return [
        Part(
            tuple(tokenizer.encode_marked(turn.prompt)),
            tuple(tokenizer.continuation(turn.prompt, turn.said)),
            tokenizer.plain(turn.said),
        )
        for turn in tokenizer.chat_turns(messages, places)
    ]


def _document(characters: str, tokenizer: Tokenizer) -> Part:
    begin = tokenizer.begin or next(((token,) for token in (tokenizer.bos, tokenizer.eos) if token is not None), ())
    tokens = tuple(tokenizer.encode(characters))
    if begin and tokens[: len(begin)] == begin:
        tokens = tokens[len(begin) :]
        return Part(begin, tokens, tokenizer.decode(tokens, skip_special=False))
    if begin:
        return Part(begin, tokens, characters)
    return Part(tokens[:1], tokens[1:], tokenizer.decode(tokens[1:], skip_special=False))


def utf8_bytes(characters: str) -> int:
    """Bytes of a text in UTF-8; a lone surrogate counts as the U+FFFD that it is encoded as."""
    return len(whole_characters(characters).encode())
