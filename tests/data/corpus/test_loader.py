"""Sample n is the same for any ranks, rows and starting point; every token is predicted once; weights add up to 1."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lockstep.data.batch import TokenBatch
from lockstep.data.corpus.indexed_dataset import BadIndexedDataset, IndexedDataset, Note
from lockstep.data.corpus.indexed_dataset_writer import IndexedDatasetWriter
from lockstep.data.corpus.loader import BadBlend, BlendPart, PretrainingConfig, PretrainingData
from lockstep.data.corpus.prefetch import Prefetch
from lockstep.data.packing import RowRules

VOCABULARY = 1 << 20
BATCH = 6
LENGTH = 10
Step = list[tuple[int, ...]]


def make_store(path: Path, lengths: Sequence[int], *, first: int = 0, tokenizer: str = "d") -> Path:
    """Documents whose tokens are numbered through from `first`, so that each token of a corpus is unique."""
    writer = IndexedDatasetWriter(path, vocabulary=VOCABULARY)
    writer.add(first + np.arange(sum(lengths)), np.array(lengths, np.int64))
    writer.finish(Note(tokenizer, VOCABULARY, 0, "m", writer.documents, writer.tokens))
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PretrainingConfig:
    """Two stores: documents shorter and longer than a sample, empty ones, and ones of a single token."""
    folder = tmp_path_factory.mktemp("stores")
    lengths = np.random.default_rng(0).integers(0, 35, 60)
    long = make_store(folder / "long", [*lengths.tolist(), 1, 1, 1])
    short = make_store(folder / "short", [3, 1, 0, 40, 2, 7, 5, 5, 5], first=10_000)
    blend = (BlendPart(path=str(long), weight=0.7), BlendPart(path=str(short), weight=0.3))
    return PretrainingConfig(blend=blend, length=LENGTH, held_out=0.2)


@pytest.fixture(scope="module")
def data(config: PretrainingConfig) -> PretrainingData:
    return PretrainingData(config, seed=3, vocabulary=VOCABULARY, tokenizer="d")


def batch(step: int) -> range:
    return range(step * BATCH, (step + 1) * BATCH)


def inputs(rows: Iterable[TokenBatch]) -> Counter[int]:
    """Tokens that are read, padding apart."""
    return Counter(t for row in rows for t in row.tokens.tolist()) - Counter({0: 10**9})


def predictions(rows: Iterable[TokenBatch]) -> Counter[tuple[tuple[int, ...], int]]:
    """(what is seen → next token) for every prediction."""
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    for row in rows:
        for at, target in zip(row.predictors.tolist(), row.targets.tolist(), strict=True):
            start = at - int(row.positions[at])
            found[tuple(row.tokens[start : at + 1].tolist()), target] += 1
    return found


def naive_predictions(data: PretrainingData, samples: range) -> Counter[tuple[tuple[int, ...], int]]:
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    for n in samples:
        cut = data.sample(n)
        for piece in np.split(cut.tokens, np.cumsum(cut.lengths)[:-1]):
            tokens = piece.tolist()
            for i in range(1, len(tokens)):
                found[tuple(tokens[:i]), tokens[i]] += 1
    return found


SHARES = [(ranks, row, equal) for ranks in (1, 2, 4, 7) for row in (1, 25, 60) for equal in (False, True)]


@pytest.mark.parametrize(("ranks", "row_tokens", "equal"), SHARES)
def test_any_layout_gets_the_same_predictions(data: PretrainingData, ranks: int, row_tokens: int, equal: bool) -> None:
    for step in range(12):
        rules = RowRules(ranks, row_tokens, multiple=4, equal=equal, in_step=equal)
        by_rank = [data.rows(batch(step), rules, rank) for rank in range(ranks)]
        rows = [row for each in by_rank for row in each]
        expected = naive_predictions(data, batch(step))
        assert predictions(rows) == expected
        assert sum(expected.values()) == data.predictions(batch(step))
        assert inputs(rows) == Counter(t for n in batch(step) for t in data.sample(n).tokens[:-1].tolist() if t)
        assert sum(float(row.weight.sum(dtype=np.float64)) for row in rows) == pytest.approx(1, rel=1e-6)
        for row in rows:
            check(row, row_tokens, multiple=4)
        if equal:
            assert len({len(each) for each in by_rank}) == 1
            assert len({len(row.tokens) for row in rows}) == 1


def check(row: TokenBatch, budget: int, multiple: int) -> None:
    """What the trainer relies on."""
    assert all(len(d) == 1 and d[0] > 0 for d in row.documents)
    assert sum(d[0] for d in row.documents) == len(row.tokens) == len(row.positions)
    assert row.positions.tolist() == [i for (n,) in row.documents for i in range(n)]
    assert len(row.tokens) % multiple == 0
    assert len(row.tokens) - multiple < max(budget, LENGTH)
    assert (row.advantage == 1).all()
    assert not row.old_logp.any()
    assert not row.reference_logp.any()
    assert len(row.predictors) == len(row.targets) == len(row.weight) == len(row.advantage)
    assert (row.tokens.dtype, row.predictors.dtype, row.weight.dtype) == (np.int64, np.int64, np.float32)


def read_order(rows_of_ranks: Sequence[Sequence[TokenBatch]]) -> list[tuple[int, ...]]:
    """Samples of a global batch in order, from the rows of all ranks: sample i went to rank i mod ranks."""
    queues = [
        [
            tuple(row.tokens[i : i + LENGTH].tolist())
            for row in rows
            for i in range(0, len(row.tokens) - LENGTH + 1, LENGTH)
        ]
        for rows in rows_of_ranks
    ]
    return [queues[i % len(queues)][i // len(queues)] for i in range(BATCH)]


@given(st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 60), st.integers(1, 3)), min_size=1, max_size=5))
def test_a_run_that_changes_its_layout_reads_samples_in_order(
    config: PretrainingConfig, data: PretrainingData, legs: list[tuple[int, int, int]]
) -> None:
    """Each leg starts from a fresh object, as a resumed run does."""
    found, step = [], 0
    for ranks, row_tokens, steps in legs:
        resumed = PretrainingData(config, seed=3, vocabulary=VOCABULARY)
        for _ in range(steps):
            rules = RowRules(ranks, row_tokens, multiple=1)
            found += read_order([resumed.rows(batch(step), rules, rank) for rank in range(ranks)])
            step += 1
    assert found == [tuple(data.sample(n).tokens[:-1].tolist()) for n in range(step * BATCH)]


def test_samples_follow_each_other_without_gap(config: PretrainingConfig, data: PretrainingData) -> None:
    """Samples of one store, put together, are its training tokens, each once an epoch."""
    sources, _ = data.blend.take(0, 400)
    for number, summary in enumerate(data.summary):
        samples = [data.sample(n).tokens for n in np.flatnonzero(sources == number).tolist()]
        assert all(a[-1] == b[0] for a, b in pairwise(samples))
        stream = np.concatenate([s[:-1] for s in samples])
        epochs = len(stream) // summary.tokens
        assert epochs >= 1
        for e in range(epochs):
            assert len(set(stream[e * summary.tokens : (e + 1) * summary.tokens].tolist())) == summary.tokens
        assert data.epochs(400)[number] == pytest.approx(len(stream) / summary.tokens)


def test_a_batch_can_be_kept_as_plain_arrays(config: PretrainingConfig, data: PretrainingData, tmp_path: Path) -> None:
    np.savez(tmp_path / "batch.npz", **data.batch(range(40, 44)))
    with np.load(tmp_path / "batch.npz") as batch:  # which refuses pickles
        assert batch["samples"].tolist() == [40, 41, 42, 43]
        for number, tokens, documents, path in zip(*(batch[n] for n in batch.files), strict=True):
            assert tokens.tolist() == data.sample(int(number)).tokens.tolist()
            store = IndexedDataset(Path(str(path)))
            for token, document in zip(tokens.tolist(), documents.tolist(), strict=True):
                assert token in store.document(document)
        assert set(batch["stores"].tolist()) == {part.path for part in config.blend}


def test_held_out_documents_are_read_once_and_never_trained_on(data: PretrainingData) -> None:
    trained = inputs(row for step in range(60) for row in data.rows(batch(step), RowRules()))
    held_out = held_out_tokens(data)
    assert not set(trained) & set(held_out)
    for ranks, row_tokens, equal in SHARES:
        rules = RowRules(ranks, row_tokens, multiple=4, equal=equal, in_step=equal)
        by_rank = [data.held_out_rows(rules, rank) for rank in range(ranks)]
        rows = [row for each in by_rank for row in each]
        assert inputs(rows) == Counter(held_out)
        assert Counter(t for row in rows for t in row.targets.tolist()) == held_out_targets(data)
        assert sum(float(row.weight.sum(dtype=np.float64)) for row in rows) == pytest.approx(1, rel=1e-6)
        for row in rows:
            check(row, row_tokens, multiple=4)
        if equal:
            assert len({(len(each), *(len(row.tokens) for row in each)) for each in by_rank}) == 1


def held_out_documents(data: PretrainingData) -> list[list[int]]:
    """By their tokens: all that training never reads in several epochs."""
    seen = {t for n in range(600) for t in data.sample(n).tokens.tolist()}
    stores = [IndexedDataset(Path(part.path)) for part in data.config.blend]
    documents = [store.document(d).tolist() for store in stores for d in range(store.documents)]
    return [d for d in documents if d and d[0] not in seen]


def held_out_tokens(data: PretrainingData) -> list[int]:
    tokens = [t for d in held_out_documents(data) for t in d]
    assert len(tokens) == sum(s.held_out_tokens for s in data.summary) > 0
    return [t for t in tokens if t]


def held_out_targets(data: PretrainingData) -> Counter[int]:
    return Counter(t for d in held_out_documents(data) for t in d[1:])


def test_the_order_depends_on_seed_and_blend_alone(config: PretrainingConfig, data: PretrainingData) -> None:
    def tokens(each: PretrainingData) -> list[list[int]]:
        return [each.sample(n).tokens.tolist() for n in range(20)]

    assert tokens(PretrainingData(config, seed=3, vocabulary=VOCABULARY)) == tokens(data)
    assert tokens(PretrainingData(config, seed=4, vocabulary=VOCABULARY)) != tokens(data)
    longer = config.model_copy(update={"length": 11})
    assert tokens(PretrainingData(longer, seed=3, vocabulary=VOCABULARY)) != tokens(data)


def test_batches_of_nothing_but_single_tokens_predict_nothing(tmp_path: Path) -> None:
    blend = (BlendPart(path=str(make_store(tmp_path / "s", [1] * 30))),)
    data = PretrainingData(PretrainingConfig(blend=blend, length=4), seed=0, vocabulary=VOCABULARY)
    rows = data.rows(range(3), RowRules(budget=8))
    assert data.predictions(range(3)) == 0
    assert [len(row.targets) for row in rows] == [0, 0]
    assert [len(row.tokens) for row in rows] == [32, 32]


def test_one_document_longer_than_many_samples(tmp_path: Path) -> None:
    blend = (BlendPart(path=str(make_store(tmp_path / "s", [33])) + ".bin"),)
    data = PretrainingData(PretrainingConfig(blend=blend, length=4), seed=0, vocabulary=VOCABULARY)
    assert np.concatenate([data.sample(n).tokens[:-1] for n in range(17)]).tolist() == [*range(33), *range(33), 0, 1]
    assert data.predictions(range(9)) == 9 * 4 - 1
    assert data.held_out_rows(RowRules()) == []


def test_steps_are_prefetched(data: PretrainingData) -> None:
    with Prefetch(lambda step: data.rows(batch(step), RowRules()), range(5, 9)) as steps:
        for step, rows in enumerate(steps, start=5):
            assert predictions(rows) == naive_predictions(data, batch(step))


def one(path: Path, **settings: object) -> PretrainingConfig:
    return PretrainingConfig.model_validate({"blend": [{"path": str(path)}], "length": 8, **settings})


def refusal(config: PretrainingConfig, vocabulary: int = VOCABULARY, tokenizer: str | None = None) -> str:
    with pytest.raises((BadIndexedDataset, BadBlend)) as caught:
        PretrainingData(config, seed=0, vocabulary=vocabulary, tokenizer=tokenizer)
    return str(caught.value)


def test_a_store_smaller_than_a_sample_is_refused(tmp_path: Path) -> None:
    path = make_store(tmp_path / "s", [4, 4])
    assert refusal(one(path)) == (
        f"{path} has 8 tokens in 2 documents to train on, and one sample takes 9: shorten length, hold out fewer "
        "documents, or give a larger store"
    )
    PretrainingData(one(path, length=7), seed=0, vocabulary=VOCABULARY)
    assert "has 4 tokens in 1 documents" in refusal(one(path, length=7, held_out=0.1))
    assert "has 0 tokens in 0 documents" in refusal(one(path, held_out=2))
    assert "has 0 tokens" in refusal(one(make_store(tmp_path / "empty", [0, 0])))


def test_a_store_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    path = make_store(tmp_path / "s", [40], tokenizer="e")
    for on_bad in ("stop", "skip"):
        assert refusal(one(path, on_bad=on_bad), tokenizer="d") == (
            f"{path} was made with another tokenizer (digest e, of {VOCABULARY} tokens) than the model's (digest d): "
            "tokenize its sources again, or train the model that it was made for"
        )


def test_tokens_that_the_model_does_not_know_are_refused_or_skipped(tmp_path: Path) -> None:
    path = make_store(tmp_path / "s", [10, 10, 10])
    (tmp_path / "s.json").unlink()
    assert refusal(one(path), vocabulary=15) == (
        f"{path}.bin, byte 60: token 15 is not in a vocabulary of 15: the store was made with another tokenizer"
    )
    data = PretrainingData(one(path, on_bad="skip"), seed=0, vocabulary=20)
    assert (data.summary[0].documents, data.summary[0].skipped_documents) == (2, 1)
    assert {t for n in range(9) for t in data.sample(n).tokens.tolist()} == set(range(20))


def test_a_truncated_store_is_refused_or_its_lost_documents_are_skipped(tmp_path: Path) -> None:
    path = make_store(tmp_path / "s", [10, 10, 10])
    whole = (tmp_path / "s.bin").read_bytes()
    (tmp_path / "s.bin").write_bytes(whole[:101])
    assert refusal(one(path)) == (
        f"{path}.bin is truncated at byte 101, and its index needs 120 bytes: copy or make it again"
    )
    data = PretrainingData(one(path, on_bad="skip"), seed=0, vocabulary=VOCABULARY)
    assert (data.summary[0].documents, data.summary[0].skipped_documents) == (2, 1)
    assert {t for n in range(9) for t in data.sample(n).tokens.tolist()} == set(range(20))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"held_out": 1.5}, "share below 1 or a whole number"),
        ({"held_out": -0.1}, "greater than or equal to 0"),
        ({"blend": []}, "at least 1 item"),
        ({"blend": [{"path": "s", "weight": 0}]}, "greater than 0"),
        ({"blend": [{"path": "s", "weight": float("inf")}]}, "finite"),
        ({"lenght": 3}, "Extra inputs"),
    ],
)
def test_a_bad_configuration_is_refused(tmp_path: Path, settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(words)):
        one(tmp_path, **settings)
