"""GGUF files of several architectures, by llama.cpp's names: the weights as before, as `transformers` reads them."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quantization
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, GgufConfig

from lockstep.cluster.conversion.convert import convert_checkpoint
from lockstep.cluster.conversion.plan import Conversion
from lockstep.distributed.checkpoint.tensors import whole
from lockstep.model.config import ModelConfig, UnknownModel
from lockstep.model.formats.files.extents import BadFile
from lockstep.model.formats.files.gguf_header import GGUFHeader
from lockstep.model.formats.gguf import ARCHITECTURES, GGUFFile
from lockstep.model.weights.initialization import RandomWeights
from lockstep.model.weights.names import logical_tensors

SIZES: dict[str, Any] = {
    "layers": 7,
    "width": 64,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 32,
    "intermediate": 96,
    "vocabulary": 101,
    "context": 128,
    "tied": False,
    "norm_eps": 1e-6,
}
GEMMA: dict[str, Any] = SIZES | {
    "tied": True,
    "norm": "rms_offset",
    "norm_at": "around",
    "activation": "gelu_tanh",
    "embedding_scale": 8.0,
    "query_scalar": 32,
    "window": 16,
}
MODELS = {
    "llama": ModelConfig(**SIZES | {"head_dim": 16}),
    "qwen2": ModelConfig(family="qwen2", biases=("qkv",), **SIZES | {"head_dim": 16}),
    "qwen3": ModelConfig(family="qwen3", qk_norm="head", **SIZES | {"heads": 2, "kv_heads": 1, "head_dim": 128}),
    "gemma2": ModelConfig(family="gemma2", attention_cap=50.0, logit_cap=30.0, full_layers=(1, 3, 5), **GEMMA),
    "gemma3": ModelConfig(
        family="gemma3_text",
        qk_norm="head",
        full_layers=(5,),
        rope={"theta": 1e6},
        window_rope={"theta": 1e4},
        **GEMMA,
    ),
}


def weights_of(model: ModelConfig) -> dict[str, NDArray[np.float32]]:
    """Random weights whose norms and biases say something, too."""
    source, generator = RandomWeights(model, seed=4, deviation=0.3), np.random.default_rng(5)
    drawn = {name: source.read(name, whole(shape)) for name, shape in logical_tensors(model).items()}
    return {n: a + generator.normal(0, 0.2, a.shape).astype(np.float32) if a.ndim == 1 else a for n, a in drawn.items()}


def write_gguf(path: Path, architecture: str, kind: Quantization = Quantization.F32, **keys: Any) -> Path:
    """A file as llama.cpp's converter writes it."""
    model, key = MODELS[architecture], f"{architecture}."
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {
        "block_count": model.layers,
        "embedding_length": model.width,
        "attention.head_count": model.heads,
        "attention.head_count_kv": model.kv_heads,
        "attention.key_length": model.head_dim,
        "feed_forward_length": model.intermediate,
        "context_length": model.context,
        "vocab_size": model.vocabulary,
    }.items():
        writer.add_uint32(key + name, value)
    if architecture == "llama":
        writer.add_uint32("llama.rope.dimension_count", model.head_dim)
    assert model.rope
    writer.add_float32(f"{key}rope.freq_base", model.rope.theta)
    writer.add_float32(f"{key}attention.layer_norm_rms_epsilon", model.norm_eps)
    if architecture.startswith("gemma"):
        writer.add_uint32(f"{key}attention.sliding_window", model.window or 0)
    if architecture == "gemma2":
        writer.add_float32("gemma2.attn_logit_softcapping", 50.0)
        writer.add_float32("gemma2.final_logit_softcapping", 30.0)
    for name, value in keys.items():
        writer.add_string(name, value)
    for name, array in weights_of(model).items():
        add_tensor(writer, architecture, model, name, array, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensor(
    writer: gguf.GGUFWriter,
    architecture: str,
    model: ModelConfig,
    name: str,
    array: NDArray[np.float32],
    kind: Quantization,
) -> None:
    arch = next(a for a in gguf.MODEL_ARCH if gguf.MODEL_ARCH_NAMES[a] == architecture)
    stored = gguf.get_tensor_name_map(arch, model.layers).get_name(name, (".weight", ".bias"))
    assert stored
    if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = model.heads if "q_proj" in name else model.kv_heads
        array = array.reshape(heads, 2, model.head_dim // 2, -1).swapaxes(1, 2).reshape(array.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        array = array + np.float32(1)
    kind = Quantization.F32 if array.ndim == 1 else kind
    writer.add_tensor(stored, gguf.quantize(array, kind), raw_dtype=kind)


@pytest.fixture(scope="module", params=MODELS)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_tensor_comes_back_in_slices_of_any_kind(architecture: str, tmp_path: Path) -> None:
    file = GGUFFile(write_gguf(tmp_path / "model.gguf", architecture))
    assert file.config == MODELS[architecture]
    assert file.config.family == ARCHITECTURES[architecture]
    for name, wanted in weights_of(file.config).items():
        assert np.allclose(file.read(name, whole(wanted.shape)), wanted, rtol=0, atol=2e-7), name
        if wanted.ndim == 2:
            rows, columns = (3, wanted.shape[0] - 5), (7, 20)
            part = file.read(name, (rows, columns))
            assert np.array_equal(part, file.read(name, whole(wanted.shape))[slice(*rows), slice(*columns)]), name
        assert file.read(name, tuple((0, 0) for _ in wanted.shape)).dtype == np.float32


def test_transformers_reads_the_same_weights(architecture: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", architecture, Quantization.Q8_0)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    ours, state = GGUFFile(path), theirs.state_dict()
    for name, shape in logical_tensors(ours.config).items():
        assert np.array_equal(ours.read(name, whole(shape)), state[name].numpy()), name


QUANTIZED = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantised_types_are_dequantised_by_rows(kind: str, tmp_path: Path) -> None:
    file = GGUFFile(write_gguf(tmp_path / "model.gguf", "qwen2", Quantization[kind]))
    name = "model.layers.1.mlp.down_proj.weight"
    wanted = weights_of(file.config)[name]
    exact = gguf.dequantize(gguf.quantize(wanted, Quantization[kind]), Quantization[kind])
    assert np.array_equal(file.read(name, whole(wanted.shape)), exact)
    assert np.array_equal(file.read(name, ((9, 23), (0, 96))), exact[9:23])
    assert np.abs(exact - wanted).max() < 0.2


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "qwen2")
    content = path.read_bytes()
    path.write_bytes(content[:-1000])
    with pytest.raises(BadFile, match=r"model\.gguf is no whole GGUF file"):
        GGUFFile(path)
    path.write_bytes(b"GGML" + content[4:])
    with pytest.raises(BadFile, match=r"model\.gguf is no whole GGUF file"):
        GGUFFile(path)
    scaled = write_gguf(tmp_path / "scaled.gguf", "qwen2", **{"qwen2.rope.scaling.type": "yarn"})
    with pytest.raises(UnknownModel, match="scales its rotary positions"):
        GGUFFile(scaled)


def test_a_tokenizer_of_an_unknown_kind_is_left_out_and_said_so(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "qwen2", **{"tokenizer.ggml.model": "llama"})
    file = GGUFFile(path)
    assert file.text_files() == {}
    assert file.notes == (
        "the tokenizer is left out: tokenizer.ggml.model='llama' is not supported: known is gpt2, byte-level BPE",
    )


def with_biases(path: Path, architecture: str, names: tuple[str, ...]) -> Path:
    """A file with further biases beside its layers' weights, and nothing of them in its keys."""
    model = MODELS[architecture]
    rows = {"attn_q": model.heads * model.head_dim, "attn_output": model.width, "ffn_down": model.width}
    rows |= dict.fromkeys(("attn_k", "attn_v"), model.kv_heads * model.head_dim)
    rows |= dict.fromkeys(("ffn_gate", "ffn_up"), model.intermediate)
    generator = np.random.default_rng(7)
    biases = {
        f"blk.{layer}.{name}.bias": generator.normal(0, 0.5, rows[name]).astype(np.float32)
        for layer in range(model.layers)
        for name in names
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", _first(biases, gguf.GGUFWriter.write_header_to_file))
        return write_gguf(path, architecture)


def _first(biases: dict[str, NDArray[np.float32]], then: Any) -> Any:
    def write(writer: gguf.GGUFWriter) -> None:
        for name, bias in biases.items():
            writer.add_tensor(name, bias)
        then(writer)

    return write


QKV = ("attn_q", "attn_k", "attn_v")


@pytest.mark.parametrize(
    ("names", "family", "biases"),
    [
        (QKV, "qwen2", ("qkv",)),
        ((*QKV, "attn_output"), "llama", ("qkv", "out")),
        (("ffn_gate", "ffn_up", "ffn_down"), "llama", ("mlp",)),
        ((*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down"), "llama", ("qkv", "out", "mlp")),
    ],
)
def test_biases_that_only_the_tensors_show_come_along(
    names: tuple[str, ...], family: str, biases: tuple[str, ...], tmp_path: Path
) -> None:
    path = with_biases(tmp_path / "model.gguf", "llama", names)
    file = GGUFFile(path)
    assert (file.config.family, file.config.biases) == (family, biases)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    convert_checkpoint(Conversion(str(path), tmp_path / "out", "hf"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    found = model.state_dict()
    for layer in range(file.config.layers):
        for name in names:
            logical = {
                "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
                "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
                "ffn_down": "mlp.down_proj",
            }[name]  # fmt: skip
            wanted = stored[f"blk.{layer}.{name}.bias"]
            if name in ("attn_q", "attn_k"):  # llama.cpp interleaves the halves of each head in this architecture
                wanted = wanted.reshape(-1, 8, 2).swapaxes(1, 2).reshape(-1)
            assert np.array_equal(found[f"model.layers.{layer}.{logical}.bias"].numpy(), wanted), name


@pytest.mark.parametrize(
    ("architecture", "names", "said"),
    [
        ("llama", ("attn_q",), r"lacks the tensor blk\.0\.attn_k\.bias"),
        ("llama", ("attn_v",), r"holds blk\.0\.attn_v\.bias, which a llama model of its keys does not have"),
        ("llama", ("attn_output",), r"has biases of attn_output, and no llama model has these"),
        (
            "llama",
            (*QKV, "ffn_gate", "ffn_up", "ffn_down"),
            r"has biases of attn_q, attn_k, attn_v and ffn_gate, ffn_up",
        ),
        ("qwen3", QKV, r"has biases of attn_q, attn_k, attn_v, and no qwen3 model has these"),
        ("gemma2", ("ffn_down",), r"holds blk\.0\.ffn_down\.bias, which a gemma2 model"),
    ],
)
def test_biases_that_no_family_has_are_refused(
    architecture: str, names: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        GGUFFile(with_biases(tmp_path / "model.gguf", architecture, names))


def test_headers_say_what_the_library_reads(architecture: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", architecture, Quantization.Q8_0)
    header, theirs = GGUFHeader(path), gguf.GGUFReader(path)
    assert {name: header.value(name) for name in theirs.fields if not name.startswith("GGUF.")} == {
        name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")
    }
    assert header.tensors.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        found = header.tensors[tensor.name]
        assert found.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert (found.kind, found.offset, found.size) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
