"""The page itself: templates filled with content."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastseq.bench.html import charts, colour, figures
from fastseq.bench.html.cells import threads_text
from fastseq.bench.html.content import Source, build


def _schemes() -> str:
    dark = colour.rules(colour.DARK)
    return f"{colour.rules(colour.LIGHT)}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"


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
        loader=jinja2.PackageLoader("fastseq.bench.html", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals.update(
        key_of=figures.key_of,
        threads_text=threads_text,
        marker_path=charts.marker_path,
        width=charts.WIDTH,
        height=charts.HEIGHT,
        limit=colour.LIMIT,
        steps=colour.STEPS,
    )
    template = environment.get_template("page.html.j2")
    return template.render(page=build(sources, roofs or {}), schemes=_schemes())
