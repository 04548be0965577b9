"""What a run shows while it goes on: a table that grows and a bar, or plain lines.

Nothing here runs by itself: a thread that redraws would take time from what is being measured. The
screen changes between steps only, and that is when the clock on it moves.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastseq.bench import screen

if TYPE_CHECKING:
    from fastseq.bench.cases import AnyCase
    from fastseq.bench.runner import CaseResult, Plan

# A rough model of how long a case takes, for the time that remains: so much for itself, and so
# much for its arithmetic, which the float64 oracle and slow peers repeat.
_CASE_SECONDS = 3.0
_FLOPS_PER_SECOND = 1e10
# Lines of the screen that are not rows of the table.
_OTHER_LINES = 8


def weight(case: AnyCase, plan: Plan) -> float:
    """How long a case takes, roughly, in seconds."""
    return _CASE_SECONDS + plan.seconds * (2 if plan.cold else 1) + case.flops() / _FLOPS_PER_SECOND


def clock(seconds: float) -> str:
    """Minutes and seconds, hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Display:
    """Shows a run.

    Args:
        machine: Record of the machine.
        cases: All that will be run.
        plan: How.
        console: Where; standard output unless given.
    """

    def __init__(
        self,
        machine: dict[str, Any],
        cases: Sequence[AnyCase],
        plan: Plan,
        console: Console | None = None,
    ) -> None:
        # Without a terminal to ask, rich assumes 80 columns and cuts the names.
        self.console = console or Console(width=None if sys.stdout.isatty() else 200)
        self.machine, self.plan = machine, plan
        self._steps = [(case, threads) for case in cases for threads in plan.threads]
        self._weights = [weight(case, plan) for case, _ in self._steps]
        self._started = perf_counter()
        self._done = 0
        self._now = ""
        self._rows: list[CaseResult] = []
        self._live: Live | None = None

    def __enter__(self) -> Display:
        """Show what is about to run."""
        threads = ", ".join(map(str, self.plan.threads))
        self.console.print(
            f"{self.machine['cpu']}, threads {threads}, {self.machine['isa']} kernels, "
            f"{len(self._steps)} runs beside {', '.join(self.plan.peers) or 'nobody'}",
            highlight=False,
        )
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        self._started = perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the screen back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def steps(self) -> Iterator[tuple[AnyCase, int]]:
        """Cases and numbers of threads in the order of the run."""
        for case, threads in self._steps:
            self._now = f"{case.name}, threads {threads}"
            yield case, threads

    def phase(self, name: str) -> None:
        """Show what is done within the current case."""
        self._draw(name)

    def add(self, result: CaseResult) -> None:
        """Show one more result."""
        self._rows.append(result)
        self._done += 1
        if self._live is None:
            line = screen.line(result, self.plan.peers)
            self.console.print(f"[{self._done}/{len(self._steps)}] {line}", markup=False)
        self._draw("")

    def remaining_seconds(self) -> float | None:
        """Expected time to the end, from the time that earlier cases took."""
        done = sum(self._weights[: self._done])
        if not done:
            return None
        return (perf_counter() - self._started) * (sum(self._weights) / done - 1)

    def finish(self, results: Sequence[CaseResult]) -> None:
        """Show all results, and what there is to say about them."""
        if not results:
            return
        self.console.print(self._table(results))
        self.console.print()
        for line in screen.notes(results):
            self.console.print(line, highlight=False, markup=False)
        self.console.print(
            f"{len(results)} runs in {clock(perf_counter() - self._started)}", highlight=False
        )

    def _table(self, results: Sequence[CaseResult]) -> Table:
        several = len(self.plan.threads) > 1
        table = screen.new_table(self.plan.peers, threads=several)
        for result in results:
            screen.add_row(table, result, self.plan.peers, threads=several)
        return table

    def _draw(self, phase: str) -> None:
        if self._live is None:
            return
        # As many of the last rows as fit: a table taller than the screen could not be redrawn.
        fitting = max(1, self.console.height - _OTHER_LINES)
        self._live.update(Group(self._table(self._rows[-fitting:]), self._bar(phase)), refresh=True)

    def _bar(self, phase: str) -> Table:
        remaining = self.remaining_seconds()
        done, total = sum(self._weights[: self._done]), sum(self._weights)
        grid = Table.grid(padding=(0, 1))
        ends = "" if remaining is None else f", {clock(remaining)} to go"
        grid.add_row(
            ProgressBar(total=total, completed=done, width=30),
            f"{self._done}/{len(self._steps)}",
            clock(perf_counter() - self._started) + ends,
            Text(f"{self._now}: {phase}" if phase else self._now, overflow="ellipsis"),
        )
        return grid
