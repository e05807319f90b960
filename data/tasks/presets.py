r"""Presets of `TaskConfig` for known data sets: GSM8K, MATH, AIME, HumanEval, MBPP, APPS, LiveCodeBench and others.

Each says where its files lie on the Hugging Face Hub; `generator` and `held_out_from` name files that are here instead.
Chat presets ask in one turn and say where the answer stands. Presets that end in `-plain` are for base models: they
continue a text, after solved examples where the data set's paper does so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Keys of the recipe's section [task] for a data set, and what they are."""

    about: str
    values: Mapping[str, Any]


_BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
_HASHES = "Reason step by step. Then write #### and the answer, a number, on a line of its own."
_PROGRAM = "Write a Python program that solves the problem. Answer with the whole program in one ```python block."
_BEGUN = "Where code is given below, complete it and keep its names."
_MBPP_ASKS = "{question} Your code should pass these tests:\n\n{examples}\n"

_HUB = "hf://datasets/"
_GSM8K = {
    "generator": f"{_HUB}openai/gsm8k/main/train-*.parquet",
    "held_out_from": f"{_HUB}openai/gsm8k/main/test-*.parquet",
    "train": 7473,
    "held_out": 1319,
}
_MATH = {
    "generator": f"{_HUB}DigitalLearningGmbH/MATH-lighteval/data/train-*.parquet",
    "held_out_from": f"{_HUB}HuggingFaceH4/MATH-500/test.jsonl",
    "train": 7500,
    "held_out": 500,
}
_HUMANEVAL = {
    "generator": f"{_HUB}openai/openai_humaneval/openai_humaneval/test-*.parquet",
    "held_out": 164,
}
_MBPP = {
    "generator": f"{_HUB}google-research-datasets/mbpp/full/train-*.parquet",
    "held_out_from": f"{_HUB}google-research-datasets/mbpp/full/test-*.parquet",
    "train": 374,
    "held_out": 500,
}

PRESETS: Mapping[str, Preset] = {
    "gsm8k": Preset(
        "GSM8K (arXiv:2110.14168), one turn; the answer comes after ####, as in the data.",
        _GSM8K | {"instruction": _HASHES, "completion": "{solution}"},
    ),
    "gsm8k-plain": Preset(
        "GSM8K for base models: five solved problems before each, as most published numbers have it.",
        _GSM8K
        | {
            "prompt": "Question: {question}\nAnswer:",
            "completion": " {solution}",
            "shots": 5,
            "chat": False,
            "stop": ["Question:"],
        },
    ),
    "math": Preset(
        "MATH (arXiv:2103.03874) and its 500 held-out problems of arXiv:2305.20050; the answer is boxed.",
        _MATH | {"instruction": _BOXED, "completion": "{solution}"},
    ),
    "math-plain": Preset(
        "MATH for base models: four solved problems before each, as in Minerva (arXiv:2206.14858).",
        _MATH
        | {
            "prompt": "Problem:\n{question}\n\nSolution:",
            "completion": " {solution}",
            "shots": 4,
            "chat": False,
            "stop": ["Problem:"],
        },
    ),
    "aime": Preset(
        "AIME 2024: 30 problems with whole numbers from 0 to 999 as answers, boxed. Trained on DeepScaleR's problems.",
        {
            "generator": f"{_HUB}agentica-org/DeepScaleR-Preview-Dataset/deepscaler.json",
            "held_out_from": f"{_HUB}HuggingFaceH4/aime_2024/data/train-*.parquet",
            "instruction": _BOXED,
            "completion": "{solution}",
            "train": 40315,
            "held_out": 30,
        },
    ),
    "deepscaler": Preset(
        "DeepScaleR's 40,315 competition problems; the answer is boxed.",
        {
            "generator": f"{_HUB}agentica-org/DeepScaleR-Preview-Dataset/deepscaler.json",
            "instruction": _BOXED,
            "completion": "{solution}",
            "train": 40315,
            "held_out": 500,
        },
    ),
    "dapo": Preset(
        "DAPO-Math-17k (arXiv:2503.14476), whose messages say themselves how to answer: `Answer: x` on the last line.",
        {
            "generator": f"{_HUB}BytedTsinghua-SIA/DAPO-Math-17k/data/dapo-math-17k.parquet",
            "train": 17398,
            "held_out": 500,
        },
    ),
    "humaneval": Preset(
        "HumanEval (arXiv:2107.03374), one turn: the function is shown and asked for as a whole.",
        _HUMANEVAL
        | {
            "prompt": "Complete this Python function. Answer with the whole function in one ```python block.\n\n"
            "```python\n{question}\n```",
            "completion": "```python\n{program}\n```",
        },
    ),
    "humaneval-plain": Preset(
        "HumanEval for base models: the function is continued up to what ends it, the paper's stop texts.",
        _HUMANEVAL | {"chat": False, "stop": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]},
    ),
    "mbpp": Preset(
        "MBPP (arXiv:2108.07732), one turn, with the tests shown as in the paper.",
        _MBPP
        | {
            "prompt": "You are an expert Python programmer, and here is your task: " + _MBPP_ASKS,
            "instruction": "Answer with the whole program in one ```python block.",
            "completion": "```python\n{program}\n```",
        },
    ),
    "mbpp-plain": Preset(
        "MBPP for base models: three solved problems before each, between [BEGIN] and [DONE] as in the paper.",
        _MBPP
        | {
            "prompt": "You are an expert Python programmer, and here is your task: " + _MBPP_ASKS + "[BEGIN]\n",
            "completion": "{program}\n[DONE]",
            "shots": 3,
            "chat": False,
            "stop": ["[DONE]"],
        },
    ),
    "apps": Preset(
        "APPS (arXiv:2105.09938), one turn: a program that reads standard input, or the function that is begun.",
        {
            "prompt": "{question}\n\n{examples}",
            "generator": f"{_HUB}codeparrot/apps/train.jsonl",
            "held_out_from": f"{_HUB}codeparrot/apps/test.jsonl",
            "instruction": f"{_PROGRAM} {_BEGUN}",
            "completion": "```python\n{program}\n```",
            "train": 5000,
            "held_out": 5000,
        },
    ),
    "livecodebench": Preset(
        "LiveCodeBench (arXiv:2403.07974), one turn: a program that reads standard input, or the method that is begun.",
        {
            "prompt": "{question}\n\n{examples}",
            "generator": f"{_HUB}livecodebench/code_generation_lite/test*.jsonl",
            "instruction": f"{_PROGRAM} {_BEGUN}",
            "held_out": 2000,
        },
    ),
}
