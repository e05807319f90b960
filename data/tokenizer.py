"""Tokenizers with chat templates from Hugging Face tokenizer files, and training of byte-level BPE tokenizers."""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import jinja2
import xxhash
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers


class BadTokenizer(ValueError):
    """Tokenizer files that cannot be used."""


class Tokenizer:
    """A Hugging Face `tokenizers` tokenizer with its special tokens and chat template."""

    def __init__(self, files: dict[str, str]) -> None:
        """
        Args:
            files: file name → text; `tokenizer.json` is needed, the others are optional.

        Raises:
            BadTokenizer: when tokenizer.json is missing or broken.
        """
        if "tokenizer.json" not in files:
            raise BadTokenizer("the checkpoint has no tokenizer.json: convert it from a folder that has one")
        self.files = files
        try:
            self._fast = FastTokenizer.from_str(files["tokenizer.json"])
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise BadTokenizer(f"tokenizer.json cannot be read: {error}") from error
        settings: dict[str, Any] = json.loads(files.get("tokenizer_config.json", "{}"))
        self._names = {k: _content(settings.get(k)) for k in ("bos_token", "eos_token", "pad_token")}
        template = files.get("chat_template.jinja") or settings.get("chat_template")
        self._template = _compiled(template) if isinstance(template, str) else None

    @property
    def vocabulary(self) -> int:
        """Number of tokens, special ones included."""
        return self._fast.get_vocab_size()

    @cached_property
    def numbers(self) -> int:
        """One more than the highest token id; tokenizers with unused ids have fewer tokens."""
        return 1 + max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def eos(self) -> int | None:
        """The id of the end-of-text token, or None."""
        name = self._names["eos_token"]
        return None if name is None else self._fast.token_to_id(name)

    @cached_property
    def special(self) -> dict[int, str]:
        """Ids and names of the special tokens."""
        return {
            number: token.content for number, token in self._fast.get_added_tokens_decoder().items() if token.special
        }

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

    def encode(self, text: str) -> list[int]:
        """Encode a text; no special tokens are added."""
        return self._fast.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts, in parallel; no special tokens are added."""
        return [e.ids for e in self._fast.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, tokens: Iterable[int], *, skip_special: bool = True) -> str:
        """Decode tokens to text; bytes that do not form a character become U+FFFD."""
        return self._fast.decode(list(tokens), skip_special_tokens=skip_special)

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """Render a conversation with the chat template, up to where the model's answer begins.

        Raises:
            BadTokenizer: when the tokenizer has no chat template.
        """
        if self._template is None:
            raise BadTokenizer("the tokenizer has no chat template: set task.chat=false, or convert a chat model")
        return self._template.render(messages=list(messages), add_generation_prompt=True, **self._names)


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
    return token["content"] if isinstance(token, dict) else token


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)
