"""Pretraining ten million parameters: Lockstep's trainer, and the same model in one file of plain PyTorch.

    python benchmarks/train_vs_plain.py TEXT [--steps 300] [--dtype float32|bfloat16]

The text becomes documents of 8 KiB, a tokenizer and an indexed dataset. Both sides train on the same documents with
the same shapes, schedule and optimizer, each from its own random weights and in its own order, in a process of its own
with the same threads and allocator settings, and say the loss on the same held-out documents. Runs alternate; the
medians of all steps count. In bf16 the plain loop is autocast over fp32 weights; Lockstep keeps fp32 master weights.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import numpy as np
import torch

from lockstep.data.corpus import tokenization
from lockstep.data.corpus.document_stream import split
from lockstep.data.corpus.documents import Reading
from lockstep.data.corpus.indexed_dataset import IndexedDataset
from lockstep.data.corpus.loader import PretrainingConfig, PretrainingData
from lockstep.data.tokenizer import Tokenizer, train_tokenizer
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import alone
from lockstep.model.config import ModelConfig
from lockstep.model.loading import DTYPES, build
from lockstep.model.training.config import PretrainConfig, row_rules
from lockstep.model.training.pretraining import Pretraining
from lockstep.model.training.trainer import Trainer
from lockstep.model.weights.initialization import RandomWeights
from lockstep.rl.remote import ENVIRONMENT

RECIPE = Path(__file__).parent.parent / "recipes" / "pretrain-10m.toml"
DOCUMENT = 8192
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        print(json.dumps(ours(args.folder, args.steps, args.dtype)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(args.text, folder, args.steps)
        sides = {
            "plain": [str(Path(__file__).with_name("plain_loop.py")), str(folder), args.dtype],
            "lockstep": [__file__, "x", "--folder", name, "--steps", str(args.steps), "--dtype", args.dtype],
        }
        found: dict[str, list[dict]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side, words in sides.items():
                found[side].append(child(words))
                print(side, f"held-out loss {found[side][-1]['loss']:.4f}", flush=True)
    model, config = settings()
    medians = {}
    for side, runs in found.items():
        medians[side] = statistics.median(s for run in runs for s in run["seconds"])
        print(f"{side}: {config.samples_per_step * config.data.length / medians[side]:.0f} tokens/s")
    print(f"{model.parameters / 1e6:.1f}M parameters; lockstep / plain: {medians['plain'] / medians['lockstep']:.2f}")


def settings() -> tuple[ModelConfig, PretrainConfig]:
    """The recipe's, without the z loss, which the plain loop does not have."""
    recipe = tomllib.loads(RECIPE.read_text())
    config = PretrainConfig.model_validate(recipe["pretrain"] | {"z_coefficient": 0.0})
    return ModelConfig.model_validate(recipe["model"]["config"]), config


def prepare(text: Path, folder: Path, steps: int) -> None:
    """Documents, tokenizer and store for Lockstep; for the plain loop its tokens as arrays."""
    model, config = settings()
    assert config.data is not None
    words = text.read_text()
    pieces = [words[i : i + DOCUMENT] for i in range(0, len(words), DOCUMENT)]
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in pieces))
    reading = Reading("text", None)
    files = train_tokenizer(tokenization.texts([folder / "documents.jsonl"], reading, "stop", []), model.vocabulary)
    how = tokenization.tokenization_of(Tokenizer(files), end=None, reading=reading, on_bad="stop")
    tokenization.tokenize([folder / "documents.jsonl"], folder / "corpus", how, workers=1)
    store = IndexedDataset(folder / "corpus")
    train, held_out = split(np.arange(store.documents), config.data.held_out, seed=SEED, source=0)
    for name, documents in {"train": train, "held_out": held_out}.items():
        np.save(folder / f"{name}.npy", np.concatenate([store.document(int(d)) for d in documents]).astype(np.int64))
    optimizer = config.optimizer
    assert model.heads == model.kv_heads
    assert model.tied
    assert optimizer.final_share == 0.1
    (folder / "settings.json").write_text(
        json.dumps(
            {
                "model": model.model_dump(include={"layers", "width", "heads", "intermediate", "vocabulary"}),
                "length": config.data.length,
                "batch": config.samples_per_step,
                "steps": steps,
                "rate": optimizer.learning_rate,
                "warmup": optimizer.warmup_steps,
                "weight_decay": optimizer.weight_decay,
                "seed": SEED,
            }
        )
    )


def child(words: list[str]) -> dict:
    environment = os.environ | ENVIRONMENT
    line = subprocess.run([sys.executable, *words], check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(line.stdout.strip().splitlines()[-1])


def ours(folder: Path, steps: int, dtype: str) -> dict:
    model, config = settings()
    assert config.data is not None
    data = config.data.model_copy(update={"blend": ({"path": str(folder / "corpus")},)}).model_dump()
    config = config.model_copy(update={"steps": steps, "data": PretrainingConfig.model_validate(data)})
    source = PretrainingData(config.data, seed=SEED, vocabulary=model.vocabulary)
    groups = alone()
    trainer = Trainer(build(model, groups, DTYPES[dtype], RandomWeights(model, SEED)), groups, config.optimizer)
    run = Pretraining(trainer, config, source, row_rules(Layout(), config.samples_per_step * config.data.length))
    seconds = []
    for step in range(1, steps + 1):
        began = time.perf_counter()
        loss = run.step(step).values["loss"]
        seconds.append(time.perf_counter() - began)
        assert math.isfinite(loss)
    held_out = run.held_out_loss()
    run.close()
    return {"loss": held_out, "seconds": seconds}


if __name__ == "__main__":
    torch.set_num_threads(torch.get_num_threads())
    main()
