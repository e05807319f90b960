"""Text to tokens and back, and conversations to text, from the files of a Hugging Face tokenizer."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer


class BadTokenizer(ValueError):
    """Tokenizer files that cannot be used."""


class Tokenizer:
    """A `tokenizers` tokenizer with its special tokens and chat template."""

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

    @property
    def eos(self) -> int | None:
        """The token that ends a text, if there is one."""
        name = self._names["eos_token"]
        return None if name is None else self._fast.token_to_id(name)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; nothing is added."""
        return self._fast.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of tokens; bytes that do not form a character become U+FFFD."""
        return self._fast.decode(list(tokens), skip_special_tokens=skip_special)

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation as the model reads it, up to where its answer begins.

        Raises:
            BadTokenizer: when the tokenizer has no chat template.
        """
        if self._template is None:
            raise BadTokenizer("the tokenizer has no chat template: set task.chat=false, or convert a chat model")
        return self._template.render(messages=list(messages), add_generation_prompt=True, **self._names)


def _content(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)
