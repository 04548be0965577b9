"""The ``bench`` command: run cases, draw the picture, fill the README."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastseq.bench import compare, html, model, readme, run_command
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

    readme.add_command(commands)
    compare.add_command(commands)
    html.add_command(commands)
    model.add_command(commands)
    return parser


def _list(arguments: argparse.Namespace) -> int:
    for case in select(arguments.suite, arguments.case):
        work = f"{case.flops() / 1e9:.3g} GFLOP  {case.bytes() / 1e6:.3g} MB"
        print(f"{case.name}  {work}  {' '.join(case.tags)}")
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
        sys.stdout.flush()
    except ModuleNotFoundError as error:
        print(f"fastseq bench: {error}; pip install 'fastseq[bench]'", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Who reads has seen enough (head, say). The interpreter flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError) as error:
        print(f"fastseq bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastseq bench: interrupted", file=sys.stderr)
        return 130
    return status
