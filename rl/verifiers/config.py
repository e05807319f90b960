"""The `[verifier]` section of a recipe: processes, deadlines, the sandbox and its isolation, an LLM judge."""

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lockstep.rl.sandbox.distributions import DEFAULT
from lockstep.rl.sandbox.isolation import USUAL, Isolation, SandboxLimits
from lockstep.rl.verifiers.llm_judge.config import LLMJudgeConfig

PROGRAMS = "tests"
"""The name of the grader of problems that have tests."""

Mechanism = Literal["namespaces", "seccomp", "landlock"]

_LIMITS = SandboxLimits()
_USUAL = tuple(name for name in get_args(Mechanism) if getattr(USUAL, name))


class SandboxConfig(BaseModel):
    """Limits of a program's run, and the isolation without which none is run; see `lockstep.rl.sandbox.isolation`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requires: tuple[Mechanism, ...] = Field(_USUAL, description="a machine that lacks one of these judges no programs")
    seconds: float = Field(_LIMITS.seconds, ge=0.01, description="of work on a processor, for the whole of a run")
    memory_mib: int = Field(_LIMITS.memory_bytes >> 20, ge=256, description="address space, Python's 100 MiB included")
    folder_mib: int = Field(_LIMITS.folder_bytes >> 20, ge=1, description="of all files that it writes")
    output_mib: int = Field(_LIMITS.output_bytes >> 20, ge=1, description="of what it prints")
    threads: int = Field(_LIMITS.threads, ge=1, description="threads and processes that it may have at one time")
    libraries: tuple[str, ...] = Field(
        DEFAULT, description="installed distributions that programs and tests may import beside Python's own modules"
    )

    @property
    def limits(self) -> SandboxLimits:
        """The limits in the form that the sandbox takes."""
        return SandboxLimits(
            seconds=self.seconds,
            memory_bytes=self.memory_mib << 20,
            folder_bytes=self.folder_mib << 20,
            output_bytes=self.output_mib << 20,
            threads=self.threads,
        )

    @property
    def required(self) -> Isolation:
        """The required isolation in the form that the pool of sandboxes takes."""
        return Isolation(
            namespaces="namespaces" in self.requires,
            seccomp="seccomp" in self.requires,
            landlock="landlock" in self.requires,
        )


class VerifierConfig(BaseModel):
    """How many verifier workers there are, with how many processes, and how long one answer may take."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: int = Field(1, ge=1, description="Ray actors that judge")
    processes: int = Field(1, ge=1, description="grading processes of each worker")
    deadline: float = Field(5.0, gt=0, description="seconds of processor time for one answer")
    sandbox: SandboxConfig = SandboxConfig()
    llm_judge: LLMJudgeConfig | None = None

    @model_validator(mode="after")
    def _has_a_budget_to_share(self) -> "VerifierConfig":
        budget = self.llm_judge.budget if self.llm_judge else 0
        if 0 < budget < self.workers:
            raise ValueError(
                f"llm_judge.budget={budget} is less than the {self.workers} workers that share it: raise it, or set 0"
            )
        return self
