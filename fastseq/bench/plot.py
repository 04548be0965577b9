"""The picture of the README: speed-up over torch for every case, losses included."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from fastseq.bench.cases import LAYERS
from fastseq.bench.machine import threads_text
from fastseq.bench.report import at_most_threads
from fastseq.bench.results import CaseResult
from fastseq.bench.transformer_cases import NORMS, STACKS, TransformerCase

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Readable on white and on the usual dark grey alike; the ink is switched by the style sheet below.
_INK = "#24292f"
_INK_ON_DARK = "#e6edf3"
_COLOURS = {"inference": "#2f81c7", "training": "#2e9e6b"}
_LOSS = "#d9534f"
_STYLE = (
    "<style>@media (prefers-color-scheme: dark) {"
    f'[style*="fill: {_INK}"] {{ fill: {_INK_ON_DARK} !important; }}'
    f'[style*="stroke: {_INK}"] {{ stroke: {_INK_ON_DARK} !important; }}'
    "}</style>"
)
# Identifies the element that holds what the picture shows.
_DATA = "fastseq-speedups"


# Layers of few cases share a column.
_SHARED: dict[str, str] = dict.fromkeys(NORMS, "norms") | dict.fromkeys(STACKS, "layers and models")
_COLUMNS = tuple(dict.fromkeys(_SHARED.get(layer, layer) for layer in LAYERS))


def _labelled(results: Sequence[CaseResult], column: str) -> dict[str, dict[str, float | None]]:
    """Speed-ups of one column's layers by row label, then by direction."""
    rows: dict[str, dict[str, float | None]] = {}
    for result in results:
        case = result.case
        # Denormal numbers slow torch down so much that they would flatten all other bars.
        if _SHARED.get(case.layer, case.layer) != column or case.options.denormal:
            continue
        label = case.shape_label
        if case.layer in _SHARED:
            label = f"{case.layer.replace('_', ' ')} {label}"
        if isinstance(case, TransformerCase):
            extra = case.words.replace(",", "")
        else:
            extra = case.options.suffix().strip("-").replace("-", " ")
        if extra:
            label += f"\n{extra}"
        rows.setdefault(label, {})[case.direction] = result.torch_speedup()
    return rows


def _number(speedup: float | None) -> str:
    """What stands at a bar."""
    return "gate failed" if speedup is None else f"{speedup:.2f}"


def _grouped(results: Sequence[CaseResult]) -> dict[str, dict[str, dict[str, float | None]]]:
    return {column: rows for column in _COLUMNS if (rows := _labelled(results, column))}


def _caption(results: Sequence[CaseResult], machine: dict[str, Any]) -> str:
    peer = "torch"
    if any(isinstance(result.case, TransformerCase) for result in results):
        peer = "torch, eager or compiled, whichever is faster"
    return f"Speed-up over {peer}, {threads_text(machine)}, {machine['cpu']}"


def shown(results: Sequence[CaseResult], machine: dict[str, Any]) -> dict[str, Any]:
    """All that the picture of these results says: its caption, and every bar's number."""
    results, machine = at_most_threads(results, machine)
    bars = {
        column: {
            label: {direction: _number(speedup) for direction, speedup in found.items()}
            for label, found in rows.items()
        }
        for column, rows in _grouped(results).items()
    }
    return {"caption": _caption(results, machine), "bars": bars}


def shown_in(path: Path) -> dict[str, Any] | None:
    """What ``shown`` gave when a picture was drawn; None if the file does not say.

    Raises:
        OSError: The picture cannot be read.
        ValueError: It is no SVG.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is no picture: {error}") from error
    found = root.find(f"{{*}}metadata[@id='{_DATA}']")
    return None if found is None or found.text is None else json.loads(found.text)


def _draw_layer(axes: Axes, rows: dict[str, dict[str, float | None]], slots: int) -> None:
    height = 0.36
    for row, speedups in enumerate(rows.values()):
        for direction, speedup in speedups.items():
            if len(speedups) == 1:
                offset = 0.0
            else:
                offset = -height / 2 if direction == "inference" else height / 2
            if speedup is None:
                axes.text(1.03, row + offset, _number(None), color=_LOSS, va="center", fontsize=7)
                continue
            colour = _COLOURS[direction] if speedup >= 1 else _LOSS
            hatch = None if direction == "inference" else "////"
            axes.barh(
                row + offset,
                speedup - 1,
                left=1,
                height=height,
                color=colour,
                hatch=hatch,
                edgecolor="#ffffff66",
                linewidth=0,
            )
            edge = max(speedup, 1.0) * 1.04
            axes.text(edge, row + offset, _number(speedup), color=_INK, va="center", fontsize=7)
    axes.axvline(1, color=_INK, linewidth=0.8)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=7)
    axes.set_ylim(slots - 0.5, -0.5)  # first case on top, bars equally thick in every column


def _finish(axes: Axes, layer: str, limits: tuple[float, float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(*limits)
    ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if limits[0] <= t <= limits[1]]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.set_title(layer.upper(), color=_INK, fontsize=10, loc="left")
    axes.tick_params(colors=_INK, length=2, labelsize=7)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_INK)


def draw(results: Sequence[CaseResult], machine: dict[str, Any], path: Path) -> None:
    """Write the picture as SVG.

    Args:
        results: What to show; of several thread counts, the highest.
        machine: Record of the machine, for the caption.
        path: Where to write.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    recorded = shown(results, machine)
    results, machine = at_most_threads(results, machine)
    groups = _grouped(results)
    speedups = [s for rows in groups.values() for row in rows.values() for s in row.values() if s]
    if not speedups:
        raise ValueError("no case was timed, there is nothing to draw")
    limits = (min(0.8, *speedups) * 0.9, max(2.0, *speedups) * 1.5)
    # One column of axes per layer; the layer with most cases sets the height.
    tallest = max(len(rows) for rows in groups.values())
    figure = Figure(figsize=(3.6 * len(groups), 0.42 * tallest + 1.2), layout="constrained")
    for column, (layer, rows) in enumerate(groups.items(), start=1):
        axes = figure.add_subplot(1, len(groups), column)
        _draw_layer(axes, rows, tallest)
        _finish(axes, layer, limits)
    handles = [Patch(color=colour, label=name) for name, colour in _COLOURS.items()]
    handles[1].set_hatch("////")
    handles.append(Patch(color=_LOSS, label="slower than torch"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3, frameon=False, labelcolor=_INK
    )
    figure.suptitle(recorded["caption"], color=_INK, fontsize=9)
    # Fixed salt and no date: the same results give the same file.
    with mpl.rc_context({"svg.hashsalt": "fastseq", "svg.fonttype": "none"}):
        figure.savefig(
            path, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    svg = path.read_text(encoding="utf-8")
    data = escape(json.dumps(recorded, sort_keys=True))
    added = f'<metadata id="{_DATA}">{data}</metadata>\n {_STYLE}'
    path.write_text(svg.replace("<defs>", f"{added}\n <defs>", 1), encoding="utf-8")
