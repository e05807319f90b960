"""Measures the peak memory that work needs beyond what the interpreter and imports hold; formats byte counts."""

import re
from pathlib import Path

_STATUS = Path("/proc/self/status")


class Watch:
    """Measures peak resident memory from its construction on; proc(5): writing 5 to clear_refs resets the peak."""

    def __init__(self) -> None:
        self._before = _held("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """The most by which resident memory has exceeded what it was at construction, in bytes."""
        return max(0, _held("VmHWM") - self._before)


def _held(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", _STATUS.read_text())
    assert found, f"{_STATUS} says no {what}"
    return 1024 * int(found[1])


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def size_of(text: str) -> int:
    """Parse a size as people write it, 5GB, 500MB or 64MiB, into bytes.

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    units = {unit.lower(): unit for unit in _UNITS}
    if not found or found[2].lower() not in units or not float(found[1]):
        raise ValueError(f"{text!r} is not a size: give a number and one of {', '.join(_UNITS)}, as in 5GB")
    return int(float(found[1]) * _UNITS[units[found[2].lower()]])


def in_words(size: int) -> str:
    """Format bytes as people read them: 512 B, 3.1 MB, 141 GB."""
    if size < 1000:
        return f"{size} B"
    unit = next((u for u in ("KB", "MB", "GB") if size < 999.5 * _UNITS[u]), "TB")
    return f"{size / _UNITS[unit]:.3g} {unit}"
