"""Training steps of SmolLM2-135M on the same tokens: Lockstep's trainer and a plain loop around `transformers`.

Both run in a process of their own, one after the other, with the same threads, allocator settings, dtype, batch (4
sequences of 512 tokens) and optimizer (torch's fused AdamW, clipping by the global norm 1.0). What Lockstep's step does
besides: fp32 master weights and ZeRO's bookkeeping.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lockstep.cluster.conversion.convert import to_huggingface
from lockstep.data.batch import sample
from lockstep.data.packing import RowRules, rows_for_ranks
from lockstep.distributed.world.groups import alone
from lockstep.model.formats.registry import QUICKSTART_MODEL, open_model
from lockstep.model.loading import build
from lockstep.model.objectives.token_loss import nll
from lockstep.model.training.config import OptimizerConfig
from lockstep.model.training.flops import peak_flops, training_flops
from lockstep.model.training.trainer import Trainer
from lockstep.rl.remote import ENVIRONMENT

SEQUENCES, LENGTH, RATE = 4, 512, 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="steps that count, after two that do not")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measured(SIDES[args.side](args.model), args.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = to_huggingface(QUICKSTART_MODEL, Path(folder) / "model", dtype="bfloat16")
        found = {side: child(side, model, args.steps) for side in SIDES}
    cost = training_flops(open_model(QUICKSTART_MODEL).config, LENGTH)
    for side, result in found.items():
        speed = SEQUENCES * LENGTH / statistics.median(result["seconds"])
        share = speed * cost / result["peak"]
        peak = f"{result['peak'] / 1e9:.0f} GFLOP/s"
        print(f"{side}: {speed:.0f} tokens/s, {share:.0%} of {peak}, loss {result['loss']:.3f}")
    ratio = statistics.median(found["transformers"]["seconds"]) / statistics.median(found["lockstep"]["seconds"])
    print(f"lockstep / transformers: {ratio:.2f}")


def child(side: str, model: Path, steps: int) -> dict:
    words = [sys.executable, __file__, "--side", side, "--model", str(model), "--steps", str(steps)]
    environment = os.environ | ENVIRONMENT
    line = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(line.strip().splitlines()[-1])


def measured(step: Callable[[], float], steps: int) -> dict:
    """Seconds of each step, the last loss, and the peak of a matrix product in this process before and after."""
    before = peak_flops(torch.bfloat16, torch.device("cpu"))
    seconds, loss = [], 0.0
    for _ in range(steps + 2):
        start = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - start)
    peak = max(before, peak_flops(torch.bfloat16, torch.device("cpu")))
    return {"seconds": seconds[2:], "loss": loss, "peak": peak}


def tokens() -> torch.Tensor:
    return torch.randint(0, 49152, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def ours(model: Path) -> Callable[[], float]:
    opened = open_model(str(model))
    trainer = Trainer(build(opened.config, groups := alone(), torch.bfloat16, opened.source), groups, OptimizerConfig())
    samples = [sample(row[:1], row[1:], weight=1 / (SEQUENCES * LENGTH)) for row in tokens().numpy()]
    rows = rows_for_ranks(samples, RowRules(budget=SEQUENCES * LENGTH))[0]
    assert [len(r.tokens) for r in rows] == [SEQUENCES * LENGTH]
    return lambda: trainer.step(rows, nll, RATE).values["loss"]


def theirs(model: Path) -> Callable[[], float]:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    inputs, labels = tokens()[:, :-1], tokens()[:, 1:]

    def step() -> float:
        logits = network(inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


SIDES = {"lockstep": ours, "transformers": theirs}

if __name__ == "__main__":
    main()
