"""Rolling windows over texts that are longer than a model's context: each token is scored once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Tokens [start, end) of a text are scored, after [begin, start)."""

    begin: int
    start: int
    end: int


def rolling_windows(tokens: int, given: int, window: int, stride: int) -> list[Window]:
    """Split a text into windows for perplexity with a sliding window; each token is scored in one of them.

    The page "Perplexity of fixed-length models" of Hugging Face transformers explains the strategy; a stride of
    `window` is lm-eval's `loglikelihood_rolling`.

    Args:
        tokens: of the text, with those that are given.
        given: tokens at its begin that are not scored, 1 or more.
        window: tokens that the model reads at most, N. The last token of a window is predicted and not read.
        stride: tokens that a window scores at most once the first one is full, M ≤ N.

    Returns:
        Windows in order; each scored token has min(what stands before it, N − M + 1) tokens of context or more.
    """
    assert given >= 1
    assert 1 <= stride <= window
    found: list[Window] = []
    start = given
    while start < tokens:
        full = window + 1 if start == given < window + 1 else start + stride
        end = min(tokens, full)
        found.append(Window(max(0, end - 1 - window), start, end))
        start = end
    return found
