"""Tokenizers with chat templates from Hugging Face tokenizer files, and training of byte-level BPE tokenizers.

Which text means control tokens is the question that decides how to encode:

- `encode` takes a text as it is: where it spells a control token, it has one. `encode_prompt` also begins it as the
  tokenizer does, with BOS where there is one, once.
- `render` and `chat` put a conversation into the chat template; what messages and tools spell is text, and only what
  the template writes is a control token. `encode_marked` encodes what `render` gives. Templates write BOS themselves.
- `continuation` encodes a text as it goes on behind another; `chat_answer` and `text_answer` also end it.
- `chat_turns` has what an assistant says in a conversation, each turn with the prompt that it answers.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import xxhash
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from lockstep.data.chat_template import ChatTemplates, Message
from lockstep.data.chat_turns import ChatRenderer, ChatTurn, Tools, TurnEnd
from lockstep.data.control_tokens import ControlTokens, Marked
from lockstep.data.json_text import Bad, parsed_json, whole_characters

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ASKED, _SAID, _NEXT = "7f3a-what-is-asked", "7f3a-what-is-said", "7f3a-what-is-asked-next"
"""Texts that stand for turns, to see what a template writes around them."""
_ANCHORS = ("\n", "a", ".", "0")
"""Texts to encode another behind, where the prompt's own last token would merge with its first."""


class BadTokenizer(ValueError):
    """Tokenizer files that cannot be used."""


class Tokenizer:
    """A Hugging Face `tokenizers` tokenizer with its special tokens and chat templates."""

    def __init__(self, files: dict[str, str], chat_template_kwargs: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            files: file name → text; `tokenizer.json` is needed, the others are optional.
            chat_template_kwargs: variables of the chat template, such as `enable_thinking`.

        Raises:
            BadTokenizer: when tokenizer.json is missing, or a file is broken.
        """
        if "tokenizer.json" not in files:
            raise BadTokenizer("the checkpoint has no tokenizer.json: convert it from a folder that has one")
        self.files, self._variables = files, dict(chat_template_kwargs or {})
        try:
            self._fast = FastTokenizer.from_str(files["tokenizer.json"])
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise BadTokenizer(f"tokenizer.json cannot be read: {error}") from error
        settings = _object(files, "special_tokens_map.json") | _object(files, "tokenizer_config.json")
        named = {name: _content(settings.get(name)) for name in _NAMED}
        self._names = {name: text for name, text in named.items() if text is not None}
        self._fast.add_special_tokens([n for n in self._names.values() if self._fast.token_to_id(n) is not None])
        self._templates = ChatTemplates(files, settings)

    def with_template_kwargs(self, chat_template_kwargs: Mapping[str, Any]) -> "Tokenizer":
        """The same tokenizer with other variables of its chat template."""
        return self if self._variables == chat_template_kwargs else Tokenizer(self.files, chat_template_kwargs)

    @property
    def vocabulary(self) -> int:
        """Number of tokens, special ones included."""
        return self._fast.get_vocab_size()

    @cached_property
    def numbers(self) -> int:
        """One more than the highest token id; tokenizers with unused ids have fewer tokens."""
        return 1 + max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def bos(self) -> int | None:
        """The id of the begin-of-text token, or None; whether texts begin with it is what `begin` says."""
        return self._id_of("bos_token")

    @property
    def eos(self) -> int | None:
        """The id of the end-of-text token, or None."""
        return self._id_of("eos_token")

    def _id_of(self, role: str) -> int | None:
        name = self._names.get(role)
        return None if name is None else self._fast.token_to_id(name)

    @cached_property
    def special(self) -> dict[int, str]:
        """Ids and names of the special tokens."""
        added = self._fast.get_added_tokens_decoder()
        return {number: token.content for number, token in added.items() if token.special}

    @cached_property
    def tokenizer_json(self) -> str:
        """The content of tokenizer.json, with the special tokens that other files name."""
        return self._fast.to_str()

    @cached_property
    def digest(self) -> str:
        """A digest of the vocabulary, 32 hex digits: equal for tokenizers that give every id the same token."""
        names = sorted((number, name) for name, number in self._fast.get_vocab(with_added_tokens=True).items())
        return xxhash.xxh3_128_hexdigest(json.dumps(names).encode())

    def token(self, name: str) -> int:
        """The id of a token.

        Raises:
            BadTokenizer: when there is no token of this name.
        """
        found = self._fast.token_to_id(name)
        if found is None:
            raise BadTokenizer(f"the tokenizer has no token {name!r}")
        return found

    @cached_property
    def begin(self) -> tuple[int, ...]:
        """The tokens that the post-processor of tokenizer.json begins a text with: BOS, or none."""
        encoding = self._fast.encode("a", add_special_tokens=True)
        own = encoding.special_tokens_mask.index(0) if 0 in encoding.special_tokens_mask else 0
        return tuple(encoding.ids[:own])

    def encode(self, text: str) -> list[int]:
        """Encode a text as it is; nothing is added, and control tokens that it spells are control tokens."""
        return self._fast.encode(whole_characters(text), add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Encode a text to be continued as it is, no chat: it begins with BOS where the tokenizer adds it, once."""
        return self.begun(self.encode(text))

    def begun(self, tokens: list[int]) -> list[int]:
        """Tokens of a text with BOS before them, where the tokenizer adds it and they do not begin with it."""
        return tokens if tokens[: len(self.begin)] == list(self.begin) else [*self.begin, *tokens]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts, in parallel; no special tokens are added."""
        return [e.ids for e in self._fast.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, tokens: Iterable[int], *, skip_special: bool = True) -> str:
        """Decode tokens to text; bytes that do not form a character become U+FFFD."""
        return self._fast.decode(list(tokens), skip_special_tokens=skip_special)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools = None,
        add_generation_prompt: bool = True,
        **chat_template_kwargs: Any,
    ) -> Marked:
        """Render a conversation with the chat template, up to where the model's answer begins.

        Args:
            tools: JSON schemas of functions that the model may call.
            chat_template_kwargs: further variables of the template, over the tokenizer's own.

        Returns:
            A text for `encode_marked`, in which control tokens that messages and tools spell are marked as text.

        Raises:
            BadTemplate: when there is no template, or it cannot be read.
            RefusedChat: says in the template's words why it refuses the conversation.
        """
        return self._chats.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **chat_template_kwargs
        )

    def chat(self, messages: Sequence[Message], **options: Any) -> str:
        """The text that `render` gives, without marks."""
        return self.plain(self.render(messages, **options))

    def encode_chat(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """The tokens of a conversation, up to where the model's answer begins; options are those of `render`."""
        return self.encode_marked(self.render(messages, **options))

    def marked(self, text: str) -> Marked:
        """A text all of whose control tokens are only spelled, to be put into others for `encode_marked`."""
        return Marked(self._control.mark(text))

    def plain(self, marked: Marked) -> str:
        """A marked text without its marks."""
        return self._control.plain(marked)

    def verbatim(self, text: str) -> Marked:
        """A text all of whose control tokens are meant."""
        return self._control.verbatim(text)

    def encode_marked(self, marked: Marked, *, begin: bool = False) -> list[int]:
        """Encode a text in which control tokens that are only spelled are marked.

        Args:
            begin: whether it begins with BOS, as `encode_prompt` says; nothing is added otherwise.
        """
        tokens = self._control.encode(marked)
        return self.begun(tokens) if begin else tokens

    def continuation(self, before: Marked, text: Marked) -> list[int]:
        """The tokens of a text behind another, whose own tokens are those of `encode_marked(before)`.

        Unlike `encode`, no tokenizer adds a space before it, as SentencePiece's do at the begin of a text.
        """
        for anchor in (self._control.context(before), *map(self.verbatim, _ANCHORS)):
            head, whole = self.encode_marked(anchor), self.encode_marked(Marked(anchor + text))
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return self.encode_marked(text)

    def continuations(self, pairs: Sequence[tuple[Marked, Marked]]) -> list[list[int]]:
        """The tokens of several texts, each behind another, as `continuation`; in parallel."""
        anchors = [self._control.context(before) for before, _ in pairs]
        heads = {anchor: self.encode_marked(anchor) if anchor else [] for anchor in set(anchors)}
        wholes = self._control.encode_all([Marked(a + text) for a, (_, text) in zip(anchors, pairs, strict=True)])
        return [
            whole[len(heads[anchor]) :] if whole[: len(heads[anchor])] == heads[anchor] else self.continuation(*pair)
            for anchor, pair, whole in zip(anchors, pairs, wholes, strict=True)
        ]

    def chat_turns(self, messages: Sequence[Message], places: Iterable[int], tools: Tools = None) -> list[ChatTurn]:
        """What a model reads and writes at turns of an assistant in a conversation; see `ChatRenderer.turns`."""
        return self._chats.turns(messages, places, tools)

    def chat_answer(self, messages: Sequence[Message], text: str) -> list[int]:
        """The tokens of a model's answer to a conversation, ended as the chat template ends a turn.

        They go on behind those of `encode_chat(messages)`, and are what the template writes of the answer there, where
        it keeps the prompt's text. The last one is the control token that ends the turn, or the tokenizer's end of
        text, where the template writes none.

        Raises:
            BadTemplate, RefusedChat: as `render`.
        """
        [turn] = self.chat_turns([*messages, {"role": "assistant", "content": text}], [len(messages)])
        return self._ended(turn.prompt, turn.said, self.turn_end.token)

    def text_answer(self, prompt: Marked, text: Marked) -> list[int]:
        """The tokens of a text behind a prompt that is continued as it is, ended by the tokenizer's end of text."""
        return self._ended(prompt, text, None)

    def _ended(self, before: Marked, text: Marked, end: int | None) -> list[int]:
        tokens = self.continuation(before, text)
        return tokens if end is not None or self.eos is None else [*tokens, self.eos]

    @property
    def turn_end(self) -> TurnEnd:
        """How the chat template ends an assistant's turn.

        Raises:
            BadTemplate, RefusedChat: as `render`.
        """
        return self._chats.turn_end

    @cached_property
    def chat_stop_tokens(self) -> tuple[int, ...]:
        """The token that ends a turn in chats, at which a model stops beside its own; none where none is known."""
        try:
            end = self.turn_end.token
        except ValueError:  # a template that needs more than a question and an answer
            return ()
        return () if end is None else (end,)

    @cached_property
    def _chats(self) -> ChatRenderer:
        return ChatRenderer(self._templates, self._control, self._names | self._variables)

    @cached_property
    def _control(self) -> ControlTokens:
        """Of the tokens with special meaning: special ones, named ones, and those that begin and end turns.

        Added tokens that are not special, such as <think> and <tool_call>, are part of what is said.
        """
        added = self._fast.get_added_tokens_decoder().values()
        around = self._around_turns()
        return ControlTokens(
            self._fast, {t.content for t in added if t.special or (t.content in around and not t.content.isspace())}
        )

    def _around_turns(self) -> str:
        """What the chat template writes around turns of a user and an assistant; empty where it writes none."""
        turns = zip(("user", "assistant", "user"), (_ASKED, _SAID, _NEXT), strict=True)
        try:
            return self._templates.render(
                [{"role": role, "content": text} for role, text in turns],
                None,
                {**self._names, **self._variables, "add_generation_prompt": False},
            )
        except ValueError:  # whoever renders a conversation is told
            return ""


def train_tokenizer(
    texts: Iterable[str], vocabulary: int, *, special: Sequence[str] = (), end: str = "<|endoftext|>"
) -> dict[str, str]:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016; Radford et al. 2019) on texts; returns its files.

    Every digit is a token. The token that ends a document has id 0, the other special tokens follow.

    Args:
        vocabulary: tokens at most; a small text yields fewer.

    Raises:
        BadTokenizer: when the vocabulary cannot hold the 256 bytes and the special tokens.
    """
    reserved = [end, *special]
    if len(set(reserved)) < len(reserved):
        raise BadTokenizer(f"special tokens must differ, and these are given: {', '.join(reserved)}")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary < len(reserved) + len(alphabet):
        raise BadTokenizer(
            f"a vocabulary of {vocabulary} cannot hold {len(alphabet)} bytes and {len(reserved)} special tokens: "
            f"ask for {len(reserved) + len(alphabet)} or more"
        )
    bpe = FastTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=reserved, initial_alphabet=sorted(alphabet), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": bpe.to_str(pretty=True), "tokenizer_config.json": json.dumps(settings, indent=2)}


def _content(token: Any) -> str | None:
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _object(files: Mapping[str, str], name: str) -> dict[str, Any]:
    found = parsed_json(files.get(name, "{}"))
    if isinstance(found, Bad) or not isinstance(found, dict):
        raise BadTokenizer(f"{name} must hold an object: {found.reason if isinstance(found, Bad) else 'it does not'}")
    return found
