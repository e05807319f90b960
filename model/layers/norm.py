"""RMSNorm and LayerNorm, and the norms of queries and keys (by head, or over all heads across tensor ranks)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lockstep.distributed.libraries import tensor_parallel
from lockstep.distributed.world.groups import Groups
from lockstep.model.config import ModelConfig, Numerics
from lockstep.model.layers.linear import mark, reduced, summed_over
from lockstep.model.ops.exact import reductions
from lockstep.model.ops.fused import rms_norm


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dim, as `ModelConfig.norm` says."""

    def __init__(
        self,
        model: ModelConfig,
        width: int,
        dtype: torch.dtype,
        parts: ProcessGroup | None = None,
        numerics: Numerics = "fast",
    ) -> None:
        """
        Args:
            parts: ranks that each norm tokens, or heads, of their own.
        """
        super().__init__()
        self.kind, self.eps, self._parts, self._numerics = model.norm, model.norm_eps, parts, numerics
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(width, dtype=dtype)) if self.kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        """The normalised activations, of the same shape and dtype."""
        weight = summed_over(self.weight, self._parts)
        if self.kind == "rms":
            return rms_norm(x, weight, self.eps, self._numerics)
        if self.kind == "rms_offset":  # 1 + weight has no place for a small weight in bf16
            return rms_norm(x.float(), 1 + weight.float(), self.eps, self._numerics).to(x.dtype)
        assert self.bias is not None
        return F.layer_norm(x, weight.shape, weight, summed_over(self.bias, self._parts), self.eps)


class HeadNorm(nn.Module):
    """Norm of each head of queries and keys; all heads share one weight, whose gradient is summed over tensor ranks."""

    def __init__(self, model: ModelConfig, groups: Groups, dtype: torch.dtype, numerics: Numerics) -> None:
        super().__init__()
        self.queries = model.heads // groups.layout.tensor
        self.q = Norm(model, model.head_dim, dtype, groups.tensor, numerics)
        self.k = Norm(model, model.head_dim, dtype, groups.tensor, numerics)

    def forward(self, qk_THE: Tensor) -> Tensor:
        """[T, heads + kv_heads, E] → the same, normalised."""
        normed = self.q(qk_THE[:, : self.queries]), self.k(qk_THE[:, self.queries :])
        return torch.cat(normed, dim=1)


class WidthNorm(nn.Module):
    """RMSNorm over all query heads together, and over all key heads, across tensor ranks (OLMo 2)."""

    def __init__(self, model: ModelConfig, groups: Groups, dtype: torch.dtype, numerics: Numerics) -> None:
        super().__init__()
        tensor, self._numerics = groups.layout.tensor, numerics
        self.queries, self.group, self.eps = model.heads // tensor, groups.tensor, model.norm_eps
        self.widths = model.heads * model.head_dim, model.kv_heads * model.head_dim
        self.q, self.k = _Scale(self.widths[0] // tensor, dtype), _Scale(self.widths[1] // tensor, dtype)

    def forward(self, qk_THE: Tensor) -> Tensor:
        """[T, heads + kv_heads, E] → the same, normalised."""
        wide = qk_THE.float()
        parts = wide[:, : self.queries], wide[:, self.queries :]
        squares = (x.square().flatten(1) for x in parts)
        sums_T2 = torch.stack([x.sum(1) if self._numerics == "fast" else reductions.row_sum(x) for x in squares], dim=1)
        # Every rank's part of the loss depends on the sum: it is summed forwards, and its gradient backwards.
        sums_T2 = reduced(sums_T2, self.group, False, self._numerics)
        sums_T2 = tensor_parallel.copy_to_tensor_model_parallel_region(sums_T2, self.group)
        scales = (torch.rsqrt(sums_T2[:, i, None, None] / width + self.eps) for i, width in enumerate(self.widths))
        normed = [
            (x * scale).to(qk_THE.dtype) * norm.weight.view(-1, x.shape[2])
            for x, scale, norm in zip(parts, scales, (self.q, self.k), strict=True)
        ]
        return torch.cat(normed, dim=1)


class _Scale(nn.Module):
    """This rank's part of a norm's weight."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))
        mark(self.weight, 0)


QK_NORMS: dict[str | None, Callable[[ModelConfig, Groups, torch.dtype, Numerics], nn.Module]] = {
    None: lambda model, groups, dtype, numerics: nn.Identity(),
    "head": HeadNorm,
    "width": WidthNorm,
}
