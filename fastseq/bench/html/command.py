"""The ``report`` subcommand."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def _roofs(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    from fastseq.profiler.roofs import Roofs

    try:
        return Roofs.from_dict(json.loads(path.read_text(encoding="utf-8"))).to_dict()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not written by fastseq roof --json") from error


def _action(arguments: argparse.Namespace) -> int:
    from fastseq.bench.compare import machine_differences
    from fastseq.bench.html.content import Source
    from fastseq.bench.html.page import render
    from fastseq.bench.results import load

    loaded = [load(path) for path in arguments.results]
    first = loaded[0][1]
    for path, (_, machine) in zip(arguments.results[1:], loaded[1:], strict=True):
        differences = machine_differences(first, machine)
        if differences:
            text = f"machines differ: {arguments.results[0]}, {path}: {'; '.join(differences)}"
            print(f"fastseq bench: warning: {text}", file=sys.stderr)
    sources = [
        Source(path.name, *found) for path, found in zip(arguments.results, loaded, strict=True)
    ]
    page = render(sources, _roofs(arguments.roofs))
    arguments.html.parent.mkdir(parents=True, exist_ok=True)
    arguments.html.write_text(page, encoding="utf-8")
    print(f"wrote {arguments.html} ({len(page.encode()) / 1e3:.0f} kB)")
    return 0


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``report``."""
    parser = commands.add_parser(
        "report",
        help="results as one HTML page",
        description="Write one self-contained HTML page about one or several result files.",
    )
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json")
    parser.add_argument("--html", type=Path, required=True, metavar="PAGE.html")
    parser.add_argument(
        "--roofs",
        type=Path,
        metavar="ROOFS.json",
        help="draw the memory's roofs, too, from what fastseq roof --json wrote",
    )
    parser.set_defaults(action=_action)
