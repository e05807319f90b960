"""Folders that megatron-core wrote, read bit for bit, and folders that we wrote, loaded by megatron-core."""

import os
import pickle
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnBackend
from ml_dtypes import bfloat16

from lockstep.distributed.checkpoint.tensors import Box, Source, digest, state_name, to_numpy, whole
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.attention.packed import DocumentAttention
from lockstep.model.config import ModelConfig, MoEConfig, UnknownModel
from lockstep.model.formats.files.safe_unpickler import UnreadFile
from lockstep.model.formats.megatron import torch_dist
from lockstep.model.formats.megatron.arguments import from_megatron, to_megatron
from lockstep.model.formats.megatron.reader import MegatronFolder
from lockstep.model.formats.megatron.tensor_map import parts, place
from lockstep.model.formats.megatron.torch_dist import BadTorchDist
from lockstep.model.formats.megatron.writer import MegatronTarget, write
from lockstep.model.formats.recast import Recast
from lockstep.model.layers.logprobs import local_logits
from lockstep.model.loading import build, transformer_of
from lockstep.model.rope import Rope
from lockstep.model.weights.initialization import RandomWeights
from lockstep.model.weights.names import logical_tensors
from tests.model.formats.megatron_models import Naive, filled, loaded, logits, resaved, save

SIZES: dict[str, Any] = {"layers": 4, "width": 24, "heads": 4, "kv_heads": 2, "head_dim": 8, "context": 16}
MODELS = {
    "tied": ModelConfig(vocabulary=31, intermediate=20, tied=True, rope=Rope(theta=5000.0), **SIZES),
    "untied": ModelConfig(vocabulary=33, intermediate=36, tied=False, family="qwen3", qk_norm="head", **SIZES),
    "biases": ModelConfig(vocabulary=40, intermediate=20, tied=False, family="qwen2", biases=("qkv",), **SIZES),
    "gpt2": ModelConfig(
        vocabulary=29,
        intermediate=20,
        family="gpt2",
        norm="layer",
        rope=None,
        gated=False,
        activation="gelu",
        biases=("qkv", "out", "mlp"),
        **(SIZES | {"kv_heads": 4, "head_dim": 6}),
    ),
    "experts": ModelConfig(
        vocabulary=33,
        intermediate=12,
        family="mixtral",
        tied=False,
        moe=MoEConfig(experts=4, experts_per_token=2, intermediate=12),
        **SIZES,
    ),
    "shared": ModelConfig(
        vocabulary=33,
        intermediate=20,
        family="qwen2_moe",
        biases=("qkv",),
        moe=MoEConfig(
            experts=2,
            experts_per_token=1,
            intermediate=12,
            shared_intermediate=8,
            shared_gate=True,
            normalize=False,
        ),
        **SIZES,
    ),
}
LAYOUTS = [Layout(tensor=2, pipeline=2), Layout(tensor=2), Layout(pipeline=2), Layout()]
EXPERT = Layout(expert=2)
"""Models without experts have no such layout."""
NAMING = {LAYOUTS[1]: {"singleton_local_shards": True}, LAYOUTS[2]: {"non_homogeneous_layers": True}}
"""Layers with names of their own, and experts, gates and ups as well."""


class Drawn(RandomWeights):
    """Random weights in a dtype, no two tensors alike: norms and biases are drawn, too."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__(model, seed=3)
        self.dtype, self.model = dtype, model

    def read(self, name: str, box: Box) -> np.ndarray:
        shape = self._shapes[name]
        drawn = np.random.default_rng([*name.encode()]).standard_normal(shape, dtype=np.float32)
        drawn = drawn * np.float32(0.3) + np.float32("norm" in name)
        return to_numpy(torch.from_numpy(drawn).to(self.dtype))[tuple(slice(a, b) for a, b in box)]


def dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if name in ("tied", "experts") else torch.float32


def differing(found: Source, expected: Source, model: ModelConfig) -> list[str]:
    """Logical tensors of which not every bit is the same."""
    return [
        name
        for name, shape in logical_tensors(model).items()
        if digest(found.read(name, whole(shape))) != digest(expected.read(name, whole(shape)))
    ]


class WithAdam(Drawn):
    """Drawn weights, with Adam's state after 7 updates."""

    updates = 7

    @property
    def states(self) -> Sequence[str]:
        kinds = ("exp_avg", "exp_avg_sq", *(("master",) if self.dtype == torch.bfloat16 else ()))
        return tuple(state_name(kind, name) for name in self._shapes for kind in kinds)

    def read(self, name: str, box: Box) -> np.ndarray:
        kind, _, tensor = name.rpartition("/")
        if not kind:
            return super().read(name, box)
        drawn = np.random.default_rng([*name.encode()]).standard_normal(self._shapes[tensor], dtype=np.float32)
        return drawn[tuple(slice(a, b) for a, b in box)]


def models_of(layout: Layout) -> dict[str, ModelConfig]:
    """Those that are tried in a layout."""
    return {name: model for name, model in MODELS.items() if model.moe or layout != EXPERT}


def saved_by_megatron(groups: Groups, folder: Path) -> None:
    """Save every model, filled by hand, from all ranks."""
    for name, model in models_of(groups.layout).items():
        module = filled(groups, model, dtype_of(name), Drawn(model, dtype_of(name)))
        state = module.sharded_state_dict(metadata=dict(NAMING.get(groups.layout, {})))
        save(folder / name, {"model": state, "iteration": 3})


@pytest.fixture(scope="module")
def saved(worlds: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Path]:
    folders = {layout: tmp_path_factory.mktemp("megatron") for layout in (*LAYOUTS, EXPERT)}
    for layout, folder in folders.items():
        worlds.run(layout, saved_by_megatron, folder)
    return folders


@pytest.mark.parametrize("layout", [*LAYOUTS, EXPERT], ids=str)
def test_what_megatron_saved_is_read_bit_for_bit(layout: Layout, saved: dict[Layout, Path]) -> None:
    for name, model in models_of(layout).items():
        found = MegatronFolder(saved[layout] / name, model)
        assert differing(found, Drawn(model, dtype_of(name)), model) == []
        assert not found.states
        assert found.updates == 0


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model as we write it, with Adam's state."""
    folder = tmp_path_factory.mktemp("ours")
    for name, model in MODELS.items():
        write(folder / name, model, WithAdam(model, dtype_of(name)), {"tokenizer.json": "{}"})
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_what_we_wrote_is_read_bit_for_bit(name: str, ours: Path) -> None:
    model, found = MODELS[name], MegatronFolder(ours / name)
    expected = WithAdam(model, dtype_of(name))
    assert found.config == model
    assert differing(found, expected, model) == []
    assert set(found.states) == set(expected.states)
    assert found.updates == 7
    for state in found.states:
        box = whole(logical_tensors(model)[state.split("/")[1]])
        assert digest(found.read(state, box)) == digest(expected.read(state, box)), state


@torch.no_grad()
def differing_in_megatron(groups: Groups, folder: Path) -> list[str]:
    """Parameters of this rank's GPTModels that megatron-core filled with other bits than we do by hand."""
    wrong = []
    for name, model in models_of(groups.layout).items():
        module = loaded(groups, model, dtype_of(name), folder / name)
        naive = Naive(groups, model, Drawn(model, dtype_of(name)))
        wrong += [
            f"{name} {path}" for path, p in module.named_parameters() if not torch.equal(p, naive.parameter(path))
        ]
    return wrong


@pytest.mark.parametrize("layout", [*LAYOUTS, EXPERT], ids=str)
def test_megatron_loads_what_we_wrote(layout: Layout, ours: Path, worlds: RankPool) -> None:
    assert worlds.run(layout, differing_in_megatron, ours) == [[]] * layout.processes


@torch.no_grad()
def largest_difference(groups: Groups, folder: Path) -> dict[str, float]:
    """Of our logits from Megatron's, for the models that it computes without Transformer Engine."""
    found = {}
    for name in ("untied", "biases", "gpt2"):
        model = MODELS[name]
        tokens, positions = torch.arange(11) * 7 % model.vocabulary, torch.arange(11)
        transformer = transformer_of(build(model, groups, torch.float32, MegatronFolder(folder / name)))
        hidden = transformer(tokens, positions, DocumentAttention([[11]], tokens.device))[:, 0]
        mine = local_logits(hidden, transformer.head_weight, 0, model.vocabulary)[:, : model.vocabulary]
        theirs = logits(loaded(groups, model, torch.float32, folder / name), tokens)[:, : model.vocabulary]
        assert theirs.std() > 0.1
        found[name] = float((mine - theirs).abs().max())
    return found


def test_our_logits_equal_those_of_megatron(ours: Path, worlds: RankPool) -> None:
    (found,) = worlds.run(Layout(), largest_difference, ours)
    assert max(found.values()) < 1e-4, found


RESAVED = [
    ("tied", Layout(tensor=2, data=2), "fully_reshardable"),
    ("untied", Layout(tensor=2, pipeline=2), "fully_reshardable"),
    ("tied", Layout(pipeline=2), None),
    ("untied", Layout(tensor=2), None),
]


@pytest.mark.parametrize(("name", "layout", "sharding"), RESAVED, ids=str)
def test_adam_goes_through_megatron_and_back(
    name: str, layout: Layout, sharding: str | None, ours: Path, tmp_path: Path, worlds: RankPool
) -> None:
    model, dtype = MODELS[name], dtype_of(name)
    for groups in worlds.run(layout, resaved, model, dtype, ours / name, tmp_path / "back", sharding):
        assert {(g["wd_mult"], g["weight_decay"], g["eps"], g["lr"]) for g in groups} == {
            (1.0, 0.01, 1e-8, 1e-4),
            (0.0, 0.0, 1e-8, 1e-4),
        }
    expected, back = WithAdam(model, dtype), MegatronFolder(tmp_path / "back", model)
    assert set(back.states) == set(expected.states)
    assert back.updates == 7
    assert differing(back, expected, model) == []
    for state in back.states:
        box = whole(logical_tensors(model)[state.split("/")[1]])
        assert digest(back.read(state, box)) == digest(expected.read(state, box)), state


def test_buckets_without_names_are_refused_and_weights_are_not(ours: Path, tmp_path: Path, worlds: RankPool) -> None:
    model = MODELS["untied"]
    worlds.run(Layout(tensor=2), resaved, model, torch.float32, ours / "untied", tmp_path / "back", "dp_reshardable")
    found = MegatronFolder(tmp_path / "back", model)
    assert differing(found, Drawn(model, torch.float32), model) == []
    with pytest.raises(BadTorchDist, match="save with --dist-ckpt-optim-fully-reshardable"):
        list(found.states)


ARGUMENTS: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "group_query_attention": True,
    "ffn_hidden_size": 20,
    "max_position_embeddings": 16,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_base": 5000,
    "untie_embeddings_and_output_weights": False,
}
"""A command line of Megatron-LM for the model `tied`."""


def test_arguments_say_which_model_it_is() -> None:
    assert from_megatron(ARGUMENTS | {"vocab_size": 31}, 32) == MODELS["tied"]
    assert from_megatron(ARGUMENTS, 32) == MODELS["tied"].model_copy(update={"vocabulary": 32})
    alone = from_megatron(ARGUMENTS | {"group_query_attention": False, "num_query_groups": 1}, 32)
    assert alone.kv_heads == alone.heads


@pytest.mark.parametrize("name", MODELS)
def test_arguments_survive_a_round_trip(name: str) -> None:
    assert from_megatron(to_megatron(MODELS[name]), 1) == MODELS[name]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_layers": None}, "arguments lack num_layers: put the model's config.json beside it"),
        ({"multi_latent_attention": True}, "uses multi_latent_attention"),
        ({"rotary_percent": 0.5}, r"uses rotary_percent=0\.5"),
        ({"position_embedding_type": "mrope"}, "uses position_embedding_type=mrope"),
        ({"normalization": "LayerNorm", "apply_layernorm_1p": True}, "uses apply_layernorm_1p with LayerNorm"),
        ({"num_experts": 4, "moe_layer_freq": [1, 0, 1, 1]}, r"uses moe_layer_freq=\[1, 0, 1, 1\]"),
        ({"num_experts": 4, "moe_router_score_function": "sigmoid"}, "uses moe_router_score_function=sigmoid"),
    ],
)
def test_arguments_of_other_models_are_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UnknownModel, match=complaint):
        from_megatron(ARGUMENTS | change, 32)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"attention_cap": 50.0}, "Megatron's arguments cannot say this model's attention_cap"),
        ({"window": 4}, "Megatron's arguments cannot say this model's window"),
        ({"norm_at": "after"}, "Megatron's arguments cannot say this model's norm_at"),
    ],
)
def test_models_that_megatron_lacks_are_not_written(change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    model = MODELS["tied"].model_copy(update=change)
    with pytest.raises(UnknownModel, match=complaint):
        write(tmp_path / "out", model, Drawn(model, torch.float32), {})
    assert not (tmp_path / "out").exists()


def rewritten(folder: Path, **common: Any) -> MegatronFolder:
    """The folder without its config.json, and with this in its common.pt."""
    (folder / "config.json").unlink(missing_ok=True)
    torch.save(common, folder / "common.pt")
    return MegatronFolder(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The model `tied` without an optimizer's state, as we write it."""
    write(tmp_path / "one", MODELS["tied"], Drawn(MODELS["tied"], torch.bfloat16), {})
    return tmp_path / "one"


def test_the_model_is_that_of_the_arguments_where_nothing_else_says_it(folder: Path) -> None:
    padded = MODELS["tied"].model_copy(update={"vocabulary": 31})
    backend = AttnBackend.auto
    assert rewritten(folder, args=Namespace(**ARGUMENTS, attention_backend=backend)).config == padded
    assert rewritten(folder, config=ARGUMENTS).config == padded
    with pytest.raises(UnknownModel, match=r"does not say which model it holds: put the model's config\.json"):
        rewritten(folder)


def test_the_newest_of_a_run_is_found(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12\n")
    folder.rename(tmp_path / "iter_0000012")
    assert MegatronFolder(tmp_path).folder.name == "iter_0000012"


def test_a_vocabulary_of_too_few_rows_and_unknown_tensors_are_refused(folder: Path) -> None:
    larger = MODELS["tied"].model_copy(update={"vocabulary": 40})
    with pytest.raises(BadTorchDist, match=r"word_embeddings\.weight in .* is \(31, 24\), and .* be \(40"):
        MegatronFolder(folder, larger)
    with pytest.raises(BadTorchDist, match=r"lacks output_layer\.weight, which a model of its configuration has"):
        MegatronFolder(folder, MODELS["tied"].model_copy(update={"tied": False}))
    deeper = MODELS["tied"].model_copy(update={"layers": 3})
    with pytest.raises(BadTorchDist, match=r"the model's would be \(3, "):
        MegatronFolder(folder, deeper)
    with pytest.raises(BadTorchDist, match=r"lacks decoder\.layers\.self_attention\.linear_qkv\.bias"):
        MegatronFolder(folder, MODELS["tied"].model_copy(update={"biases": ("qkv",)}))
    with pytest.raises(KeyError, match=r"has no tensor exp_avg/model\.norm\.weight"):
        MegatronFolder(folder).read("exp_avg/model.norm.weight", ((0, 24),))


def test_tensors_that_the_model_lacks_are_refused(ours: Path) -> None:
    without = MODELS["biases"].model_copy(update={"biases": ()})
    with pytest.raises(BadTorchDist, match=r"holds .*linear_qkv\.bias, which a model of its configuration lacks"):
        MegatronFolder(ours / "biases", without)


def test_a_file_that_is_cut_off_missing_or_damaged_is_named(folder: Path) -> None:
    model, data = MODELS["tied"], folder / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[:-2000])
    with pytest.raises(BadTorchDist, match=r"__0_0\.distcp ends \d+ bytes before its chunk does: copy the folder"):
        differing(MegatronFolder(folder), Drawn(model, torch.bfloat16), model)
    data.write_bytes(b"\0" * len(content))
    with pytest.raises(UnreadFile, match=r"embed.* in __0_0\.distcp of .* is damaged \("):
        differing(MegatronFolder(folder), Drawn(model, torch.bfloat16), model)
    data.unlink()
    with pytest.raises(BadTorchDist, match=r"lacks __0_0\.distcp: give a folder that Megatron saved whole"):
        differing(MegatronFolder(folder), Drawn(model, torch.bfloat16), model)
    for name in ("common.pt", ".metadata", "metadata.json"):
        (folder / name).unlink()
        with pytest.raises(BadTorchDist, match=f"lacks {name}"):
            MegatronFolder(folder)


class Foreign:
    """A class that no checkpoint holds."""


def test_a_foreign_class_is_never_made(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnreadFile, match=r"common\.pt is not read: it holds .*Foreign, which is not on the list"):
        rewritten(folder, args=Namespace(**ARGUMENTS, tokenizer=Foreign()))
    with pytest.raises(UnreadFile, match=r"it holds builtins\.eval, which is not on the list"):
        rewritten(folder, args=Call(eval, "1 + 1"))
    torch.save({}, folder / "common.pt")
    mark = tmp_path / "made"
    (folder / ".metadata").write_bytes(pickle.dumps(Call(os.mkdir, str(mark))))
    with pytest.raises(UnreadFile, match=r"\.metadata is not read: it holds posix\.mkdir, which is not on the list"):
        MegatronFolder(folder)
    assert not mark.exists()


class Call:
    """Pickled as a call, which a pickle may hold."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class WithMuon(Drawn):
    """Drawn weights, with a state of Muon's."""

    updates = 1
    states = ("momentum/model.norm.weight",)


def test_state_of_another_optimizer_is_not_written(tmp_path: Path) -> None:
    model = MODELS["tied"]
    with pytest.raises(BadTorchDist, match=r"state is not Adam's \(momentum/model\.norm\.weight is there\)"):
        write(tmp_path / "out", model, WithMuon(model, torch.float32), {})
    with pytest.raises(BadTorchDist, match=r"\(master/model\.embed_tokens\.weight is missing\)"):
        write(tmp_path / "out", model, Halved(WithAdam(model, torch.float32)), {})
    assert not (tmp_path / "out").exists()


class Halved:
    """Another's weights in bfloat16, whose state knows nothing of it."""

    def __init__(self, source: Source) -> None:
        self.source, self.states, self.updates = source, source.states, source.updates

    def read(self, name: str, box: Box) -> np.ndarray:
        return self.source.read(name, box).astype(bfloat16)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 6), st.booleans())
def test_parts_of_a_stored_tensor_cover_it_once(groups: int, queries: int, head_dim: int, gated: bool) -> None:
    sizes = {"heads": groups * queries, "kv_heads": groups, "head_dim": 2 * head_dim}
    model = MODELS["tied"].model_copy(update=sizes | {"gated": gated})
    shapes = logical_tensors(model)
    for part in parts({name: place(name, model) for name in shapes}, shapes):
        rows = np.concatenate([found.rows(0, count) for _, found, count in part.tensors])
        assert sorted(rows) == list(range(part.rows)), part.key


class Counted(Drawn):
    """Drawn weights that remember the largest part that was asked for."""

    largest = 0

    def read(self, name: str, box: Box) -> np.ndarray:
        part = super().read(name, box)
        self.largest = max(self.largest, part.nbytes)
        return part


def test_chunks_are_small_and_files_are_many(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch_dist, "LARGEST_FILE", 20_000)
    model = MODELS["untied"]
    source = Counted(model, torch.float32)
    target = MegatronTarget(tmp_path / "out", model, Recast(source, model, None), {}, limit=512)
    target.create()
    digests = {part: target.write(part) for part in reversed(target.parts)}
    target.create()
    target.write(target.parts[3])  # again
    target.finish(digests)
    assert source.largest <= 512
    assert len(list((tmp_path / "out").glob("*.distcp"))) > 3
    assert differing(MegatronFolder(tmp_path / "out"), source, model) == []
    part = MegatronFolder(tmp_path / "out").read("model.layers.2.self_attn.k_proj.weight", ((3, 11), (5, 9)))
    assert digest(part) == digest(source.read("model.layers.2.self_attn.k_proj.weight", ((3, 11), (5, 9))))
