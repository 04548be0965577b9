"""``fastseq profile script.py [args]`` and ``fastseq roof``."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from fastseq.profiler import roofs
from fastseq.profiler.session import (
    MAX_CALLS,
    MAX_SLICES,
    NO_KERNELS,
    Profile,
    profile,
    progress_on,
)
from fastseq.profiler.summary import GROUPS, SORTS

__all__ = ["main", "roof_main"]

_USAGE = "fastseq profile [options] (script.py | -m module) [arguments]"


class _UsageError(Exception):
    """The command line or a file named on it."""


class _Parser(argparse.ArgumentParser):
    """Complains in one line; argparse's own complaint is the usage text and the error."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(message)


def _parser() -> _Parser:
    parser = _Parser(
        prog="fastseq profile",
        usage=_USAGE,
        description="Run a program and show what its time in fastseq's kernels went into.",
        allow_abbrev=False,
    )
    parser.add_argument("--sort", choices=SORTS, default="time")
    parser.add_argument("--group", choices=GROUPS, default="phase")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="Chrome trace for Perfetto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything recorded")
    parser.add_argument("--roofline", type=Path, metavar="FILE", help="page with the roofline")
    parser.add_argument(
        "--counters", action="store_true", help="cycles, instructions and cache misses, too"
    )
    parser.add_argument("--max-calls", type=int, default=MAX_CALLS, metavar="N")
    parser.add_argument("--max-slices", type=int, default=MAX_SLICES, metavar="N")
    parser.add_argument(
        "-m", dest="module", metavar="MODULE", help="run a module, as python -m does"
    )
    return parser


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own options, and the program with what belongs to it."""
    flags = {"-h", "--help", "--counters"}
    index = 0
    while index < len(arguments):
        word = arguments[index]
        if word == "--":
            return list(arguments[:index]), list(arguments[index + 1 :])
        if word.startswith("-m") and not word.startswith("--"):
            # Everything behind the module's name is the module's.
            end = index + (2 if word == "-m" else 1)
            return list(arguments[:end]), list(arguments[end:])
        if not word.startswith("-") or word == "-":
            break
        index += 1 if word in flags or "=" in word else 2
    return list(arguments[:index]), list(arguments[index:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status, or 2 for wrong use."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    own, program = _split(given)
    try:
        options = _parser().parse_args(own)
        _check(options, program)
        recording = profile(
            options.counters, max_calls=options.max_calls, max_slices=options.max_slices
        )
        status = _run(recording, options.module, program)
        _report(recording, options)
    except (_UsageError, RuntimeError, ValueError, OSError, ImportError) as error:
        print(f"fastseq profile: {error}", file=sys.stderr)
        return 2
    return status


def _check(options: argparse.Namespace, program: Sequence[str]) -> None:
    if options.module is None:
        if not program:
            raise _UsageError(f"a script is missing; usage: {_USAGE}")
        script = Path(program[0])
        if not script.exists():
            raise _UsageError(f"{script} does not exist")
        # runpy takes a folder or archive that holds a __main__.py, as python does.
        if script.is_dir() and not (script / "__main__.py").exists():
            raise _UsageError(f"{script} is a folder without a __main__.py")
        if script.is_file() and not os.access(script, os.R_OK):
            raise _UsageError(f"{script} cannot be read")
    elif not _is_module(options.module):
        raise _UsageError(f"no module named {options.module!r}")
    # Better now than after an hour of running.
    for path in (options.trace, options.json, options.roofline):
        if path is not None and not path.parent.is_dir():
            raise _UsageError(f"{path.parent} is no folder to write {path.name} into")
        if path is not None and path.is_dir():
            raise _UsageError(f"{path} is a folder")


def _is_module(name: str) -> bool:
    import importlib.util

    # As for python -m, modules beside the caller count.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _run(recording: Profile, module: str | None, program: Sequence[str]) -> int:
    """Run the program under the profile as Python would; its exit status."""
    argv, path = sys.argv, list(sys.path)
    status = 0
    # The table says so in any case, and better than with a line of this file.
    warnings.filterwarnings("ignore", message=NO_KERNELS)
    with recording:
        try:
            if module is not None:
                sys.argv = [module, *program]
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            else:
                sys.argv = list(program)
                # A script finds the modules beside it first.
                sys.path.insert(0, str(Path(program[0]).resolve().parent))
                runpy.run_path(program[0], run_name="__main__")
        except SystemExit as exit:
            status = _exit_status(exit)
        except KeyboardInterrupt:
            print("KeyboardInterrupt", file=sys.stderr)
            status = 130
        except BaseException as error:
            traceback.print_exception(type(error), error, _own(error.__traceback__))
            status = 1
        finally:
            sys.argv, sys.path[:] = argv, path
    return status


def _own(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from where the program begins, without the lines that started it."""
    ours = (__file__, "<frozen runpy>", getattr(runpy, "__file__", ""))
    while trace is not None and trace.tb_frame.f_code.co_filename in ours:
        trace = trace.tb_next
    return trace


def _exit_status(exit: SystemExit) -> int:
    if exit.code is None:
        return 0
    if isinstance(exit.code, int):
        return exit.code
    print(exit.code, file=sys.stderr)
    return 1


def _report(recording: Profile, options: argparse.Namespace) -> None:
    sys.stdout.flush()
    recording.table(options.sort, options.group)
    if options.roofline is not None:
        recording.roofline(options.roofline)
    if options.trace is not None:
        recording.trace(options.trace)
    if options.json is not None:
        recording.to_json(options.json)


def roof_main(arguments: Sequence[str] | None = None) -> int:
    """``fastseq roof``: show the machine's roofs; returns the exit status."""
    parser = _Parser(
        prog="fastseq roof",
        description="Show what this machine can do: multiply-adds and memory, measured once.",
        allow_abbrev=False,
    )
    parser.add_argument("--measure", action="store_true", help="measure again")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write them, too")
    try:
        options = parser.parse_args(arguments)
        progress = progress_on(sys.stderr)
        found = roofs.measure(progress) if options.measure else roofs.load_or_measure(progress)
        print("\n".join(roofs.lines(found)))
        path = roofs.cache_path()
        if path is not None and path.exists():
            print(f"kept in {path}")
        else:
            print("not kept: the cache folder cannot be written; XDG_CACHE_HOME names another")
        if options.json is not None:
            roofs.write_atomically(options.json, json.dumps(found.to_dict(), indent=1) + "\n")
    except (_UsageError, RuntimeError, ValueError, OSError, ImportError) as error:
        print(f"fastseq roof: {error}", file=sys.stderr)
        return 2
    return 0
