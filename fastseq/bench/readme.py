"""``fastseq bench readme`` and ``plot``: a document's tables and pictures from result files."""

from __future__ import annotations

import argparse
from pathlib import Path


def figure_path(results: Path, folder: Path) -> Path:
    """Where the picture of a result file lies."""
    return folder / f"{results.stem}-speedups.svg"


def _plot(arguments: argparse.Namespace) -> int:
    from fastseq.bench import plot, results

    found, record = results.load(arguments.results)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    plot.draw(found, record, arguments.output)
    return 0


def _readme(arguments: argparse.Namespace) -> int:
    from fastseq.bench import plot, report, results

    loaded = [(path, *results.load(path)) for path in arguments.results]
    text = arguments.document.read_text(encoding="utf-8")
    for path, found, machine in loaded:
        filled = report.fill_markers(text, found, machine)
        if arguments.check and filled != text:
            raise ValueError(f"{arguments.document} does not show {path}")
        text = filled
    if not arguments.check:
        arguments.document.write_text(text, encoding="utf-8")
    if arguments.figures is None:
        return 0
    for path, found, machine in loaded:
        picture = figure_path(path, arguments.figures)
        if not arguments.check:
            picture.parent.mkdir(parents=True, exist_ok=True)
            plot.draw(found, machine, picture)
        elif plot.shown_in(picture) != plot.shown(found, machine):
            raise ValueError(f"{picture} does not show {path}")
    return 0


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``plot`` and ``readme``."""
    plot = commands.add_parser("plot", help="draw results as SVG")
    plot.add_argument("results", type=Path)
    plot.add_argument("--output", type=Path, required=True)
    plot.set_defaults(action=_plot)

    readme = commands.add_parser("readme", help="fill a document's tables from results")
    readme.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json")
    readme.add_argument("document", type=Path, metavar="README.md")
    readme.add_argument(
        "--figures",
        type=Path,
        metavar="FOLDER",
        help="draw the picture of every file, too: FOLDER/NAME-speedups.svg for NAME.json",
    )
    readme.add_argument(
        "--check",
        action="store_true",
        help="change nothing, fail if tables or pictures are out of date",
    )
    readme.set_defaults(action=_readme)
