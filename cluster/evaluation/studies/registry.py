"""Finds studies: each is a module of `catalog`, named as its module, whose docstring's first line says what it is."""

import pkgutil
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from pydantic import ValidationError

from lockstep.cluster.evaluation.studies import catalog
from lockstep.cluster.evaluation.studies.study import Study, StudySettings


def study_names() -> list[str]:
    """The names of all studies."""
    return sorted(module.name for module in pkgutil.iter_modules(catalog.__path__))


def summary_of(name: str) -> str:
    """The first line of a study's docstring."""
    return (_module(name).__doc__ or "").split("\n")[0]


def study_of(name: str) -> Study:
    """The study of this name.

    Raises:
        ValueError: names the closest study that there is.
    """
    if name not in study_names():
        near = get_close_matches(name, study_names(), 1, cutoff=0.0)
        raise ValueError(f"there is no study {name!r}: did you mean {near[0]!r}? `lockstep study --list` names all")
    found: Study = _module(name).STUDY
    return found


def settings_of(study: Study, given: Mapping[str, str]) -> StudySettings:
    """Settings from texts: values of a tuple are separated by commas.

    Raises:
        ValueError: names the key that is unknown, with the closest one, or whose value is not allowed.
    """
    fields = study.settings.model_fields
    for key in given:
        if key not in fields:
            near = get_close_matches(key, fields, 1, cutoff=0.0)
            raise ValueError(f"--set {key} is no setting: did you mean {near[0]}? All are {', '.join(fields)}")
    try:
        return study.settings.model_validate({key: _parsed(study, key, text) for key, text in given.items()})
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else study.axis
        raise ValueError(f"--set {key}={given.get(key, '')}: {first['msg']}") from error


def _parsed(study: Study, key: str, text: str) -> Any:
    default = study.settings.model_fields[key].default
    return [part.strip() for part in text.split(",") if part.strip()] if isinstance(default, tuple) else text


def _module(name: str) -> Any:
    return import_module(f"{catalog.__name__}.{name}")
