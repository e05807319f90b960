r"""Normalises how answers are written: LaTeX's variants, Unicode's symbols, currency and spacing get one form.

Text in, text out: nothing here knows numbers or sympy. Every pattern takes time linear in its text.
"""

import re
from fractions import Fraction

_SYMBOLS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "÷": r"\div ",
        "∞": r"\infty ",
        "π": r"\pi ",
        "θ": r"\theta ",
        "±": r"\pm ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "≈": r"\approx ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "ℝ": r"\mathbb{R}",
        "°": r"^\circ ",
        "²": "^2",
        "³": "^3",
        "½": r" \frac{1}{2}",
        "¼": r" \frac{1}{4}",
        "¾": r" \frac{3}{4}",
        "⟨": "(",
        "⟩": ")",
        "’": "'",
        "\u00a0": " ",
        "\u202f": " ",
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
    }
)

_TEXT = r"\\(?:text(?:bf|it|rm|sf|normal)?|math(?:rm|bf|it|sf)|mbox|hbox|emph|underline|boldsymbol|operatorname)"
_REPEATING = re.compile(
    r"(?<![\d.])([0-9]{0,9})\.([0-9]{0,9})(?:\\(?:overline|bar|dot)\s*(?:\{([0-9]{1,9})\}|([0-9]))|\(([0-9]{1,9})\))"
)

_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"√\s*\(([^()]*)\)|√\s*([0-9.]+|[a-zA-Z])"), r"\\sqrt{\1\2}"),
    (re.compile(rf"{_TEXT}\s*\{{([^{{}}]*)\}}\s*\^\s*(?:\{{\s*([23])\s*\}}|([23]))"), r" \1^\2\3 "),
    (re.compile(rf"{_TEXT}\s*\{{([^{{}}]*)\}}|\\math(?:rm|it)\s+([a-zA-Z])(?![a-zA-Z])"), r" \1\2 "),
    (
        re.compile(
            r"(?<!\\)\\[,!]|\\?[$€£¥₹]|(?<!\\)\\[()\[\]]|[`\"]"
            r"|\\(?:left|right|middle|[bB]igg?[lmr]?|displaystyle|bf|rm)(?![a-zA-Z])|\\(?:text)?color\s*\{[a-zA-Z]*\}"
        ),
        "",
    ),
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\frac\s*([0-9a-zA-Z])\s*([0-9a-zA-Z])(?![0-9a-zA-Z{])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*([0-9])\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"\\sqrt\s*([0-9a-zA-Z])"), r"\\sqrt{\1}"),
    (re.compile(r"\\(?:varnothing|O)(?![a-z])|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\\([lg])eq(?:slant)?(?![a-z])"), r"\\\1e "),
    (re.compile(r"\\neq(?![a-z])"), r"\\ne "),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"\\langle(?![a-z])"), "("),
    (re.compile(r"\\rangle(?![a-z])"), ")"),
    (re.compile(r"\\begin\{[bBvp]?matrix\}"), r"\\begin{pmatrix}"),
    (re.compile(r"\\end\{[bBvp]?matrix\}"), r"\\end{pmatrix}"),
    (re.compile(r"(?i:(?<![a-z\\])infinity(?![a-z]))"), r"\\infty "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\q?quad(?![a-zA-Z])|(?<!\\)\\[;:]|(?<!\\)\\(?=\s)|~|\s+"), " "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"^\s*\\?(?:approx|sim)(?![a-z])\s*|^\s*=\s*(?!=)"), ""),
)


_SYNONYMS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\\[lc]?dots[bcimo]?(?![a-zA-Z])|\.{3}|…"), r"\\ldots "),
    (re.compile(r"\\(?:long)?rightarrow(?![a-zA-Z])|→"), r"\\to "),
    (re.compile(r"(?<=[0-9])\s+(?=[a-zA-Z])"), ""),
    (re.compile(r"\s+"), " "),
)
_BAR = re.compile(r"\\(?:mid|vert|colon)(?![a-zA-Z])|:")
_IDLE_SPACE = re.compile(r"(?<![0-9a-zA-Z])\s+|\s+(?![0-9a-zA-Z])")


_TURNED = re.compile(r"([\[\]])([^\[\](),]*,[^\[\](),]*)([\[\]])")


def clean(text: str) -> str:
    """The text in normal form: no currency, math delimiters, spacing commands, quotes or final punctuation.

    An interval ]a, b[ has the brackets (a, b).
    """
    text = _REPEATING.sub(_as_fraction, text.translate(_SYMBOLS))
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = text.rstrip(" .,;:").lstrip()
    if turned := _TURNED.fullmatch(text):
        left, ends, right = turned.groups()
        return f"{left.replace(']', '(')}{ends}{right.replace('[', ')')}"
    return text


def as_words(text: str) -> str:
    """Clean text in the form in which words are compared: no enclosing brackets, spaces at signs, plural or case.

    The case of LaTeX commands and of formulas is kept. Dots, arrows and the bars of set-builders have one form each.
    """
    for pattern, replacement in _SYNONYMS:
        text = pattern.sub(replacement, text)
    text = re.sub(r"^\(\s*(\w+)\s*\)$|^(\w)\)$", r"\1\2", text)
    text = re.sub(r"_\{([0-9a-zA-Z]+)\}", r"_\1", text)
    text = re.sub(r"\s*([:,;=<>+*/^|])\s*", r"\1", text)
    if "\\" in text:
        return _IDLE_SPACE.sub("", _BAR.sub("|", text) if r"\{" in text else text)
    return " ".join(_singular(word) for word in text.casefold().replace("p.m", "pm").replace("a.m", "am").split())


def _singular(word: str) -> str:
    return word.rstrip(".").removesuffix("s") if len(word) > 3 else word.rstrip(".")


def _as_fraction(match: re.Match[str]) -> str:
    """0.1666… written as 0.1\\overline{6} is 15/90: its digits less those before the period, over nines and zeros."""
    whole, fixed = match[1], match[2]
    period = match[3] or match[4] or match[5]
    top = int(whole + fixed + period) - int((whole + fixed) or 0)
    value = Fraction(top, (10 ** len(period) - 1) * 10 ** len(fixed))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
