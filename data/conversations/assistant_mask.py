"""Tokens of conversations with an assistant mask: which of them the assistant says, so that a loss is of them alone.

Each turn is encoded behind exactly what a model reads before it (`ChatTurn`). Turns go into one sequence as long as the
prompt of the next one is what the sequence says so far, with more behind it. Where it is not, the template changes
earlier turns when later ones come: it drops their thoughts, or ends the last turn in another way. Then the next turn
begins a sequence of its own, with its own prompt. So no turn is learned behind a prompt that it does not have when it
is asked for, and none is learned twice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lockstep.data.chat_template import RefusedChat
from lockstep.data.chat_turns import ChatTurn
from lockstep.data.control_tokens import Marked
from lockstep.data.conversations.conversation import Conversation
from lockstep.data.row_reader import BadRow
from lockstep.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class MaskedTokens:
    """Tokens of a conversation, or of a part of one, and which of them are learned from."""

    tokens: list[int]
    taught: list[bool]
    """Of each token, whether the assistant says it; the control token that ends its turn included."""


@dataclass(frozen=True)
class _Piece:
    text: Marked
    taught: bool


_Text = list[_Piece]


def masked_tokens(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, *, chat: bool = True
) -> list[list[MaskedTokens] | BadRow]:
    """Tokenize conversations with an assistant mask: their sequences, or what is wrong with one.

    Tokens of a prompt are those that rollouts and serving read, and those of a turn go on behind them. The control
    token that ends a turn is learned. Where the template writes none, the tokenizer's end token stands there, and each
    turn is a sequence of its own. With `{% generation %}` blocks in the template, of a turn only what they mark is
    learned, and its end. Control tokens that messages spell are text.

    Args:
        chat: use the chat template; otherwise conversations are a prompt and a completion, as they are.

    Raises:
        BadTemplate: when there is no chat template, or it cannot be read.
        RefusedChat: when it refuses any question with an answer.
    """
    end = tokenizer.turn_end.token if chat else None
    texts = [_texts(each, tokenizer) if chat else _plain(each, tokenizer) for each in conversations]
    pairs = [pair for each in texts if not isinstance(each, BadRow) for text in each for pair in _pairs(text)]
    encoded = iter(tokenizer.continuations(pairs))
    last = [] if end is not None or tokenizer.eos is None else [tokenizer.eos]
    return [
        each if isinstance(each, BadRow) else [_masked(text, encoded, last, tokenizer, begin=not chat) for text in each]
        for each in texts
    ]


def _texts(conversation: Conversation, tokenizer: Tokenizer) -> list[_Text] | BadRow:
    """The sequences of a conversation, as texts."""
    try:
        turns = tokenizer.chat_turns(conversation.messages, conversation.taught, conversation.tools)
    except RefusedChat as error:
        return BadRow(f"{conversation.place}: {error}")
    found: list[_Text] = []
    before, goes_on = "", tokenizer.turn_end.token is not None
    for turn in turns:
        if found and goes_on and turn.prompt.startswith(before):
            found[-1].append(_Piece(Marked(turn.prompt[len(before) :]), taught=False))
        else:
            found.append([_Piece(turn.prompt, taught=False)])
        found[-1] += _pieces(turn)
        before = turn.prompt + turn.said
    return found


def _pieces(turn: ChatTurn) -> Iterator[_Piece]:
    """What a turn says, in parts that are learned from and others."""
    last = 0
    for begun, ended in turn.taught:
        if begun > last:
            yield _Piece(Marked(turn.said[last:begun]), taught=False)
        yield _Piece(Marked(turn.said[begun:ended]), taught=True)
        last = ended
    if turn.said[last:]:
        yield _Piece(Marked(turn.said[last:]), taught=False)


def _plain(conversation: Conversation, tokenizer: Tokenizer) -> list[_Text] | BadRow:
    if not conversation.is_plain:
        return BadRow(
            f"{conversation.place}: without a chat template a conversation is a prompt and a completion, both texts, "
            f"and this one has {len(conversation.messages)} messages: use the template, with chat=true"
        )
    prompt, completion = (message["content"] for message in conversation.messages)
    return [[_Piece(tokenizer.verbatim(prompt), taught=False), _Piece(tokenizer.marked(completion), taught=True)]]


def _pairs(text: _Text) -> Iterator[tuple[Marked, Marked]]:
    """Each piece with all that is before it."""
    before = ""
    for piece in text:
        yield Marked(before), piece.text
        before += piece.text


def _masked(
    text: _Text, encoded: Iterator[list[int]], end: Sequence[int], tokenizer: Tokenizer, *, begin: bool
) -> MaskedTokens:
    """The tokens of a sequence.

    Args:
        encoded: the tokens of its pieces; as many are taken.
        end: what is learned behind it.
        begin: whether it begins with BOS where the tokenizer adds it.
    """
    tokens: list[int] = []
    taught: list[bool] = []
    for piece in text:
        found = next(encoded)
        found = tokenizer.begun(found) if begin and not tokens else found
        tokens += found
        taught += [piece.taught] * len(found)
    return MaskedTokens([*tokens, *end], [*taught, *[any(taught)] * len(end)])
