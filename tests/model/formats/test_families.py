"""Our block against every family of `transformers`: logits, gradients, decoding and files, on random weights."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lockstep.data.batch import sample
from lockstep.data.packing import rows_for_ranks
from lockstep.distributed.checkpoint.tensors import Box, Source, to_torch, whole
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.attention.packed import DocumentAttention
from lockstep.model.config import ModelConfig, UnknownModel
from lockstep.model.formats.huggingface import writer
from lockstep.model.formats.huggingface.families.registry import from_huggingface, to_huggingface
from lockstep.model.formats.huggingface.reader import HuggingFaceFolder
from lockstep.model.layers.logprobs import local_logits, token_logprobs
from lockstep.model.loading import build, transformer_of
from lockstep.model.objectives.token_loss import nll
from lockstep.model.rope import Rope
from lockstep.model.state_dict import pieces
from lockstep.model.training.config import OptimizerConfig, row_rules
from lockstep.model.training.trainer import Trainer
from lockstep.model.transformer import Transformer
from lockstep.model.weights.initialization import RandomWeights
from lockstep.model.weights.names import logical_tensors
from lockstep.rl.rollout.config import EngineConfig, SamplingParams
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.output_processor import generate
from lockstep.rl.types import Prompt
from lockstep.rl.weight_sync.protocol import Shard
from lockstep.rl.weight_sync.shards import shards_of
from tests.parameters import every
from tests.shards import Assembled

SIZES = dict(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=128,
    rope_theta=1000.0,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
)
WINDOW = 7
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 2": ("llama", dict(num_key_value_heads=6, tie_word_embeddings=False)),
    "llama 3": ("llama", dict(rope_scaling=LLAMA3, tie_word_embeddings=False)),
    "smollm 2": ("llama", dict(tie_word_embeddings=True)),
    "llama with biases": ("llama", dict(attention_bias=True, mlp_bias=True, hidden_act="gelu")),
    "mistral": ("mistral", dict(sliding_window=WINDOW)),
    "mistral without a window": ("mistral", dict(sliding_window=None)),
    "qwen 2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen 2.5 with yarn": ("qwen2", dict(rope_scaling=YARN)),
    "qwen 2 with windows": ("qwen2", dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2)),
    "qwen 3": ("qwen3", dict(tie_word_embeddings=True)),
    "smollm 3": ("smollm3", dict(no_rope_layers=[1, 0, 1])),
    "gemma": ("gemma", dict(num_key_value_heads=2)),
    "gemma 2": (
        "gemma2",
        dict(sliding_window=WINDOW, query_pre_attn_scalar=20, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    ),
    "gemma 3": (
        "gemma3_text",
        dict(
            sliding_window=WINDOW,
            query_pre_attn_scalar=20,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_local_base_freq=300.0,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        ),
    ),
    "olmo 2": ("olmo2", dict(tie_word_embeddings=False)),
    "gpt-2": ("gpt2", {}),
}
"""A `model_type`, and what its configuration says beyond SIZES."""

UNLIKE = {"llama 3", "qwen 2 with windows", "qwen 3", "smollm 3", "gemma 3", "olmo 2", "gpt-2"}
"""Cases that between them have all that the others have."""

ATOL = 1e-4
LENGTH = 45


def reference_of(family: str, changes: dict[str, Any]) -> Any:
    """A random model of `transformers` whose every parameter, biases and norms too, says something."""
    words = SIZES | changes
    if family == "gpt2":
        words = dict(vocab_size=101, n_embd=48, n_layer=3, n_head=6, n_inner=72, n_positions=128)
        words |= dict(bos_token_id=1, eos_token_id=2)
    config = AutoConfig.for_model(family, **words, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_matrix = parameter.dim() > 1
            drawn = torch.randn(parameter.shape, generator=generator) * (0.2 if is_matrix else 0.3)
            is_scale = not is_matrix and name.endswith("weight") and "gemma" not in family
            parameter.copy_(drawn + 1 if is_scale else drawn)
    return model


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family") / "model"
    reference_of(*CASES[request.param]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def alone(folder: Path, groups: Groups) -> Transformer:
    """The model in one process."""
    return loaded(groups, folder)


def loaded(groups: Groups, folder: Path) -> Transformer:
    source = HuggingFaceFolder(folder)
    return transformer_of(build(source.config, groups, torch.float32, source))


def text(length: int, seed: int = 5) -> Tensor:
    return torch.randint(3, 101, (length,), generator=torch.Generator().manual_seed(seed))


def hidden_of(transformer: Transformer, tokens: Tensor) -> Tensor:
    return transformer(tokens, torch.arange(len(tokens)), DocumentAttention([[len(tokens)]], tokens.device))


def logits_of(transformer: Transformer, hidden: Tensor) -> Tensor:
    """[T, vocabulary], gathered from all tensor ranks."""
    groups, model, weight = transformer.groups, transformer.model, transformer.head_weight
    part = local_logits(hidden[:, 0], weight, groups.tensor_rank * weight.shape[0], model.vocabulary, model.logit_cap)
    parts = [torch.empty_like(part) for _ in range(groups.layout.tensor)]
    dist.all_gather(parts, part, group=groups.tensor)
    return torch.cat(parts, dim=1)[:, : model.vocabulary]


SLOPES = torch.randn(LENGTH - 1, generator=torch.Generator().manual_seed(8))
"""What the log-probabilities of a text are multiplied by, so that their sum has gradients that do not cancel."""

Gradients = list[tuple[str, Box, Tensor]]


def gradients_of(transformer: Transformer, tokens: Tensor) -> Gradients:
    """Of Σ slope · log p, by logical name."""
    transformer.zero_grad()
    logp = token_logprobs(
        hidden_of(transformer, tokens)[:-1, 0],
        transformer.head_weight,
        tokens[1:],
        vocabulary=transformer.model.vocabulary,
        group=transformer.groups.tensor,
        cap=transformer.model.logit_cap,
    )
    (logp * SLOPES).sum().backward()
    found = []
    for parameter, piece in pieces(transformer):
        assert parameter.grad is not None, f"{piece.name} received no gradient"
        found.append((piece.name, piece.box, piece.view(parameter.grad)))
    return found


def split(groups: Groups, folder: Path, tokens: Tensor) -> tuple[Tensor, Gradients, float, list[Shard]]:
    """What a tensor rank finds, and what it would send."""
    transformer = loaded(groups, folder)
    gradients = gradients_of(transformer, tokens)
    with torch.no_grad():
        logits = logits_of(transformer, hidden_of(transformer, tokens))
        return logits, gradients, norm_of(transformer), shards_of(transformer)


def trained(groups: Groups, folder: Path) -> list[tuple[float, float]]:
    """Losses and gradient norms of two steps."""
    source = HuggingFaceFolder(folder)
    stage = build(source.config, groups, torch.float32, source)
    trainer = Trainer(stage, groups, OptimizerConfig())
    answers = [(text(5, seed=i // 2), text(8 + i, seed=10 + i)) for i in range(6)]
    batch = [sample(prompt.numpy(), answer.numpy(), weight=1 / 60) for prompt, answer in answers]
    rows = rows_for_ranks(batch, row_rules(groups.layout, 40))[0]
    results = [trainer.step(rows, nll, 1e-3) for _ in range(2)]
    return [(result.values["loss"], result.grad_norm) for result in results]


@pytest.fixture(scope="module")
def expected(reference: Any) -> Tensor:
    with torch.no_grad():
        logits = reference(text(LENGTH)[None]).logits[0]
    assert logits.std() > 0.3
    return logits


@pytest.fixture(scope="module")
def slopes(folder: Path, reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Gradients of the reference, in a folder of their own."""
    tokens = text(LENGTH)
    logp = reference(tokens[None]).logits[0].log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
    reference.zero_grad()
    (logp * SLOPES).sum().backward()
    other = tmp_path_factory.mktemp("gradients")
    shutil.copy(folder / "config.json", other)
    save_file({name: p.grad.contiguous() for name, p in reference.named_parameters()}, other / "model.safetensors")
    return HuggingFaceFolder(other)


def norm_of(transformer: Transformer) -> float:
    """Norm of the gradients as DeepSpeed counts them: marked parameters everywhere, others on the first rank."""
    groups = transformer.groups
    counted = [p for p in transformer.parameters() if groups.tensor_rank == 0 or hasattr(p, "tensor_model_parallel")]
    total = torch.stack([p.grad.square().sum() for p in counted if p.grad is not None]).sum()
    dist.all_reduce(total, group=groups.tensor)
    return float(total.sqrt())


def check_gradients(found: Gradients, slopes: Source) -> None:
    for name, box, gradient in found:
        wanted = to_torch(slopes.read(name, box))
        tolerance = ATOL * max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(gradient, wanted, atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_one_process_equals_transformers(alone: Transformer, expected: Tensor, slopes: Source) -> None:
    with torch.no_grad():
        found = logits_of(alone, hidden_of(alone, text(LENGTH)))
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
    check_gradients(gradients_of(alone, text(LENGTH)), slopes)


def test_two_tensor_ranks_equal_transformers(folder: Path, expected: Tensor, slopes: Source, worlds: RankPool) -> None:
    ranks = worlds.run(Layout(tensor=2), split, folder, text(LENGTH))
    source = HuggingFaceFolder(folder)
    shapes = logical_tensors(source.config)
    norm = np.sqrt(sum(np.square(slopes.read(name, whole(shape))).sum() for name, shape in shapes.items()))
    for found, gradients, found_norm, _ in ranks:
        assert found_norm == pytest.approx(norm, rel=1e-4)
        torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
        check_gradients(gradients, slopes)
    sent = Assembled([shard for *_, shards in ranks for shard in shards])
    for name, shape in shapes.items():
        assert np.array_equal(sent.read(name, whole(shape)), source.read(name, whole(shape))), name


@pytest.mark.parametrize("folder", every(CASES, part=UNLIKE.__contains__), indirect=True)
def test_tensor_ranks_and_pipeline_stages_train_to_the_numbers_of_one_process(folder: Path, worlds: RankPool) -> None:
    (alone,) = worlds.run(Layout(), trained, folder)
    assert alone[1][0] < alone[0][0]
    for layout in (Layout(tensor=2), Layout(pipeline=2)):
        for history in worlds.run(layout, trained, folder):
            np.testing.assert_allclose(history, alone, rtol=2e-5, err_msg=str(layout))


@torch.no_grad()
def test_packed_documents_and_branches_equal_separate_texts(alone: Transformer) -> None:
    """The first document branches after 11 tokens; windows reach from the branches into it."""
    prompt, *branches = [text(n, seed=n) for n in (11, 4, 9)]
    rest = [text(n, seed=n) for n in (17, 1, 30)]
    row = torch.cat([prompt, *branches, *rest])
    positions = [torch.arange(11), torch.arange(4) + 11, torch.arange(9) + 11, *(torch.arange(len(t)) for t in rest)]
    attend = DocumentAttention([[11, 4, 9], [17], [1], [30]], row.device)
    packed = alone(row, torch.cat(positions), attend)
    texts = [torch.cat([prompt, b]) for b in branches] + rest
    seen = [11, 11, 0, 0, 0]
    apart = torch.cat([hidden_of(alone, t)[start:] for t, start in zip(texts, seen, strict=True)])
    torch.testing.assert_close(packed[11:], apart, atol=2e-5, rtol=1e-5)


def test_greedy_rollouts_say_what_whole_forward_passes_do(alone: Transformer) -> None:
    prompts = [Prompt(i, "", tuple(text(n, seed=n).tolist()), "") for i, n in enumerate((5, 2, 19, 8))]
    engine = RolloutEngine(alone, EngineConfig(sequences=3, length=64), decode=str)
    sampling = SamplingParams(temperature=0, max_new_tokens=14, exact_lengths=(14,))
    rollouts = list(generate(engine, prompts, sampling, samples=1, seed=0))
    assert len(rollouts) == len(prompts)
    for rollout in rollouts:
        tokens = torch.tensor([*rollout.prompt.tokens, *rollout.tokens])
        with torch.no_grad():
            logits = logits_of(alone, hidden_of(alone, tokens))[len(rollout.prompt.tokens) - 1 : -1]
        assert logits.argmax(-1).tolist() == list(rollout.tokens)
        logp = logits.log_softmax(-1).max(-1).values
        assert rollout.logp == pytest.approx(logp.tolist(), abs=1e-4)


def test_transformers_reads_what_we_write(folder: Path, alone: Transformer, expected: Tensor, tmp_path: Path) -> None:
    model, sent = alone.model, Assembled(shards_of(alone))
    writer.write(tmp_path / "back", model, sent, {})
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert HuggingFaceFolder(tmp_path / "back").config == model
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert theirs.config.model_type == model.family
    with torch.no_grad():
        assert torch.equal(theirs(text(LENGTH)[None]).logits[0], expected)


def test_parameters_are_counted_without_building_the_model(alone: Transformer, reference: Any) -> None:
    shapes = logical_tensors(alone.model)
    assert alone.model.parameters == reference.num_parameters() == sum(int(np.prod(s)) for s in shapes.values())


def test_random_weights_begin_as_plain_norms(alone: Transformer) -> None:
    source, model = RandomWeights(alone.model, seed=0), alone.model
    for name, shape in logical_tensors(model).items():
        if len(shape) == 1:
            begin = 0 if name.endswith("bias") or model.norm == "rms_offset" else 1
            assert (source.read(name, whole(shape)) == begin).all(), name


PLAIN = dict(
    model_type="llama",
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=6,
    vocab_size=101,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
)
PUBLISHED: dict[str, tuple[tuple[int, ...], dict[str, Any], int]] = {
    "Llama 3.1 8B": (
        (4096, 14336, 32, 32, 8, 128256),
        {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}},
        8_030_261_248,
    ),
    "Mistral 7B": ((4096, 14336, 32, 32, 8, 32000), {"model_type": "mistral"}, 7_241_732_096),
    "Qwen 2.5 0.5B": (
        (896, 4864, 24, 14, 2, 151936),
        {"model_type": "qwen2", "tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": 32768},
        494_032_768,
    ),
    "Qwen 3 0.6B": (
        (1024, 3072, 28, 16, 8, 151936),
        {"model_type": "qwen3", "head_dim": 128, "tie_word_embeddings": True},
        596_049_920,
    ),
    "SmolLM 3 3B": ((2048, 11008, 36, 16, 4, 128256), {"model_type": "smollm3"}, 3_075_098_624),
    "Gemma 2B": (
        (2048, 16384, 18, 8, 1, 256000),
        {"model_type": "gemma", "head_dim": 256, "hidden_act": "gelu"},
        2_506_172_416,
    ),
    "Gemma 2 2B": (
        (2304, 9216, 26, 8, 4, 256000),
        {"model_type": "gemma2", "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh"},
        2_614_341_888,
    ),
    "Gemma 3 1B": (
        (1152, 6912, 26, 4, 1, 262144),
        {"model_type": "gemma3_text", "head_dim": 256, "sliding_window": 512, "sliding_window_pattern": 6},
        999_885_952,
    ),
    "OLMo 2 1B": ((2048, 8192, 16, 16, 16, 100352), {"model_type": "olmo2"}, 1_484_916_736),
}
"""Sizes in the order of SIZE_WORDS, what else the published file says in its own words, number of parameters."""

SIZE_WORDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read(name: str) -> None:
    sizes, words, parameters = PUBLISHED[name]
    words = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6} | dict(zip(SIZE_WORDS, sizes, strict=True)) | words
    config = from_huggingface(words)
    assert config.parameters == parameters
    assert from_huggingface(to_huggingface(config, "bfloat16")) == config
    windows = {config.window_of(i): i for i in reversed(range(config.layers))}
    first_of = {"Mistral 7B": {4096: 0}, "Gemma 2 2B": {4096: 0, None: 1}, "Gemma 3 1B": {512: 0, None: 5}}
    assert windows == first_of.get(name, {None: 0})
    assert config.unrotated_layers == (tuple(range(3, 36, 4)) if name == "SmolLM 3 3B" else ())
    if name == "Gemma 3 1B":
        assert (config.rope_of(0), config.rope_of(5)) == (Rope(theta=1e4), Rope(theta=1e6))


def test_the_smallest_gpt2_as_published_is_read() -> None:
    words = dict(model_type="gpt2", n_embd=768, n_head=12, n_layer=12, n_positions=1024, n_ctx=1024, vocab_size=50257)
    assert from_huggingface(words).parameters == 124_439_808


LONG = {"factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **LONG}},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", **LONG, "attention_factor": 1.7, "truncate": False}},
        {"rope_scaling": {"rope_type": "yarn", **LONG, "mscale": 0.7, "mscale_all_dim": 1.3}},
        {"rope_scaling": {"rope_type": "yarn", **LONG, "beta_fast": 16, "beta_slow": 2}},
        {"rope_parameters": {"rope_type": "yarn", **LONG, "factor": None, "rope_theta": 1e4}},
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [8, 128])
def test_rotary_positions_equal_those_of_transformers(words: dict[str, Any], head_dim: int) -> None:
    words = PLAIN | {"head_dim": head_dim} | words
    config = from_huggingface(words)
    assert config.rope is not None
    theirs = AutoConfig.for_model(**{k: dict(v) if isinstance(v, dict) else v for k, v in words.items()})
    positions = torch.tensor([0, 1, 2, 100, 5000, 131071])
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), positions[None])
    found = config.rope.table(positions, head_dim, torch.float32)
    for ours, wanted in zip(found, (cos, sin), strict=True):
        error = (ours[:, 0] - wanted[0]).abs() / (1 + positions[:, None] * 1e-7 / ATOL)
        assert error.max() < 1e-5  # an angle in fp32 is as coarse as its size
    assert from_huggingface(to_huggingface(config, "float32")) == config


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "bert"}, "model_type='bert' is not supported: use one of llama, mistral"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic' is not supported: use one"),
        (
            {"rope_scaling": {"type": "longrope"}},
            "rope scaling 'longrope' is not supported",
        ),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "config.json lacks low_freq_factor, high_freq_factor"),
        ({"hidden_act": "relu"}, "uses hidden_act=relu: supported are silu"),
        ({"model_type": "gpt2"}, "config.json lacks n_layer, n_embd, n_head, n_positions"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "uses attn_logit_softcapping"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "uses use_bidirectional_attention"),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 3}, "uses layer_types=chunked_attention"),
    ],
)
def test_what_the_block_does_not_do_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UnknownModel, match=complaint):
        from_huggingface(PLAIN | change)


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ({"qk_norm": "head"}, "qk_norm"),
        ({"window": 8, "full_layers": (1,)}, "window, full_layers"),
        ({"rope": None}, "rope"),
    ],
)
def test_a_family_that_cannot_say_a_feature_refuses_to_write_it(change: dict[str, Any], lost: str) -> None:
    config = from_huggingface(PLAIN).model_copy(update=change)
    with pytest.raises(UnknownModel, match=f"model_type='llama' cannot say this model's {lost}"):
        to_huggingface(config, "float32")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kv_heads": 4}, "heads=6 is no multiple of kv_heads=4"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"rope": None, "unrotated_layers": (1,)}, "rope is None"),
        ({"full_layers": (1,)}, "window is None"),
        ({"unrotated_layers": (3,)}, "layer outside 0 … 2"),
        ({"qk_norm": "width", "norm": "rms_offset"}, "qk_norm='width' needs norm='rms'"),
    ],
)
def test_impossible_models_are_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ModelConfig(**(from_huggingface(PLAIN).model_dump() | change))


def test_a_configuration_survives_its_own_dump_and_version_0_1s() -> None:
    config = from_huggingface(PLAIN | {"rope_theta": 5e5})
    assert ModelConfig(**config.model_dump()) == config
    old = {name: value for name, value in config.model_dump().items() if name != "rope"}
    assert ModelConfig(**old, rope_theta=5e5) == config
    assert config.rope == Rope(theta=5e5)
