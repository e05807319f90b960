"""A head stored beside `tie_word_embeddings` is used where it is another; tensors without a place are errors."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lockstep.cluster.conversion.convert import convert_checkpoint
from lockstep.cluster.conversion.inspection import open_outline, plan_lines
from lockstep.cluster.conversion.plan import Conversion
from lockstep.distributed.checkpoint.tensors import whole
from lockstep.model.formats.huggingface import reader
from lockstep.model.formats.huggingface.reader import BadFolder, HuggingFaceFolder
from lockstep.model.formats.registry import open_model

HEAD, TEXT = "lm_head.weight", torch.arange(3, 30)[None]
State = dict[str, torch.Tensor]


def saved(folder: Path, change: Callable[[State], object], *, family: str = "llama", sharded: bool = False) -> Path:
    """A tied model's folder, whose files hold what `change` made of its tensors."""
    torch.manual_seed(5)
    sizes = dict(vocab_size=41, tie_word_embeddings=True)
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, **sizes))
    else:
        words = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        model = LlamaForCausalLM(LlamaConfig(**words, **sizes))
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    if not sharded:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"a.safetensors": [n for n in names if n != HEAD], "b.safetensors": [n for n in names if n == HEAD]}
    for file, inside in parts.items():
        save_file({n: state[n] for n in inside}, folder / file, {"format": "pt"})
    places = {n: file for file, inside in parts.items() for n in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def embedding_of(state: State) -> torch.Tensor:
    return next(tensor for name, tensor in state.items() if name.endswith(("embed_tokens.weight", "wte.weight")))


def another_head(state: State) -> None:
    state[HEAD] = embedding_of(state) * 0.5 + 0.1


def last_row_differs(state: State) -> None:
    state[HEAD] = embedding_of(state).clone()
    state[HEAD][-1, -1] += 1e-3


def rounded_head(state: State) -> None:
    state[HEAD] = embedding_of(state).bfloat16()


def copied_head(state: State) -> None:
    state[HEAD] = embedding_of(state).clone()


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(TEXT).logits


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("change", [another_head, last_row_differs, rounded_head])
def test_a_head_of_other_values_is_used_as_transformers_does(
    change: Callable[[State], object], family: str, sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_BLOCK", 8 * 16 * 7)  # six blocks of seven rows
    folder = saved(tmp_path / "model", change, family=family, sharded=sharded)
    opened = open_model(str(folder))
    assert not opened.config.tied
    conversion = Conversion(str(folder), tmp_path / "out", "hf", dtype="float32")
    plan = "\n".join(plan_lines(conversion, open_outline(str(folder))))
    assert "lm_head.weight is another than the embedding and is used, in spite of tie_word_embeddings" in plan
    assert "left out: " not in plan
    convert_checkpoint(conversion)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(logits(folder), logits(tmp_path / "out"))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_copy_of_the_embedding_stays_tied(family: str, sharded: bool, tmp_path: Path) -> None:
    opened = open_model(str(saved(tmp_path / "model", copied_head, family=family, sharded=sharded)))
    assert opened.config.tied
    assert isinstance(opened.source, HuggingFaceFolder)
    assert opened.source.notes == ()


def test_a_pickle_that_stores_one_tensor_under_both_names_stays_tied(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", copied_head)
    state = load_file(folder / "model.safetensors")
    state[HEAD] = embedding_of(state)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert open_model(str(folder)).config.tied


def test_a_head_alone_is_the_embedding_too(tmp_path: Path) -> None:
    def only_head(state: State) -> None:
        state[HEAD] = state.pop("model.embed_tokens.weight") + 1

    opened = open_model(str(saved(tmp_path / "model", only_head)))
    assert opened.config.tied
    assert opened.source.read("model.embed_tokens.weight", whole((41, 16))).mean() > 0.9


def test_a_head_in_a_shard_that_the_index_does_not_mention_is_used(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", another_head, sharded=True)
    for file, extra in (("a.safetensors", {HEAD: load_file(folder / "b.safetensors")[HEAD]}),):
        save_file(load_file(folder / file) | extra, folder / file, {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {n: f for n, f in index.items() if n != HEAD}})
    )
    assert not open_model(str(folder)).config.tied


def bad_shape(state: State) -> None:
    state[HEAD] = torch.zeros(40, 16)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (bad_shape, r"lm_head\.weight in .* has shape \(40, 16\), and config\.json asks for \(41, 16\)"),
        (
            lambda s: s.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}),
            r"holds .*q_proj\.bias, which a",
        ),
        (lambda s: s.update({"model.layers.1.mlp.up_proj.weight": torch.ones(2, 2)}), r"layers\.1\.mlp\.up_proj"),
        (lambda s: s.update({"v_head.summary.weight": torch.ones(1, 16)}), r"v_head\.summary\.weight"),
        (lambda s: s.update({"a.scale": torch.ones(1), "b.scale": torch.ones(1)}), r"holds a\.scale and 1 more, which"),
    ],
)
def test_a_tensor_without_a_place_is_an_error(change: Callable[[State], object], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadFolder, match=said):
        open_model(str(saved(tmp_path / "model", change)))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "h.0.attn.masked_bias"),
    ],
)
def test_buffers_that_follow_from_the_configuration_are_no_hindrance(family: str, name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", lambda state: state.update({name: torch.ones(4)}), family=family)
    assert open_model(str(folder)).config.family == family


def test_one_file_comes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", another_head, sharded=True)
    state = load_file(folder / "a.safetensors")
    save_file({n: t + 1 for n, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
    found = open_model(str(folder)).source.read("model.norm.weight", ((0, 16),))
    np.testing.assert_array_equal(found, np.full(16, 2, np.float32))
    assert AutoModelForCausalLM.from_pretrained(folder).model.norm.weight.tolist() == [2.0] * 16
