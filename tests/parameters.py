"""Parameters of which `make test` takes a part, and `make parity` the rest."""

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest


def every(*values: Iterable[Any], part: Callable[..., bool]) -> list[Any]:
    """All combinations of values; those that `part` does not choose are marked as exhaustive."""
    combinations = list(product(*values))
    chosen = [part(*each) for each in combinations]
    assert any(chosen)
    return [
        pytest.param(*each, marks=[] if is_in else [pytest.mark.exhaustive])
        for each, is_in in zip(combinations, chosen, strict=True)
    ]
