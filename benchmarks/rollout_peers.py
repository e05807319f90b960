"""Rollouts by Lockstep, vLLM, transformers and OpenVINO GenAI: the same 64 requests at once, and one alone.

Each engine runs in a process of its own, with an interpreter of its own where its versions exclude ours, one after the
other in each round. All get the same prompts, draw at temperature 1 exactly as many tokens as they are asked for, and
share no prefix; the time includes the prompts. Of the times that a process does its work the fastest counts, and of
the rounds the median, beside the least and the largest. In the first round engines of others run with the allocator
that they choose and with the one of Lockstep's workers, and keep what was faster. Lockstep also reports the
log-probability of each token, which no other is asked for.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lockstep.cluster.conversion.convert import to_huggingface
from lockstep.model.formats.registry import QUICKSTART_MODEL
from lockstep.rl.cores import usable_cores
from lockstep.rl.remote import ENVIRONMENT
from lockstep.rl.rollout.loading import to_lockstep
from rollout_engines.environments import OPENVINO, ROOT, VLLM, export_openvino, interpreter
from rollout_engines.work import SEQUENCES, Job, prompt, work

BENCHMARKS = ROOT / "benchmarks"
ALLOCATORS: dict[str, dict[str, str]] = {"own": {}, "jemalloc": ENVIRONMENT}


@dataclass(frozen=True)
class Peer:
    """An engine and how it is set up."""

    title: str
    module: str
    format: str
    """Of the model that it reads: lockstep, huggingface or openvino."""
    python: str = "ours"
    settings: Mapping[str, Any] = field(default_factory=dict)
    allocators: Sequence[str] = tuple(ALLOCATORS)


PEERS = {
    "lockstep": Peer("Lockstep", "lockstep_engine", "lockstep", allocators=["jemalloc"]),
    "vllm": Peer("vLLM, compiled", "vllm_engine", "huggingface", "vllm", {"eager": False}),
    "vllm-eager": Peer("vLLM, eager", "vllm_engine", "huggingface", "vllm", {"eager": True}),
    "openvino": Peer("OpenVINO GenAI", "openvino_engine", "openvino", "openvino"),
    "transformers": Peer(
        "transformers, continuous batching", "transformers_engine", "huggingface", settings={"continuous": True}
    ),
    "transformers-generate": Peer(
        "transformers, generate", "transformers_engine", "huggingface", settings={"continuous": False}
    ),
}


class Environments:
    """The interpreters that peers run with, and the model in the formats that they read, each made when asked for."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.given: dict[str, Path | None] = {"vllm": args.vllm_python, "openvino": args.openvino_python}
        self.model, self.dtype, self.folder = args.model, args.dtype, folder

    def python(self, name: str) -> Path:
        """The interpreter of an environment: the one that was given, or one below `runs/`."""
        if name == "ours":
            return Path(sys.executable)
        made = {"vllm": VLLM, "openvino": OPENVINO}[name]
        return self.given[name] or interpreter(ROOT / "runs" / f".{name}-venv", made)

    @cached_property
    def lockstep(self) -> Path:
        return to_lockstep(self.model, self.folder / "ours", dtype=self.dtype)

    @cached_property
    def huggingface(self) -> Path:
        return to_huggingface(self.model, self.folder / "huggingface", dtype=self.dtype)

    @cached_property
    def openvino(self) -> Path:
        return export_openvino(self.python("openvino"), self.huggingface, self.folder / "openvino", self.dtype)


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        environments = Environments(args, Path(folder))
        run = Runner(environments, args)
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in args.peers}
        for _ in range(args.rounds):
            for name in args.peers:
                rounds[name].append(run(name))
    keep(rounds)
    print("\n".join(table(rounds, args.requests)))
    print("\n".join(bounds(rounds.get("lockstep", []))))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=3, help="each runs every engine once")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--requests", type=int, default=SEQUENCES, help="completions of the batch")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--passes", type=int, default=24, help="decoding passes beside their bound; 0 leaves them out")
    parser.add_argument("--model", default=QUICKSTART_MODEL, help="of any format that Lockstep reads")
    parser.add_argument("--vllm-python", type=Path, help="of an environment with vLLM, such as .venv-vllm/bin/python")
    parser.add_argument("--openvino-python", type=Path, help="of an environment with optimum-intel and openvino-genai")
    return parser.parse_args()


class Runner:
    """Runs peers as child processes on the same work."""

    def __init__(self, environments: Environments, args: argparse.Namespace) -> None:
        vocabulary = json.loads((environments.huggingface / "config.json").read_text())["vocab_size"]
        self.environments, self.args = environments, args
        self.work = work(vocabulary, args.requests)
        self.warm_up = [{"prompt": prompt(20, -1, vocabulary), "new": 8}]
        self.kept: dict[str, str] = {}
        """The allocator of each peer that has run with all."""

    def __call__(self, name: str) -> dict[str, Any]:
        """What a peer reports, by the allocator that is faster for it; or why it does not run."""
        peer = PEERS[name]
        words = [self.kept[name]] if name in self.kept else peer.allocators
        found = [self.child(peer, allocator) | {"allocator": allocator} for allocator in words]
        best = max(found, key=lambda report: report.get("speeds", {}).get("batch", 0.0))
        if "speeds" in best:
            self.kept[name] = best["allocator"]
        return best | {"tried": {report["allocator"]: report.get("speeds") for report in found}}

    def job(self, peer: Peer) -> Job:
        return {
            "model": str(getattr(self.environments, peer.format)),
            "dtype": self.args.dtype,
            "threads": self.args.threads,
            "passes": self.args.passes,
            "settings": dict(peer.settings),
            "warm_up": self.warm_up,
            "work": self.work,
        }

    def child(self, peer: Peer, allocator: str) -> dict[str, Any]:
        """The report of one process, or `{"failed": its last line}`."""
        python = self.environments.python(peer.python)
        file, log = self.environments.folder / "job.json", self.environments.folder / "log"
        file.write_text(json.dumps(self.job(peer)))
        environment = environment_of(python, ALLOCATORS[allocator], self.args.threads)
        words = [str(python), "-m", f"rollout_engines.{peer.module}", str(file)]
        print(f"{peer.title} ({allocator} allocator)", file=sys.stderr, flush=True)
        with log.open("w") as errors:
            ended = subprocess.run(
                words, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=BENCHMARKS, check=False
            )
        if ended.returncode:
            lines = [*log.read_text(errors="replace").strip().splitlines()] or ["no reason given"]
            return {"failed": f"{lines[-1]} (exit code {ended.returncode})"}
        report: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
        return report


def environment_of(python: Path, allocator: Mapping[str, str], threads: int) -> dict[str, str]:
    """Variables of a child: so many threads, no network, and what the documentation of vLLM advises."""
    iomp = python.parent.parent / "lib" / "libiomp5.so"  # Intel's OpenMP, which vLLM wants preloaded
    preloaded = [allocator.get("LD_PRELOAD", ""), str(iomp) if iomp.exists() else ""]
    paths = [str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]
    chosen = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "LD_PRELOAD": ":".join(filter(None, preloaded)),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB, as the others have
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # otherwise it leaves a core unused
        "VLLM_NO_USAGE_STATS": "1",
    }
    return os.environ | allocator | chosen


def keep(rounds: Mapping[str, Any]) -> None:
    """Keep all reports in `runs/`."""
    kept = ROOT / "runs" / f"rollout-peers-{time.strftime('%Y%m%d-%H%M%S')}.json"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps(rounds) + "\n")
    print(f"kept in {kept.relative_to(ROOT)}", file=sys.stderr)


def table(rounds: Mapping[str, Sequence[Mapping[str, Any]]], requests: int) -> list[str]:
    """Lines of a Markdown table: medians of tokens a second, with the least and the largest.

    Raises:
        ValueError: where engines did different work.
    """
    done = [report["tokens"] for reports in rounds.values() for report in reports if "tokens" in report]
    if any(each != done[0] for each in done):
        raise ValueError("engines did different work, and their speeds cannot be compared: they counted other tokens")
    lines = [f"| tokens/s | {requests} requests | one | allocator | versions |", "| --- | --- | --- | --- | --- |"]
    for name, reports in rounds.items():
        ran = [report for report in reports if "speeds" in report]
        cells = [spread([report["speeds"][kind] for report in ran]) for kind in ("batch", "alone")] if ran else []
        if ran:
            versions = ", ".join(f"{package} {version}" for package, version in ran[-1]["versions"].items())
            cells += [ran[-1]["allocator"], versions]
        else:
            cells = [f"does not run: {reports[-1]['failed']}", "", "", ""]
        lines.append(f"| {PEERS[name].title} | {' | '.join(cells)} |")
    return lines


def bounds(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines on Lockstep's decoding passes and their bound."""
    lines = []
    passes = [report["passes"] for report in reports if "passes" in report]
    for kind in passes[0] if passes else ():
        speed, bound = (statistics.median(each[kind][of] for each in passes) for of in ("speed", "bound"))
        share = spread([each[kind]["speed"] / each[kind]["bound"] for each in passes], ".2f")
        lines.append(f"{kind}: decoding alone {speed:.0f} tokens/s, {share} of the bound of {bound:.0f}")
    return lines


def spread(values: Sequence[float], form: str = ".0f") -> str:
    """The median, and the least and the largest in parentheses."""
    middle, least, largest = (format(of(values), form) for of in _OF)
    return f"{middle} ({least} to {largest})"


_OF: tuple[Callable[[Sequence[float]], float], ...] = (statistics.median, min, max)

if __name__ == "__main__":
    main()
