"""Converts the tokenizer of a GGUF file to Hugging Face's: byte-level BPE, special tokens and chat template.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer. `tokenizer.ggml.pre` names how llama.cpp cuts
a text before it merges; only names whose rule is known here are taken. `tokenizer.ggml.add_bos_token` says whether a
text begins with BOS; without it, llama.cpp begins those of Llama 3 so.
"""

import json
from collections.abc import Callable
from typing import Any

from lockstep.model.config import UnknownModel

_CONTROL, _USER_DEFINED = 3, 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(digits: str) -> list[dict[str, Any]]:
    pattern = "|".join((_CONTRACTIONS, _WORDS, digits, _REST))
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}]


_PRE: dict[str, list[dict[str, Any]]] = {
    "smollm": [{"type": "Digits", "individual_digits": True}],
    "gpt-2": [],
    "default": [],
    "qwen2": _split(r"\p{N}"),
    "llama-bpe": _split(r"\p{N}{1,3}"),
}
"""How a text is cut; where a pattern says it, the byte level adds none of its own."""


def tokenizer_files(value: Callable[..., Any]) -> dict[str, str]:
    """The files `tokenizer.json` and `tokenizer_config.json`, from a GGUF file's values.

    Args:
        value: key of the file, and a default if there may be none → value.

    Raises:
        UnknownModel: for a tokenizer of another kind, or with another way to cut a text.
    """
    kind, pre = value("tokenizer.ggml.model", None), value("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise UnknownModel(f"tokenizer.ggml.model={kind!r} is not supported: known is gpt2, byte-level BPE")
    if pre not in _PRE:
        raise UnknownModel(f"tokenizer.ggml.pre={pre!r} is not supported: known are {', '.join(_PRE)}")
    tokens = value("tokenizer.ggml.tokens")
    return {
        "tokenizer.json": json.dumps(_document(value, tokens, pre), ensure_ascii=False),
        "tokenizer_config.json": json.dumps(_settings(value, tokens), indent=2, ensure_ascii=False),
    }


def _document(value: Callable[..., Any], tokens: list[str], pre: str) -> dict[str, Any]:
    has_pattern = any(step["type"] == "Split" for step in _PRE[pre])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not has_pattern}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, value("tokenizer.ggml.token_type")),
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*_PRE[pre], byte_level]},
        "post_processor": _begin(value, tokens, pre),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in value("tokenizer.ggml.merges")],
        },
    }


def _begin(value: Callable[..., Any], tokens: list[str], pre: str) -> dict[str, Any] | None:
    """The post-processor that begins a text with BOS, where the file wants it."""
    bos = value("tokenizer.ggml.bos_token_id", None)
    if bos is None or not value("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        return None
    first = {"SpecialToken": {"id": tokens[bos], "type_id": 0}}
    text, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, first, second],
        "special_tokens": {tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}},
    }


def _added(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": i, "content": tokens[i], "special": kind == _CONTROL} | plain
        for i, kind in enumerate(types)
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _settings(value: Callable[..., Any], tokens: list[str]) -> dict[str, Any]:
    bos, eos = (value(f"tokenizer.ggml.{end}_token_id", None) for end in ("bos", "eos"))
    template = value("tokenizer.chat_template", None)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None if bos is None else tokens[bos],
        "eos_token": None if eos is None else tokens[eos],
        "pad_token": None if eos is None else tokens[eos],
        "clean_up_tokenization_spaces": False,
    }
    return settings | ({"chat_template": template} if template else {})
