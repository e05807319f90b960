"""OpenVINO GenAI's continuous batching, as a child process in an environment that has it."""

from collections.abc import Sequence

import numpy as np
import openvino
from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig

from rollout_engines.child import Generate, measured, read_job, show
from rollout_engines.work import Completion, Job

PRECISIONS = {"bfloat16": "bf16", "float32": "f32"}


def open_engine(job: Job) -> Generate:
    scheduler = SchedulerConfig()
    scheduler.cache_size = 2  # GiB
    scheduler.max_num_seqs = max(map(len, job["work"]["batch"]))
    scheduler.max_num_batched_tokens = 4096
    scheduler.enable_prefix_caching = False
    precision = PRECISIONS[job["dtype"]]
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,  # otherwise 8 bits
        "INFERENCE_NUM_THREADS": job["threads"],
        **job["settings"],
    }
    pipeline = ContinuousBatchingPipeline(job["model"], scheduler, "CPU", properties)

    def generate(asked: Sequence[Completion]) -> list[Sequence[int]]:
        prompts = [openvino.Tensor(np.array([c["prompt"]], dtype=np.int64)) for c in asked]
        sampling = [
            GenerationConfig(do_sample=True, temperature=1.0, max_new_tokens=c["new"], ignore_eos=True) for c in asked
        ]
        return [result.m_generation_ids[0] for result in pipeline.generate(prompts, sampling)]

    return generate


def main() -> None:
    job = read_job()
    show(measured(job, open_engine(job), ["openvino-genai", "openvino"]))


if __name__ == "__main__":
    main()
