"""Random documents are the same for the same seed, and enough for eight steps of samples that a model can hold."""

from pathlib import Path

import pytest

from lockstep.data.corpus.indexed_dataset import IndexedDataset
from lockstep.data.corpus.loader import PretrainingData
from lockstep.data.corpus.synthetic import random_text


@pytest.mark.parametrize(("context", "samples", "length", "least"), [(64, 4, 32, 4096), (16, 64, 16, 8192)])
def test_random_text_is_enough_for_eight_steps(
    context: int, samples: int, length: int, least: int, tmp_path: Path
) -> None:
    configs = [
        random_text(tmp_path / name, vocabulary=31, context=context, samples_per_step=samples, seed=seed)
        for name, seed in (("one", 3), ("again", 3), ("other", 4))
    ]
    assert {(config.length, config.held_out) for config in configs} == {(length, 0.05)}
    one, again, other = ((tmp_path / f"{name}.bin").read_bytes() for name in ("one", "again", "other"))
    assert one == again != other
    store = IndexedDataset(tmp_path / "one")
    assert store.note.tokens >= 0.9 * least
    assert store.note.vocabulary == 31
    PretrainingData(configs[0], seed=0, vocabulary=31)


def test_random_text_is_of_no_tokenizer_and_any_model_reads_it(tmp_path: Path) -> None:
    config = random_text(tmp_path / "random", vocabulary=31, context=64, samples_per_step=4, seed=3)
    assert IndexedDataset(tmp_path / "random").note.tokenizer == ""
    PretrainingData(config, seed=0, vocabulary=31, tokenizer="that of a model")
