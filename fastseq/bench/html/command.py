"""The ``report`` subcommand."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def _action(arguments: argparse.Namespace) -> int:
    from fastseq.bench.compare import machine_differences
    from fastseq.bench.html.page import render
    from fastseq.bench.report import load

    loaded = [load(path) for path in arguments.results]
    first = loaded[0][1]
    for path, (_, machine) in zip(arguments.results[1:], loaded[1:], strict=True):
        differences = machine_differences(first, machine)
        if differences:
            text = f"machines differ: {arguments.results[0]}, {path}: {'; '.join(differences)}"
            print(f"fastseq bench: warning: {text}", file=sys.stderr)
    page = render([(path.name, *found) for path, found in zip(arguments.results, loaded)])
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
    parser.set_defaults(action=_action)
