"""The roofline page: every kernel and shape under the machine's roofs, one file, no scripts."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fastseq.profiler.record import Call, Recording
from fastseq.profiler.roofs import LEVELS, Roofs
from fastseq.profiler.summary import Row

__all__ = ["page"]


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #60646c; --paper: #ffffff; --line: #d9dce1;
  --roof: #8b4513; --band: #2f6f4f; --point: #1f5fbf; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --dim: #9aa0a8; --paper: #15171a;
  --line: #33373d; --roof: #e0a070; --band: #7cc49c; --point: #7fb0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; }
p { margin: .25rem 0 1rem; color: var(--dim); }
svg { width: 100%; height: auto; display: block; }
svg.narrow { display: none; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .tick { fill: var(--dim); }
svg .roof-label { paint-order: stroke; stroke: var(--paper); stroke-width: 4px;
  stroke-linejoin: round; }
.grid { stroke: var(--line); stroke-width: 1; }
.roof { stroke: var(--roof); stroke-width: 2; fill: none; }
.band { stroke: var(--band); stroke-width: 1.5; fill: none; }
.single { stroke-dasharray: 5 4; }
.point { fill: var(--point); fill-opacity: .75; stroke: var(--paper); stroke-width: 1.5; }
.point:hover { fill-opacity: 1; stroke: var(--ink); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; white-space: nowrap; }
th, td { padding: .25rem .45rem; text-align: right; border-bottom: 1px solid var(--line); }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
@media (max-width: 40rem) { svg.wide { display: none; } svg.narrow { display: block; }
  body { padding: .6rem; } }
"""


class _Frame(NamedTuple):
    """A drawing and the margins around its axes, in units that are about a pixel each."""

    name: str
    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


# Text has one size in both; a single drawing, shrunk to a phone, could not be read.
_FRAMES = (
    _Frame("wide", 860, 540, 64, 24, 36, 52),
    _Frame("narrow", 360, 400, 44, 20, 36, 52),
)


# Of a slope's label, "DRAM 123 GB/s", in the same units.
_LABEL_LENGTH, _LABEL_HEIGHT = 85, 14


class _Axes(NamedTuple):
    """Both axes logarithmic, in powers of ten."""

    frame: _Frame
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, intensity: float) -> float:
        share = (math.log10(intensity) - self.x_low) / (self.x_high - self.x_low)
        left, right = self.frame.left, self.frame.right
        return left + share * (self.frame.width - left - right)

    def y(self, gflops: float) -> float:
        share = (math.log10(gflops) - self.y_low) / (self.y_high - self.y_low)
        bottom = self.frame.height - self.frame.bottom
        return bottom - share * (bottom - self.frame.top)


def page(
    rows: Sequence[Row],
    calls: Sequence[Call],
    roofs: Roofs | None,
    machine: Mapping[str, Any],
    recording: Recording,
) -> str:
    """The page as HTML.

    Args:
        rows: By kernel and shape.
        calls: What was recorded; their tiers, dtypes and threads decide which roofs are drawn.
        roofs: The machine's, or ``None``: points only.
        machine: What it was recorded on.
        recording: For the length of the block.
    """
    title = "Roofline of a fastseq profile"
    about = (
        f"{machine.get('cpu', 'unknown processor')}, {machine.get('threads', '?')} threads, "
        f"fastseq {machine.get('libraries', {}).get('fastseq', '?')}, "
        f"{machine.get('date', 'no date')}. "
        f"{len(calls):,} calls in {recording.wall_seconds * 1e3:,.1f} ms, of which "
        f"{recording.outside_seconds() * 1e3:,.1f} ms outside the kernels."
    )
    points = [row for row in rows if row.gflops and row.intensity]
    note = ""
    if points:
        lines = _drawn_roofs(calls, roofs)
        note = f" Roofs: {html.escape(', '.join(line.short for line in lines))}." if lines else ""
        chart = "\n".join(_chart(points, lines, frame) for frame in _FRAMES)
    else:
        chart = "<p>No kernel with a matrix product ran, so there is no point to draw.</p>"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{title}</h1><p>{html.escape(about)}</p>",
            chart,
            "<p>A point is a kernel at one shape; its area is its share of the time. Horizontal "
            "lines are multiply-add peaks, slopes are what all threads together read of a "
            "level of memory; dashed: one thread. Bytes are modelled: the least that must move. "
            "A kernel that reads its weights again at every step, or lies in a cache, is held to "
            f"that roof in the table.{note}</p>",
            _table(rows),
            "</body></html>",
            "",
        ]
    )


class _Line(NamedTuple):
    """A roof: a peak in GFLOP/s, or a slope in GB/s."""

    label: str
    short: str
    gflops: float | None
    gbytes: float | None
    single: bool


def _drawn_roofs(calls: Iterable[Call], roofs: Roofs | None) -> list[_Line]:
    if roofs is None:
        return []
    lines = []
    used = dict.fromkeys((call.isa, call.dtype) for call in calls)
    counts = sorted({1, *roofs.threads})
    for threads in counts:
        single = threads == 1 and len(counts) > 1
        for isa, dtype in used:
            peak = roofs.gflops(isa, dtype, threads)
            if peak:
                label = f"FMA {dtype} {isa} x{threads}"
                lines.append(_Line(label, f"{label}: {peak:.0f}", peak, None, single))
        if single:
            continue
        for level in LEVELS:
            bandwidth = roofs.gbytes(level, "read", threads)
            if bandwidth:
                label, short = f"{level} read x{threads}", f"{level} {bandwidth:.0f} GB/s"
                lines.append(_Line(label, short, None, bandwidth, single))
    return lines


def _axes(points: Sequence[Row], lines: Sequence[_Line], frame: _Frame) -> _Axes:
    intensities = [row.intensity for row in points if row.intensity]
    rates = [row.gflops for row in points if row.gflops]
    rates += [line.gflops for line in lines if line.gflops]
    ridges = [
        peak.gflops / band.gbytes
        for peak in lines
        for band in lines
        if peak.gflops and band.gbytes and not peak.single
    ]
    return _Axes(
        frame,
        math.floor(math.log10(min([*intensities, *ridges])) - 0.3),
        math.ceil(math.log10(max([*intensities, *ridges])) + 0.1),
        math.floor(math.log10(min(rates)) - 0.1),
        math.ceil(math.log10(max(rates)) + 0.15),
    )


def _chart(points: Sequence[Row], lines: Sequence[_Line], frame: _Frame) -> str:
    axes = _axes(points, lines, frame)
    parts = [
        f'<svg class="{frame.name}" viewBox="0 0 {frame.width} {frame.height}" role="img" '
        'aria-label="Rate of every kernel over its operations per byte, under the roofs">'
    ]
    parts += _grid(axes)
    taken: list[tuple[float, float]] = []
    drawn = [_roof_line(line, lines, axes, taken) for line in lines]
    # Text last, so that no line is drawn across it.
    parts += [line for line, _ in drawn]
    parts += [label for _, label in drawn]
    total = sum(row.total_s for row in points)
    # Large ones first, so that no small one lies hidden behind them.
    for row in sorted(points, key=lambda row: -row.total_s):
        assert row.intensity
        assert row.gflops
        radius = 4 + 14 * math.sqrt(row.total_s / total) if total else 5
        parts.append(
            f'<circle class="point" cx="{axes.x(row.intensity):.1f}" '
            f'cy="{axes.y(row.gflops):.1f}" r="{radius:.1f}">'
            f"<title>{html.escape(_hover(row))}</title></circle>"
        )
    parts.append("</svg>")
    return "\n".join(parts)


def _grid(axes: _Axes) -> list[str]:
    parts = []
    frame = axes.frame
    left, top = frame.left, frame.top
    bottom, right = frame.height - frame.bottom, frame.width - frame.right
    for power in range(int(axes.x_low), int(axes.x_high) + 1):
        x = axes.x(10.0**power)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>'
            f'<text class="tick" x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">'
            f"{10.0**power:g}</text>"
        )
    for power in range(int(axes.y_low), int(axes.y_high) + 1):
        y = axes.y(10.0**power)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">'
            f"{10.0**power:g}</text>"
        )
    middle = (left + right) / 2
    parts.append(
        f'<text x="{middle}" y="{frame.height - 8}" text-anchor="middle">'
        "flop per byte (modelled)</text>"
        f'<text x="14" y="{top - 16}" text-anchor="start">GFLOP/s</text>'
    )
    return parts


def _roof_line(
    line: _Line, lines: Sequence[_Line], axes: _Axes, taken: list[tuple[float, float]]
) -> tuple[str, str]:
    """A peak from where it meets the fastest memory, or a slope up to the highest peak; its label.

    Levels of memory may be close: a slope's label stands at the foot, or further up where another
    one is in the way (``taken`` has their places), or is left to the note below the drawing.
    """
    left, right = 10**axes.x_low, 10**axes.x_high
    style = " single" if line.single else ""
    label, short = html.escape(line.label), html.escape(line.short)
    if line.gflops:
        fastest = max([other.gbytes for other in lines if other.gbytes], default=0.0)
        start = max(left, line.gflops / fastest) if fastest else left
        y, x = axes.y(line.gflops), axes.x(right)
        return (
            f'<line class="roof{style}" x1="{axes.x(start):.1f}" x2="{x:.1f}" '
            f'y1="{y:.1f}" y2="{y:.1f}"><title>{label}: {line.gflops:.1f} GFLOP/s</title></line>',
            f'<text class="roof-label" x="{x - 4:.1f}" y="{y - 5:.1f}" text-anchor="end">'
            f"{short}</text>",
        )
    assert line.gbytes
    highest = max([other.gflops for other in lines if other.gflops], default=10**axes.y_high)
    # The slope is cut where it leaves the picture.
    begin = max(left, 10**axes.y_low / line.gbytes)
    end = min(right, highest / line.gbytes)
    x1, y1, x2, y2 = (
        axes.x(begin),
        axes.y(begin * line.gbytes),
        axes.x(end),
        axes.y(end * line.gbytes),
    )
    angle = math.degrees(math.atan2(y2 - y1, x2 - x1))
    shown = (
        f'<line class="band" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}">'
        f"<title>{label}: {line.gbytes:.1f} GB/s</title></line>"
    )
    for share in (0.06, 0.52):
        at_x, at_y = x1 + share * (x2 - x1), y1 + share * (y2 - y1)
        if any(_clash((at_x, at_y), other, angle) for other in taken):
            continue
        taken.append((at_x, at_y))
        return (
            shown,
            f'<text class="roof-label" x="{at_x:.1f}" y="{at_y:.1f}" dy="-4" '
            f'transform="rotate({angle:.1f} {at_x:.1f} {at_y:.1f})">{short}</text>',
        )
    return shown, ""


def _clash(one: tuple[float, float], other: tuple[float, float], angle: float) -> bool:
    """Whether two labels of slopes, which are all as steep, would touch."""
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    x, y = one[0] - other[0], one[1] - other[1]
    return abs(x * cosine + y * sine) < _LABEL_LENGTH and abs(y * cosine - x * sine) < _LABEL_HEIGHT


def _hover(row: Row) -> str:
    lines = [
        f"{row.name}, {row.shapes[0]}",
        f"{row.dtype} {row.isa}, {row.threads[0]} threads",
        f"{row.calls:,} calls, {row.total_s * 1e3:,.2f} ms, {100 * row.share:.1f} % of the time",
        f"{row.gflops:,.1f} GFLOP/s, {row.gbytes:,.1f} GB/s (modelled)",
    ]
    if row.roof_share is not None:
        lines.append(f"{100 * row.roof_share:.0f} % of the roof that binds: {row.roof}")
    return "\n".join(lines)


def _table(rows: Sequence[Row]) -> str:
    heads = (
        '<th>kernel</th><th class="text">shape</th><th>calls</th><th>total ms</th><th>% wall</th>'
        "<th>GFLOP/s</th><th>GB/s (modelled)</th><th>flop/byte</th><th>% of roof</th>"
        '<th class="text">roof</th>'
    )
    lines = [f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>']
    for row in rows:
        share = None if row.roof_share is None else 100 * row.roof_share
        lines.append(
            f'<tr><td>{html.escape(row.name)}</td><td class="text">{html.escape(row.shapes[0])}, '
            f"{row.dtype}</td><td>{row.calls:,}</td><td>{row.total_s * 1e3:,.2f}</td>"
            f"<td>{100 * row.share:.1f}</td><td>{_number(row.gflops)}</td>"
            f"<td>{_number(row.gbytes)}</td><td>{_number(row.intensity)}</td>"
            f'<td>{_number(share)}</td><td class="text">{html.escape(row.roof or "-")}</td></tr>'
        )
    return "\n".join([*lines, "</tbody></table></div>"])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
