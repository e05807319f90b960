"""What tests of reinforcement learning share: a Ray cluster in this process's care, and actors over the tiny model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lockstep.data.tasks.problem import Problem
    from lockstep.data.tasks.task import TaskConfig
    from lockstep.data.tokenizer import Tokenizer
    from lockstep.rl.controller import Controller
    from lockstep.rl.workers.worker_groups import ModelGroup, RolloutGroup, VerifierGroup


@dataclass(frozen=True)
class Actors:
    """One rank of a policy, two rollout workers, a verifier, and what the model reads."""

    policy: "ModelGroup"
    rollouts: "RolloutGroup"
    verifiers: "VerifierGroup"
    tokenizer: "Tokenizer"
    checkpoint: Path

    def controller(
        self, problems: "Sequence[Problem]", held_out: int, task: "TaskConfig | None" = None, **given: Any
    ) -> "Controller":
        """A controller over these actors and one task, of whose problems the first ones are held out."""
        from lockstep.data.tasks.mixture import ProblemSet
        from lockstep.data.tasks.task import Split, TaskConfig
        from lockstep.rl.controller import Controller

        split = Split(tuple(problems[held_out:]), tuple(problems[:held_out]), "")
        sets = [ProblemSet(task or TaskConfig(), split)]
        return Controller(
            self.policy, self.rollouts, self.verifiers, tokenizer=self.tokenizer, problems=sets, seed=0, **given
        )


@pytest.fixture(scope="session")
def wide_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads of 32, the smallest that vLLM's attention on CPUs has."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide") / "model"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_folder, head_dim=32)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def actors(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Actors]:
    """Actors that all tests of a process share, on a cluster of their own."""
    import ray

    from lockstep.data.tokenizer import Tokenizer
    from lockstep.distributed.checkpoint.manager import Checkpoint
    from lockstep.distributed.layout import Layout
    from lockstep.model.training.config import OptimizerConfig, TrainerConfig
    from lockstep.rl.remote import gather
    from lockstep.rl.rollout.config import RolloutConfig
    from lockstep.rl.rollout.loading import to_lockstep
    from lockstep.rl.verifiers.config import VerifierConfig
    from lockstep.rl.workers.worker_groups import ModelGroup, RolloutGroup, VerifierGroup

    checkpoint = to_lockstep(str(tiny_folder), tmp_path_factory.mktemp("actors"))
    ray.init("local", include_dashboard=False, log_to_driver=False, num_cpus=1)
    try:
        policy = ModelGroup(Layout(), threads=1, trainer=TrainerConfig(row_tokens=256))
        rollouts = RolloutGroup(RolloutConfig(workers=2, sequences=4, length=64, bucket_mib=0.01), threads=1)
        verifiers = VerifierGroup(VerifierConfig())
        calls = rollouts.start(checkpoint, "float32")
        gather(policy.start(checkpoint, "float32", OptimizerConfig(), 1.0) + calls)
        yield Actors(policy, rollouts, verifiers, Tokenizer(Checkpoint(checkpoint).files), checkpoint)
    finally:
        ray.shutdown()
