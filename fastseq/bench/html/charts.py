"""Points on axes: everything a template needs to draw a chart as inline SVG.

A chart is drawn for a phone: 340 units wide and shown at that width or little more, so that its
text keeps the size it was written in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 340, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 12, 40
_LETTER = 6.5  # width of a letter on average
_TICK_SPACE = 30  # units between two labels on the horizontal axis at least


@dataclass(frozen=True)
class Series:
    """Points of one peer or kind.

    Attributes:
        name: For the legend.
        key: Class of the style sheet: colour and marker.
        points: (x, y, text to show when pointed at).
        joined: Whether a line joins the points.
    """

    name: str
    key: str
    points: tuple[tuple[float, float, str], ...]
    joined: bool = True


@dataclass(frozen=True)
class Tick:
    """A position in the drawing, and what stands there."""

    at: float
    label: str


@dataclass(frozen=True)
class Marker:
    """A point in the drawing.

    Attributes:
        path: Its outline, for ``d`` of a path.
        tip: Text to show when pointed at.
    """

    path: str
    tip: str


@dataclass(frozen=True)
class Line:
    """A line in the drawing, or markers alone.

    Attributes:
        name: For the legend and the style.
        key: Class of the style sheet.
        points: For ``points`` of a polyline.
        markers: Points on it.
        label: Text drawn along the line.
        label_at: Where the text starts.
        label_angle: By how many degrees the text is turned.
    """

    name: str
    key: str
    points: str
    markers: tuple[Marker, ...] = ()
    label: str = ""
    label_at: tuple[float, float] = (0.0, 0.0)
    label_angle: float = 0.0


@dataclass(frozen=True)
class Chart:
    """A chart, placed, and the same numbers as a table.

    Attributes:
        title: Heading.
        x_label: Under the horizontal axis.
        y_label: Above the vertical axis.
        x_ticks: Labelled positions on the horizontal axis.
        y_ticks: Labelled positions on the vertical axis.
        lines: Series, placed.
        headings: Of the table.
        rows: Of the table.
        threads: Thread count that it is about; 0 for all.
        note: A line below the drawing.
    """

    title: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    threads: int = 0
    note: str = ""
    left: int = field(default=_LEFT, init=False)
    right: int = field(default=WIDTH - _RIGHT, init=False)
    top: int = field(default=_TOP, init=False)
    bottom: int = field(default=HEIGHT - _BOTTOM, init=False)


def log_ticks(low: float, high: float) -> list[float]:
    """Round values within a range: 1, 2 and 5 times powers of ten, or fewer where it is long."""
    decades = math.log10(high / low)
    factors = (1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [factor * 10.0**power for power in powers for factor in factors]
    stride = 2 if decades > 7 else 1
    return [tick for tick in every if low <= tick <= high][::stride]


def _room(values: Sequence[float], factor: float) -> tuple[float, float]:
    """The range of values with room on both sides, and never without a round value in it."""
    low, high = min(values) / factor, max(values) * factor
    while not log_ticks(low, high):
        low, high = low / factor, high * factor
    return low, high


def logarithmic(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """The map from values to positions: ``low`` comes to ``start``, ``high`` to ``end``."""
    span = math.log(high / low)

    def place(value: float) -> float:
        return start + (end - start) * math.log(value / low) / span

    return place


def marker_path(key: str, x: float, y: float, radius: float = 4.0) -> str:
    """The outline of a series' marker; the shape says what the colour says."""
    shapes: dict[str, tuple[tuple[float, float], ...]] = {
        "torch": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "torch-compile": ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
        "onnxruntime": ((0, -1.3), (1.25, 1), (-1.25, 1)),
        "openvino": ((-1.25, -1), (1.25, -1), (0, 1.3)),
        "attention": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "transformer": ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
    }
    corners = shapes.get(key)
    if corners is None:
        return f"M{x - radius:.1f} {y:.1f}a{radius:g} {radius:g} 0 1 0 {2 * radius:g} 0" + (
            f"a{radius:g} {radius:g} 0 1 0 {-2 * radius:g} 0Z"
        )
    points = (f"{x + radius * dx:.1f} {y + radius * dy:.1f}" for dx, dy in corners)
    return f"M{'L'.join(points)}Z"


def _spread_ticks(values: Sequence[float], place: Callable[[float], float]) -> list[float]:
    """Those of the data's own values whose labels do not touch, first and last always."""
    kept = [values[0]]
    for value in values[1:-1]:
        near_last = place(values[-1]) - place(value) < _TICK_SPACE
        if place(value) - place(kept[-1]) >= _TICK_SPACE and not near_last:
            kept.append(value)
    return [*kept, values[-1]] if len(values) > 1 else kept


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    y_format: Callable[[float], str],
    *,
    threads: int = 0,
) -> Chart:
    """Series over common values of x, both axes logarithmic.

    Args:
        title: Heading.
        x_label: Quantity and unit of x.
        y_label: Quantity of y.
        series: What to draw; every value is positive.
        y_format: y in words, for ticks and table.
        threads: Thread count that the chart is about; 0 for all.
    """
    xs = sorted({x for one in series for x, _, _ in one.points})
    ys = [y for one in series for _, y, _ in one.points]
    low, high = _room(ys, 1.3)
    y_values = log_ticks(low, high)
    place_x = logarithmic(xs[0], xs[-1], _LEFT + 8, WIDTH - _RIGHT - 8)
    place_y = logarithmic(low, high, HEIGHT - _BOTTOM, _TOP)
    lines = []
    # The first series, ours, is drawn last: on top.
    for one in reversed(series):
        placed = [(place_x(x), place_y(y), tip) for x, y, tip in sorted(one.points)]
        markers = tuple(Marker(marker_path(one.key, x, y), tip) for x, y, tip in placed)
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in placed) if one.joined else ""
        lines.append(Line(one.name, one.key, joined, markers))
    by_series = [{x: y for x, y, _ in one.points} for one in series]
    rows = tuple(
        (f"{x:g}", *(y_format(found[x]) if x in found else "-" for found in by_series)) for x in xs
    )
    return Chart(
        title,
        x_label,
        y_label,
        tuple(Tick(place_x(x), f"{x:g}") for x in _spread_ticks(xs, place_x)),
        tuple(Tick(place_y(y), y_format(y)) for y in y_values),
        tuple(lines),
        (x_label, *(one.name for one in series)),
        rows,
        threads,
    )


def roofline(
    title: str,
    series: Sequence[Series],
    peak_gflops: float,
    bandwidths: dict[str, float],
    rows: tuple[tuple[str, ...], ...],
    *,
    threads: int = 0,
) -> Chart:
    """GFLOP/s over flop per byte, under the roofs.

    Args:
        title: Heading.
        series: Points (flop/byte, GFLOP/s, text); at least one.
        peak_gflops: The flat roof.
        bandwidths: Gigabytes per second of the sloping roofs, by name.
        rows: The table behind the chart: case, flop/byte, GFLOP/s, share of the peak.
        threads: Thread count that the chart is about.
    """
    points = [point for one in series for point in one.points]
    left, right = _room([x for x, _, _ in points], 1.6)
    low, high = _room([peak_gflops, *(y for _, y, _ in points)], 1.6)
    place_x = logarithmic(left, right, _LEFT, WIDTH - _RIGHT)
    place_y = logarithmic(low, high, HEIGHT - _BOTTOM, _TOP)
    lines = []
    drawn = 0
    for name, bandwidth in bandwidths.items():
        # Where the slope comes into the drawing, and where it meets the flat roof; one that lies
        # outside is not drawn.
        start = max(left, low / bandwidth)
        end = min(right, peak_gflops / bandwidth)
        if start >= end:
            continue
        x1, y1 = place_x(start), place_y(bandwidth * start)
        x2, y2 = place_x(end), place_y(bandwidth * end)
        slope = math.atan2(y2 - y1, x2 - x1)
        # The text lies along the line, or only in the note if it is longer than that.
        length, needed = math.hypot(x2 - x1, y2 - y1), _LETTER * (len(name) + 1)
        fits = length > needed
        # At the foot and the top by turns: two levels of memory may be almost as fast.
        along = length - needed if drawn % 2 else 4.0
        drawn += 1
        at = (
            x1 + along * math.cos(slope) + 4 * math.sin(slope),
            y1 + along * math.sin(slope) - 4 * math.cos(slope),
        )
        lines.append(
            Line(
                name,
                "roof",
                f"{x1:.1f},{y1:.1f} {x2:.1f},{y2:.1f}",
                label=name if fits else "",
                label_at=at,
                label_angle=math.degrees(slope),
            )
        )
    roof_y = place_y(peak_gflops)
    lines.append(
        Line(
            "FMA peak",
            "roof",
            f"{_LEFT},{roof_y:.1f} {WIDTH - _RIGHT},{roof_y:.1f}",
            label=f"FMA peak {peak_gflops:.0f} GFLOP/s",
            label_at=(WIDTH / 2, roof_y - 4),
        )
    )
    roofs = [f"FMA peak {peak_gflops:.0f} GFLOP/s"]
    roofs += [f"{name} {bandwidth:.3g} GB/s" for name, bandwidth in bandwidths.items()]
    note = f"Roofs: {', '.join(roofs)}."
    for one in series:
        markers = tuple(
            Marker(marker_path(one.key, place_x(x), place_y(y)), tip) for x, y, tip in one.points
        )
        lines.append(Line(one.name, one.key, "", markers))
    return Chart(
        title,
        "flop per byte",
        "GFLOP/s",
        tuple(Tick(place_x(x), f"{x:g}") for x in log_ticks(left, right)),
        tuple(Tick(place_y(y), f"{y:g}") for y in log_ticks(low, high)),
        tuple(lines),
        ("case", "flop/byte", "GFLOP/s", "of FMA peak"),
        rows,
        threads,
        note,
    )
