"""Nodes on which a recipe has no place are refused, in one sentence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.cluster.recipe.load import parse
from lockstep.cluster.render.nodes import Nodes, RenderError, check_fits


@pytest.mark.parametrize(
    ("values", "nodes", "words"),
    [
        ({"layout": {"tensor": 8}}, Nodes(4, gpus=4), "a group of layout.tensor=8 needs 8 GPU on one node"),
        (
            {"layout": {"data": 9}},
            Nodes(2, gpus=4),
            "9 groups of layout.tensor=1 need 1 GPU each, and nodes=2 with gpus=4 have room for 8",
        ),
        ({"roles": {"policy": {"gpus": 1}}}, Nodes(gpus=0), "needs 1 GPU on one node, and nodes have gpus=0"),
        (
            {"roles": {"policy": {"cpus": 5}}, "layout": {"data": 2}},
            Nodes(1, 8),
            "reserves 5 CPU has no place left on nodes=1",
        ),
        ({"roles": {"policy": {"cpus": 16}}}, Nodes(4, 8), "reserves 16 CPU has no place left on nodes=4 with cpus=8"),
    ],
)
def test_what_does_not_fit_is_said(values: dict[str, object], nodes: Nodes, words: str) -> None:
    with pytest.raises(RenderError) as refused:
        check_fits(parse({"pretrain": {"steps": 1}} | values), nodes)
    assert words in str(refused.value)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
def test_processes_with_a_gpu_each_fit_where_there_are_as_many(tensor: int, data: int, count: int, gpus: int) -> None:
    recipe = parse({"pretrain": {"steps": 1}, "layout": {"tensor": tensor, "data": data}})
    fits = count * (gpus // tensor) >= data
    try:
        check_fits(recipe, Nodes(count, gpus=gpus))
    except RenderError:
        assert not fits
    else:
        assert fits


def test_recipes_that_reserve_nothing_fit_everywhere() -> None:
    check_fits(parse({"pretrain": {"steps": 1}, "layout": {"data": 64}}), Nodes(1, cpus=1))
