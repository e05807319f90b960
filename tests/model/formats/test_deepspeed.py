"""DeepSpeed's own checkpoints read without a changed bit, and ours continued by DeepSpeed."""

import argparse
import functools
import itertools
import os
import random
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import deepspeed
import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.zero import parameter_offload
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lockstep.data.batch import sample
from lockstep.data.packing import rows_for_ranks
from lockstep.distributed.checkpoint.tensors import Box, Source, WeightsOnly, state_name, to_numpy, whole
from lockstep.distributed.layout import Layout
from lockstep.distributed.optimizer.zero import _Grid
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import ModelConfig, MoEConfig
from lockstep.model.formats.deepspeed.reader import DeepSpeedFolder
from lockstep.model.formats.deepspeed.stored_tensors import BadDeepSpeedFolder, FlatTensor, load
from lockstep.model.formats.deepspeed.writer import write_universal
from lockstep.model.formats.huggingface.reader import HuggingFaceFolder
from lockstep.model.formats.recast import Recast
from lockstep.model.loading import build
from lockstep.model.objectives.token_loss import nll
from lockstep.model.state_dict import pieces
from lockstep.model.training.config import OptimizerConfig, row_rules
from lockstep.model.training.trainer import Trainer
from lockstep.model.weights.initialization import RandomWeights
from lockstep.model.weights.names import EMBEDDING, is_projection, logical_tensors

SIZES: dict[str, Any] = dict(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=16,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
)
MOE = dict(num_experts_per_tok=2, moe_intermediate_size=8, norm_topk_prob=True)
NO_DROPOUT = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama tied": dict(model_type="llama", **SIZES, tie_word_embeddings=True),
    "llama": dict(model_type="llama", **SIZES, tie_word_embeddings=False, attention_bias=True),
    "gpt2": dict(
        model_type="gpt2", vocab_size=31, n_embd=12, n_layer=2, n_head=3, n_inner=10, n_positions=16, **NO_DROPOUT
    ),
    "mixtral": dict(model_type="mixtral", **SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen3_moe": dict(model_type="qwen3_moe", **SIZES, **MOE, num_experts=4, tie_word_embeddings=False),
}
KINDS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Run:
    """A DeepSpeed run on a Hugging Face model."""

    family: str
    zero: int
    data: int = 1
    dtype: torch.dtype = torch.bfloat16
    zero_options: dict[str, Any] = field(default_factory=dict, hash=False)
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    two_groups: bool = True
    frozen: bool = False
    """Whether the embedding is not trained."""

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join([self.family, f"zero {self.zero} x {self.data}", dtype, *self.zero_options, *self.options])


BFLOAT16_WITHOUT_ZERO = Run("llama", 0, data=2)
ROUND_ROBIN = Run("llama tied", 2, data=2, zero_options={"round_robin_gradients": True})
RUNS = [
    Run("llama tied", 0, dtype=torch.float32),
    BFLOAT16_WITHOUT_ZERO,
    Run("llama", 1),
    Run("llama tied", 1, data=2),
    Run("gpt2", 1, data=2, dtype=torch.float32),
    Run("mixtral", 1, data=2),
    Run("llama", 2, data=2, zero_options={"offload_optimizer": {"device": "cpu"}}),
    Run("llama", 1, data=2, options={"data_types": {"grad_accum_dtype": "fp32"}}),
    Run("gpt2", 2, data=2, zero_options={"parameter_alignment": True}),
    Run("llama", 2, dtype=torch.float16),
    Run("qwen3_moe", 2),
    Run("llama tied", 3),
    Run("gpt2", 3, data=2),
    Run("qwen3_moe", 3, data=2, dtype=torch.float32),
]


@contextmanager
def engine_of(run: Run, groups: Groups, **config: Any) -> Iterator[Any]:
    """DeepSpeed's engine over a model with random weights."""
    torch.manual_seed(0)
    words = dict(FAMILIES[run.family])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(words.pop("model_type"), **words), dtype=run.dtype)
    model.get_input_embeddings().requires_grad_(not run.frozen)
    trained = [p for p in model.parameters() if p.requires_grad]
    by_dims = [{"params": [p for p in trained if (p.dim() > 1) == matrices]} for matrices in (True, False)]
    optimizer = torch.optim.AdamW(by_dims if run.two_groups else trained, lr=0.01, weight_decay=0.1)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": run.dtype == torch.bfloat16},
        "fp16": {"enabled": run.dtype == torch.float16, "initial_scale_power": 4},
        "zero_optimization": {"stage": run.zero, "overlap_comm": False, **run.zero_options},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    # DeepSpeed asks whether oneDNN has products in fp16 on this processor; torch has some on all.
    with patch.object(get_accelerator(), "is_fp16_supported", lambda: True):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, mpu=_Grid(groups), config=settings | run.options | config
        )
    try:
        yield engine
    finally:
        engine.destroy()
        deepspeed_groups.mpu = None
        parameter_offload.FWD_MODULE_STACK.clear()


def steps(engine: Any, groups: Groups, which: range) -> list[float]:
    """Train; each data rank on tokens of its own. Returns this rank's losses."""
    losses = []
    for step in which:
        generator = torch.Generator().manual_seed(step * 10 + groups.data_rank)
        tokens = torch.randint(3, 31, (1, 9), generator=generator)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def values(engine: Any, run: Run) -> dict[str, dict[str, Tensor]]:
    """Kind → name of a parameter → what DeepSpeed itself says that it is; weights are of kind ""."""
    if run.zero in (1, 2):  # DeepSpeed gives access to the first group's state alone
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in ("", *KINDS)}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=run.zero == 3):
            found[""][name] = parameter.detach().clone()
        for kind in KINDS if parameter.requires_grad else ():
            found[kind][name] = state_of(engine, parameter, kind, run.zero).clone()
    return found


def state_of(engine: Any, parameter: Any, kind: str, zero: int) -> Tensor:
    if zero:
        if kind == "master":
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)
    held, optimizer = parameter, engine.optimizer
    if hasattr(optimizer, "fp32_groups"):
        pairs = zip(*(itertools.chain(*g) for g in (optimizer.fp16_groups, optimizer.fp32_groups)), strict=True)
        held = next(fp32 for fp16, fp32 in pairs if fp16 is parameter)
    return held.detach() if kind == "master" else optimizer.state[held][kind]


def trained(groups: Groups, run: Run, folder: Path) -> tuple[dict[str, dict[str, Tensor]], list[float]]:
    """Train three steps, save, train two more. Returns what was saved, and the losses of the last two."""
    with engine_of(run, groups) as engine:
        steps(engine, groups, range(3))
        engine.save_checkpoint(str(folder))
        return values(engine, run), steps(engine, groups, range(3, 5))


def as_source(found: dict[str, Tensor], run: Run, folder: Path) -> Source:
    """A module's tensors in a Hugging Face folder, which `transformers` writes."""
    words = dict(FAMILIES[run.family])
    config = AutoConfig.for_model(words.pop("model_type"), **words)
    model = AutoModelForCausalLM.from_config(config, dtype=next(iter(found.values())).dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found.get(name, torch.zeros(())))
    model.save_pretrained(folder)
    return HuggingFaceFolder(folder)


@dataclass(frozen=True)
class Saved:
    """A checkpoint and what is in it."""

    run: Run
    folder: Path
    expected: dict[str, Source]
    losses: list[list[float]]
    """Of each data rank, in the steps after."""


def save(run: Run, worlds: RankPool, folder: Path) -> Saved:
    ranks = worlds.run(Layout(data=run.data), trained, run, folder / "saved")
    found, _ = ranks[0]
    expected = {kind: as_source(tensors, run, folder / f"expected{kind}") for kind, tensors in found.items()}
    (folder / "saved" / "config.json").write_text((folder / "expected" / "config.json").read_text())
    return Saved(run, folder / "saved", expected, [losses for _, losses in ranks])


@pytest.fixture(scope="module")
def saved(worlds: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Run], Saved]:
    """Makes each run once."""
    return functools.cache(lambda run: save(run, worlds, tmp_path_factory.mktemp("run")))


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are the same bits."""
    bits = (np.ascontiguousarray(array).view(np.uint8) for array in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(*bits)


def check(source: Source, expected: dict[str, Source], model: ModelConfig, kinds: tuple[str, ...]) -> None:
    """Whether a source has exactly the expected weights and states."""
    shapes = logical_tensors(model)
    assert {*source.states} == {state_name(kind, name) for kind in kinds for name in shapes}
    for kind in ("", *kinds):
        for name, shape in shapes.items():
            found = source.read(state_name(kind, name) if kind else name, whole(shape))
            assert same(found, expected[kind].read(name, whole(shape))), (kind, name)


def kinds_of(run: Run) -> tuple[str, ...]:
    return KINDS[1:] if run.dtype == torch.float32 else KINDS


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_what_deepspeed_saved_is_read_bit_for_bit(run: Run, saved: Callable[[Run], Saved]) -> None:
    source = DeepSpeedFolder(saved(run).folder)
    # Without ZeRO, DeepSpeed's bf16 optimizer begins with a step of its own, which Adam counts.
    assert source.updates == (4 if run == BFLOAT16_WITHOUT_ZERO else 3)
    check(source, saved(run).expected, source.config, kinds_of(run))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt2"])
def test_modules_of_older_transformers_are_read(family: str, tmp_path: Path) -> None:
    """Their parameters were named as files still are; GPT-2's of the bare model lack a prefix."""
    words = dict(FAMILIES[family])
    AutoModelForCausalLM.from_config(AutoConfig.for_model(words.pop("model_type"), **words)).save_pretrained(tmp_path)
    expected = HuggingFaceFolder(tmp_path)
    module = {n.removeprefix("transformer."): t for n, t in load_file(tmp_path / "model.safetensors").items()}
    states = {"module": module, "mp_world_size": 1, "dp_world_size": 1, "param_shapes": None, "optimizer": None}
    torch.save(states, tmp_path / "mp_rank_00_model_states.pt")
    check(DeepSpeedFolder(tmp_path), {"": expected}, expected.config, ())


@pytest.mark.parametrize("zero", [1, 3])
def test_what_is_not_trained_has_no_state(zero: int, saved: Callable[[Run], Saved], tmp_path: Path) -> None:
    there = saved(Run("llama", zero, data=2, frozen=True))
    source = DeepSpeedFolder(there.folder)
    shapes = logical_tensors(source.config)
    assert {*source.states} == {state_name(kind, name) for kind in KINDS for name in shapes if name != EMBEDDING}
    write_universal(tmp_path / "ours", source.config, Recast(source, source.config, None), {})
    for name, shape in shapes.items():
        for found in (source, DeepSpeedFolder(tmp_path / "ours")):
            assert same(found.read(name, whole(shape)), there.expected[""].read(name, whole(shape))), name


def test_parameters_that_went_round_robin_are_told_apart(saved: Callable[[Run], Saved]) -> None:
    source = DeepSpeedFolder(saved(ROUND_ROBIN).folder)
    for name, shape in logical_tensors(source.config).items():
        weight, master = (source.read(n, whole(shape)) for n in (name, state_name("master", name)))
        assert same(master.astype(weight.dtype), weight), name


@pytest.mark.parametrize("run", [Run("llama tied", 1, data=2), Run("gpt2", 3, data=2)], ids=str)
def test_what_ds_to_universal_wrote_is_read_bit_for_bit(
    run: Run, saved: Callable[[Run], Saved], tmp_path: Path
) -> None:
    folder = saved(run).folder
    ds_to_universal.main(
        Namespace(
            input_folder=str(folder / "global_step3"),
            output_folder=str(tmp_path / "universal"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    source = DeepSpeedFolder(tmp_path)
    assert source.folder == tmp_path / "universal"
    assert source.updates == 3
    check(source, saved(run).expected, source.config, kinds_of(run))


@pytest.mark.parametrize("run", RUNS[1:], ids=str)
def test_what_we_write_is_read_again_bit_for_bit(run: Run, saved: Callable[[Run], Saved], tmp_path: Path) -> None:
    source = DeepSpeedFolder(saved(run).folder)
    write_universal(tmp_path / "ours", source.config, Recast(source, source.config, None), {})
    again = DeepSpeedFolder(tmp_path / "ours")
    assert (again.updates, again.config) == (source.updates, source.config)
    check(again, saved(run).expected, source.config, kinds_of(run))


def continued(groups: Groups, run: Run, folder: Path) -> list[float]:
    """Losses of the two steps that `trained` took after it had saved, from a universal checkpoint."""
    with engine_of(run, groups, checkpoint={"load_universal": True}) as engine:
        engine.load_checkpoint(str(folder), load_lr_scheduler_states=False)
        return steps(engine, groups, range(3, 5))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Run("llama tied", 1, data=2), Run("llama tied", 1, data=2)),
        (Run("llama tied", 1, data=2), Run("llama tied", 2, data=2)),
        (Run("llama tied", 1, data=2), Run("llama tied", 3, data=2, two_groups=False)),
        (Run("gpt2", 3, data=2), Run("gpt2", 1, data=2)),
        (Run("mixtral", 1, data=2), Run("mixtral", 2, data=2)),
        (ROUND_ROBIN, Run("llama tied", 1, data=2)),
    ],
    ids=str,
)
def test_deepspeed_continues_what_we_wrote(
    before: Run, after: Run, saved: Callable[[Run], Saved], worlds: RankPool, tmp_path: Path
) -> None:
    source = DeepSpeedFolder(saved(before).folder)
    write_universal(tmp_path / "ours", source.config, Recast(source, source.config, None), {})
    assert worlds.run(Layout(data=after.data), continued, after, tmp_path / "ours") == saved(before).losses


SHAPE: dict[str, Any] = dict(layers=2, width=16, heads=4, kv_heads=2, head_dim=4, intermediate=10, context=40)
OURS = {
    "tied": ModelConfig(**SHAPE, vocabulary=31),
    "untied": ModelConfig(**SHAPE, vocabulary=33, tied=False, biases=("qkv", "out", "mlp")),
    "moe": ModelConfig(
        **SHAPE,
        family="qwen2_moe",
        biases=("qkv",),
        vocabulary=31,
        moe=MoEConfig(experts=4, experts_per_token=2, intermediate=6, shared_intermediate=4, shared_gate=True),
    ),
}
LAYOUTS: list[tuple[str, Layout, Literal["adamw", "muon"]]] = [
    ("tied", Layout(pipeline=2, data=2), "adamw"),
    ("untied", Layout(pipeline=2, data=2, zero=2), "muon"),
    ("moe", Layout(tensor=2, data=2), "adamw"),
    ("untied", Layout(tensor=2, data=2, zero=3), "adamw"),
    ("tied", Layout(tensor=2, pipeline=2, zero=0), "adamw"),
]

Part = tuple[str, Box, np.ndarray]
"""Of a logical tensor or of its state."""


def kinds_by_us(name: str, layout: Layout, optimizer: str) -> tuple[str, ...]:
    """Which state a logical tensor has."""
    moments = ("momentum",) if optimizer == "muon" and is_projection(name) else KINDS[1:]
    return ("master", *moments) if layout.zero_stage else moments


def trainer_of(groups: Groups, name: str, optimizer: Literal["adamw", "muon"], source: Source) -> Trainer:
    dtype = torch.float32 if groups.layout.zero_stage == 0 else torch.bfloat16
    return Trainer(build(OURS[name], groups, dtype, source), groups, OptimizerConfig(kind=optimizer))


def our_losses(trainer: Trainer, count: int) -> list[float]:
    """Of some steps, all on the same texts."""
    tokens = np.random.default_rng(2).integers(3, 31, (6, 12))
    texts = [sample(t[:3], t[3:], weight=1 / 54) for t in tokens]
    rows = rows_for_ranks(texts, row_rules(trainer.groups.layout, 30))[trainer.groups.data_rank]
    return [trainer.step(rows, nll, 1e-2).values["loss"] for _ in range(count)]


def trained_by_us(
    groups: Groups, name: str, optimizer: Literal["adamw", "muon"], folder: Path
) -> tuple[list[Part], list[float]]:
    """Train two steps, save with DeepSpeed, train two more; what this rank held, and the last losses."""
    trainer = trainer_of(groups, name, optimizer, RandomWeights(OURS[name], 1))
    our_losses(trainer, 2)
    engine = trainer.engine._zero._engine
    engine.save_checkpoint(str(folder))
    return [*parts_of(trainer, engine, optimizer)], our_losses(trainer, 2)


def resumed_by_us(groups: Groups, name: str, optimizer: Literal["adamw", "muon"], folder: Path) -> list[float]:
    """Losses of the last two steps of `trained_by_us`, from what it had saved."""
    source = DeepSpeedFolder(folder, OURS[name])
    trainer = trainer_of(groups, name, optimizer, source)
    trainer.restore(source)
    return our_losses(trainer, 2)


def parts_of(trainer: Trainer, engine: Any, optimizer: str) -> Iterator[Part]:
    zero = trainer.groups.layout.zero_stage
    if zero in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    with trainer.engine.whole_weights():
        for parameter, piece in pieces(trainer.transformer):
            yield piece.name, piece.box, to_numpy(piece.view(parameter)).copy()
    for parameter, piece in pieces(trainer.transformer):
        for kind in kinds_by_us(piece.name, trainer.groups.layout, optimizer):
            state = state_of(engine, parameter, "momentum_buffer" if kind == "momentum" else kind, zero)
            yield state_name(kind, piece.name), piece.box, to_numpy(piece.view(state)).copy()


@pytest.mark.parametrize(("name", "layout", "optimizer"), LAYOUTS, ids=str)
def test_a_transformer_of_ours_is_read_from_any_layout(
    name: str, layout: Layout, optimizer: str, worlds: RankPool, tmp_path: Path
) -> None:
    ranks = worlds.run(layout, trained_by_us, name, optimizer, tmp_path / "saved")
    source, shapes = DeepSpeedFolder(tmp_path / "saved", OURS[name]), logical_tensors(OURS[name])
    assert source.updates == 2
    expected = {state_name(kind, n) for n in shapes for kind in kinds_by_us(n, layout, optimizer)}
    assert {*source.states} == expected
    for tensor, box, values in (part for parts, _ in ranks for part in parts):
        assert same(source.read(tensor, box), values), (tensor, box)
    write_universal(tmp_path / "universal", OURS[name], Recast(source, OURS[name], None), {})
    again = DeepSpeedFolder(tmp_path / "universal")
    assert {*again.states} == expected
    for tensor in (*shapes, *expected):
        box = whole(shapes[tensor.rpartition("/")[2]])
        assert same(again.read(tensor, box), source.read(tensor, box)), tensor


@pytest.mark.parametrize(("name", "layout", "optimizer"), LAYOUTS[1:3], ids=str)
def test_our_trainer_goes_on_from_deepspeed_s_files(
    name: str, layout: Layout, optimizer: str, worlds: RankPool, tmp_path: Path
) -> None:
    expected = [losses for _, losses in worlds.run(layout, trained_by_us, name, optimizer, tmp_path)]
    assert worlds.run(layout, resumed_by_us, name, optimizer, tmp_path) == expected


@given(st.data())
def test_any_slice_of_any_parts_is_that_of_the_whole(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    elements = int(np.prod(shape))
    values = torch.arange(elements + data.draw(st.integers(0, 4)), dtype=torch.float32)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=5)))
    parts = [values[a:b] for a, b in itertools.pairwise([0, *cuts, len(values)])]
    pairs = [data.draw(st.tuples(st.integers(0, n - 1), st.integers(1, n))) for n in shape]
    box = tuple((min(a, b - 1), b) for a, b in pairs)
    tensor = FlatTensor(shape, parts, torch.bfloat16)
    assert tensor.is_whole
    expected = values[:elements].view(shape)[tuple(slice(a, b) for a, b in box)]
    assert torch.equal(tensor.read(box), expected.bfloat16())


def resident(path: Path) -> int:
    """Bytes of a file that are in this process's memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [i for i, line in enumerate(lines) if line.endswith(str(path))]
    sizes = (next(line for line in lines[i:] if line.startswith("Rss:")) for i in starts)
    return sum(int(line.split()[1]) for line in sizes) * 1024


def test_a_row_is_read_without_the_rest_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"param": torch.arange(8 << 20, dtype=torch.float32)}, file)
    tensor = FlatTensor((1 << 13, 1 << 10), [load(file)["param"]], torch.float32)
    assert (tensor.read(((5000, 5001), (0, 4))).flatten() == 5000 * 1024 + torch.arange(4)).all()
    assert 0 < resident(file) < 4 << 20


@pytest.fixture
def broken(saved: Callable[[Run], Saved], tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be broken."""
    return shutil.copytree(saved(Run("llama tied", 1, data=2)).folder, tmp_path / "copy")


def test_a_file_that_was_cut_is_named(broken: Path) -> None:
    file = broken / "global_step3" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        BadDeepSpeedFolder, match=r"bf16_zero_pp_rank_1_mp_rank_00_optim_states\.pt is not a whole file"
    ):
        DeepSpeedFolder(broken)


def test_a_rank_whose_file_is_missing_is_named(broken: Path) -> None:
    (broken / "global_step3" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(
        BadDeepSpeedFolder, match=r"lacks the \*_optim_states\.pt file of model-parallel rank 0, data rank 1"
    ):
        DeepSpeedFolder(broken)
    (broken / "global_step3" / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(BadDeepSpeedFolder, match=r"has no mp_rank_XX_model_states\.pt"):
        DeepSpeedFolder(broken)
    with pytest.raises(BadDeepSpeedFolder, match="there is no folder"):
        DeepSpeedFolder(broken / "elsewhere")


def change(folder: Path, **changes: Any) -> None:
    """Put something else into a checkpoint's module file."""
    file = folder / "global_step3" / "mp_rank_00_model_states.pt"
    torch.save(torch.load(file, weights_only=False) | changes, file)


class Caller:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch stolen",)


@pytest.mark.parametrize(
    ("given", "named"), [(Decimal(1), r"decimal\.Decimal"), (Caller(), r"posix\.system"), (exec, "exec")]
)
def test_a_class_that_could_run_code_is_named_and_not_made(given: Any, named: str, broken: Path) -> None:
    change(broken, note=given)
    with pytest.raises(BadDeepSpeedFolder, match=f"holds {named}, which could run code"):
        DeepSpeedFolder(broken)


def test_arguments_and_random_states_of_a_script_are_no_hindrance(broken: Path) -> None:
    state = {"numpy": np.random.default_rng(1).bit_generator.state, "old": np.random.RandomState(1).get_state()}
    change(broken, args=Namespace(lr=0.1, betas=(0.9, 0.95)), rng=[random.getstate(), torch.get_rng_state(), state])
    assert DeepSpeedFolder(broken).updates == 3


def test_a_checkpoint_without_a_configuration_asks_for_one(broken: Path) -> None:
    config = DeepSpeedFolder(broken).config
    (broken / "config.json").unlink()
    with pytest.raises(BadDeepSpeedFolder, match=r"does not say which model it is of: put the model's config\.json"):
        DeepSpeedFolder(broken)
    assert DeepSpeedFolder(broken, config).config == config


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"layers": 3}, r"lacks model\.layers\.2\.self_attn\.q_proj\.weight"),
        (
            {"layers": 1},
            r"model\.layers\.1\.self_attn\.q_proj\.weight is \[16, 16\] in the checkpoint, which does not fit",
        ),
        ({"intermediate": 20}, r"gate_proj\.weight is \[24, 16\] in the checkpoint, which does not fit"),
        ({"intermediate": 28}, r"gate_proj\.weight is \[24, 16\] in the checkpoint, which does not fit"),
        ({"vocabulary": 16, "width": 31}, r"embed_tokens\.weight is \[31, 16\] in the checkpoint"),
        ({"tied": False}, r"lacks lm_head\.weight"),
    ],
)
def test_another_model_s_configuration_is_refused(change: dict[str, Any], complaint: str, broken: Path) -> None:
    config = DeepSpeedFolder(broken).config.model_copy(update=change)
    with pytest.raises(BadDeepSpeedFolder, match=complaint):
        DeepSpeedFolder(broken, config)


def test_model_parallel_ranks_of_another_library_are_refused(broken: Path) -> None:
    change(broken, mp_world_size=2, param_shapes=None, optimizer=None)
    step = broken / "global_step3"
    for file in step.glob("*optim_states.pt"):
        file.unlink()
    shutil.copy(step / "mp_rank_00_model_states.pt", step / "mp_rank_01_model_states.pt")
    with pytest.raises(BadDeepSpeedFolder, match="has 2 model-parallel ranks"):
        DeepSpeedFolder(broken)


def test_layers_that_lie_apart_are_refused(broken: Path) -> None:
    change(broken, module=None)
    with pytest.raises(BadDeepSpeedFolder, match="keeps its layers apart"):
        DeepSpeedFolder(broken)


def test_groups_that_do_not_tell_their_parameters_are_refused(saved: Callable[[Run], Saved], tmp_path: Path) -> None:
    folder = shutil.copytree(saved(RUNS[0]).folder, tmp_path / "copy")
    file = folder / "global_step3" / "mp_rank_00_model_states.pt"
    optimizer = torch.load(file, weights_only=False)["optimizer"]
    first, *others = optimizer["param_groups"]
    halves = [first | {"params": first["params"][:5]}, first | {"params": first["params"][5:]}]
    change(folder, optimizer=optimizer | {"param_groups": [*halves, *others]})
    with pytest.raises(BadDeepSpeedFolder, match="its groups do not tell which parameters"):
        DeepSpeedFolder(folder)


class Lean(WeightsOnly):
    """A source without an optimizer's state."""

    def __init__(self, source: Source) -> None:
        self.read = source.read


def test_weights_alone_get_what_adam_begins_with(saved: Callable[[Run], Saved], tmp_path: Path) -> None:
    source = DeepSpeedFolder(saved(Run("llama", 1)).folder)
    write_universal(
        tmp_path / "ours", source.config, Recast(Lean(source), source.config, None), {"tokenizer.json": "{}"}
    )
    again = DeepSpeedFolder(tmp_path / "ours")
    assert again.updates == 0
    assert (tmp_path / "ours" / "tokenizer.json").read_text() == "{}"
    for name, shape in logical_tensors(source.config).items():
        weight = source.read(name, whole(shape))
        assert same(again.read(name, whole(shape)), weight)
        assert same(again.read(state_name("master", name), whole(shape)), weight.astype(np.float32))
        assert not again.read(state_name("exp_avg_sq", name), whole(shape)).any()


def test_classes_that_others_allow_to_be_read_stay_allowed(saved: Callable[[Run], Saved]) -> None:
    """As megatron-core does for the whole process, and it cannot read its own files otherwise."""
    before = torch.serialization.get_safe_globals()
    try:
        torch.serialization.add_safe_globals([argparse.Namespace])
        DeepSpeedFolder(saved(RUNS[0]).folder)
        assert argparse.Namespace in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
