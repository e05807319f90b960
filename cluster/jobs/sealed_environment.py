"""Environment variables of a job, such as tokens, in two halves that say nothing alone.

Ray writes the variables of a runtime environment into its logs and shows them on its dashboard, and a package that
travels with a job lies on the disk of each node. So a value is added to random bits as long as it is: the sum is a
variable of the job, the bits are in its package, and the job's first process puts them together.
"""

import json
import os
import secrets
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path

from lockstep.rl.remote import PASSED_ON

BITS = "environment.json"
"""The file with the random bits, in the job's package."""
SUM = "LOCKSTEP_SEALED"
"""The variable with the sums."""


class NotSet(ValueError):
    """A variable that is set neither where a job is submitted nor where it runs."""


def seal(names: Iterable[str], environment: Mapping[str, str], package: Path) -> dict[str, str]:
    """Write the random bits into a package; returns the variable with the sums. Names that are not set are left out."""
    values = {name: environment[name].encode() for name in names if name in environment}
    bits = {name: secrets.token_bytes(len(value)) for name, value in values.items()}
    (package / BITS).write_text(json.dumps({name: each.hex() for name, each in bits.items()}), encoding="utf-8")
    return {SUM: json.dumps({name: _add(value, bits[name]).hex() for name, value in values.items()})}


def unseal(names: Iterable[str], environment: MutableMapping[str, str], package: Path) -> None:
    """Set the variables of a job in its first process, and have its driver pass them on to its workers.

    Raises:
        NotSet: when one was sent without a value, and is not set here.
    """
    bits, sums = json.loads((package / BITS).read_text(encoding="utf-8")), json.loads(environment.pop(SUM, "{}"))
    for name, hidden in sums.items():
        environment[name] = _add(bytes.fromhex(hidden), bytes.fromhex(bits[name])).decode()
    if missing := [name for name in names if name not in environment]:
        raise NotSet(
            f"env={missing[0]} is set neither where the job was submitted nor on {os.uname().nodename}: set it in one "
            "of the two places"
        )
    environment[PASSED_ON] = ",".join(names)


def _add(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))
