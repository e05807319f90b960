"""Charts of measurements with intervals, side by side, as files of their own."""

import math
from xml.etree import ElementTree

from lockstep.cluster.records.svg import Point, interval_chart, standalone

SVG = "{http://www.w3.org/2000/svg}"


def test_each_name_has_a_line_and_each_interval_a_whisker() -> None:
    before = [Point(0.3, 1.0, 0.9, 1.1), Point(1.0, 2.0, 1.5, 2.5), Point(math.nan, 1.0, 1.0, 1.0)]
    after = [Point(0.3, 0.5, math.nan, math.nan), Point(1.0, math.nan, math.nan, math.nan)]
    page = standalone(interval_chart("a > b", {"before": before, "after": after}, "temperature", "nats"))
    root = ElementTree.fromstring(page)
    classes = [element.get("class") for element in root.iter(f"{SVG}path")]
    assert classes.count("whisker") == 2
    assert {"line s0", "line s1"} <= set(classes)
    assert root.get("aria-label") == "a > b"
    assert root.find(f"{SVG}style") is not None


def test_a_chart_of_nothing_says_so() -> None:
    assert "no data" in interval_chart("empty", {"a": [Point(1.0, math.nan, 0, 1)]}, "x", "y")
