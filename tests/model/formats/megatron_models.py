"""GPTModels of megatron-core for tests of its format: filled from logical tensors by hand, saved by megatron-core."""

import multiprocessing
import queue
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lockstep.distributed.checkpoint.tensors import Source, to_torch, whole
from lockstep.distributed.device import megatron_device
from lockstep.distributed.world.groups import Groups
from lockstep.model.config import ModelConfig
from lockstep.model.weights.names import logical_tensors

DIVISOR = 8
"""Rows of the vocabulary of each tensor rank are a multiple of this."""


def gpt(groups: Groups, model: ModelConfig, dtype: torch.dtype) -> GPTModel:
    """This rank's part of a model, as Megatron's local spec builds it."""
    moe = model.moe
    experts: dict[str, Any] = {}
    if moe:
        experts = {
            "num_moe_experts": moe.experts,
            "moe_router_topk": moe.experts_per_token,
            "moe_ffn_hidden_size": moe.intermediate,
            "moe_shared_expert_intermediate_size": moe.shared_intermediate or None,
            "moe_shared_expert_gate": moe.shared_gate,
            "moe_router_pre_softmax": not moe.normalize,
            "moe_token_dispatcher_type": "alltoall",
            "expert_model_parallel_size": groups.layout.expert,
        }
    config = TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.width,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.intermediate,
        normalization="LayerNorm" if model.norm == "layer" else "RMSNorm",
        layernorm_epsilon=model.norm_eps,
        activation_func=F.silu if model.gated else F.gelu,
        gated_linear_unit=model.gated,
        add_bias_linear="mlp" in model.biases,
        add_qkv_bias="qkv" in model.biases,
        qk_layernorm=model.qk_norm == "head",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=groups.layout.tensor,
        pipeline_model_parallel_size=groups.layout.pipeline,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        **experts,
    )
    spec = get_gpt_layer_local_spec(
        num_experts=moe.experts if moe else None,
        qk_layernorm=model.qk_norm == "head",
        normalization=config.normalization,
    )
    # Shared experts have a stream of their own, and there is none without an accelerator.
    with patch.object(torch.cuda, "Stream", lambda: None):
        return GPTModel(
            config,
            spec,
            vocab_size=padded(model, groups.layout.tensor),
            max_sequence_length=model.context,
            pre_process=groups.is_first_stage,
            post_process=groups.is_last_stage,
            parallel_output=True,
            share_embeddings_and_output_weights=model.tied,
            position_embedding_type="learned_absolute" if model.rope is None else "rope",
            rotary_base=int(model.rope.theta) if model.rope else 10000,
        )


def padded(model: ModelConfig, tensor: int) -> int:
    """Rows of Megatron's vocabulary."""
    multiple = DIVISOR * tensor
    return -(-model.vocabulary // multiple) * multiple


@torch.no_grad()
def logits(module: GPTModel, tokens_T: Tensor) -> Tensor:
    """[T, padded vocabulary], computed by megatron-core; its dropout, which is 0, asks for states of an accelerator."""
    positions = torch.arange(len(tokens_T))
    mask = (positions[:, None] < positions)[None, None]
    states = SimpleNamespace(fork=nullcontext)
    with megatron_device(), patch.object(tensor_parallel, "get_cuda_rng_tracker", lambda: states):
        return module.eval()(tokens_T[None], positions[None], mask)[0]


class Naive:
    """What each parameter of a GPTModel should hold, put together from whole logical tensors."""

    def __init__(self, groups: Groups, model: ModelConfig, source: Source, kind: str = "") -> None:
        self.groups, self.model, self.source, self.kind = groups, model, source, kind
        self.tensor, self.rank = groups.layout.tensor, groups.tensor_rank
        self.shapes = logical_tensors(model)

    def get(self, name: str) -> Tensor:
        full = f"{self.kind}/{name}" if self.kind else name
        return to_torch(np.array(self.source.read(full, whole(self.shapes[name]))))

    def share(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(self.tensor, dim)[self.rank]

    def vocabulary(self, name: str) -> Tensor:
        rows = self.get(name)
        pad = padded(self.model, self.tensor) - len(rows)
        return self.share(torch.cat([rows, torch.zeros(pad, rows.shape[1], dtype=rows.dtype)]), 0)

    def qkv(self, block: str, part: str) -> Tensor:
        """Rank by rank and group by group: the queries, the key, the value."""
        model, groups = self.model, []
        q, k, v = (self.get(f"{block}.self_attn.{n}_proj.{part}").split(model.head_dim) for n in "qkv")
        per = model.heads // model.kv_heads
        for g in range(model.kv_heads):
            groups.append(torch.cat([*q[g * per : (g + 1) * per], k[g], v[g]]))
        return self.share(torch.cat(groups), 0)

    def gated(self, owner: str, part: str) -> Tensor:
        up = self.share(self.get(f"{owner}.up_proj.{part}"), 0)
        return torch.cat([self.share(self.get(f"{owner}.gate_proj.{part}"), 0), up]) if self.model.gated else up

    def parameter(self, path: str) -> Tensor:
        """By the path of a parameter in a GPTModel of this rank."""
        if path == "embedding.word_embeddings.weight":
            return self.vocabulary("model.embed_tokens.weight")
        if path == "output_layer.weight":
            return self.vocabulary("model.embed_tokens.weight" if self.model.tied else "lm_head.weight")
        if path == "embedding.position_embeddings.weight":
            return self.get("model.embed_positions.weight")
        if path.startswith("decoder.final_layernorm."):
            return self.get(f"model.norm.{path.rsplit('.', 1)[1]}")
        _, _, layer, module, *rest = path.split(".")
        first = self.groups.stage * (self.model.layers // self.groups.layout.pipeline)
        block, part = f"model.layers.{first + int(layer)}", rest[-1]
        if module == "input_layernorm":
            return self.get(f"{block}.input_layernorm.{part}")
        if module == "pre_mlp_layernorm":
            return self.get(f"{block}.post_attention_layernorm.{part}")
        if module == "self_attention":
            return self.attention(block, rest[0], part)
        return self.mlp(f"{block}.mlp", rest, part)

    def attention(self, block: str, module: str, part: str) -> Tensor:
        if module == "linear_qkv":
            return self.qkv(block, part)
        if module == "linear_proj":
            whole_proj = self.get(f"{block}.self_attn.o_proj.{part}")
            return self.share(whole_proj, 1) if part == "weight" else whole_proj
        return self.get(f"{block}.self_attn.{module[0]}_norm.{part}")

    def mlp(self, owner: str, rest: list[str], part: str) -> Tensor:
        if rest[0] == "router":
            return self.get(f"{owner}.gate.weight")
        if rest[:2] == ["shared_experts", "gate_weight"]:
            return self.get(f"{owner}.shared_expert_gate.weight")
        if rest[0] == "shared_experts":
            owner, rest = f"{owner}.shared_expert", rest[1:]
        if rest[0] == "experts":
            assert self.model.moe is not None
            first = self.groups.expert_rank * (self.model.moe.experts // self.groups.layout.expert)
            owner, rest = f"{owner}.experts.{first + int(rest[2])}", rest[3:]
        if rest[0] == "linear_fc1":
            return self.gated(owner, part)
        down = self.get(f"{owner}.down_proj.{part}")
        return self.share(down, 1) if part == "weight" else down


@torch.no_grad()
def filled(groups: Groups, model: ModelConfig, dtype: torch.dtype, source: Source) -> GPTModel:
    """A GPTModel that holds the logical tensors of a source."""
    with megatron_device():
        module, naive = gpt(groups, model, dtype).to(dtype), Naive(groups, model, source)
        for path, parameter in module.named_parameters():
            expected = naive.parameter(path)
            assert expected.shape == parameter.shape, (path, expected.shape, parameter.shape)
            parameter.copy_(expected)
    return module


def save(folder: Path, state: dict[str, Any]) -> None:
    """`dist_checkpointing.save`. It starts processes, which a rank of our worlds may not, and one that outlives it."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    filesystem_async._results_queue = queue.Queue()
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    with megatron_device():
        dist_checkpointing.save(state, str(folder))
    dist.barrier()


@torch.no_grad()
def loaded(groups: Groups, model: ModelConfig, dtype: torch.dtype, folder: Path) -> GPTModel:
    """A GPTModel that megatron-core fills from a folder."""
    with megatron_device():
        module = gpt(groups, model, dtype).to(dtype)
        state = dist_checkpointing.load({"model": module.sharded_state_dict()}, str(folder))
    module.load_state_dict(state["model"])
    return module


class _CudaNames(TorchFunctionMode):
    """Megatron's optimizers ask a tensor for the name of its type, and know those on an accelerator only."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return found.replace("torch.", "torch.cuda.") if func is torch.Tensor.type and len(args) == 1 else found


def _with_step(self: DistributedOptimizer, parameter: torch.nn.Parameter, tensors: dict[str, Tensor]) -> None:
    """What is loaded has no count of steps for each tensor, and torch's Adam has one, unlike that of an accelerator."""
    _set_states(self, parameter, {**self._get_main_param_and_optimizer_states(parameter), **tensors})


_set_states = DistributedOptimizer._set_main_param_and_optimizer_states

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def resaved(
    groups: Groups, model: ModelConfig, dtype: torch.dtype, folder: Path, back: Path, sharding: str | None
) -> list[Any]:
    """Have Megatron's optimizer load a folder and save it: the distributed one with a sharding, or the plain one.

    Returns its parameter groups.
    """
    kind = {"params_dtype": dtype, "bf16": dtype == torch.bfloat16, "use_distributed_optimizer": sharding is not None}
    with megatron_device(), _CudaNames():
        module = gpt(groups, model, dtype).to(dtype)
        parallel = DistributedDataParallelConfig(use_distributed_optimizer=sharding is not None)
        wrapped = DistributedDataParallel(module.config, parallel, module)
        optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-4, min_lr=0.0, **kind), [wrapped])
        if sharding:  # it reads how often torch's Adam has stepped, and Megatron's training has it step first
            optimizer.chained_optimizers[0]._init_optimizer_states_with_dummy_values()
        metadata = dict(SHARDING)  # a copy, in which Megatron keeps a process group
        weights = module.sharded_state_dict(metadata=metadata)
        wanted = optimizer.sharded_state_dict(weights, is_loading=True, metadata=metadata)
        state = dist_checkpointing.load({"model": weights, "optimizer": wanted}, str(folder))
        module.load_state_dict(state["model"])
        with patch.object(DistributedOptimizer, "_set_main_param_and_optimizer_states", _with_step):
            optimizer.load_state_dict(state["optimizer"])
        metadata |= {"distrib_optim_sharding_type": sharding}
        weights = module.sharded_state_dict(metadata=metadata)
        save(back, {"model": weights, "optimizer": optimizer.sharded_state_dict(weights, metadata=metadata)})
        return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
