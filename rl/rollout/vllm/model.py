"""A model that vLLM runs in this process: started from a configuration alone, its weights replaced as a whole.

The weights that it begins with take the same way as those of every update: by their Hugging Face names through the
model's own `load_weights`, inside of vLLM's layer-by-layer reload. That undoes what vLLM made of the old ones (joined
projections, and on CPUs matrices packed for oneDNN, whose originals are gone) and makes it again.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vllm
from torch import Tensor, nn
from vllm import EngineArgs, LLMEngine
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.v1.metrics.loggers import StatLoggerBase

from lockstep.distributed.checkpoint.tensors import Source, digest, to_numpy, to_torch, whole
from lockstep.model.config import ModelConfig
from lockstep.model.formats.huggingface.families.registry import to_huggingface
from lockstep.model.formats.huggingface.tensor_names import stored_names
from lockstep.model.formats.recast import Recast
from lockstep.model.weights.names import logical_tensors
from lockstep.rl.rollout.config import EngineConfig
from lockstep.rl.rollout.sampling.draws import EndTokens
from lockstep.rl.rollout.vllm.interpreter import check_version
from lockstep.rl.rollout.vllm.logits_processor import Board, processor_for
from lockstep.rl.weight_sync.protocol import WeightsDiffer

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine, its scheduler and the model in the process that calls it
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # which takes no custom logits processors
    "VLLM_NO_USAGE_STATS": "1",
}
"""Environment variables that vLLM reads when it starts."""

BLOCK = 32
"""Tokens of a block of the KV cache: the smallest that vLLM's attention on CPUs has."""


class VllmModel:
    """A model with random weights until `load`."""

    def __init__(self, model: ModelConfig, config: EngineConfig, dtype: str) -> None:
        """
        Args:
            config: its length is bounded by the model's context; `budget` is at least `sequences`.
            dtype: bfloat16 or float32, of weights and activations.

        Raises:
            WrongInterpreter: where vLLM's version is not one that was tried.
            UnknownModel: for a family whose stored tensors are not the logical ones.
        """
        check_version(vllm.__version__)
        self.model, self._dtype, self._stored = model, dtype, stored_names(model)
        self.length = min(config.length, model.context)
        self.board, self.meter = Board(EndTokens(model)), Meter()
        self.llm = self._started(config)
        self.blocks = int(self.llm.vllm_config.cache_config.num_gpu_blocks)
        self.digest = ""
        """Of the weights that were loaded."""

    def _started(self, config: EngineConfig) -> LLMEngine:
        os.environ.update(ENVIRONMENT)
        on_cpu = vllm.platforms.current_platform.is_cpu()
        if on_cpu:
            torch._dynamo.config.disable = True  # compiling the ranks of prompts' tokens alone takes half a minute
        with tempfile.TemporaryDirectory() as folder:
            words = to_huggingface(self.model, self._dtype)
            Path(folder, "config.json").write_text(json.dumps(words))
            arguments = EngineArgs(
                model=folder,
                skip_tokenizer_init=True,
                load_format="dummy",
                dtype=self._dtype,
                enforce_eager=on_cpu,
                async_scheduling=False,  # a step ends with the tokens that it drew
                block_size=BLOCK,
                max_model_len=self.length,
                max_num_seqs=config.sequences,
                max_num_batched_tokens=max(config.budget, config.sequences),
                kv_cache_memory_bytes=int(config.cache_gib * 2**30),
                max_logprobs=-1,
                logits_processors=[processor_for(self.board)],
                log_level="ERROR",  # warnings are of a processor in general, and of weights that have no tensors
            )
            return LLMEngine.from_engine_args(arguments, stat_loggers=[self.meter])

    def read(self, source: Source) -> Iterator[tuple[str, Tensor]]:
        """Every logical tensor of a source, whole, in the model's dtype."""
        cast = Recast(source, self.model, self._dtype, states=False)
        for name, shape in logical_tensors(self.model).items():
            yield name, to_torch(np.ascontiguousarray(cast.read(name, whole(shape))))

    def empty(self) -> dict[str, Tensor]:
        """A tensor of NaN in host memory for each logical tensor."""
        dtype = getattr(torch, self._dtype)
        return {name: torch.full(shape, torch.nan, dtype=dtype) for name, shape in logical_tensors(self.model).items()}

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights by these logical tensors.

        Raises:
            WeightsDiffer: when a parameter of vLLM's model has no new weights.
        """
        digests: dict[str, str] = {}

        def renamed() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                digests[name] = digest(to_numpy(tensor))
                yield self._stored[name], tensor

        missing = self.llm.collective_rpc(_reload, args=(renamed(),))[0]
        if missing or digests.keys() != self._stored.keys():
            lacking = sorted(missing or self._stored.keys() - digests.keys())
            raise WeightsDiffer(f"vLLM got no new weights for {len(lacking)} tensors, {lacking[0]} among them")
        self.digest = digest(np.array([digests[name] for name in sorted(digests)]))


def _reload(worker: Any, tensors: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Replace the weights of a worker of vLLM; returns the names of parameters that got none."""
    model = worker.get_model()
    expected = {name for name, _ in model.named_parameters()}
    with set_current_vllm_config(worker.vllm_config):
        initialize_layerwise_reload(model)
        loaded = model.load_weights(tensors)
        finalize_layerwise_reload(model, worker.model_config)
        _process_tied(model)
    return expected - loaded


def _process_tied(model: nn.Module) -> None:
    """Process the weights of modules that share them with another again.

    The reload processes a shared weight for the module that has it first. On CPUs a tied head would go on with the old
    embeddings, which it has packed for itself.
    """
    seen = set[int]()
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in seen:
            method: Any = module.quant_method
            method.process_weights_after_loading(module)
        seen.add(id(weight))


class Meter(StatLoggerBase):
    """Reads vLLM's own statistics: the part of the KV cache in use, and preemptions since the start."""

    def __init__(self) -> None:
        self.usage, self.preemptions = 0.0, 0

    def __call__(self, vllm_config: Any, engine_index: int = 0) -> "Meter":
        """vLLM makes a logger for each engine, and this one stands for itself."""
        return self

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        """Take the statistics of one pass."""
        self.usage = scheduler_stats.kv_cache_usage if scheduler_stats else self.usage
        self.preemptions += iteration_stats.num_preempted_reqs if iteration_stats else 0

    def log_engine_initialized(self) -> None:
        """Say nothing."""
