import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.distributed.layout import Layout, LayoutError, check_divides, stage_layers


def test_processes_are_the_product_of_the_degrees() -> None:
    assert Layout(tensor=3, pipeline=2, data=4).processes == 24


def test_heads_that_do_not_divide_are_refused_with_the_degrees_that_would() -> None:
    with pytest.raises(LayoutError, match=r"tensor=2 does not divide the model's 9 query heads: use one of 1, 3"):
        check_divides(Layout(tensor=2), heads=9, kv_heads=3, intermediate=1536, layers=30)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(LayoutError, match="pipeline=5"):
        check_divides(Layout(pipeline=5), heads=8, kv_heads=8, intermediate=64, layers=4)


@given(st.integers(1, 200), st.integers(1, 32))
def test_stages_cover_all_layers_in_order_and_differ_by_one(layers: int, stages: int) -> None:
    parts = stage_layers(layers, stages)
    assert [i for part in parts for i in part] == list(range(layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
