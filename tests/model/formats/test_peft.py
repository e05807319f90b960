"""Adapters in PEFT's format, there and back: the same logits as the real library, and what is not LoRA is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from lockstep.cluster.checks.verify import verify_checkpoint
from lockstep.cluster.conversion.convert import convert_checkpoint
from lockstep.cluster.conversion.inspection import open_outline, plan_lines
from lockstep.cluster.conversion.plan import BadConversion, Conversion
from lockstep.data.batch import sample
from lockstep.data.packing import rows_for_ranks
from lockstep.distributed.world.groups import Groups
from lockstep.model.config import UnknownModel
from lockstep.model.formats.huggingface.reader import BadFolder
from lockstep.model.formats.peft import PeftFolder
from lockstep.model.formats.registry import open_model
from lockstep.model.loading import build
from lockstep.model.training.config import OptimizerConfig, TrainerConfig, row_rules
from lockstep.model.training.trainable import TrainableConfig
from lockstep.model.training.trainer import Trainer
from lockstep.rl.rollout.loading import to_lockstep

TEXT = [5, 9, 2, 7, 7, 1, 44, 8]
TARGETS = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "rslora"])
def folder(request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that PEFT wrote, with a B that is not 0."""
    torch.manual_seed(1)
    words = PeftConfig(
        r=4,
        lora_alpha=6,
        target_modules=TARGETS,
        use_rslora=request.param,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32), words)
    folder = tmp_path_factory.mktemp("peft") / "adapters"
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def peft_logp(base: Path, adapters: Path) -> np.ndarray:
    """log p of all but the first token of TEXT."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapters).eval()
    return logp_of(model)


@torch.no_grad()
def logp_of(model: torch.nn.Module) -> np.ndarray:
    logp = model(torch.tensor([TEXT])).logits[0].float().log_softmax(-1)
    return logp[torch.arange(len(TEXT) - 1), TEXT[1:]].numpy()


def our_logp(groups: Groups, name: Path) -> np.ndarray:
    opened = open_model(str(name))
    source, model = opened.source, opened.config
    config = TrainerConfig(trainable=TrainableConfig(lora=model.lora))
    trainer = Trainer(build(model, groups, torch.float32, source), groups, OptimizerConfig(), config=config)
    rows = rows_for_ranks([sample(TEXT[:1], TEXT[1:])], row_rules(groups.layout, 64))[0]
    return trainer.score(rows)[0].numpy()


def test_logits_equal_those_of_peft_both_ways(folder: Path, tiny_folder: Path, groups: Groups, tmp_path: Path) -> None:
    expected = peft_logp(tiny_folder, folder)
    base = logp_of(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32))
    assert np.abs(expected - base).max() > 0.1
    np.testing.assert_allclose(our_logp(groups, folder), expected, rtol=1e-4, atol=1e-4)

    ours = to_lockstep(str(folder), tmp_path / "ours")
    np.testing.assert_allclose(our_logp(groups, ours), expected, rtol=1e-4, atol=1e-4)
    convert_checkpoint(Conversion(str(ours), tmp_path / "again", "peft"))
    np.testing.assert_array_equal(peft_logp(tiny_folder, tmp_path / "again"), expected)
    written, given = (PeftFolder(path) for path in (tmp_path / "again", folder))
    assert written.lora == given.lora
    assert written.base == str(ours)

    conversion = Conversion(str(ours), tmp_path / "merged", "hf")
    assert "its adapters of rank 4: go into the weights" in plan_lines(conversion, open_outline(str(ours)))
    convert_checkpoint(Conversion(str(ours), tmp_path / "merged", "hf"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    np.testing.assert_allclose(logp_of(merged), expected, rtol=1e-4, atol=1e-4)
    found = verify_checkpoint(str(tmp_path / "merged"), str(ours))
    assert not found.faults
    assert found.tensors > 30


def test_adapters_of_a_reward_model_bring_its_head(tiny_folder: Path, groups: Groups, tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1, dtype=torch.float32)
    words = PeftConfig(r=2, target_modules=["v_proj"], task_type="SEQ_CLS", init_lora_weights=False)
    model = get_peft_model(base, words)
    model.save_pretrained(tmp_path / "adapters")
    with torch.no_grad():
        expected = model.eval()(torch.tensor([TEXT])).logits[0].numpy()
    opened = open_model(str(tmp_path / "adapters"))
    source, config = opened.source, opened.config
    assert config.head == "value"
    trainer = Trainer(build(config, groups, torch.float32, source), groups, OptimizerConfig())
    last = np.eye(len(TEXT), dtype=np.float32)[-1]
    rows = rows_for_ranks([sample(TEXT[:1], [*TEXT[1:], 0], weight=last)], row_rules(groups.layout, 64))[0]
    np.testing.assert_allclose(trainer.score(rows)[0].numpy(), expected, rtol=1e-4, atol=1e-5)
    ours = to_lockstep(str(tmp_path / "adapters"), tmp_path / "ours")
    convert_checkpoint(Conversion(str(ours), tmp_path / "again", "peft"))
    again = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1, dtype=torch.float32),
        tmp_path / "again",
    )
    with torch.no_grad():
        np.testing.assert_allclose(again.eval()(torch.tensor([TEXT])).logits[0].numpy(), expected, rtol=1e-6)
    with pytest.raises(BadConversion, match="has no place for a value head: convert to lockstep or hf"):
        convert_checkpoint(Conversion(str(ours), tmp_path / "megatron", "megatron"))


def begun_as(kind: str | bool, base: Path, folder: Path) -> Path:
    """Adapters whose initialization PEFT knows as `kind`, after a little training."""
    torch.manual_seed(1)
    words = PeftConfig(r=4, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=kind)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), words)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [True, "gaussian", "orthogonal", "eva"])
def test_beginnings_that_leave_the_base_alone_have_the_logits_of_peft(
    kind: str | bool, tiny_folder: Path, groups: Groups, tmp_path: Path
) -> None:
    adapters = begun_as(kind, tiny_folder, tmp_path / "adapters")
    assert json.loads((adapters / "adapter_config.json").read_text())["init_lora_weights"] == kind
    expected = peft_logp(tiny_folder, adapters)
    np.testing.assert_allclose(our_logp(groups, adapters), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
def test_beginnings_that_take_their_part_out_of_the_base_are_refused(
    kind: str, tiny_folder: Path, groups: Groups, tmp_path: Path
) -> None:
    adapters = begun_as(kind, tiny_folder, tmp_path / "adapters")
    with pytest.raises(UnknownModel, match=f"uses init_lora_weights='{kind}', whose base model is not the one that it"):
        convert_checkpoint(Conversion(str(adapters), tmp_path / "out", "hf"))
    # What is refused would be another model: as plain LoRA over the untouched base.
    words = json.loads((adapters / "adapter_config.json").read_text())
    (adapters / "adapter_config.json").write_text(json.dumps(words | {"init_lora_weights": True}))
    plain = our_logp(groups, adapters)
    (adapters / "adapter_config.json").write_text(json.dumps(words))
    assert np.abs(plain - peft_logp(tiny_folder, adapters)).max() > 0.05


def test_what_peft_makes_plain_lora_of_is_read(tiny_folder: Path, groups: Groups, tmp_path: Path) -> None:
    """The way that the refusal of PiSSA names."""
    torch.manual_seed(1)
    words = PeftConfig(r=4, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights="pissa")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32), words)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "begun")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.05 * torch.randn(parameter.shape)
    expected = logp_of(model.eval())
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "begun"))
    np.testing.assert_allclose(our_logp(groups, tmp_path / "plain"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_modules_that_are_saved_whole_replace_the_base_s(tied: bool, groups: Groups, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    whole = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    words = PeftConfig(r=2, target_modules=["v_proj"], modules_to_save=whole, task_type="CAUSAL_LM")
    base.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, words)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "adapters")
    if tied:
        with pytest.raises(UnknownModel, match=r"modules_to_save, model\.embed_tokens\.weight over .* a tied head"):
            open_model(str(tmp_path / "adapters"))
        return
    expected = peft_logp(tmp_path / "base", tmp_path / "adapters")
    np.testing.assert_allclose(our_logp(groups, tmp_path / "adapters"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type=IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias='all'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2], [1, 4]]}, "layer_replication"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
        ({"a_key_of_a_later_version": "on"}, "a_key_of_a_later_version"),
        ({"revision": "v2"}, "revision='v2' of its base model"),
        *(
            ({"init_lora_weights": kind}, f"init_lora_weights={kind!r}")
            for kind in ("pissa_niter_16", "corda", "loftq")
        ),
        *(
            ({"init_lora_weights": kind}, f"init_lora_weights={kind!r}")
            for kind in ("lora_ga", "mica", "OLORA", "new", 1)
        ),
    ],
)
def test_what_is_no_plain_lora_is_refused(change: dict[str, object], said: str, folder: Path, tmp_path: Path) -> None:
    words = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(words | change))
    (tmp_path / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    with pytest.raises(UnknownModel, match=f"uses {re.escape(said)}"):
        PeftFolder(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"r": None}, "does not say the rank r"),
        ({"r": "4"}, "does not say the rank r"),
        ({"r": -1}, "rank"),
        ({"r": 5}, r"has .*lora_A.* of shape \(4, "),
        ({"lora_alpha": "many"}, "alpha"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path that is no text"),
    ],
)
def test_what_is_no_adapter_config_is_one_sentence(
    change: dict[str, object], said: str, folder: Path, tmp_path: Path
) -> None:
    words = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(words | change))
    (tmp_path / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=said) as raised:
        open_model(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_not_whole_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    with pytest.raises(BadFolder, match="lacks adapter_model"):
        PeftFolder(tmp_path)


def test_a_model_without_adapters_cannot_be_written_as_adapters(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="has no adapters: give a checkpoint"):
        convert_checkpoint(Conversion(str(tiny_folder), tmp_path / "out", "peft"))
