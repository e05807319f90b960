"""Diversity of generated texts: distinct n-grams and self-BLEU, over tokens."""

import math
from collections import Counter
from collections.abc import Sequence

Tokens = Sequence[int]


def distinct(texts: Sequence[Tokens], n: int) -> float:
    """distinct-n: different n-grams of all texts as a share of all their n-grams (Li et al. 2016, arXiv:1510.03055).

    NaN where no text has n tokens.
    """
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def self_bleu(texts: Sequence[Tokens], n: int = 4) -> float:
    """Self-BLEU: mean BLEU-n of each text against all others, 1 where they repeat each other (arXiv:1802.01886).

    NaN with fewer than two texts that have tokens.
    """
    kept = [text for text in texts if len(text)]
    if len(kept) < 2:
        return math.nan
    return sum(bleu(text, kept[:i] + kept[i + 1 :], n) for i, text in enumerate(kept)) / len(kept)


def bleu(text: Tokens, references: Sequence[Tokens], n: int = 4) -> float:
    """BLEU of one text (Papineni et al. 2002, P02-1040): geometric mean of clipped n-gram precisions, brevity penalty.

    Orders that the text is too short for are left out. A precision of 0 makes the whole 0, as in the paper, without
    smoothing.
    """
    orders = range(1, min(n, len(text)) + 1)
    precisions = [_clipped(text, references, order) for order in orders]
    if not precisions or min(precisions) == 0:
        return 0.0
    closest = min((len(reference) for reference in references), key=lambda length: (abs(length - len(text)), length))
    penalty = min(1.0, math.exp(1 - closest / len(text)))
    return penalty * math.exp(sum(map(math.log, precisions)) / len(precisions))


def _clipped(text: Tokens, references: Sequence[Tokens], n: int) -> float:
    """Share of a text's n-grams that stand in a reference, each as often as in the one that has it most often."""
    counts, most = Counter(_grams(text, n)), Counter[tuple[int, ...]]()
    for reference in references:
        most |= Counter(_grams(reference, n))
    return sum((counts & most).values()) / sum(counts.values())


def _grams(text: Tokens, n: int) -> list[tuple[int, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
