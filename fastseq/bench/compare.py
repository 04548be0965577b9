"""``fastseq bench compare``: two result files side by side, with an exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from fastseq.bench.results import CaseResult
    from fastseq.bench.timing import Timing

# What has to be equal for two files to be comparable; other keys (date, load, ...) may differ.
_MACHINE_KEYS = ("cpu", "cores", "system", "isa")
_LIBRARIES_THAT_RUN = ("torch",)


@dataclass(frozen=True)
class Change:
    """One case at one thread count, in both files.

    Attributes:
        name: The case.
        threads: Threads of every peer.
        before: Our timing in the first file; None if the case was not timed there.
        after: Our timing in the second file; None if the case was not timed there.
        torch_before: Speed-up over torch in the first file.
        torch_after: Speed-up over torch in the second file.
        problem: Why there is no ratio, for the table.
        failed: The check passed in the first file; in the second it did not, or the case raised.
    """

    name: str
    threads: int
    before: Timing | None
    after: Timing | None
    torch_before: float | None
    torch_after: float | None
    problem: str | None = None
    failed: bool = False

    @property
    def ratio(self) -> float | None:
        """How many times faster the second file is; below 1 it is slower."""
        if self.before is None or self.after is None:
            return None
        return self.before.median_s / self.after.median_s

    @property
    def failure(self) -> str:
        """What went wrong in the second file, for a sentence that begins with the case."""
        return "raised" if (self.problem or "").endswith("raised") else "failed its check"

    @property
    def within_noise(self) -> bool:
        """Whether the middle halves of both timings overlap."""
        from fastseq.bench.ratios import within_noise

        if self.before is None or self.after is None:
            return False
        return within_noise(self.before, self.after)

    @property
    def torch_change(self) -> float | None:
        """The speed-up over torch in the second file over that in the first.

        Both files' drift divides out: torch took its turns on the same machine in the same hour.
        """
        if self.torch_before is None or self.torch_after is None:
            return None
        return self.torch_after / self.torch_before


@dataclass(frozen=True)
class Comparison:
    """All cases of two result files.

    Attributes:
        changes: Cases in both, in the order of the second file.
        only_before: Cases (and threads) that only the first file has.
        only_after: Cases (and threads) that only the second file has.
    """

    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]

    @property
    def mean(self) -> float | None:
        """Geometric mean of the ratios."""
        from fastseq.bench.ratios import geometric_mean

        return geometric_mean(c.ratio for c in self.changes if c.ratio is not None)

    @property
    def torch_mean(self) -> float | None:
        """Geometric mean of the changes of the speed-up over torch."""
        from fastseq.bench.ratios import geometric_mean

        return geometric_mean(c.torch_change for c in self.changes if c.torch_change is not None)

    def below(self, limit: float, *, mean: bool = False) -> list[str]:
        """What is slower than the limit: cases, or the mean; what is wrong now in any case."""
        found = [f"{label(c.name, c.threads)} {c.failure}" for c in self.changes if c.failed]
        if mean:
            if self.mean is not None and self.mean < limit:
                found.append(f"geometric mean {self.mean:.3f}x")
            return found
        for change in self.changes:
            if change.ratio is not None and change.ratio < limit:
                noise = ", within noise" if change.within_noise else ""
                found.append(f"{label(change.name, change.threads)} {change.ratio:.3f}x{noise}")
        return found


def label(name: str, threads: int) -> str:
    """A case at a thread count in words."""
    return f"{name} ({threads} thread{'' if threads == 1 else 's'})"


def _problem(result: CaseResult, peer: str) -> str | None:
    if result.raised:
        return "raised"
    if not result.gate.passed:
        return "check failed"
    return None if peer in result.timings else f"no timing of {peer}"


def _change(before: CaseResult, after: CaseResult, peer: str) -> Change:
    problems = _problem(before, peer), _problem(after, peer)
    texts = [f"{side}: {text}" for side, text in zip("AB", problems, strict=True) if text]
    failed = bool(after.raised) or not after.gate.passed
    return Change(
        after.case.name,
        after.threads,
        None if problems[0] else before.timings[peer],
        None if problems[1] else after.timings[peer],
        before.peer_speedup("torch"),
        after.peer_speedup("torch"),
        "; ".join(texts) or None,
        failed and problems[0] is None,
    )


def compare(
    before: Sequence[CaseResult], after: Sequence[CaseResult], peer: str = "fastseq"
) -> Comparison:
    """Pair the cases of two result files by name and threads.

    Args:
        before: Results of the first file.
        after: Results of the second file.
        peer: Whose timings to compare.

    Raises:
        ValueError: No case is in both, or none of the pairs has a timing of the peer.
    """
    first = {(result.case.name, result.threads): result for result in before}
    second = {(result.case.name, result.threads): result for result in after}
    changes = tuple(_change(first[key], second[key], peer) for key in second if key in first)
    if not changes:
        raise ValueError("no case at the same thread count is in both files")
    if not any(peer in r.timings for results in (first, second) for r in results.values()):
        known = sorted({name for r in (*first.values(), *second.values()) for name in r.timings})
        raise ValueError(f"no timing of {peer!r} in these files; there are: {', '.join(known)}")
    return Comparison(
        changes,
        tuple(label(*key) for key in first if key not in second),
        tuple(label(*key) for key in second if key not in first),
    )


def machine_differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What of two machine records makes times incomparable, in words."""
    pairs = [(key, before.get(key), after.get(key)) for key in _MACHINE_KEYS]
    libraries = before.get("libraries", {}), after.get("libraries", {})
    pairs += [(name, *(known.get(name) for known in libraries)) for name in _LIBRARIES_THAT_RUN]
    return [f"{name} {old} and {new}" for name, old, new in pairs if old != new]


def _table(comparison: Comparison) -> Table:
    from rich.table import Table

    from fastseq.bench.report import NOTHING, format_seconds

    table = Table(title="A/B: how many times faster the second file is; below 1x it is slower")
    table.add_column("case", no_wrap=True)
    for heading in ("threads", "A", "B", "A/B", "vs torch, A", "vs torch, B", "change"):
        table.add_column(heading, justify="right")
    table.add_column("")

    def seconds(timing: Timing | None) -> str:
        return NOTHING if timing is None else format_seconds(timing.median_s)

    def ratio(value: float | None) -> str:
        return NOTHING if value is None else f"{value:.2f}x"

    for change in comparison.changes:
        note = change.problem or ("within noise" if change.within_noise else "")
        shown = ratio(change.ratio)
        if change.ratio is not None and change.ratio < 1 and not change.within_noise:
            shown = f"[red]{shown}[/red]"
        change_of_torch = change.torch_change
        table.add_row(
            change.name,
            str(change.threads),
            seconds(change.before),
            seconds(change.after),
            shown,
            ratio(change.torch_before),
            ratio(change.torch_after),
            NOTHING if change_of_torch is None else f"{change_of_torch - 1:+.0%}",
            f"[red]{note}[/red]" if change.failed else note,
        )
    return table


def _mean_line(comparison: Comparison) -> str:
    counted = sum(change.ratio is not None for change in comparison.changes)
    if comparison.mean is None:
        return "no case has a timing in both files"
    text = f"geometric mean of {counted} case{'' if counted == 1 else 's'}: {comparison.mean:.3f}x"
    if comparison.torch_mean is not None:
        text += f", speed-up over torch {comparison.torch_mean - 1:+.1%}"
    return text


def _action(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from fastseq.bench.results import PEERS, STOPPED, load

    limit: float | None = arguments.fail_below
    if limit is not None and not limit > 0:
        raise ValueError(f"--fail-below must be above 0, got {limit:g}")
    if arguments.mean and limit is None:
        raise ValueError("--mean needs --fail-below")
    (before, machine_before), (after, machine_after) = load(arguments.before), load(arguments.after)
    comparison = compare(before, after, PEERS.get(arguments.peer, arguments.peer))
    differences = machine_differences(machine_before, machine_after)
    for path, machine in ((arguments.before, machine_before), (arguments.after, machine_after)):
        if STOPPED in machine:
            print(
                f"fastseq bench: warning: {path}: the run was stopped {machine[STOPPED]}",
                file=sys.stderr,
            )
    if differences:
        print(f"fastseq bench: warning: machines differ: {'; '.join(differences)}", file=sys.stderr)
    # Without a terminal to ask, rich assumes 80 columns and cuts the names.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(_table(comparison))
    for file, names in (("A", comparison.only_before), ("B", comparison.only_after)):
        for name in names:
            console.print(f"only in {file}: {name}", highlight=False)
    console.print(_mean_line(comparison), highlight=False)
    if limit is None:
        return 0
    below = comparison.below(limit, mean=arguments.mean)
    for line in below:
        console.print(f"below {limit:g}x: {line}", highlight=False)
    return 1 if below else 0


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``compare``."""
    parser = commands.add_parser(
        "compare",
        help="two result files side by side",
        description="How many times faster the second file is than the first, case by case.",
        epilog="Exit status: 0, 1 if something is below the limit, 2 for wrong use or a bad file.",
    )
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument(
        "--fail-below",
        type=float,
        metavar="RATIO",
        help="exit with 1 if a case's A/B is below this, or its check fails in B only",
    )
    parser.add_argument(
        "--mean", action="store_true", help="hold the geometric mean against --fail-below"
    )
    parser.add_argument(
        "--peer", default="fastseq", help="whose times to compare (default: fastseq)"
    )
    parser.set_defaults(action=_action)
