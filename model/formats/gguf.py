"""Reads GGUF files: blocks dequantised to fp32, rotary halves and norms in Hugging Face's convention.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tensors have the names of llama.cpp's own table,
which the package `gguf` brings. What llama.cpp changes when it writes a file is undone: in the architecture llama it
interleaves the two halves of each head's rows of q and k, and to Gemma's norms it adds 1.
"""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, dequantize, get_tensor_name_map
from numpy.typing import NDArray

from lockstep.distributed.checkpoint.tensors import Box, WeightsOnly
from lockstep.model.config import ModelConfig, UnknownModel
from lockstep.model.formats.files.extents import BadFile, read_bytes
from lockstep.model.formats.files.gguf_header import Blocks, GGUFHeader
from lockstep.model.formats.files.reading import reading
from lockstep.model.formats.gguf_tokenizer import tokenizer_files
from lockstep.model.formats.huggingface.families.registry import from_huggingface
from lockstep.model.weights.names import logical_tensors

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text"}
"""Architectures that are read, and Hugging Face's `model_type` of each."""

_BLOCK = 4 << 20
"""Bytes of fp32 that are dequantised at once; on the way they are in memory several times."""

_BIASES = {
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "out": ("attn_output",),
    "mlp": ("ffn_gate", "ffn_up", "ffn_down"),
}
"""Linear layers that have biases or not, in the words of `ModelConfig.biases` and of the file."""

_GEMMA_2_27B = 46
"""Layers of the one Gemma 2 whose scores are divided by the root of width / heads; its files do not say so."""


class GGUFFile(WeightsOnly):
    """A `Source` over one GGUF file; tensors are fp32 after dequantisation."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            BadFile: when the file is damaged, or is one of several.
            UnknownModel: for an architecture that is not in `ARCHITECTURES`, or scaled rotary positions.
        """
        self.path, self._header = path, GGUFHeader(path)
        self._value, self._tensors = self._header.value, self._header.tensors
        with reading(path):
            self._architecture = str(self._value("general.architecture"))
            self._check_features()
            self.config = self._model()
            self._names = self._stored_names()
        if unknown := self._tensors.keys() - self._names.values():
            raise BadFile(f"{path} holds {min(unknown)}, which a {self._architecture} model of its keys does not have")
        self.notes = self._notes()
        """What of the file does not come along, as sentences."""

    def read(self, name: str, box: Box) -> NDArray[Any]:
        """See `Source`."""
        if name not in self._names:
            raise KeyError(f"{self.path} has no tensor {name}")
        (start, stop), *columns = box
        rows = self._logical_rows(name, start, stop)
        if self.config.norm == "rms_offset" and name.endswith("norm.weight"):
            rows = rows - np.float32(1)
        return rows[:, *(slice(a, b) for a, b in columns)] if columns else rows

    def text_files(self) -> dict[str, str]:
        """The tokenizer as Hugging Face's files; empty where its kind is not supported."""
        try:
            return self._tokenizer()
        except (UnknownModel, BadFile):
            return {}

    def _check_features(self) -> None:
        if self._architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UnknownModel(
                f"{self.path} has architecture {self._architecture!r}: supported in GGUF files are {known}"
            )
        if self._value("split.count", 1) > 1:
            raise BadFile(
                f"{self.path} is one of {self._value('split.count')} files: join them with llama-gguf-split --merge"
            )
        if "rope_freqs.weight" in self._tensors or self._of_model("rope.scaling.type", "none") != "none":
            raise UnknownModel(
                f"{self.path} scales its rotary positions: convert the model's Hugging Face folder instead"
            )

    def _model(self) -> ModelConfig:
        """The model that keys and tensors describe: whether linear layers have biases, the tensors alone say."""
        biases = tuple(kind for kind, names in _BIASES.items() if f"blk.0.{names[0]}.bias" in self._tensors)
        words = self._words() | {"attention_bias": "out" in biases, "mlp_bias": "mlp" in biases}
        if self._architecture == "llama" and biases == ("qkv",):
            words["model_type"] = "qwen2"  # a Llama with biases of q, k and v alone, in the words of config.json
        config = from_huggingface(words)
        if config.biases != biases:
            said = " and ".join(", ".join(_BIASES[kind]) for kind in biases) or "none"
            raise UnknownModel(f"{self.path} has biases of {said}, and no {config.family} model has these")
        return config

    def _of_model(self, key: str, *default: Any) -> Any:
        return self._value(f"{self._architecture}.{key}", *default)

    def _words(self) -> dict[str, Any]:
        """The model in the words of a `config.json`."""
        heads, width = self._of_model("attention.head_count"), self._of_model("embedding_length")
        rotated = self._of_model("rope.dimension_count", width // heads)
        words = {
            "model_type": ARCHITECTURES[self._architecture],
            "num_hidden_layers": self._of_model("block_count"),
            "hidden_size": width,
            "num_attention_heads": heads,
            "num_key_value_heads": self._of_model("attention.head_count_kv", heads),
            "head_dim": self._of_model("attention.key_length", rotated),
            "intermediate_size": self._of_model("feed_forward_length"),
            "vocab_size": self._tensor("token_embd.weight").shape[0],
            "max_position_embeddings": self._of_model("context_length"),
            "rope_theta": self._of_model("rope.freq_base", 10000.0),
            "rms_norm_eps": float(f"{self._of_model('attention.layer_norm_rms_epsilon'):.6g}"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "bos_token_id": self._value("tokenizer.ggml.bos_token_id", None),
            "eos_token_id": self._value("tokenizer.ggml.eos_token_id", None),
        }
        return words | (self._gemma_words(words) if self._architecture.startswith("gemma") else {})

    def _gemma_words(self, words: dict[str, Any]) -> dict[str, Any]:
        is_27b = self._architecture == "gemma2" and words["num_hidden_layers"] == _GEMMA_2_27B
        scalar = words["hidden_size"] // words["num_attention_heads"] if is_27b else words["head_dim"]
        caps = {
            "attn_logit_softcapping": self._of_model("attn_logit_softcapping", None),
            "final_logit_softcapping": self._of_model("final_logit_softcapping", None),
        }
        window = self._of_model("attention.sliding_window", None)
        return caps | {"sliding_window": window, "query_pre_attn_scalar": scalar}

    def _stored_names(self) -> dict[str, str]:
        """By logical name, the file's; every tensor is there and has the right shape."""
        architecture = next(a for a in MODEL_ARCH if MODEL_ARCH_NAMES[a] == self._architecture)
        table = get_tensor_name_map(architecture, self.config.layers)
        names = {}
        for name, shape in logical_tensors(self.config).items():
            names[name] = table.get_name(name, (".weight", ".bias")) or name
            found = self._tensor(names[name]).shape
            if found != shape:
                raise BadFile(f"{names[name]} in {self.path} has shape {found}, and the model's is {shape}")
        return names

    def _tensor(self, stored: str) -> Blocks:
        if stored not in self._tensors:
            raise BadFile(f"{self.path} lacks the tensor {stored}")
        return self._tensors[stored]

    def _notes(self) -> tuple[str, ...]:
        try:
            self._tokenizer()
        except (UnknownModel, BadFile) as error:
            return (f"the tokenizer is left out: {error}",)
        return ()

    def _tokenizer(self) -> dict[str, str]:
        with reading(self.path, "has no tokenizer that can be read"):
            return tokenizer_files(self._value)

    def _logical_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        if self._architecture != "llama" or name.split(".")[-2] not in ("q_proj", "k_proj"):
            return self._rows(name, start, stop)
        size = self.config.head_dim
        first, last = start // size * size, -(-stop // size) * size
        return _uninterleaved(self._rows(name, first, last), size)[start - first : stop - first]

    def _rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows of a tensor as the file has it; a vector is one row there."""
        blocks = self._tensors[self._names[name]]
        if len(blocks.shape) == 1:
            return self._dequantised(blocks, 0, 1)[0, start:stop]
        return self._dequantised(blocks, start, stop)

    def _dequantised(self, blocks: Blocks, start: int, stop: int) -> NDArray[Any]:
        columns, row_bytes = blocks.shape[-1], blocks.row_bytes
        out = np.empty((stop - start, columns), np.float32)
        step = max(1, _BLOCK // (4 * columns))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            data = read_bytes(self.path, blocks.offset + first * row_bytes, (last - first) * row_bytes)
            try:
                out[first - start : last - start] = dequantize(data.reshape(-1, row_bytes), blocks.kind)
            except NotImplementedError as error:
                raise BadFile(f"{blocks.name} in {self.path} cannot be dequantised: {error}") from error
        return out


def _uninterleaved(array: NDArray[Any], head_dim: int) -> NDArray[Any]:
    """Rows (head, pair, half) → (head, half, pair)."""
    rows, *rest = array.shape
    return array.reshape(rows // head_dim, head_dim // 2, 2, *rest).swapaxes(1, 2).reshape(array.shape)
