"""Conversations in a chat template's words, as marked texts: prompts, and the turns of an assistant that answer them.

A turn is seen as a model meets it: its prompt is the conversation before it, rendered with the prompt for an answer,
and what it says is what the template adds to that when the turn is there, up to the token that ends it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lockstep.data.chat_template import REASONING, ChatTemplates, Message, RefusedChat
from lockstep.data.control_tokens import GENERATION, ControlTokens, Marked, without_generation

Tools = Sequence[Mapping[str, Any]] | None

_ASKED, _SAID = "7f3a-what-is-asked", "7f3a-what-is-said"
"""Texts that stand for turns, to see what a template writes around them."""


@dataclass(frozen=True)
class ChatTurn:
    """A turn of an assistant in a conversation, as the chat template has it there."""

    prompt: Marked
    """What a model reads before it."""
    said: Marked
    """What it writes there, up to and including the control token that ends the turn."""
    taught: tuple[tuple[int, int], ...]
    """Parts of it that are learned from, in characters and in order: all of it, or what `{% generation %}` marks."""


@dataclass(frozen=True)
class TurnEnd:
    """How a chat template ends what an assistant says."""

    whole: str
    """All that follows it in a conversation."""
    text: str
    """Of that, what ends in the first control token: what a model writes to end its turn; empty if there is none."""
    token: int | None
    """That control token."""


class ChatRenderer:
    """Renders conversations with a tokenizer's chat templates; what messages and tools spell is marked as text."""

    def __init__(self, templates: ChatTemplates, control: ControlTokens, variables: Mapping[str, Any]) -> None:
        """
        Args:
            variables: of the templates, beside messages and tools.
        """
        self._templates, self._control, self._variables = templates, control, dict(variables)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools = None,
        add_generation_prompt: bool = True,
        **chat_template_kwargs: Any,
    ) -> Marked:
        """Render a conversation; see `Tokenizer.render`."""
        mark = self._control.mark
        variables = mark(chat_template_kwargs) | {"add_generation_prompt": add_generation_prompt}
        return Marked(self._templates.render(mark(list(messages)), mark(tools), self._variables | variables))

    @cached_property
    def turn_end(self) -> TurnEnd:
        """How the chat template ends an assistant's turn.

        Raises:
            BadTemplate, RefusedChat: as `render`.
        """
        asked, said = {"role": "user", "content": _ASKED}, {"role": "assistant", "content": _SAID}
        _, found, whole = self.render([asked, said], add_generation_prompt=False).rpartition(_SAID)
        if not found:
            raise RefusedChat("the chat template leaves out what an assistant says: use another template")
        written = self._control.written(Marked(whole))
        if written is None:
            return TurnEnd(whole, "", None)
        return TurnEnd(whole, whole[: written.end()], self._control.number(written[0]))

    def turns(self, messages: Sequence[Message], places: Iterable[int], tools: Tools = None) -> list[ChatTurn]:
        """What a model reads and writes at turns of an assistant in a conversation.

        What the template writes otherwise of earlier turns when later ones follow, as of thoughts that it drops, is so
        in the prompts of the later ones alone.

        Args:
            places: of messages of the assistant; none is the first.

        Raises:
            BadTemplate: as `render`.
            RefusedChat: as `render`; also where the template leaves out thoughts or calls of tools, or writes a turn
                otherwise than behind its own prompt for one.
        """
        marked, schemas = self._control.mark(list(messages)), self._control.mark(tools)
        return [self._turn(marked[:place], marked[place], schemas) for place in places]

    def _turn(self, before: Sequence[Message], message: Message, tools: Tools) -> ChatTurn:
        prompts, complete = (self._variables | {"add_generation_prompt": each} for each in (True, False))
        prompt = Marked(self._templates.render(before, tools, prompts))
        rendered = self._templates.render([*before, message], tools, complete, GENERATION)
        whole, blocks = without_generation(rendered)
        end = self._end_of(whole[len(prompt) :]) if whole.startswith(prompt) else None
        if end is None:
            said = Marked(_content_alone(message) + self.turn_end.text)
            return ChatTurn(prompt, said, ((0, len(said)),))
        said = Marked(whole[len(prompt) : len(whole) - len(end.whole)] + end.text)
        _check_whole(message, said)
        if not self._templates.marks_generation:
            return ChatTurn(prompt, said, ((0, len(said)),))
        return ChatTurn(prompt, said, _clipped(blocks, len(prompt), len(said), len(said) - len(end.text)))

    def _end_of(self, answer: str) -> TurnEnd | None:
        """How a turn ends: as others do, or in a control token of its own, as one that calls a tool may."""
        if answer.endswith(self.turn_end.whole):
            return self.turn_end
        last = self._control.context(Marked(answer))
        found = self._control.written(last)
        if found is None or last[found.end() :].strip():
            return None
        return TurnEnd(last, found[0], self._control.number(found[0]))


def _content_alone(message: Message) -> str:
    """What a turn says that the template writes otherwise: where it is nothing but a text, a model writes that text."""
    if not message.keys() <= {"role", "content"}:
        keys = ", ".join(key for key in message if key not in ("role", "content"))
        raise RefusedChat(
            f"the chat template writes a turn that has {keys} otherwise than behind its own prompt for an answer: "
            "leave them out, or use another template"
        )
    return str(message["content"])


def _check_whole(message: Message, said: str) -> None:
    """Whether the template writes what a turn has beside its content: calls of tools by name, and thoughts."""
    names = [(call.get("function") or call).get("name", "") for call in message.get("tool_calls") or ()]
    parts = {f"the call of the tool {name!r}": name for name in names}
    parts |= {f"{key} of the assistant": str(message[key]).strip() for key in REASONING if message.get(key)}
    for part, text in parts.items():
        if text not in said:
            raise RefusedChat(
                f"the chat template leaves out {part}, so that it would not be learned: use a template that writes it, "
                "or write it into the content"
            )


def _clipped(blocks: Iterable[tuple[int, int]], start: int, length: int, end: int) -> tuple[tuple[int, int], ...]:
    """The parts of blocks that lie within a turn, in characters from its start; with the turn's end, if there are any.

    Args:
        start: of the turn.
        end: where what ends the turn begins, from its start.
    """
    found = [(max(begun - start, 0), min(ended - start, length)) for begun, ended in blocks if ended > start]
    found = [(begun, ended) for begun, ended in found if begun < ended]
    if not found:
        return ()
    begun, ended = found[-1]
    return (*found[:-1], (begun, length)) if ended >= end else (*found, (end, length))
