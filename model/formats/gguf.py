"""GGUF files of the Llama architecture: quantised blocks dequantised, rotary halves back in Hugging Face's order.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. llama.cpp interleaves the two halves of each head's
rows of q and k; `_uninterleaved` undoes that.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from gguf import GGUFReader, ReaderTensor, dequantize
from numpy.typing import NDArray

from lockstep.distributed.checkpoint.spec import Box, WeightsOnly
from lockstep.model.config import ModelConfig, UnknownModel
from lockstep.model.rope import Rope

_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


class GGUFFile(WeightsOnly):
    """A `Source` over one GGUF file; tensors are fp32 after dequantisation."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            UnknownModel: for an architecture other than llama, or scaled rotary positions.
        """
        reader = GGUFReader(path)
        self._fields: dict[str, Any] = dict(reader.fields.items())
        self._tensors: dict[str, ReaderTensor] = {t.name: t for t in reader.tensors}
        architecture = self._value("general.architecture")
        if architecture != "llama":
            raise UnknownModel(f"{path} has architecture {architecture!r}: only 'llama' is supported in GGUF files")
        scaling = self._value("llama.rope.scaling.type", "none")
        if "rope_freqs.weight" in self._tensors or scaling != "none":
            raise UnknownModel(f"{path} scales its rotary positions: convert the model's Hugging Face folder instead")
        self.config = self._config()
        self._dequantised = lru_cache(maxsize=2)(self._dequantise)

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """See `Source`."""
        return self._dequantised(name)[tuple(slice(a, b) for a, b in box)]

    def tokenizer_files(self) -> dict[str, str]:
        """The tokenizer as Hugging Face's files: byte-level BPE, special tokens and chat template."""
        return _tokenizer_files(
            tokens=self._value("tokenizer.ggml.tokens"),
            types=self._value("tokenizer.ggml.token_type"),
            merges=self._value("tokenizer.ggml.merges"),
            pre=self._value("tokenizer.ggml.pre"),
            bos=self._value("tokenizer.ggml.bos_token_id"),
            eos=self._value("tokenizer.ggml.eos_token_id"),
            template=self._value("tokenizer.chat_template", None),
        )

    def _value(self, key: str, *default: Any) -> Any:
        return self._fields[key].contents() if key in self._fields or not default else default[0]

    def _config(self) -> ModelConfig:
        heads, width = self._value("llama.attention.head_count"), self._value("llama.embedding_length")
        return ModelConfig(
            layers=self._value("llama.block_count"),
            width=width,
            heads=heads,
            kv_heads=self._value("llama.attention.head_count_kv", heads),
            head_dim=self._value("llama.rope.dimension_count", width // heads),
            intermediate=self._value("llama.feed_forward_length"),
            vocabulary=self._value("llama.vocab_size", len(self._value("tokenizer.ggml.tokens"))),
            context=self._value("llama.context_length"),
            rope=Rope(theta=self._value("llama.rope.freq_base", 10000.0)),
            norm_eps=float(f"{self._value('llama.attention.layer_norm_rms_epsilon'):.6g}"),
            tied="output.weight" not in self._tensors,
            bos_token=self._value("tokenizer.ggml.bos_token_id", None),
            eos_tokens=(self._value("tokenizer.ggml.eos_token_id"),),
        )

    def _dequantise(self, name: str) -> NDArray[Any]:
        tensor = self._tensors[_stored_name(name)]
        array = dequantize(tensor.data, tensor.tensor_type)
        heads = {"q_proj": self.config.heads, "k_proj": self.config.kv_heads}.get(name.split(".")[-2])
        return array if heads is None else _uninterleaved(array, heads)


def _stored_name(name: str) -> str:
    if name in _ENDS:
        return _ENDS[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_BLOCK[rest.removesuffix('.weight')]}.weight"


def _uninterleaved(array: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows (head, pair, half) → (head, half, pair)."""
    rows, width = array.shape
    return array.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


_CONTROL = 3
_SPLITS = {
    "smollm": [{"type": "Digits", "individual_digits": True}],
    "gpt-2": [],
    "default": [],
}


def _tokenizer_files(
    tokens: list[str], types: list[int], merges: list[str], pre: str, bos: int, eos: int, template: str | None
) -> dict[str, str]:
    if pre not in _SPLITS:
        raise UnknownModel(f"tokenizer.ggml.pre={pre!r} is not supported: known are {', '.join(_SPLITS)}")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = [i for i, kind in enumerate(types) if kind == _CONTROL]
    added = [
        {"id": i, "content": tokens[i], "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i in special
    ]
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*_SPLITS[pre], byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[bos],
        "eos_token": tokens[eos],
        "pad_token": tokens[eos],
        "clean_up_tokenization_spaces": False,
    }
    if template:
        settings["chat_template"] = template
    return {
        "tokenizer.json": json.dumps(document, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False),
    }
