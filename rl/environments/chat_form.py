"""ChatForm: encodes an environment's messages, such as tool results, as tokens behind a prompt or a turn.

They are messages of the chat template. Only what is new is encoded: the template renders a conversation with a stand-in
where the model spoke, and what follows the stand-in is the answer, up to where the next assistant turn begins. What the
model wrote is never rendered: its tokens stay what they are, also where its text has other tokens. What messages say is
text: no result of a tool can end its own message and begin another.

Where an environment speaks first, its prompt ends where the user's message does, before the assistant's turn: the first
observation is a further message of the user's then, and the tokens of both are those of the whole conversation. A
template that takes no two messages of the user's in a row has the observation at the end of the first.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from lockstep.data.chat_template import BadTemplate, RefusedChat
from lockstep.data.control_tokens import Marked
from lockstep.data.tokenizer import Tokenizer
from lockstep.rl.environments.protocol import Message

_STAND_IN, _PROBE = "0d5f3a-what-the-model-said", "0d5f3a-what-it-hears"


class ChatForm:
    """Encodes an environment's messages as tokens to append to a model's turn."""

    def __init__(self, tokenizer: Tokenizer, *, chat: bool) -> None:
        """
        Args:
            chat: whether prompts use the tokenizer's chat template; messages are lines of plain text otherwise.
        """
        self._tokenizer, self._chat = tokenizer, chat
        self._known: dict[str, bool] = {}

    def answer(self, turn: Sequence[int], messages: Sequence[Message]) -> list[int]:
        """Tokens to append to those of a turn, the end-of-turn token included where the model has not written it.

        Raises:
            BadTemplate, RefusedChat: when there is no chat template, or it refuses the messages.
        """
        if not self._chat:
            return self._tokenizer.continuation(Marked(_STAND_IN), self._plain(messages))
        (before, after), end = self._rendered(messages), self._tokenizer.turn_end
        if turn and turn[-1] == end.token and after.startswith(end.text):
            before, after = Marked(before + end.text), Marked(after.removeprefix(end.text))
        return self._tokenizer.continuation(before, after)

    def prompt(self, conversation: Sequence[dict[str, Any]]) -> Marked:
        """What the template renders of a conversation up to where a first observation stands.

        Args:
            conversation: in OpenAI's form; the last message is the user's.

        Raises:
            BadTemplate, RefusedChat: see `answer`.
        """
        if self._has_further_message:
            return self._tokenizer.render(conversation, add_generation_prompt=False)
        *before, last = conversation
        whole = self._tokenizer.render([*before, last | {"content": last["content"] + _STAND_IN}])
        return Marked(_parted(whole)[0].removesuffix(_STAND_IN))

    def first_observation(self, messages: Sequence[Message]) -> list[int]:
        """Tokens to append to those of a prompt before the model's first turn: messages in the user's name.

        Raises:
            BadTemplate, RefusedChat: see `answer`.
        """
        if not self._chat:
            return self._tokenizer.continuation(Marked(_STAND_IN), self._plain(messages))
        said = _as_user(messages)
        if not self._has_further_message:
            whole = self._tokenizer.render([_user(f"{_STAND_IN}\n\n{said.content}")])
            return self._tokenizer.continuation(*_parted(whole))
        before = self._tokenizer.render([_user(_STAND_IN)], add_generation_prompt=False)
        whole = self._tokenizer.render([_user(_STAND_IN), vars(said)])
        return self._tokenizer.continuation(before, Marked(whole.removeprefix(before)))

    @cached_property
    def _has_further_message(self) -> bool:
        """Whether the template renders two messages of the user's, one after the other."""
        try:
            before = self._tokenizer.render([_user(_STAND_IN)], add_generation_prompt=False)
            whole = self._tokenizer.render([_user(_STAND_IN), _user(_PROBE)])
        except RefusedChat:
            return False
        return whole.startswith(before) and _PROBE in whole[len(before) :]

    def _plain(self, messages: Sequence[Message]) -> Marked:
        return self._tokenizer.marked("".join(f"\n{_tagged(m)}\n" for m in messages))

    def _rendered(self, messages: Sequence[Message]) -> tuple[Marked, Marked]:
        """What the template renders up to the end of a turn, and behind it.

        Tool results are user messages where it has no tool role.
        """
        return self._after_stand_in(messages if all(self._knows(m.role) for m in messages) else [_as_user(messages)])

    def _knows(self, role: str) -> bool:
        """Whether the template renders messages of a role."""
        if role not in self._known:
            try:
                self._known[role] = _PROBE in self._after_stand_in([Message(role, _PROBE)])[1]
            except RefusedChat:
                self._known[role] = False
        return self._known[role]

    def _after_stand_in(self, messages: Sequence[Message]) -> tuple[Marked, Marked]:
        opening = [_user("…"), {"role": "assistant", "content": _STAND_IN}]
        return _parted(self._tokenizer.render([*opening, *map(vars, messages)]))


def _parted(whole: Marked) -> tuple[Marked, Marked]:
    """A rendering up to the stand-in in it, and what follows."""
    before, found, after = whole.rpartition(_STAND_IN)
    if not found:
        raise BadTemplate(f"the chat template leaves out what was said ({whole[:80]!r} is all): use another template")
    return Marked(before + found), Marked(after)


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _as_user(messages: Sequence[Message]) -> Message:
    return Message("user", "\n".join(_tagged(m) for m in messages))


def _tagged(message: Message) -> str:
    return f"<tool_response>\n{message.content}\n</tool_response>" if message.role == "tool" else message.content


def prompt_before_observation(tokenizer: Tokenizer, conversation: Sequence[dict[str, Any]]) -> Marked:
    """A chat's prompt up to where an environment's first observation stands; see `ChatForm.prompt`."""
    return ChatForm(tokenizer, chat=True).prompt(conversation)
