"""Units after a number: split off, brought to one form, compared. A missing unit agrees with any."""

import re

_SPELLINGS = {
    "mm": "millimeter millimetre",
    "cm": "centimeter centimetre",
    "m": "meter metre",
    "km": "kilometer kilometre",
    "in": "inch inche",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "g": "gram gramme",
    "kg": "kilogram kilo",
    "lb": "pound",
    "oz": "ounce",
    "l": "liter litre",
    "ml": "milliliter millilitre",
    "s": "sec second",
    "min": "minute",
    "h": "hr hour",
    "degree": "deg \\circ",
    "dollar": "usd buck",
    "cent": "¢",
    "mi/h": "mph",
    "km/h": "kph kmh",
}
_CANONICAL = {name: unit for unit, names in _SPELLINGS.items() for name in names.split()}
_LONG = sorted((word for word in {*_SPELLINGS, *_CANONICAL, "unit"} if len(word) > 1 and word.isalpha()), key=len)
_WORD = "|".join(f"{word}s?" for word in reversed(_LONG))
POWERED = re.compile(rf"(?:\b(?:{_WORD})|^\sm)\s*\^\s*(?:\{{\s*[23]\s*\}}|[23])(?![0-9])", re.IGNORECASE)
"""A unit with its power, after a number. In m^2 without a space before it, m may be a variable."""
_TAIL = re.compile(
    rf"(?:(?<=[\s}})])|(?<=[0-9]))(?:(?:square|cubic|sq)\.?\s+)?(?:{_WORD})\b(?:\s*(?:/|\s+per\s+)\s*[a-z]+)?"
    r"(?:\s*\^\s*(?:\{[23]\}|[23]))?$"
)
_MODULUS = re.compile(r"\s*\(?\s*\\?p?mod\s*(?:\{\s*(\w+)\s*\}|(\w+))\s*\)?$")
_BASED = re.compile(r"([0-9]+)_(?:\{\s*([0-9]{1,2})\s*\}|([0-9]{1,2}))")
_DEGREES = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*$")


def split_unit(text: str) -> tuple[str, str]:
    r"""Splits the unit off a clean answer: words (25\pi cm), degrees, a modulus, the base of a number."""
    if based := _BASED.fullmatch(text):
        return based[1], f"base {based[2] or based[3]}"
    if (modulus := _MODULUS.search(text)) and modulus.start():
        return text[: modulus.start()].rstrip(), f"mod {modulus[1] or modulus[2]}"
    tail = _DEGREES.search(text) or _TAIL.search(text)
    if tail and text[: tail.start()].strip():
        return text[: tail.start()].rstrip(), canonical(tail[0])
    return text, ""


def canonical(unit: str) -> str:
    """A unit in canonical form: "square metres" and "m^2" are m^2, "miles per hour" is mi/h; other words stay."""
    text = re.sub(r"[.,;:(){}]", " ", unit.casefold())
    text = re.sub(r"\s*\^\s*", "^", re.sub(r"\bper\b", "/", text)).replace("^\\circ", " degree ")
    words = [word for part in re.split(r"(/)|\s+", text) if (word := part)]
    powers = {"square": "^2", "sq": "^2", "cubic": "^3"}
    power = next((powers[word] for word in words if word in powers), "")
    names = [_name(word) for word in words if word not in powers]
    if names and power:
        names[0] += power
    return re.sub(r" ?/ ?", "/", " ".join(names))


def agree(one: str, other: str) -> bool:
    """Whether two canonical units may be the same: equal, or one missing, or one a prefix of the other by words."""
    shorter, longer = sorted((one, other), key=len)
    return longer == shorter or not shorter or longer.startswith(f"{shorter} ")


def _name(word: str) -> str:
    stem, caret, power = word.partition("^")
    singular = stem if stem in _SPELLINGS or len(stem) < 3 else stem.removesuffix("s").removesuffix("e")
    for candidate in (stem, stem.removesuffix("s"), singular):
        if candidate in _SPELLINGS or candidate in _CANONICAL:
            return _CANONICAL.get(candidate, candidate) + caret + power
    return singular + caret + power
