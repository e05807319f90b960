"""How many HumanEval-sized programs a second the sandbox judges, beside bare forks of a small Python process.

    python benchmarks/sandbox.py [--humaneval HumanEval.jsonl.gz] [--workers 2] [--rounds 5]

An item is two forks (harness and guest), each into a new namespace of processes, with all isolation. The bare side
forks as many processes that end at once, from as many parents of the same size as there are workers, and waits for
each. Rounds alternate; medians count.
"""

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from lockstep.data.tasks.code_tests import CodeTests
from lockstep.rl.verdict import Outcome
from lockstep.rl.verifiers.code_pool import CodePool

HUMANEVAL = Path(__file__).parents[2] / "shared" / "datasets" / "humaneval" / "HumanEval.jsonl.gz"
FORKING = """
import os, sys, unittest.mock, inspect, decimal
for _ in range(int(sys.argv[1])):
    pid = os.fork()
    if pid == 0: os._exit(0)
    os.waitpid(pid, 0)
"""


def items(path: Path) -> list[tuple[str, CodeTests]]:
    """HumanEval's own solutions with their tests."""
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    return [(row["canonical_solution"], CodeTests(row["test"], row["entry_point"], row["prompt"])) for row in rows]


def forks(workers: int, count: int) -> float:
    """Seconds that each of `workers` processes at once takes for `count` forks, their own start taken off."""
    begun = time.perf_counter()
    _bare(workers, 0)
    started = time.perf_counter()
    _bare(workers, count)
    return time.perf_counter() - started - (started - begun)


def _bare(workers: int, count: int) -> None:
    processes = [subprocess.Popen([sys.executable, "-S", "-c", FORKING, str(count)]) for _ in range(workers)]
    for process in processes:
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--humaneval", type=Path, default=HUMANEVAL)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    work = items(options.humaneval)
    judged, bare = [], []
    with CodePool(options.workers) as pool:
        print(pool.isolation, f"load {os.getloadavg()[0]:.1f}")
        for _ in range(options.rounds):
            begun = time.perf_counter()
            correct = sum(verdict.outcome is Outcome.correct for verdict in pool.grade(work))
            judged.append(len(work) / (time.perf_counter() - begun))
            bare.append(2 * len(work) / forks(options.workers, 2 * len(work) // options.workers))
    rate, limit = statistics.median(judged), statistics.median(bare)
    print(
        f"{correct} of {len(work)} correct; {rate:.0f} programs/s; bare forks {limit:.0f}/s, or {limit / 2:.0f} pairs"
    )
    print(f"ratio {rate / (limit / 2):.2f}; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
