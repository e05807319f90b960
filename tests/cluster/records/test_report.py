import json
import math
import random
import re
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lockstep.cluster.records.report import Answer, Pair, _choose, summary_table, write_report
from lockstep.cluster.records.run_folder import RunError, RunFolder
from lockstep.cluster.records.svg import Point, Series, line_chart, moving_average, number, point_chart, ticks

VOID = {"meta", "br", "link", "hr", "img", "input"}
RECIPE = 'name = "quickstart"\n\n[policy]\nhidden = 64  # <small> & quick\n\n[rl]\nsteps = 40\nkl = 1e-3\n'
EVIL = '<script>alert("&")</script> & so on'
ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True)


def outcome_rows(stage: str, total: int, correct: int) -> list[dict[str, object]]:
    shift = 0 if stage == "before" else 3
    return [
        {
            "problem": index,
            "prompt": f"A crate holds {index + 3} jars & {index} lids. How many jars are in 4 crates?",
            "answer": 4 * (index + 3),
            "completion": f"4 × {index + 3} = {4 * (index + 3)}\n#### {4 * (index + 3)}"
            if (good := (index * 7 + shift) % total < correct)
            else EVIL,
            "outcome": "correct" if good else "ungradable" if index % 5 == 0 else "incorrect",
            "reason": "" if good else "no number after ####" if index % 5 == 0 else "another number",
        }
        for index in range(total)
    ]


def measure(run: RunFolder, stage: str, correct: int, step: int, total: int = 60) -> dict[str, object]:
    row: dict[str, float | str] = {
        "stage": stage,
        "accuracy": correct / total,
        "correct": correct,
        "total": total,
        "ungradable": 3,
    }
    run.log("eval", step, row)
    run.evaluation(stage, outcome_rows(stage, total, correct))
    return {**row, "step": step}


def rl_metrics(step: int, noise: random.Random) -> dict[str, float]:
    rise = 1 - math.exp(-step / 18)
    return {
        "reward": 0.2 + 0.5 * rise + noise.gauss(0, 0.04),
        "kl": 0.012 * rise + abs(noise.gauss(0, 0.0008)),
        "entropy": 1.3 - 0.7 * rise + noise.gauss(0, 0.03),
        "mismatch_mean": abs(noise.gauss(2e-7, 6e-8)),
        "mismatch_max": 3.1e-6,
        "completion_tokens": 48 - 12 * rise + noise.gauss(0, 2),
        "rollout_tokens_per_second": 812 + noise.gauss(0, 40),
        "train_tokens_per_second": 655 + noise.gauss(0, 25),
    }


def whole_run(path: Path, steps: int = 40, clock: Iterator[float] | None = None) -> RunFolder:
    """A finished run with every file that a report reads."""
    noise, ticking = random.Random(0), clock or iter(x * 1.3 for x in range(10**6))
    with RunFolder.create(path, RECIPE, "quickstart", clock=lambda: next(ticking)) as run:
        rows = [measure(run, "before", 7, 0)]
        for step in range(1, steps // 2):
            run.log("sft", step, {"loss": 0.4 + 2 * math.exp(-step / 8) + noise.gauss(0, 0.03)})
        rows.append(measure(run, "supervised", 19, 0))
        for step in range(1, steps + 1):
            run.log("rl", step, rl_metrics(step, noise))
        rows.append(measure(run, "after", 41, steps))
        split = {"train": 2000, "held_out": 60, "overlap": 0, "method": "Hashed by template, then by numbers."}
        run.update(rows=rows, split=split, software={"torch": "2.13.0"}, machine={"cores": 2, "gpus": []})
        run.update(speed={"rollout_tokens_per_second": 812.4, "train_tokens_per_second": 655.2})
    return run


class Balance(HTMLParser):
    """Raises at the first end tag that does not match, and keeps text and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes nothing"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(html: str) -> Balance:
    parser = Balance()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("runs") / "quickstart"
    whole_run(path)
    return write_report(path).read_text(encoding="utf-8")


def test_page_is_well_formed_and_whole(page: str) -> None:
    parsed = parse(page)
    text = " ".join(" ".join(parsed.text).split())
    assert parsed.tags.count("svg") == 8
    for phrase in (
        "11.7%",
        "68.3%",
        "+56.7 points",
        "41 / 60",
        "812 tokens/s",
        "Hashed by template",
        "gpus none",
        "finished",
    ):
        assert phrase in text
    assert "There is no" not in text


def test_page_needs_no_network(page: str) -> None:
    assert "http://" not in page
    assert "https://" not in page
    assert not re.search(r"\b(src|href|@import|url\()", page)


def test_completions_and_recipe_are_escaped(page: str) -> None:
    parsed = parse(page)
    assert parsed.tags.count("script") == 1
    assert EVIL in "".join(parsed.text)
    assert "<small>" not in page
    assert "&lt;small&gt; &amp; quick" in page


def test_fixed_come_before_still_wrong_before_broken(page: str) -> None:
    shown = re.findall(r'class="tag ([a-z-]+)"', page)
    assert shown == sorted(shown, key=["fixed", "still-wrong", "broken"].index)
    assert set(shown) == {"fixed", "still-wrong"}
    assert len(shown) == 24


def test_charts_carry_their_read_out(page: str) -> None:
    hovers = [json.loads(unescape(text)) for text in re.findall(r'data-hover="([^"]*)"', page)]
    assert all(len(hover["x"]) == len(hover["text"]) > 0 for hover in hovers)
    assert hovers[0]["text"][-1].startswith("after: 68.3 (")


def test_interrupted_run_still_reports(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", RECIPE, "cut short")
    measure(run, "before", 7, 0)
    for step in (1, 2):
        run.log("rl", step, {"reward": math.nan, "rollout_tokens_per_second": 500.0})
    run.close("interrupted")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as lines:
        lines.write('{"phase": "rl", "step": 3, "rew')
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    text = " ".join("".join(parse(page).text).split())
    assert "interrupted" in text
    assert "no held-out measurement “after”" in text
    assert "There is nothing to compare yet" in text
    assert "500 tokens/s" in text


def test_empty_and_failed_runs_report(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", RECIPE, "empty")
    (tmp_path / "run" / "recipe.toml").unlink()
    parse(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    run.close("failed", "MemoryError: <no> room")
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "MemoryError: &lt;no&gt; room" in page
    assert "There is no recipe.toml." in page


def test_accuracy_of_each_task_stands_below_that_of_all(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", RECIPE, "mixed")
    line = {"accuracy": 0.25, "correct": 1, "total": 4, "ungradable": 0, "accuracy/sums": 0.5, "accuracy/code": 0.125}
    run.log("eval", 0, line | {"stage": "before"})
    run.log("eval", 9, line | {"stage": "during", "accuracy/late": 0.75})
    run.log("eval", 9, line | {"stage": "after", "accuracy/late": 0.875})
    parsed = parse(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    text = " ".join(" ".join(parsed.text).split())
    for phrase in ("sums 50.0%", "code 12.5%", "late 87.5%", *(f"Held-out accuracy: {n}" for n in ("sums", "late"))):
        assert phrase in text
    assert parsed.tags.count("svg") == 7 + 3
    columns = {each.header: list(each.cells) for each in summary_table(tmp_path / "run").columns}
    assert columns["held-out"] == ["before", "  sums", "  code", "after", "  sums", "  code", "  late"]
    assert columns["accuracy"] == ["25.0%", "50.0%", "12.5%", "25.0%", "50.0%", "12.5%", "87.5%"]


def test_rows_of_a_killed_run_come_from_its_metrics(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", RECIPE, "killed")
    measure(run, "before", 6, 0)
    assert "10.0%" in write_report(tmp_path / "run").read_text(encoding="utf-8")


def test_report_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no summary\.json"):
        write_report(tmp_path)


def test_summary_table(tmp_path: Path) -> None:
    whole_run(tmp_path / "run", steps=10)
    console = Console(width=100, record=True, file=(tmp_path / "out").open("w"))
    console.print(summary_table(tmp_path / "run"))
    text = console.export_text()
    for phrase in (
        "before",
        "supervised",
        "after",
        "+36.7 points",
        "41/60",
        "RL steps 10",
        "wall time",
        "812 tokens/s",
    ):
        assert phrase in text


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=80), st.integers(0, 30))
def test_choice_keeps_order_and_fills_its_places(verdicts: list[tuple[bool, bool]], most: int) -> None:
    words = {True: "correct", False: "incorrect"}
    pairs = [
        Pair(index, "", "", Answer("", words[was], ""), Answer("", words[now], ""))
        for index, (was, now) in enumerate(verdicts)
    ]
    chosen = [pair.change for pair in _choose(pairs, most)]
    wanted = sum(pair.change != "still correct" for pair in pairs)
    assert len(chosen) == min(most, wanted)
    assert chosen == sorted(chosen, key=["fixed", "still wrong", "broken"].index)


@given(ANY_FLOAT, ANY_FLOAT, st.integers(1, 20))
def test_ticks_cover_the_range(low: float, high: float, count: int) -> None:
    values = ticks(low, high, count)
    assert 2 <= len(values) <= count + 3
    assert all(map(math.isfinite, values))
    assert values == sorted(set(values))
    if math.isfinite(low) and math.isfinite(high):
        least, most = (max(-1e300, min(1e300, end)) for end in sorted((low, high)))
        assert values[0] <= least
        assert most <= values[-1]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (1, 80, [0, 20, 40, 60, 80]), (0.3, 0.3, [0.26, 0.28, 0.3, 0.32, 0.34])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@given(st.lists(st.tuples(ANY_FLOAT, ANY_FLOAT), max_size=12), st.integers(1, 4), st.booleans())
def test_no_float_breaks_a_line_chart(points: list[tuple[float, float]], window: int, zero: bool) -> None:
    series = Series("a < b", [x for x, _ in points], [y for _, y in points])
    svg = line_chart("t & u", [series, series], "step", "unit", window, zero)
    parse(svg)
    assert "nan" not in re.sub(r'data-hover="[^"]*"', "", svg)


@given(st.lists(st.builds(Point, ANY_FLOAT, ANY_FLOAT, ANY_FLOAT, ANY_FLOAT, st.text()), max_size=8))
def test_no_float_breaks_a_point_chart(points: list[Point]) -> None:
    parse(point_chart("accuracy", points, "update", "percent", points[:1]))


def test_gaps_interrupt_a_line_and_lone_points_stay_visible() -> None:
    svg = line_chart("t", [Series("s", [1, 2, 3, 4, 5], [1.0, math.nan, 2.0, 3.0, math.inf])], "step", "unit")
    (path,) = re.findall(r'class="line s0" d="([^"]*)"', svg)
    assert path.count("M") == 2
    assert path.count("h0") == 1
    assert path.count("L") == 1


def test_long_series_stay_small() -> None:
    xs = list(range(50_000))
    assert len(line_chart("t", [Series("s", xs, xs)], "step", "unit", 10)) < 100_000


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.integers(1, 6))
def test_moving_average_is_the_naive_one(values: list[float], window: int) -> None:
    naive = [
        sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1])
        for i in range(len(values))
    ]
    assert moving_average(values, window) == pytest.approx(naive, abs=1e-6)


def test_numbers_are_short() -> None:
    assert [number(value) for value in (0.0, 0.53, 12.345, 812.4, 12300.0, 3.1e-6, 2e9, math.nan)] == [
        *("0", "0.53", "12.3", "812", "12,300", "3.1e-6", "2e9", "none")
    ]
