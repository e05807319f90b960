"""A trace shows the steps after a warm-up, once, however long the run is."""

from pathlib import Path

import pytest
import torch

from lockstep.distributed.profiler import Trace
from tests.distributed.traces import steps_and_kinds


@pytest.mark.parametrize(("steps", "traced"), [(0, 0), (2, 0), (3, 1), (5, 3), (9, 3)])
def test_steps_3_to_5_are_traced(steps: int, traced: int, tmp_path: Path) -> None:
    trace = Trace(tmp_path / "traces" / "rank-0.json")
    x = torch.ones(2, 2, requires_grad=True)
    for _ in range(steps):
        torch.nn.functional.linear(x, x).sum().backward()
        trace.step()
    assert trace.close() == (traced > 0)
    if traced:
        found, kinds = steps_and_kinds(tmp_path / "traces" / "rank-0.json")
        assert found in (traced, traced + 1)  # a step that began before the end has a name, too
        assert kinds == {"forward": True, "backward": True, "collective": False}
