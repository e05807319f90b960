"""Nodes on which a recipe has no place are refused, in one sentence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.cluster.recipe.load import parse
from lockstep.cluster.render.nodes import Nodes, RenderError, check_fits


@pytest.mark.parametrize(
    ("values", "nodes", "words"),
    [
        (
            {"layout": {"tensor": 8}},
            Nodes(4, gpus=4),
            "nodes=4 with cpus=8 and gpus=4: policy needs 8 GPU in groups of 8",
        ),
        ({"layout": {"data": 9}}, Nodes(2, gpus=4), "need 9 GPU (policy 9) and the cluster has 8"),
        ({"layout": {"tensor": 3, "data": 4}}, Nodes(3, gpus=4), "and 3 nodes cannot be shared out so"),
        ({"roles": {"policy": {"gpus": 1}}}, Nodes(gpus=0), "need 1 GPU (policy 1) and the cluster has 0"),
        ({"roles": {"policy": {"cpus": 5}}, "layout": {"data": 2}}, Nodes(1, 8), "need 10 CPU (policy 10)"),
        ({"roles": {"policy": {"cpus": 16}}}, Nodes(4, 8), "and 4 nodes cannot be shared out so"),
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
