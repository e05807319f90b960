"""Studies by name, and their settings from texts."""

import pytest

from lockstep.cluster.evaluation.studies.registry import settings_of, study_names, study_of, summary_of


def test_every_module_of_the_catalog_is_a_study_that_says_what_it_is() -> None:
    assert {"cache", "generation", "step"} <= set(study_names())
    for name in study_names():
        study = study_of(name)
        assert summary_of(name).endswith(".")
        assert study.places(settings_of(study, {}))
        assert set(study.slopes) <= set(study.units)


def test_settings_are_read_from_texts() -> None:
    study = study_of("generation")
    settings = settings_of(study, {"temperature": "0.5, 2", "seeds": "4"})
    assert (study.places(settings), settings.seeds) == ((0.5, 2.0), 4)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"temprature": "1"}, "--set temprature is no setting: did you mean temperature"),
        ({"temperature": "0"}, "--set temperature=0: Input should be greater than or equal to 0.001"),
        ({"seeds": "2"}, "--set seeds=2: Input should be greater than or equal to 3"),
        ({"samples": "many"}, "--set samples=many: Input should be a valid integer"),
    ],
)
def test_settings_that_are_not_allowed_are_named(given: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        settings_of(study_of("generation"), given)


def test_an_unknown_study_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="there is no study 'generate': did you mean 'generation'"):
        study_of("generate")
