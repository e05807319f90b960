"""The reference of all keys of a recipe: types, defaults, bounds and descriptions, read from pydantic's JSON schema."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lockstep.cluster.recipe.errors import RecipeError, unknown_key
from lockstep.cluster.recipe.schema import Recipe

Schema = Mapping[str, Any]
INTRODUCTION = """\
# Keys of a recipe

This page is what `lockstep recipe keys --format markdown` prints; `lockstep recipe keys rl.flow` prints a part of it.

A recipe is a TOML file, or the name of one that ships with the package (`lockstep recipe list`). The command line sets
keys as well, as in `--set rl.group_size=16`. A relative path means the folder in which the command is given.

`extends = "quickstart.toml"`, or a list of recipes, puts a recipe on top of others: tables are merged, any other value
takes the place of theirs, and a later one of the list stands on top of an earlier one. They are paths from the recipe's
own folder, or names of recipes that ship. Relative paths in a recipe of yours that is extended mean its own folder.

    lockstep recipe show quickstart --set rl.group_size=16     # every key with its value
    lockstep recipe check quickstart                           # whether it can run, without a cluster
    lockstep recipe diff grpo-gsm8k-smollm2 grpo-gsm8k-cluster # keys whose values differ"""
_SECTIONS = "#/$defs/"
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


@dataclass(frozen=True)
class Key:
    """A key, and what may stand there."""

    name: str
    values: str
    """Types with their bounds, or choices, as `integer ≥ 1`."""
    default: str
    """As it is written in TOML; empty where there is none."""
    required: bool
    description: str

    def __str__(self) -> str:
        """Two lines: the key with its default, then what may stand there and what it means."""
        default = f" = {self.default}" if self.default else " (required)" if self.required else ""
        return f"{self.name}{default}\n    {self.values}: {self.description}"


@dataclass(frozen=True)
class Section:
    """The keys of a table. In `sections` names are relative to it."""

    name: str = field(compare=False)
    description: str = field(compare=False)
    is_list: bool = field(compare=False)
    keys: tuple[Key, ...]
    sections: tuple["Section", ...]

    @property
    def heading(self) -> str:
        """As it is written in TOML."""
        return f"[[{self.name}]]" if self.is_list else f"[{self.name}]"

    def whole(self, key: Key) -> str:
        """The whole name of one of the keys."""
        return f"{self.name}.{key.name}" if self.name else key.name

    def __iter__(self) -> Iterator["Section"]:
        """The section and all sections inside of it, with whole names."""
        yield self
        for section in self.inner:
            yield from section

    @property
    def inner(self) -> Iterator["Section"]:
        """The sections directly inside, with whole names."""
        for section in self.sections:
            yield replace(section, name=f"{self.name}.{section.name}") if self.name else section


def reference() -> Section:
    """The whole recipe; its own name is empty."""
    schema = Recipe.model_json_schema()
    return _section("", "", False, schema, schema["$defs"], {})


def sections_below(prefix: str) -> Iterator[Section]:
    """The sections with keys whose whole names begin so, and these keys under their whole names.

    Raises:
        RecipeError: when there is none; names the nearest.
    """
    found = False
    for section in reference():
        named = (replace(key, name=section.whole(key)) for key in section.keys)
        if keys := tuple(key for key in named if key.name.startswith(prefix)):
            found = True
            yield replace(section, keys=keys)
    if not found:
        raise RecipeError(unknown_key(prefix.split("."), Recipe))


def markdown() -> str:
    """The reference as a page. Sections with the same keys and defaults have one table."""
    return "\n".join([INTRODUCTION, *_page(reference(), {})]) + "\n"


def _page(section: Section, shown: dict[Section, str]) -> Iterator[str]:
    """The lines of a section and of those inside; `shown` has the headings of those that have a table."""
    if section.name:
        yield from ("", f"## `{section.heading}`", "", f"{section.description}.")
    if section in shown:
        yield from ("", f"Its keys are those of `{shown[section]}`.")
        return
    shown[section] = section.heading
    if section.keys:
        yield from ("", "| key | values | default | meaning |", "| --- | --- | --- | --- |", *map(_row, section.keys))
    for inner in section.inner:
        yield from _page(inner, shown)


def _row(key: Key) -> str:
    default = f"`{key.default}`" if key.default else "required" if key.required else ""
    cells = (f"`{key.name}`", key.values, default, key.description)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _section(name: str, description: str, is_list: bool, schema: Schema, types: Schema, defaults: Schema) -> Section:
    """The section of a JSON schema, where `defaults` go before those of its type."""
    keys, sections = list[Key](), list[Section]()
    for inner, given in schema["properties"].items():
        entry = given | {"default": defaults[inner]} if inner in defaults else given
        options = _options(entry)
        models = [model for option in options for model in _models(option)]
        if not models:
            keys.append(_key(inner, entry, options))
        for model in models:
            own, is_inner_list = entry.get("default"), any("items" in option for option in options)
            said = _said(entry if len(models) == 1 else {}, types[model])
            sections.append(_section(inner, said, is_inner_list, types[model], types, own or {}))
    return Section(name, description, is_list, tuple(keys), tuple(sections))


def _said(entry: Schema, model: Schema) -> str:
    """What a section is: as its place in the recipe describes it, or else its type."""
    text: str = entry.get("description") or model["description"].partition("\n\n")[0].replace("\n", " ")
    text = text[0].upper() + text[1:].rstrip(".")
    return text if entry.get("default", {}) is not None else f"{text}. There is none unless it is given"


def _key(name: str, entry: Schema, options: Sequence[Schema]) -> Key:
    default = entry.get("default")
    return Key(
        name,
        values=" or ".join(map(_values, options)),
        default="" if default is None else json.dumps(default, ensure_ascii=False),
        required="default" not in entry,
        description=entry.get("description", ""),
    )


def _options(schema: Schema) -> list[Schema]:
    """The types that a value may have; null is none, since TOML has none."""
    several = schema.get("anyOf") or schema.get("oneOf")
    if several:
        return [option for each in several for option in _options(each)]
    return [] if schema.get("type") == "null" else [schema]


def _models(option: Schema) -> list[str]:
    """The type of a section, or of the sections of a list."""
    place = option.get("$ref") or option.get("items", {}).get("$ref", "")
    return [place.removeprefix(_SECTIONS)] if place else []


def _values(option: Schema) -> str:
    choices = option.get("enum") or ([option["const"]] if "const" in option else [])
    if choices:
        return ", ".join(map(json.dumps, choices))
    if option["type"] == "array":
        return f"list of: {_values(option['items'])}"
    if isinstance(inner := option.get("additionalProperties"), dict):
        return f"table of: {_values(inner)}"
    kind = "table" if option["type"] == "object" else str(option["type"])
    bounds = ", ".join(f"{sign} {option[name]:.15g}" for name, sign in _BOUNDS.items() if name in option)
    return f"{kind} {bounds}".strip()
