"""A tiny model in every format that is read: what tests of damaged and hostile checkpoints begin with."""

from pathlib import Path

import gguf
import numpy as np

from lockstep.model.config import LoraConfig, ModelConfig
from lockstep.model.formats.deepspeed.writer import UniversalTarget
from lockstep.model.formats.huggingface.writer import HuggingFaceTarget
from lockstep.model.formats.lockstep import LockstepTarget
from lockstep.model.formats.megatron.writer import MegatronTarget
from lockstep.model.formats.peft import PeftTarget
from lockstep.model.formats.recast import Recast
from lockstep.model.formats.target import Wanted, write_whole
from lockstep.model.weights.initialization import RandomWeights
from lockstep.model.weights.names import logical_tensors

MODEL = ModelConfig(
    layers=1, width=8, heads=2, kv_heads=1, head_dim=4, intermediate=6, vocabulary=11, context=16, tied=False
)
FILES = {"tokenizer.json": "{}"}


def write_huggingface(folder: Path, model: ModelConfig = MODEL) -> Path:
    """Weights in two files with an index."""
    source = Recast(RandomWeights(model, seed=3), model, None)
    write_whole(HuggingFaceTarget(folder, model, source, FILES, shard_bytes=1200))
    assert len(list(folder.glob("*.safetensors"))) == 2
    return folder


def write_lockstep(folder: Path) -> Path:
    write_whole(
        LockstepTarget(folder, Wanted(MODEL, Recast(RandomWeights(MODEL, 3), MODEL, None), FILES, 10**9, 1 << 20))
    )
    return folder


def write_megatron(folder: Path) -> Path:
    """Without a config.json: Megatron's arguments say which model it is."""
    write_whole(MegatronTarget(folder, MODEL, Recast(RandomWeights(MODEL, 3), MODEL, None), FILES))
    (folder / "config.json").unlink()
    return folder


def write_deepspeed(folder: Path) -> Path:
    write_whole(UniversalTarget(folder, MODEL, Recast(RandomWeights(MODEL, 3), MODEL, None), FILES))
    return folder


def write_peft(folder: Path, base: Path) -> Path:
    model = MODEL.model_copy(update={"lora": LoraConfig(rank=2, targets=("q_proj", "down_proj"))})
    write_whole(PeftTarget(folder, model, Recast(RandomWeights(model, 4), model, None), str(base)))
    return folder


def write_gguf(path: Path) -> Path:
    """Of the architecture qwen2, with biases of q, k and v."""
    writer = gguf.GGUFWriter(path, "qwen2")
    for key, value in {
        "block_count": MODEL.layers,
        "embedding_length": MODEL.width,
        "attention.head_count": MODEL.heads,
        "attention.head_count_kv": MODEL.kv_heads,
        "feed_forward_length": MODEL.intermediate,
        "context_length": MODEL.context,
    }.items():
        writer.add_uint32(f"qwen2.{key}", value)
    writer.add_float32("qwen2.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_array("tokenizer.ggml.tokens", [chr(97 + i) for i in range(MODEL.vocabulary)])
    writer.add_array("tokenizer.ggml.token_type", [1] * MODEL.vocabulary)
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, MODEL.layers)
    for name, shape in logical_tensors(MODEL.model_copy(update={"biases": ("qkv",)})).items():
        writer.add_tensor(table.get_name(name, (".weight", ".bias")), np.full(shape, 0.5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
