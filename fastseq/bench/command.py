"""The ``bench`` command: run cases, draw the picture, fill the README."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fastseq.bench import model
from fastseq.bench.cases import SUITES, select


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastseq bench", description="Time fastseq's layers side by side with their peers."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="check and time cases")
    run.add_argument("--suite", choices=list(SUITES), default="rnn")
    run.add_argument(
        "--case", metavar="GLOB", action="append", default=[], help="only cases that match"
    )
    run.add_argument(
        "--seconds", type=float, default=2.0, help="time for the peers of one case (default 2)"
    )
    run.add_argument("--threads", type=int, help="threads for every peer (default: torch's)")
    run.add_argument(
        "--no-compile",
        dest="compiled",
        action="store_false",
        help="suite transformer: leave torch.compile out",
    )
    run.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    run.set_defaults(action=_run)

    listing = commands.add_parser("list", help="show the cases of a suite")
    listing.add_argument("--suite", choices=list(SUITES), default="rnn")
    listing.add_argument("--case", metavar="GLOB", action="append", default=[])
    listing.set_defaults(action=_list)

    model.add_command(commands)

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
    return parser


def _list(arguments: argparse.Namespace) -> int:
    for case in select(arguments.suite, arguments.case):
        print(f"{case.name}  {case.flops() / 1e9:.3g} GFLOP  {case.bytes() / 1e6:.3g} MB")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    import warnings

    import torch
    from rich.console import Console
    from rich.live import Live

    from fastseq.bench import machine, report, runner

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    cases = select(arguments.suite, arguments.case)
    record = machine.describe(torch.get_num_threads())
    # Without a terminal to ask, rich assumes 80 columns and cuts the names.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(f"{record['cpu']}, {record['threads']} threads, {record['isa']} kernels")
    # torch's notice about its own projections would tear the table apart.
    warnings.filterwarnings("ignore", message="LSTM with projections")
    table = report.new_table(arguments.suite)
    results = []
    with Live(table, console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for result in runner.run(
            cases,
            suite=arguments.suite,
            seconds=arguments.seconds,
            compiled=arguments.compiled,
        ):
            results.append(result)
            report.add_row(table, result)
            live.refresh()
    console.print()
    for line in report.notes(results):
        console.print(line, highlight=False)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        document = report.to_json(results, record, arguments.suite)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0 if all(result.gate.passed for result in results) else 1


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
    """Run the command; returns the exit status (1: a gate failed, 2: wrong use)."""
    parsed = _parser().parse_args(arguments)
    try:
        status: int = parsed.action(parsed)
    except ModuleNotFoundError as error:
        print(f"fastseq bench: {error}; pip install 'fastseq[bench]'", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"fastseq bench: {error}", file=sys.stderr)
        return 2
    return status
