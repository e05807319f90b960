"""Rotary position embedding (RoPE): frequencies, and their scalings for longer contexts (linear, Llama 3, YaRN).

A head of width E has E/2 pairs; pair i turns by position · θ^(−2i/E) (Su et al. 2021, "RoFormer"). A scaling changes
these frequencies once and for all; scalings that depend on the length of the text at hand are not described here.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class LinearScaling(BaseModel):
    """Linear scaling: all positions are divided by a factor (Chen et al. 2023, "Positional Interpolation")."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["linear"] = Field("linear", description="divide all positions")
    factor: float = Field(gt=0, description="by which positions are divided")

    def __call__(self, frequencies: Tensor, theta: float) -> Tensor:
        """The scaled frequencies."""
        return frequencies / self.factor


class Llama3Scaling(BaseModel):
    """Llama 3.1's scaling: low frequencies are divided by a factor, high ones kept, those between interpolated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["llama3"] = Field("llama3", description="divide low frequencies, as Llama 3.1")
    factor: float = Field(gt=0, description="by which low frequencies are divided")
    low_frequency: float = Field(1.0, description="pairs that turn less often over the original context are slow")
    high_frequency: float = Field(4.0, description="pairs that turn more often over the original context are fast")
    original_context: int = Field(ge=1, description="in tokens")

    def __call__(self, frequencies: Tensor, theta: float) -> Tensor:
        """The scaled frequencies."""
        turns = self.original_context * frequencies / (2 * math.pi)
        kept = ((turns - self.low_frequency) / (self.high_frequency - self.low_frequency)).clamp(0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies


class YarnScaling(BaseModel):
    """YaRN (Peng et al. 2023): interpolates over the index of the pair, and scales cosines and sines by a magnitude."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["yarn"] = Field("yarn", description="blend from divided to whole frequencies, as YaRN")
    factor: float = Field(gt=0, description="by which low frequencies are divided")
    fast: float = Field(32.0, description="pairs that turn more often over the original context are left alone")
    slow: float = Field(1.0, description="pairs that turn less often over the original context are divided")
    original_context: int = Field(ge=1, description="in tokens")
    magnitude: float = Field(description="of cosines and sines: the paper's √(1/t)")
    whole_pairs: bool = Field(True, description="round the ends of the blend outwards to whole pairs")

    def __call__(self, frequencies: Tensor, theta: float) -> Tensor:
        """The scaled frequencies."""
        pairs = len(frequencies)
        first, last = (self._pair(turns, theta, pairs) for turns in (self.fast, self.slow))
        if self.whole_pairs:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        index = torch.arange(pairs, dtype=torch.float32, device=frequencies.device)
        kept = 1 - ((index - first) / (last - first or 1e-3)).clamp(0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies

    def _pair(self, turns: float, theta: float, pairs: int) -> float:
        """Index of the pair that makes so many turns over the original context."""
        return pairs * math.log(self.original_context / (turns * 2 * math.pi)) / math.log(theta)


Scaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling, Field(discriminator="kind")]


class Rope(BaseModel):
    """The rotary embedding of a layer: base and scaling of its frequencies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    theta: float = Field(10000.0, gt=0, description="base of the frequencies")
    scaling: Scaling | None = Field(None, description="of the frequencies, for contexts longer than the original one")

    @property
    def magnitude(self) -> float:
        """The factor of cosines and sines."""
        return self.scaling.magnitude if isinstance(self.scaling, YarnScaling) else 1.0

    def frequencies(self, head_dim: int, device: torch.device) -> Tensor:
        """Radians a token [head_dim / 2], in fp32."""
        steps = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
        frequencies = 1.0 / self.theta**steps
        return frequencies if self.scaling is None else self.scaling(frequencies, self.theta)

    def table(self, positions_T: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, 1, head_dim], computed in fp32."""
        angles = positions_T.float()[:, None, None] * self.frequencies(head_dim, positions_T.device)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        if self.magnitude != 1.0:
            cos, sin = cos * self.magnitude, sin * self.magnitude
        return cos.to(dtype), sin.to(dtype)
