"""Copies of weights and optimizer state in host memory, so that steps can be undone without a changed bit.

Every rank copies the tensors that it stores, as it stores them: no communication, and nothing is gathered, split or
rounded on the way back, in any layout.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Snapshot:
    """Copies of weights, master weights and an optimizer's state."""

    def __init__(self, weights: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
        """
        Args:
            weights: all that an update writes to, master weights included; a tensor that comes twice is copied once.
            optimizer: the one whose state goes with them.
        """
        self._optimizer = optimizer
        self._weights = [(t.detach(), _on_host(t)) for t in {id(t): t for t in weights}.values()]
        self._state = {
            parameter: {name: _on_host(value) for name, value in state.items()}
            for parameter, state in optimizer.state.items()
        }

    @torch.no_grad()
    def restore(self) -> None:
        """Copy everything back; state that the optimizer has created since is dropped."""
        for weight, copy in self._weights:
            weight.copy_(copy)
        state: dict[Any, dict[str, Any]] = self._optimizer.state
        for parameter in [p for p in state if p not in self._state]:
            del state[parameter]
        for parameter, saved in self._state.items():
            held = state[parameter]
            for name in held.keys() - saved.keys():
                del held[name]
            for name, value in saved.items():
                held[name] = held[name].copy_(value) if isinstance(value, Tensor) else value


def _on_host(value: Any) -> Any:
    """A copy in host memory, page-locked for an accelerator; numbers are copies of themselves."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_like(value, device="cpu", requires_grad=False, pin_memory=value.is_cuda).copy_(value.detach())
