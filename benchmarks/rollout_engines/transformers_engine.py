"""transformers, as a child process: `generate`, or continuous batching with `settings.continuous`.

`generate` pads the batch on the left and goes on until its longest completion is done; tokens behind a completion's end
do not count. Continuous batching computes on a CPU what stands in a pass as one packed row, whose attention looks at
the keys of all requests behind a mask.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from rollout_engines.child import Generate, measured, read_job, show
from rollout_engines.work import Completion, Job

PAGE = 16
"""Tokens of a page of the KV cache."""
BUDGET = 1024
"""Tokens of a pass at most."""


def sampling(**settings: Any) -> GenerationConfig:
    """Draws at temperature 1 from the whole vocabulary, and never ends by itself."""
    return GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, **settings)


@contextmanager
def padded(model: Any, job: Job) -> Iterator[Generate]:
    def generate(asked: Sequence[Completion]) -> list[Sequence[int]]:
        width, new = max(len(c["prompt"]) for c in asked), max(c["new"] for c in asked)
        rows = torch.tensor([[0] * (width - len(c["prompt"])) + c["prompt"] for c in asked])
        mask = torch.tensor([[0] * (width - len(c["prompt"])) + [1] * len(c["prompt"]) for c in asked])
        drawn = model.generate(
            rows, attention_mask=mask, generation_config=sampling(min_new_tokens=new, max_new_tokens=new)
        )
        return [row[width : width + c["new"]].tolist() for row, c in zip(drawn, asked, strict=True)]

    yield generate


@contextmanager
def continuous(model: Any, job: Job) -> Iterator[Generate]:
    most = [sum(len(c["prompt"]) + c["new"] + PAGE for c in asked) for asked in job["work"]["batch"]]
    config = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=max(most) // PAGE + 1,
        max_batch_tokens=BUDGET,
        allow_block_sharing=False,
        return_logprobs=False,
    )
    options = sampling(eos_token_id=-1)
    with model.continuous_batching_context_manager(options, continuous_batching_config=config) as manager:

        def generate(asked: Sequence[Completion]) -> list[Sequence[int]]:
            names = [manager.add_request(c["prompt"], max_new_tokens=c["new"], eos_token_id=-1) for c in asked]
            ended: dict[str, Sequence[int]] = {}
            while len(ended) < len(names):
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise SystemExit("continuous batching ended before its requests did")
                if result is not None and result.error:
                    raise SystemExit(f"continuous batching failed: {result.error}")
                if result is not None and result.is_finished():
                    ended[result.request_id] = result.generated_tokens
            return [ended[name] for name in names]

        yield generate


def main() -> None:
    job = read_job()
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).eval()
    with (continuous if job["settings"]["continuous"] else padded)(model, job) as generate:
        report = measured(job, generate, ["transformers", "torch"])
    show(report)


if __name__ == "__main__":
    main()
