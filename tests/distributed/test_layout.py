import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lockstep.distributed.layout import Layout, LayoutError, check_divides, splits_heads, stage_layers


def test_processes_are_the_product_of_the_degrees() -> None:
    assert Layout(tensor=3, pipeline=2, data=4).processes == 24


def test_heads_that_do_not_divide_are_refused_with_the_degrees_that_would() -> None:
    with pytest.raises(LayoutError, match=r"tensor=2 does not divide the model's 9 query heads: use one of 1, 3"):
        check_divides(Layout(tensor=2), heads=9, kv_heads=3, intermediate=1536, layers=30)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(LayoutError, match="pipeline=5"):
        check_divides(Layout(pipeline=5), heads=8, kv_heads=8, intermediate=64, layers=4)


SIZES = st.integers(1, 32).flatmap(lambda stages: st.tuples(st.integers(stages, 200), st.just(stages)))


@given(SIZES)
def test_stages_cover_all_layers_in_order_and_differ_by_one(sizes: tuple[int, int]) -> None:
    layers, stages = sizes
    parts = stage_layers(layers, stages)
    assert [i for part in parts for i in part] == list(range(layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(2, 9), st.integers(2, 4), st.floats(0, 3), st.floats(0, 5))
def test_the_heaviest_stage_is_as_light_as_any_split_makes_it(
    layers: int, stages: int, first: float, last: float
) -> None:
    layers = max(layers, stages)

    def heaviest(counts: Sequence[int]) -> float:
        weights: list[float] = [*counts]
        weights[0] += first
        weights[-1] += last
        return max(weights)

    splits = [c for c in itertools.product(range(1, layers + 1), repeat=stages) if sum(c) == layers]
    found = [len(part) for part in stage_layers(layers, stages, first=first, last=last)]
    assert heaviest(found) == pytest.approx(min(map(heaviest, splits)))


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({"zero": 3, "pipeline": 2}, "use zero=1 or zero=2 with a pipeline"),
        ({"zero": 3, "expert": 2}, "use zero=2 with experts"),
        ({"sequence": True}, "use it with layout.tensor of 2 or more"),
        ({"virtual": 2}, "use it with layout.pipeline of 2 or more"),
        (
            {"pipeline": 2, "stages": (1, 2, 3)},
            r"stages=\[1, 2, 3\] must name at least one layer for each .* 2 stages",
        ),
        ({"pipeline": 2, "stages": (0, 3)}, "at least one layer"),
        ({"offload": True, "zero": 0}, "layout.zero of 1 or more"),
        ({"tensor": 1 << 9, "data": 1 << 9}, "262144 processes"),
    ],
    ids=str,
)
def test_what_cannot_be_combined_is_refused_with_what_can(degrees: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Layout(**degrees)


def test_a_layout_is_written_as_its_keys() -> None:
    assert str(Layout()) == "one process"
    assert str(Layout(tensor=2, sequence=True, zero=2)) == "tensor=2,sequence=true,zero=2"


def test_processes_of_one_share_are_those_that_differ_in_tensor_context_and_stage_only() -> None:
    layout = Layout(tensor=2, context=2, expert=2, data=2, pipeline=2)
    shares = [layout.data_rank(rank) for rank in range(layout.processes)]
    assert {s: shares.count(s) for s in shares} == dict.fromkeys(range(4), 8)
    assert shares[:8] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_stages_that_do_not_hold_the_models_layers_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"stages=\[2, 3\] has 5 layers, and the model has 4"):
        check_divides(Layout(pipeline=2, stages=(2, 3)), heads=8, kv_heads=8, intermediate=64, layers=4)


def test_experts_and_heads_that_do_not_divide_are_refused_with_what_would() -> None:
    sizes = {"heads": 8, "kv_heads": 2, "intermediate": 64, "layers": 4}
    with pytest.raises(LayoutError, match=r"expert=4 does not divide the model's 6 experts: use one of 1, 2, 3, 6"):
        check_divides(Layout(expert=4), experts=6, **sizes)
    with pytest.raises(LayoutError, match="or context_by='ring'"):
        check_divides(Layout(context=4, context_by="heads"), **sizes)
    assert splits_heads(Layout(context=2), 2)
    assert not splits_heads(Layout(context=4), 2)
