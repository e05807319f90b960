"""What verifiers may use and what they demand, as a recipe says it."""

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from lockstep.rl.sandbox.isolation import USUAL, Isolation, SandboxLimits

Wall = Literal["namespaces", "seccomp", "landlock"]

_LIMITS = SandboxLimits()
_USUAL = tuple(wall for wall in get_args(Wall) if getattr(USUAL, wall))


class SandboxConfig(BaseModel):
    """What a run of a program may use, and the walls without which none is run; see `protection`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requires: tuple[Wall, ...] = Field(_USUAL, description="a machine that lacks one of these judges no programs")
    seconds: float = Field(_LIMITS.seconds, ge=0.01, description="on a processor, for the whole of a run")
    memory_mib: int = Field(_LIMITS.memory_bytes >> 20, ge=256, description="address space, Python's 100 MiB included")
    folder_mib: int = Field(_LIMITS.folder_bytes >> 20, ge=1, description="of all files that it writes")
    output_mib: int = Field(_LIMITS.output_bytes >> 20, ge=1, description="of what it prints")
    threads: int = Field(_LIMITS.threads, ge=1)

    @property
    def limits(self) -> SandboxLimits:
        """What the sandbox takes."""
        return SandboxLimits(
            seconds=self.seconds,
            memory_bytes=self.memory_mib << 20,
            folder_bytes=self.folder_mib << 20,
            output_bytes=self.output_mib << 20,
            threads=self.threads,
        )

    @property
    def required(self) -> Isolation:
        """What the pool of sandboxes takes."""
        return Isolation(
            namespaces="namespaces" in self.requires,
            seccomp="seccomp" in self.requires,
            landlock="landlock" in self.requires,
        )


class VerifierConfig(BaseModel):
    """The verifier workers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: int = Field(1, ge=1)
    processes: int = Field(1, ge=1, description="grading processes of each worker")
    deadline: float = Field(5.0, gt=0, description="seconds that one answer may take")
    sandbox: SandboxConfig = SandboxConfig()
