"""Tables of tokens give back what was put in, as samples whose prompts end where learning begins."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.data.conversations.assistant_mask import MaskedTokens
from lockstep.data.conversations.token_table import TokenTable

SEQUENCES = st.builds(
    lambda pairs, last: MaskedTokens([t for t, _ in pairs] + [last], [m for _, m in pairs] + [True]),
    st.lists(st.tuples(st.integers(0, 1 << 18), st.booleans()), min_size=1, max_size=8),
    st.integers(0, 1 << 18),
)


@settings(max_examples=40)
@given(st.lists(st.lists(SEQUENCES, min_size=1, max_size=3), max_size=5))
def test_samples_hold_the_tokens_and_the_mask(conversations: list[list[MaskedTokens]]) -> None:
    made = TokenTable.of(conversations)
    for table in (made, TokenTable.from_arrow(made.to_arrow())):
        assert len(table) == len(conversations)
        for number, sequences in enumerate(conversations):
            found = table.samples(number)
            assert len(found) == len(sequences)
            for sample, sequence in zip(found, sequences, strict=True):
                begun = max(1, sequence.taught.index(True))
                assert sample.prompt.tolist() == sequence.tokens[:begun]
                assert sample.completion.tolist() == sequence.tokens[begun:]
                assert sample.weight.tolist() == sequence.taught[begun:]
            assert table.prompt(number) == found[0].prompt.astype(np.int32).tobytes()


def test_a_table_is_read_back_from_parquet(tmp_path: Path) -> None:
    made = TokenTable.of([[MaskedTokens([1, 2, 3], [False, True, True])], [MaskedTokens([4, 5], [False, True])] * 2])
    pq.write_table(made.to_arrow(), tmp_path / "table.parquet", row_group_size=2)
    found = TokenTable.from_arrow(pq.read_table(tmp_path / "table.parquet"))
    for name in ("tokens", "taught", "ends", "conversations"):
        ours, theirs = getattr(made, name), getattr(found, name)
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)
