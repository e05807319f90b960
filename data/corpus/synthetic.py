"""Synthetic text: an indexed dataset of random documents, to try layouts and to measure speed without real text."""

from pathlib import Path

import numpy as np

from lockstep.data.corpus.indexed_dataset import Note
from lockstep.data.corpus.indexed_dataset_writer import IndexedDatasetWriter
from lockstep.data.corpus.loader import PretrainingConfig


def write_random_store(path: Path, *, vocabulary: int, tokens: int, seed: int, mean_length: int = 200) -> Path:
    """Write random documents of geometric lengths, in which the next token mostly follows from the last.

    Tokens are drawn by Zipf's law from a vocabulary of which 0 ends each document; with probability ¾ the next token
    is a fixed function of the last.
    """
    draw = np.random.default_rng(seed)
    lengths = 2 + draw.geometric(1 / mean_length, size=max(2, tokens // mean_length))
    follower = draw.permutation(vocabulary)
    ranks = np.arange(1, vocabulary)
    drawn = 1 + draw.choice(vocabulary - 1, size=int(lengths.sum()), p=(1 / ranks) / (1 / ranks).sum())
    follows = draw.random(len(drawn)) < 0.75
    for place in np.flatnonzero(follows[1:]) + 1:
        drawn[place] = max(1, follower[drawn[place - 1]])
    drawn[np.cumsum(lengths) - 1] = 0
    writer = IndexedDatasetWriter(path, vocabulary=vocabulary)
    writer.add(drawn, lengths)
    writer.finish(
        Note(
            tokenizer="",
            vocabulary=vocabulary,
            end=0,
            made_by=f"write_random_store, seed {seed}",
            documents=writer.documents,
            tokens=writer.tokens,
        )
    )
    return path


def random_text(store: Path, *, vocabulary: int, context: int, samples_per_step: int, seed: int) -> PretrainingConfig:
    """Write random documents to a store, enough for eight steps, and return the configuration that reads them.

    Samples have 32 tokens, or fewer where the model's context is shorter; after eight steps they come again.
    """
    length = min(32, context)
    tokens = max(4096, 8 * samples_per_step * length)
    write_random_store(store, vocabulary=vocabulary, tokens=tokens, seed=seed, mean_length=length // 2)
    return PretrainingConfig.model_validate({"blend": [{"path": str(store)}], "length": length, "held_out": 0.05})
