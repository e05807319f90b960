"""`lockstep parity`: layouts that agree pass, one that does not fails, and what cannot run is one sentence."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockstep.cluster.checks.parity import FP32_BOUND, Course, Difference, Parity, Runs, difference, job_of, table
from lockstep.cluster.recipe.errors import RecipeError
from lockstep.cluster.recipe.load import load_recipe, parse_layout
from lockstep.cluster.recipe.model_source import starting_point
from lockstep.distributed.checkpoint.tensors import Box, Source, WeightsOnly
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.rank_pool import RankPool
from tests.cluster.cli_process import Command, refused

RECIPE = Path(__file__).parents[3] / "recipes" / "parity-tiny.toml"


def parity(log: Path, *words: str) -> tuple[int, str]:
    command = Command(log, "parity", str(RECIPE), *words)
    try:
        return command.wait(), command.output
    finally:
        command.kill()


@pytest.mark.exhaustive
def test_layouts_agree_with_one_process(tmp_path: Path) -> None:
    layouts = ("tensor=2,sequence=true", "pipeline=2,virtual=2", "context=2", "data=2,zero=3")
    code, output = parity(tmp_path / "log", "--steps", "3", "--layouts", *layouts)
    assert code == 0, output
    assert output.count("same") == len(layouts)
    assert "noise floor" in " ".join(output.split())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--layouts", "tensor=3"), "layout.tensor=3 does not divide the model's 8 query heads: use one of 1, 2, 4"),
        (("--layouts", "tensr=2"), "tensr is not a key of this recipe; the nearest is tensor"),
        (("--layouts", "pipeline=2,zero=3"), "use zero=1 or zero=2 with a pipeline"),
        (("--layouts", "tensor"), "is not of the form"),
    ],
    ids=str,
)
def test_what_cannot_run_is_one_sentence(words: tuple[str, ...], sentence: str) -> None:
    assert sentence in refused("parity", str(RECIPE), *words)


def test_a_layout_is_read_from_its_keys() -> None:
    assert parse_layout("tensor=2,sequence=true, zero=2") == Layout(tensor=2, sequence=True, zero=2)
    assert parse_layout("pipeline=2,stages=[1,3],context_by=ring") == Layout(
        pipeline=2, stages=(1, 3), context_by="ring"
    )
    with pytest.raises(RecipeError, match="zero=4"):
        parse_layout("zero=4")


def test_what_leaves_the_bound_does_not_hold() -> None:
    one = Course((2.0, 1.0), (3.0, 4.0))
    same = difference(one, [Course((2.0, 1.0), (3.0, 4.0), 1e-6, "w")])
    assert same == Difference(0.0, 0.0, 1e-6, "w")
    off = difference(one, [one, Course((2.0, 1.001), (3.0, 4.0), 1e-3, "w")])
    assert off.loss == pytest.approx(1e-3)
    assert off.beyond(FP32_BOUND) == ["loss", "weights"]
    lost = difference(one, [one, Course((2.0, math.nan), (3.0, 4.0), math.nan, "w")])
    assert lost.beyond(FP32_BOUND) == ["loss", "weights"]
    assert Parity(same, FP32_BOUND, {"a": same}).holds
    assert not Parity(same, FP32_BOUND, {"a": same, "b": off}).holds
    assert not Parity(same, FP32_BOUND, {"b": lost}).holds
    assert table(Parity(same, FP32_BOUND, {"b": off})).row_count == 3


EXPERTS = "model.config.moe={experts=4,experts_per_token=2,intermediate=48}"


class Twins(WeightsOnly):
    """Weights whose routers cannot tell experts apart, but for rounding."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def read(self, name: str, box: Box) -> Any:
        part = self._source.read(name, box)
        if name.endswith("mlp.gate.weight"):
            up = np.random.default_rng(0).random(part.shape) < 0.5
            part = np.where(up, np.nextafter(part[:1], np.float32(np.inf)), part[:1])
        return part


def test_experts_that_tie_end_the_comparison(worlds: RankPool, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, [EXPERTS])
    start = starting_point(recipe.model, recipe.seed)
    job = job_of(recipe, replace(start, source=Twins(start.source)), 2, tmp_path)
    with pytest.raises(RecipeError, match="seed=0 begins with weights for which experts tie in layer 0"):
        Runs(worlds, job, tmp_path).difference(Layout(tensor=2))
    assert _verdict_of(Difference(0.0, 0.0, 0.0, "w", tie=(13, 2))) == "same in 12 steps, then experts tie"


def _verdict_of(found: Difference) -> str:
    [*_, cell, _] = table(Parity(found, FP32_BOUND, {"a": found})).columns[-1].cells
    return str(cell)
