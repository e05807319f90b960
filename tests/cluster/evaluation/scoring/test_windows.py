"""Rolling windows: each token is scored once, with as much context as is promised."""

from hypothesis import given
from hypothesis import strategies as st

from lockstep.cluster.evaluation.scoring.windows import Window, rolling_windows


@given(st.data())
def test_each_token_is_scored_once_with_enough_context(data: st.DataObject) -> None:
    window = data.draw(st.integers(1, 12))
    stride = data.draw(st.integers(1, window))
    given_tokens = data.draw(st.integers(1, 30))
    tokens = data.draw(st.integers(given_tokens, 60))
    found = rolling_windows(tokens, given_tokens, window, stride)
    assert [t for w in found for t in range(w.start, w.end)] == list(range(given_tokens, tokens))
    for each in found:
        assert each.end - 1 - each.begin <= window
        assert each.start - each.begin >= min(each.start, window - stride + 1)


def test_a_text_that_fits_is_one_window_and_a_stride_of_the_window_is_lm_evals() -> None:
    assert rolling_windows(9, 1, 8, 4) == [Window(0, 1, 9)]
    # lm-eval's get_rolling_token_windows(range(10), prefix, max_seq_len=4, context_len=1) with the prefix put in front.
    assert rolling_windows(11, 1, 4, 4) == [Window(0, 1, 5), Window(4, 5, 9), Window(6, 9, 11)]
    assert rolling_windows(1, 1, 4, 2) == []
