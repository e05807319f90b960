"""WeightSyncConfig: bucket size, transport."""

from typing import Literal

Transport = Literal["auto", "memory", "broadcast"]
