"""Draws line and point charts as SVG text, coloured by the page's style sheet, without a plotting library.

No float can break a chart. NaN and infinities are gaps; a series without a finite point gives an empty frame that
says so. Sizes are in the SVG's own units; the page scales it to the width that it has. Each chart carries its read-out
as JSON in `data-hover` (positions and sentences), for a script that shows the nearest point.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 236
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 32, 42
LARGEST, SMALLEST = 1e300, 1e-290
MOST_POINTS = 600
LETTER = 6.8


@dataclass(frozen=True)
class Series:
    """One line of a chart: its legend, and as many y as x."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True)
class Point:
    """One measurement with its interval; a point without a label is drawn without text."""

    x: float
    y: float
    low: float
    high: float
    label: str = ""


@dataclass(frozen=True)
class _Frame:
    xs: list[float]
    ys: list[float]

    def x(self, value: float) -> float:
        return LEFT + (value - self.xs[0]) / (self.xs[-1] - self.xs[0]) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.ys[0]) / (self.ys[-1] - self.ys[0]) * (HEIGHT - TOP - BOTTOM)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers, evenly spaced, from at or below low to at or above high.

    Two at least, count + 3 at most. Values beyond 1e300 count as 1e300; a range without finite ends counts as 0 to 1.
    """
    low, high = _spread(low, high)
    step = _round_step((high - low) / max(1, count))
    first, last = math.floor(low / step), math.ceil(high / step)
    first -= first * step > low
    last += last * step < high
    return [index * step for index in range(first, last + 1)]


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last window values at each place; what is not finite is left out, and NaN where nothing is left."""
    means = []
    for end in range(1, len(values) + 1):
        kept = [value for value in map(_clamp, values[max(0, end - window) : end]) if math.isfinite(value)]
        means.append(sum(value / len(kept) for value in kept) if kept else math.nan)
    return means


def number(value: float) -> str:
    """Format a value in about four digits at most: 0.53, 812, 12,300, 3.1e-6."""
    if not math.isfinite(value):
        return "none" if math.isnan(value) else str(value)
    if value and not 1e-3 <= abs(value) < 1e7:
        return _short_exponent(f"{value:.2g}")
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def line_chart(
    title: str, series: Sequence[Series], x_label: str, y_label: str, window: int = 1, zero: bool = False
) -> str:
    """Draw lines over a shared axis.

    Args:
        title: Read by screen readers, not drawn.
        series: Each is drawn in its own colour.
        x_label: Name of the x axis.
        y_label: Unit of the y axis, drawn above it.
        window: Over 1, values are drawn faintly and their moving average firmly.
        zero: Whether the y axis reaches down to zero.
    """
    lines = [_clean(one) for one in series]
    frame = _frame([x for one in lines for x in one.xs], [y for one in lines for y in one.ys], zero)
    if frame is None:
        return _empty(title, x_label, y_label)
    drawn = [_axes(frame, x_label, y_label), _legend(lines, window)]
    for index, one in enumerate(lines):
        smooth = Series(one.name, one.xs, moving_average(one.ys, window))
        if window > 1:
            drawn.append(_path(frame, _thin(one), f"raw s{index}"))
        drawn.append(_path(frame, _thin(smooth), f"line s{index}"))
    return _svg(title, "".join(drawn), _line_hover(frame, [_thin(one) for one in lines], x_label))


def point_chart(title: str, points: Sequence[Point], x_label: str, y_label: str, marks: Sequence[Point] = ()) -> str:
    """Draw measurements with their intervals, joined by a line; the y axis starts at zero.

    Args:
        title: Read by screen readers, not drawn.
        points: In any order.
        x_label: Name of the x axis.
        y_label: Unit of the y axis, drawn above it.
        marks: Places on the x axis (only x and label are used) where a labelled vertical line stands.
    """
    kept = sorted((p for p in points if all(map(math.isfinite, (p.x, p.y, p.low, p.high)))), key=lambda p: p.x)
    marks = [mark for mark in marks if math.isfinite(mark.x)]
    xs = [*(p.x for p in kept), *(mark.x for mark in marks if kept)]
    frame = _frame(xs, [y for p in kept for y in (p.y, p.low, p.high)], zero=True)
    if frame is None:
        return _empty(title, x_label, y_label)
    line = Series(y_label, [p.x for p in kept], [_clamp(p.y) for p in kept])
    drawn = [_axes(frame, x_label, y_label), *(_mark(frame, mark) for mark in marks)]
    drawn += [_path(frame, line, "line s0"), *(_whisker(frame, p) for p in kept)]
    return _svg(title, "".join(drawn), _point_hover(frame, kept, x_label))


def interval_chart(title: str, series: Mapping[str, Sequence[Point]], x_label: str, y_label: str) -> str:
    """Draw measurements with their intervals, a line for each name; a point without an interval stands alone.

    Args:
        title: Read by screen readers, not drawn.
        series: For each name of the legend its points, in the order of their x.
    """
    kept = {name: [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)] for name, points in series.items()}
    every = [point for points in kept.values() for point in points]
    frame = _frame([p.x for p in every], [y for p in every for y in (p.y, p.low, p.high)], zero=False)
    if frame is None:
        return _empty(title, x_label, y_label)
    lines = [Series(name, [p.x for p in points], [_clamp(p.y) for p in points]) for name, points in kept.items()]
    drawn = [_axes(frame, x_label, y_label), _legend(lines, 1)]
    drawn += [_path(frame, line, f"line s{index}") for index, line in enumerate(lines)]
    drawn += [_whisker(frame, p) for p in every if math.isfinite(p.low) and math.isfinite(p.high)]
    return _svg(title, "".join(drawn), _line_hover(frame, lines, x_label))


STYLE = (
    "svg{background:#fff;font-family:sans-serif}text{fill:#5d6870;font-size:11px}path{fill:none;stroke-width:1.8}"
    ".grid{stroke:#eceeee}.axis{stroke:#5d6870}.whisker{stroke:#5d6870;stroke-width:1}.dot{fill:#5d6870}"
    ".s0{stroke:#1f77b4}.s1{stroke:#d9730d}.s2{stroke:#2a8f5c}.s3{stroke:#8a5cc2}.s4{stroke:#b8365c}"
)


def standalone(svg: str) -> str:
    """A chart as a file of its own, with colours that a page's style sheet gives it otherwise."""
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        ">", f"><style>{STYLE}</style>", 1
    )


def _clamp(value: float) -> float:
    return max(-LARGEST, min(LARGEST, value)) if math.isfinite(value) else math.nan


def _spread(low: float, high: float) -> tuple[float, float]:
    """Finite ends, low below high, far enough apart to divide."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return 0.0, 1.0
    low, high = sorted((_clamp(low), _clamp(high)))
    size = max(abs(low), abs(high))
    if size < SMALLEST:
        return (-1.0 if low < 0 else 0.0), 1.0
    pad = 0.1 * size if high - low < 1e-9 * size else 0.0
    return low - pad, high + pad


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= least), 10 * power)


def _clean(series: Series) -> Series:
    pairs = [(_clamp(x), _clamp(y)) for x, y in zip(series.xs, series.ys, strict=True) if math.isfinite(x)]
    return Series(series.name, [x for x, _ in pairs], [y for _, y in pairs])


def _thin(series: Series) -> Series:
    """Every k-th point and the last, so that a long run stays a small page."""
    stride = max(1, math.ceil(len(series.xs) / MOST_POINTS))
    keep = sorted({*range(0, len(series.xs), stride), *([len(series.xs) - 1] if series.xs else [])})
    return Series(series.name, [series.xs[i] for i in keep], [series.ys[i] for i in keep])


def _frame(xs: Sequence[float], ys: Sequence[float], zero: bool) -> _Frame | None:
    finite = [_clamp(y) for y in ys if math.isfinite(y)]
    if not finite or not xs:
        return None
    finite += [0.0] if zero else []
    return _Frame(_step_ticks([_clamp(x) for x in xs]), ticks(min(finite), max(finite)))


def _step_ticks(places: Sequence[float]) -> list[float]:
    """Ticks of an axis that counts steps: whole numbers, and room around a single step."""
    low, high = min(places), max(max(places), min(places) + 1)
    return ticks(low, high, int(max(1, min(6, high - low))))


def _short_exponent(text: str) -> str:
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else text


def _tick_labels(values: Sequence[float]) -> list[str]:
    """As many decimals as the step needs; powers of ten where plain figures would be long."""
    step, largest = values[1] - values[0], max(map(abs, values))
    if largest >= 1e6 or step < 1e-4:
        digits = min(6, max(2, math.ceil(math.log10(largest) - math.log10(step)) + 1))
        return [_short_exponent(f"{value:.{digits}g}") if abs(value) > step / 2 else "0" for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value + 0.0:,.{decimals}f}" for value in values]


def _axes(frame: _Frame, x_label: str, y_label: str) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value, label in zip(frame.ys, _tick_labels(frame.ys), strict=True):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value, label in zip(frame.xs, _tick_labels(frame.xs), strict=True):
        x = frame.x(value)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{label}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    return "".join(parts) + _axis_names(x_label, y_label)


def _axis_names(x_label: str, y_label: str) -> str:
    middle = (LEFT + WIDTH - RIGHT) / 2
    return (
        f'<text class="name" x="0" y="14">{escape(y_label)}</text>'
        f'<text class="name" x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )


def _legend(lines: Sequence[Series], window: int) -> str:
    """Right-aligned above the plot: what each colour is, and what faint and firm are."""
    entries = [(one.name, f"line s{index}") for index, one in enumerate(lines)]
    if len(lines) == 1:
        entries = [("each step", "raw s0"), (f"mean of {window}", "line s0")] if window > 1 else []
    parts, right = [], float(WIDTH - RIGHT)
    for name, style in reversed(entries):
        left = right - LETTER * len(name)
        parts.append(f'<text class="name" x="{left:.0f}" y="14">{escape(name)}</text>')
        parts.append(f'<path class="{style}" d="M{left - 22:.0f} 10h16"/>')
        right = left - 34
    return "".join(parts)


def _path(frame: _Frame, series: Series, style: str) -> str:
    """One path, interrupted at gaps; a point between two gaps becomes a dot."""
    runs: list[list[str]] = [[]]
    for x, y in zip(series.xs, series.ys, strict=True):
        if math.isfinite(y):
            runs[-1].append(f"{frame.x(x):.1f} {frame.y(y):.1f}")
        elif runs[-1]:
            runs.append([])
    steps = "".join("M" + "L".join(run) + ("h0" if len(run) == 1 else "") for run in runs if run)
    return f'<path class="{style}" d="{steps}"/>' if steps else ""


def _whisker(frame: _Frame, point: Point) -> str:
    x, y = frame.x(_clamp(point.x)), frame.y(_clamp(point.y))
    low, high = frame.y(_clamp(point.low)), frame.y(_clamp(point.high))
    bar = f'<path class="whisker" d="M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8"/>'
    dot = f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    return bar + dot + _point_label(x, y, point.label)


def _point_label(x: float, y: float, label: str) -> str:
    """Beside the point, on the side where there is room, and where a rising line does not run."""
    if not label:
        return ""
    fits = x + 9 + LETTER * len(label) < WIDTH
    place, height, anchor = (x + 9, y + 15, "start") if fits else (x - 9, y - 8, "end")
    return f'<text class="label" x="{place:.1f}" y="{height:.1f}" text-anchor="{anchor}">{escape(label)}</text>'


def _mark(frame: _Frame, mark: Point) -> str:
    x = frame.x(_clamp(mark.x))
    line = f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    return line + f'<text class="tick" x="{x + 5:.1f}" y="{TOP + 10}">{escape(mark.label)}</text>'


def _line_hover(frame: _Frame, lines: Sequence[Series], x_label: str) -> str:
    texts: dict[float, list[str]] = {}
    for one in lines:
        for x, y in zip(one.xs, one.ys, strict=True):
            texts.setdefault(x, []).append(f"{one.name} {number(y)}")
    places = sorted(texts)
    return _hover([frame.x(x) for x in places], [f"{x_label} {number(x)}: {', '.join(texts[x])}" for x in places])


def _point_hover(frame: _Frame, points: Sequence[Point], x_label: str) -> str:
    names = [point.label or f"{x_label} {number(point.x)}" for point in points]
    values = [f"{number(point.y)} ({number(point.low)} to {number(point.high)})" for point in points]
    texts = [f"{name}: {value}" for name, value in zip(names, values, strict=True)]
    return _hover([frame.x(_clamp(point.x)) for point in points], texts)


def _hover(pixels: Sequence[float], texts: Sequence[str]) -> str:
    return json.dumps({"x": [round(x, 1) for x in pixels], "text": list(texts)})


def _empty(title: str, x_label: str, y_label: str) -> str:
    frame = _Frame([0.0, 1.0], [0.0, 1.0])
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    text = f'<text class="name" x="{(LEFT + right) / 2:.0f}" y="{frame.y(0.5):.0f}" text-anchor="middle">no data</text>'
    axis = f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
    return _svg(title, axis + _axis_names(x_label, y_label) + text, _hover([], []))


def _svg(title: str, body: str, hover: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'data-hover="{escape(hover)}" data-top="{TOP}" data-bottom="{HEIGHT - BOTTOM}">{body}</svg>'
    )
