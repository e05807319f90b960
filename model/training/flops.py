"""FLOPs of training per token, and the peak matrix-multiply FLOP/s of this device, for model FLOPs utilization."""

import time

import torch

from lockstep.model.config import ModelConfig


def training_flops(model: ModelConfig, length: int) -> float:
    """FLOPs per token of forward and backward: 6 · (weights in products) + 6 · layers · heads · head_dim · length.

    Rows that are looked up and not multiplied (untied embeddings, learned positions) and experts that a token does not
    visit do not count; a token attends to half of a sample of `length` tokens on average (Narayanan et al. 2021, eq. 3,
    without recomputation).
    """
    looked_up = (0 if model.tied else model.vocabulary) + (model.context if model.rope is None else 0)
    idle = model.layers * model.moe.idle_parameters(model.width) if model.moe else 0
    attention = model.layers * model.heads * model.head_dim * length
    return 6.0 * (model.parameters - looked_up * model.width - idle) + 6.0 * attention


def peak_flops(dtype: torch.dtype, device: torch.device, *, size: int = 1024, seconds: float = 0.5) -> float:
    """The highest measured FLOP/s of a product of two square matrices on this process's threads or device."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or not best:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
