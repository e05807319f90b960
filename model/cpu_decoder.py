"""A decode step of Llama-like models on a CPU as one call into C: one new token for each of some sequences.

A decode step of a small model takes milliseconds, and calling its hundreds of operations from Python takes a large part
of them. Here the list of kernel calls (norms, products, rotary embedding, paged attention, all of `kernels.c`) is made
once and runs in torch's threads. Only tokens, positions and block tables change from step to step.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.model.attention.kv_cache import KVCache, PagedAttention
from lockstep.model.layers.block import Block
from lockstep.model.layers.linear import ColumnLinear, RowLinear
from lockstep.model.layers.mlp import GatedMLP
from lockstep.model.layers.norm import Norm
from lockstep.model.ops.cpu import jobs, kernels
from lockstep.model.transformer import Transformer

ROWS = 128
"""Tokens of a pass at most; products of more are faster elsewhere."""


def serves(transformer: Transformer) -> bool:
    """Whether `CpuDecoder` supports a model on this machine.

    It supports RMSNorm before each layer, SwiGLU, one kind of rotary embedding and widths that are multiples of a line,
    on one rank, where there is a C compiler. Its bits are those of the modules in exact numerics.
    """
    model, layout = transformer.model, transformer.groups.layout
    widths = model.width, model.heads * model.head_dim, model.kv_heads * model.head_dim, model.intermediate
    return (
        layout.processes == 1
        and kernels.usable(transformer.head_weight.dtype, transformer.head_weight.device)
        and (model.norm, model.norm_at, model.activation) == ("rms", "before", "silu")
        and (model.head, model.gated) == ("vocabulary", True)
        and (model.moe, model.lora, model.qk_norm, model.logit_cap) == (None, None, None, None)
        and (model.embedding_scale, len(transformer.ropes)) == (1, 1)
        and all(model.rope_of(layer) for layer in range(model.layers))
        and not any(width % kernels.LINE for width in widths)
    )


class CpuDecoder:
    """Decodes one new token for each of some sequences; later changes of the transformer's weights are not seen."""

    def __init__(self, transformer: Transformer, cache: KVCache) -> None:
        """
        Args:
            transformer: one for which `serves` is true.
            cache: the KV cache to write to and read from.
        """
        model, head = transformer.model, transformer.head_weight
        self._transformer, self._vocabulary = transformer, len(head)
        (self._rope,) = transformer.ropes
        self._heads = model.heads
        self._jobs = jobs.JobList(head.dtype)
        self._same = [jobs.AttentionJob() for _ in cache.windows]
        self._kept: list[Any] = [cache]
        self._x, self._normed = self._room(model.width), self._room(model.width)
        self._mixed = self._room(model.heads * model.head_dim)
        self._qkv = self._room((model.heads + 2 * model.kv_heads) * model.head_dim)
        self._gate_up, self._gated = self._room(2 * model.intermediate), self._room(model.intermediate)
        self._cosines, self._sines = self._room(model.head_dim), self._room(model.head_dim)
        for layer in range(model.layers):
            block = transformer.blocks[str(layer)]
            assert isinstance(block, Block)
            self._add_attention(block, layer, cache)
            self._add_mlp(block)
        self._add_norm(transformer.norm)
        weight = transformer.head_tiles
        self._logits = self._room(weight.shape[0] * kernels.SIDE)
        self._add_product(self._normed, weight, self._logits)

    @torch.inference_mode()
    def __call__(self, tokens_B: Tensor, positions_B: Tensor, attend: PagedAttention) -> Tensor:
        """Logits [B, V] of the tokens behind these, valid until the next call.

        Args:
            attend: over short spans, in place.
        """
        count = len(tokens_B)
        torch.index_select(self._transformer.embedding.weight, 0, tokens_B, out=self._x[:count])
        cosines, sines = self._rope.table(positions_B, self._cosines.shape[1], self._x.dtype)
        self._cosines[:count], self._sines[:count] = cosines[:, 0], sines[:, 0]
        for same, job in zip(self._same, attend.jobs(self._heads), strict=True):
            ctypes.memmove(ctypes.addressof(same), ctypes.addressof(job), ctypes.sizeof(job))
        self._jobs.run(count)
        return self._logits[:count, : self._vocabulary]

    def _room(self, width: int) -> Tensor:
        return torch.zeros(ROWS, width, dtype=self._transformer.head_weight.dtype)

    def _add_attention(self, block: Block, layer: int, cache: KVCache) -> None:
        own, width = block.attention, block.attention.head_dim
        turned, stride = own.heads + own.kv_heads, self._qkv.shape[1]
        self._add_norm(block.attention_norm)
        self._add_linear(self._normed, own.qkv, self._qkv)
        self._jobs.add(
            "turn",
            jobs.TurnJob(
                heads=turned,
                width=width,
                stride=stride,
                out_stride=stride,
                x=self._qkv.data_ptr(),
                cosines=self._cosines.data_ptr(),
                sines=self._sines.data_ptr(),
                out=self._qkv.data_ptr(),
            ),
        )
        keys, values = cache.keys[layer], cache.values[layer]
        job = jobs.AttentionJob(
            heads=own.heads,
            q_stride=stride,
            k_stride=stride,
            v_stride=stride,
            q=self._qkv.data_ptr(),
            k=self._qkv[:, own.heads * width :].data_ptr(),
            v=self._qkv[:, turned * width :].data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            out=self._mixed.data_ptr(),
            scale=width**-0.5 if own.spec.scale is None else own.spec.scale,
            cap=own.spec.cap or 0.0,
        )
        self._jobs.add("attention", job, self._same[cache.kind_of[layer]])
        self._add_linear(self._mixed, own.out, self._x, add=self._x)

    def _add_mlp(self, block: Block) -> None:
        assert isinstance(block.mlp, GatedMLP)
        self._add_norm(block.mlp_norm)
        self._add_linear(self._normed, block.mlp.gate_up, self._gate_up)
        job = jobs.GateJob(width=self._gated.shape[1], x=self._gate_up.data_ptr(), out=self._gated.data_ptr())
        self._jobs.add("gate", job)
        self._add_linear(self._gated, block.mlp.down, self._x, add=self._x)

    def _add_norm(self, norm: nn.Module) -> None:
        """Of x."""
        assert isinstance(norm, Norm)
        job = jobs.NormJob(
            width=len(norm.weight),
            weight=norm.weight.data_ptr(),
            x=self._x.data_ptr(),
            out=self._normed.data_ptr(),
            eps=norm.eps,
        )
        self._jobs.add("norm", job)

    def _add_linear(self, x: Tensor, layer: ColumnLinear | RowLinear, out: Tensor, add: Tensor | None = None) -> None:
        self._add_product(x, layer.tiles, out, layer.bias, add)

    def _add_product(
        self, x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None = None, add: Tensor | None = None
    ) -> None:
        self._kept.append(weight)
        self._jobs.add("product", kernels.product_job(x, weight, out, bias, add))
