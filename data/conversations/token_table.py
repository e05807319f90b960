"""Tokenized conversations in flat arrays: five bytes a token, to be kept in memory and as one Arrow table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lockstep.data.batch import Ints, Sample, sample
from lockstep.data.conversations.assistant_mask import MaskedTokens

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class TokenTable:
    """The sequences of conversations, one behind the other; `len` is the number of conversations."""

    tokens: NDArray[np.int32]
    """[T] of all sequences."""
    taught: Bools
    """[T] whether each is learned from."""
    ends: Ints
    """[S] where each sequence ends in them."""
    conversations: Ints
    """[S] the conversation that each sequence is of; its sequences lie together."""

    @classmethod
    def of(cls, conversations: Iterable[Sequence[MaskedTokens]]) -> "TokenTable":
        """The table of the sequences of conversations."""
        tokens, taught, lengths, numbers = [np.zeros(0, np.int32)], [np.zeros(0, np.bool_)], [], []
        for number, sequences in enumerate(conversations):
            for each in sequences:
                tokens.append(np.array(each.tokens, np.int32))
                taught.append(np.array(each.taught, np.bool_))
                lengths.append(len(each.tokens))
                numbers.append(number)
        ends = np.cumsum(np.array(lengths, np.int64), dtype=np.int64)
        return cls(np.concatenate(tokens), np.concatenate(taught), ends, np.array(numbers, np.int64))

    def __len__(self) -> int:
        return int(self.conversations[-1]) + 1 if len(self.conversations) else 0

    def samples(self, conversation: int) -> list[Sample]:
        """The sequences of a conversation as samples: the prompt ends where the first token is learned from.

        Behind it, tokens that are not learned from have weight 0 and the others 1; see `weighted`.
        """
        first, last = np.searchsorted(self.conversations, (conversation, conversation + 1))
        return [self._sample(int(number)) for number in range(first, last)]

    def prompt(self, conversation: int) -> bytes:
        """The tokens before the first that is learned from, as a key to compare conversations by."""
        return self._parts(int(np.searchsorted(self.conversations, conversation)))[0].tobytes()

    def to_arrow(self) -> pa.Table:
        """A row for each sequence: `conversation`, and lists of `tokens` and `taught`."""
        offsets = pa.array(np.concatenate([[0], self.ends]), pa.int64())
        columns = {"tokens": pa.array(self.tokens), "taught": pa.array(self.taught)}
        lists = {name: pa.LargeListArray.from_arrays(offsets, column) for name, column in columns.items()}
        return pa.table({"conversation": pa.array(self.conversations), **lists})

    @classmethod
    def from_arrow(cls, table: pa.Table) -> "TokenTable":
        """The table that `to_arrow` made."""
        lists = {name: table[name].combine_chunks() for name in ("tokens", "taught")}
        flat = {name: each.flatten().to_numpy(zero_copy_only=False) for name, each in lists.items()}
        ends = np.cumsum(lists["tokens"].value_lengths().to_numpy(), dtype=np.int64)
        return cls(flat["tokens"], flat["taught"], ends, table["conversation"].to_numpy())

    def _sample(self, number: int) -> Sample:
        prompt, completion, taught = self._parts(number)
        return sample(prompt, completion, weight=taught.astype(np.float32))

    def _parts(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.int32], Bools]:
        """The prompt of a sequence, what is behind it, and which of that is learned from."""
        part = slice(self.ends[number - 1] if number else 0, self.ends[number])
        tokens, taught = self.tokens[part], self.taught[part]
        begun = max(1, int(taught.argmax()))  # nothing predicts the first token
        return tokens[:begun], tokens[begun:], taught[begun:]
