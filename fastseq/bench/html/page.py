"""The page itself: templates filled with content."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastseq.bench.html import charts, colour, figures
from fastseq.bench.html.cells import threads_text
from fastseq.bench.html.content import Source, build
from fastseq.bench.results import OURS

_TEMPLATES = Path(__file__).with_name("templates")


def _schemes() -> str:
    dark = colour.rules(colour.DARK)
    return f"{colour.rules(colour.LIGHT)}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"


def _legend_keys(
    plots: Sequence[charts.Chart | figures.DotPlot], peers: Sequence[str]
) -> list[tuple[str, str]]:
    """Class and name of what is drawn in any of the plots."""
    drawn: set[str] = set()
    for plot in plots:
        if isinstance(plot, charts.Chart):
            drawn |= {line.key for line in plot.lines}
        else:
            drawn |= {dot.key for row in plot.rows for dot in row.dots}
    names = [(figures.key_of(name), name) for name in (OURS, *peers)]
    return [(key, name) for key, name in names if key in drawn]


def render(sources: Sequence[Source], roofs: dict[str, Any] | None = None) -> str:
    """The page about one or several result files.

    Args:
        sources: The files, at least one.
        roofs: As ``fastseq roof --json`` writes them.

    Raises:
        ValueError: The files have no case at all.
    """
    import jinja2

    if not any(source.results for source in sources):
        raise ValueError("there is no case to report")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals.update(
        legend_keys=_legend_keys,
        threads_text=threads_text,
        marker_path=charts.marker_path,
        width=charts.WIDTH,
        height=charts.HEIGHT,
        limit=colour.LIMIT,
        steps=colour.STEPS,
    )
    template = environment.get_template("page.html.j2")
    return template.render(page=build(sources, roofs or {}), schemes=_schemes())
