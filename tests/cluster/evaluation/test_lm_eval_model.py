"""The model of lm-eval against lm-eval's own `hf` on tasks made here; skipped where lm-eval is not installed."""

import shutil
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("lm_eval")

from lockstep.cluster.evaluation.lm_eval_model import LockstepModel
from tests.cluster.evaluation.lm_eval_tasks import hugging_face, outcome, same


@pytest.mark.parametrize("chat", [False, True])
def test_numbers_are_those_of_hf_in_any_layout(tiny_folder: Path, tmp_path: Path, chat: bool) -> None:
    options = {"apply_chat_template": chat}
    theirs = hugging_face(tiny_folder, tmp_path, **options)
    layouts = [{"tensor": 2, "pipeline": 2}] if chat else [{}, {"tensor": 2}, {"pipeline": 2}]
    for layout in layouts:
        ours = LockstepModel(str(tiny_folder), dtype="float32", **layout)
        same(outcome(ours, tmp_path, **options), theirs)


def test_so_they_are_at_three_tensor_ranks(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "thirds"
    shutil.copytree(tiny_folder, folder)
    config = LlamaConfig.from_pretrained(folder, num_key_value_heads=3, intermediate_size=96)
    LlamaForCausalLM(config).save_pretrained(folder)
    same(
        outcome(LockstepModel(str(folder), dtype="float32", tensor=3), tmp_path),
        hugging_face(folder, tmp_path),
    )


def test_what_does_not_fit_is_refused_in_a_sentence(tiny_folder: Path) -> None:
    for given, words in (
        ({"tensor": 4}, "tensor=4"),
        ({"tensr": 2}, "tensr"),
        ({"dtype": "float16"}, "dtype='float16' is not supported: use bfloat16 or float32"),
        ({"numerics": "exactly"}, "numerics='exactly' is not supported: use fast or exact"),
    ):
        with pytest.raises(ValueError, match=words):
            LockstepModel(str(tiny_folder), **given)
