"""vLLM engines in a process of the interpreter in .venv-vllm, for tests in this one: each call is passed on."""

import os
import subprocess
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from lockstep.data.tokenizer import Tokenizer
from lockstep.model.transformer import Transformer
from lockstep.rl.rollout.config import EngineConfig
from lockstep.rl.weight_sync.shards import shards_of

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-vllm/bin/python"
IS_THERE = (ROOT / ".venv-vllm/installed").exists()
LEFT_OUT = "tests of the vLLM engine are left out: .venv-vllm is not there, and `make vllm` makes it"


class RemoteEngine:
    """An `Engine` in the other process."""

    def __init__(self, process: "VllmProcess", number: int) -> None:
        self._process, self._number = process, number

    def __getattr__(self, name: str) -> Any:
        if name in ("weight_version", "has_work", "statistics", "longest", "exceptions"):
            return self._process.ask("call", self._number, name, (), {})
        return lambda *args, **named: self._process.ask("call", self._number, name, args, named)


class VllmProcess:
    """The other process, started by the first engine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def make(self, transformer: Transformer, config: EngineConfig, tokenizer: Tokenizer) -> RemoteEngine:
        """An engine on the model and the weights of a transformer, in fp32."""
        given = transformer.model, config, shards_of(transformer), tokenizer.files, "float32"
        return RemoteEngine(self, self.ask("make", *given))

    def free(self) -> None:
        """End what all engines do."""
        if self._connection is not None:
            self.ask("free")

    def ask(self, name: str, *args: Any) -> Any:
        """Calls a method of the server; raises what it raised."""
        connection = self._connection or self._start()
        connection.send((name, args))
        result, error = connection.recv()
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """End the process."""
        if self._connection is not None and self._process is not None:
            self._connection.close()
            self._process.wait()

    def _start(self) -> Connection:
        here, there = Pipe()
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        command = [PYTHON, Path(__file__).with_name("vllm_server.py"), str(there.fileno())]
        with there, open(self._folder / "log", "wb") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, pass_fds=[there.fileno()]
            )
        self._connection = here
        return here
