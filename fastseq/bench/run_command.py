"""``bench run``: the arguments, and the run with its display and its file."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from fastseq.bench.cases import SUITES, AnyCase, select

if TYPE_CHECKING:
    from fastseq.bench.runner import CaseResult, Plan

# Exit statuses beside 0 and 2 (wrong use): a gate failed or a case raised; Ctrl-C.
FAILED, INTERRUPTED = 1, 130

_PEERS = ("torch", "torch-compile", "onnxruntime", "openvino")
# Compiling takes longer than all else in the quick suite.
_QUICK_PEERS = ("torch", "onnxruntime", "openvino")
_SECONDS, _QUICK_SECONDS = 2.0, 1.0


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``run`` to the subcommands."""
    run = commands.add_parser("run", help="check and time cases")
    run.add_argument(
        "--suite",
        choices=list(SUITES),
        help="which cases (default: quick; with --case: full, which is all of them)",
    )
    run.add_argument(
        "--case", metavar="GLOB", action="append", default=[], help="only cases that match"
    )
    run.add_argument(
        "--peer",
        metavar="NAMES",
        type=_peers,
        action="extend",
        help=f"whom to compare with, a comma list of {', '.join(_PEERS)} "
        "(default: all; quick: without torch-compile)",
    )
    run.add_argument(
        "--threads",
        metavar="COUNTS",
        type=_counts,
        help="threads of every peer, a comma list: each case runs on each (default: torch's)",
    )
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    run.add_argument(
        "--seconds",
        type=_positive,
        help=f"time for the peers of one case (default {_SECONDS:g}; quick: {_QUICK_SECONDS:g})",
    )
    run.add_argument("--cold", action="store_true", help="time with flushed caches, too")
    run.add_argument(
        "--probes",
        action=argparse.BooleanOptionalAction,
        help="ask the cases' extra questions (default: yes; quick: no)",
    )
    run.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    run.set_defaults(action=_run)


def _peers(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in _PEERS:
            raise argparse.ArgumentTypeError(f"unknown peer {name!r}; known: {', '.join(_PEERS)}")
    return names


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,2, got {text!r}") from None
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text!r}")
    return counts


def _positive(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text!r}")
    return seconds


def _check_device(device: str) -> None:
    from fastseq._config import capabilities

    if device == "cuda":
        state = capabilities()["cuda"]
        # The cases and peers of the registry are the CPU's.
        reason = state["reason"] or "this command times the CPU; see benchmarks/cuda_check.py"
        raise ValueError(f"--device cuda: {reason}")


def _plan(arguments: argparse.Namespace, suite: str) -> Plan:
    import torch

    from fastseq.bench.results import PEERS
    from fastseq.bench.runner import Plan

    quick = suite == "quick"
    chosen = arguments.peer or (_QUICK_PEERS if quick else _PEERS)
    seconds, probes = arguments.seconds, arguments.probes
    return Plan(
        peers=[PEERS[name] for name in _PEERS if name in chosen],
        threads=arguments.threads or (torch.get_num_threads(),),
        seconds=seconds if seconds is not None else _QUICK_SECONDS if quick else _SECONDS,
        cold=arguments.cold,
        probes=probes if probes is not None else not quick,
    )


def _run(arguments: argparse.Namespace) -> int:
    _check_device(arguments.device)
    suite = arguments.suite or ("full" if arguments.case else "quick")
    cases = select(suite, arguments.case)
    # torch's notices about its own projections and compiler would tear the table apart.
    warnings.filterwarnings("ignore", module="torch")
    warnings.filterwarnings("ignore", message="LSTM with projections")
    return _Session(arguments, suite, cases).run()


class _Session:
    """One run: what it has found so far, where it is shown and where it is kept."""

    def __init__(self, arguments: argparse.Namespace, suite: str, cases: list[AnyCase]) -> None:
        from fastseq.bench import machine

        self.suite, self.cases = suite, cases
        self.file: Path | None = arguments.json
        self.plan = _plan(arguments, suite)
        self.machine = machine.describe(self.plan.threads)
        self.results: list[CaseResult] = []

    def run(self) -> int:
        import dataclasses

        from fastseq.bench import machine, results, runner
        from fastseq.bench.display import Display

        if self.file is not None:
            results.check_writable(self.file)
        machine.warn_if_busy()
        display = Display(self.machine, self.cases, self.plan)
        plan = dataclasses.replace(self.plan, on_phase=display.phase)
        interrupted = False
        with display:
            try:
                for case, threads in display.steps():
                    result = runner.run_case(case, plan, threads)
                    self.results.append(result)
                    self._save(complete=False)
                    display.add(result)
            except KeyboardInterrupt:
                interrupted = True
        display.finish(self.results)
        self._save(complete=not interrupted)
        if interrupted:
            done, wanted = len(self.results), len(self.cases) * len(self.plan.threads)
            print(f"fastseq bench: interrupted after {done} of {wanted} runs", file=sys.stderr)
            return INTERRUPTED
        passed = all(result.gate.passed and not result.raised for result in self.results)
        return 0 if passed else FAILED

    def _save(self, *, complete: bool) -> None:
        from fastseq.bench import results

        if self.file is not None:
            document = results.to_json(self.results, self.machine, self.suite, complete=complete)
            results.save(self.file, document)
