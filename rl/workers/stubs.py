"""Names of worker classes for the driver, which does not import them: mypy sees the classes, a process their names.

`worker.call(ModelWorker.update, …)` of `lockstep.rl.remote` is checked against the method's signature, and the process
that makes the call loads neither torch nor a model.
"""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any


class Stub:
    """Stands for a worker class, with its `__module__` and `__name__`; attributes stand for its methods."""

    def __init__(self, module: str, name: str) -> None:
        self.__module__, self.__name__ = module, name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copying and pickling look for is not there
            raise AttributeError(name)
        return SimpleNamespace(__name__=name)


if TYPE_CHECKING:
    from lockstep.rl.workers.environment_worker import EnvironmentWorker as EnvironmentWorker
    from lockstep.rl.workers.model_worker import ModelWorker as ModelWorker
    from lockstep.rl.workers.rank import RankWorker as RankWorker
    from lockstep.rl.workers.rollout_worker import RolloutWorker as RolloutWorker
    from lockstep.rl.workers.verifier_worker import VerifierWorker as VerifierWorker
else:
    EnvironmentWorker = Stub("lockstep.rl.workers.environment_worker", "EnvironmentWorker")
    ModelWorker = Stub("lockstep.rl.workers.model_worker", "ModelWorker")
    RankWorker = Stub("lockstep.rl.workers.rank", "RankWorker")
    RolloutWorker = Stub("lockstep.rl.workers.rollout_worker", "RolloutWorker")
    VerifierWorker = Stub("lockstep.rl.workers.verifier_worker", "VerifierWorker")
