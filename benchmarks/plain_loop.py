"""Pretraining of a small Llama in one file of plain PyTorch: the peer of `train_vs_plain.py`.

Reads `train.npy` and `held_out.npy` (token ids in the order of the text) and `settings.json` from a folder, and prints
one JSON line: the held-out loss in nats a token, the seconds of each step, and the peak of a matrix product.
"""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), 1e-5)


class Block(nn.Module):
    def __init__(self, width, heads, intermediate):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * intermediate, bias=False)
        self.down = nn.Linear(intermediate, width, bias=False)

    def forward(self, x, cos, sin):
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def turned(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class Llama(nn.Module):
    def __init__(self, layers, width, heads, intermediate, vocabulary, length):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, intermediate) for _ in range(layers))
        self.norm = RMSNorm(width)
        head_dim = width // heads
        angles = torch.outer(torch.arange(length), 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim))
        self.register_buffer("cos", angles.cos().repeat(1, 2))
        self.register_buffer("sin", angles.sin().repeat(1, 2))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens):
        x = self.embedding(tokens)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.linear(self.norm(x), self.embedding.weight)


def main():
    folder, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
    settings = json.loads((folder / "settings.json").read_text())
    train, held_out = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("train", "held_out"))
    length, batch, steps = settings["length"], settings["batch"], settings["steps"]
    torch.manual_seed(settings["seed"])
    model = Llama(**settings["model"], length=length)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    scales = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings["weight_decay"]}, {"params": scales, "weight_decay": 0.0}],
        lr=settings["rate"],
        betas=(0.9, 0.95),
        fused=True,
    )

    def loss_of(rows):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(rows[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())

    def rate(step):
        left = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (steps + 1 - step) / (steps - settings["warmup"])))
        return settings["rate"] * min(0.1 + 0.9 * left, step / (settings["warmup"] + 1))

    seconds, order = [], []
    for step in range(1, steps + 1):
        began = time.perf_counter()
        if len(order) < batch:  # every epoch all windows, in another order and from another first token
            first = int(torch.randint(length, ()))
            windows = torch.arange(first, len(train) - length, length)
            order += windows[torch.randperm(len(windows))].tolist()
        starts, order = order[:batch], order[batch:]
        rows = torch.stack([train[s : s + length + 1] for s in starts]).long()
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss_of(rows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    with torch.no_grad():
        windows = [held_out[s : s + length + 1] for s in range(0, len(held_out) - length, length)]
        losses = [loss_of(torch.stack(windows[i : i + batch]).long()).item() for i in range(0, len(windows), batch)]
    weights = [len(windows[i : i + batch]) for i in range(0, len(windows), batch)]
    print(json.dumps({"loss": float(np.average(losses, weights=weights)), "seconds": seconds}))


if __name__ == "__main__":
    main()
