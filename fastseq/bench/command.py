"""The ``bench`` command: run cases, draw the picture, fill the README."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fastseq.bench import compare, html, run_command
from fastseq.bench.cases import SUITES, select


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; ``--help`` has the rest."""

    def error(self, message: str) -> NoReturn:
        print(f"fastseq bench: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="fastseq bench", description="Time fastseq's layers side by side with their peers."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    run_command.add_command(commands)

    listing = commands.add_parser("list", help="show the cases of a suite")
    listing.add_argument("--suite", choices=list(SUITES), default="full")
    listing.add_argument("--case", metavar="GLOB", action="append", default=[])
    listing.set_defaults(action=_list)

    plot = commands.add_parser("plot", help="draw results as SVG")
    plot.add_argument("results", type=Path)
    plot.add_argument("--output", type=Path, required=True)
    plot.set_defaults(action=_plot)

    readme = commands.add_parser("readme", help="fill a document's tables from results")
    readme.add_argument("results", type=Path)
    readme.add_argument("document", type=Path)
    readme.add_argument(
        "--check", action="store_true", help="change nothing, fail if the tables are out of date"
    )
    readme.set_defaults(action=_readme)

    compare.add_command(commands)
    html.add_command(commands)
    return parser


def _list(arguments: argparse.Namespace) -> int:
    for case in select(arguments.suite, arguments.case):
        work = f"{case.flops() / 1e9:.3g} GFLOP  {case.bytes() / 1e6:.3g} MB"
        print(f"{case.name}  {work}  {' '.join(case.tags)}")
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from fastseq.bench import plot, report

    results, record = report.load(arguments.results)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    plot.draw(results, record, arguments.output)
    return 0


def _readme(arguments: argparse.Namespace) -> int:
    from fastseq.bench import report

    results, record = report.load(arguments.results)
    text = arguments.document.read_text(encoding="utf-8")
    filled = report.fill_markers(text, results, record)
    if arguments.check:
        if filled != text:
            raise ValueError(f"{arguments.document} does not show {arguments.results}")
        return 0
    arguments.document.write_text(filled, encoding="utf-8")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: 0; 1 if a gate failed, a case raised or a check found something; 2 for
        wrong use; 130 after Ctrl-C.
    """
    try:
        parsed = _parser().parse_args(arguments)
        status: int = parsed.action(parsed)
    except ModuleNotFoundError as error:
        print(f"fastseq bench: {error}; pip install 'fastseq[bench]'", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"fastseq bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastseq bench: interrupted", file=sys.stderr)
        return 130
    return status
