"""Results on the terminal: the table that grows during a run, and the lines below it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastseq.bench.cases import DIRECTIONS, LAYERS
from fastseq.bench.report import NOTHING, format_ratio, format_seconds, format_spread
from fastseq.bench.results import COMPILED, OURS, OURS_FUNCTIONAL, PEERS, TORCH, CaseResult

if TYPE_CHECKING:
    from rich.table import Table

_SHORT = {COMPILED: "compiled"}


def new_table(peers: Sequence[str] = (TORCH,), *, threads: bool = False) -> Table:
    """An empty table for ``add_row``.

    Args:
        peers: Peers that get a column with the speed-up over them.
        threads: Whether to have a column for the number of threads.
    """
    from rich.table import Table

    table = Table(title="median ± half the quartile range; more than 1x is faster than the peer")
    table.add_column("case", no_wrap=True)
    headings = ["threads"] if threads else []
    headings += [TORCH, OURS, *(f"vs {_SHORT.get(peer, peer)}" for peer in peers)]
    for heading in (*headings, "GFLOP/s", "of FMA peak"):
        table.add_column(heading, justify="right")
    table.add_column("gate")
    return table


def add_row(
    table: Table, result: CaseResult, peers: Sequence[str] = (TORCH,), *, threads: bool = False
) -> None:
    """Append one result; what stopped a case stands in the place of its times."""
    lead = [result.case.name, *([str(result.threads)] if threads else [])]
    if OURS not in result.timings:
        reason = result.raised or result.gate.summary()
        blank = [NOTHING] * (len(table.columns) - len(lead) - 1)
        table.add_row(*lead, *blank, f"[red]{_escaped(reason)}[/red]")
        return
    table.add_row(
        *lead,
        format_spread(result.timings[TORCH]) if TORCH in result.timings else NOTHING,
        format_spread(result.timings[OURS]),
        *(_coloured(result.peer_speedup(peer)) for peer in peers),
        _rate(result.gflops()),
        _share(result.share_of_peak()),
        "[red]raised later[/red]" if result.raised else "passed",
    )


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _coloured(ratio: float | None) -> str:
    text = format_ratio(ratio)
    return f"[red]{text}[/red]" if ratio is not None and ratio < 1 else text


def _rate(rate: float | None) -> str:
    if rate is None:
        return NOTHING
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"


def _share(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.0%}"


def line(result: CaseResult, peers: Sequence[str]) -> str:
    """One result in one line, for where there is no terminal."""
    label = f"{result.case.name}, {_threads(result.threads)}"
    if OURS not in result.timings:
        return f"{label}: {result.raised or result.gate.summary()}"
    shown = [format_spread(result.timings[OURS])]
    for peer in peers:
        ratio = result.peer_speedup(peer)
        if ratio is not None:
            shown.append(f"{ratio:.2f}x {peer}")
    return f"{label}: {', '.join(shown)}"


def _threads(count: int) -> str:
    return f"{count} thread" + ("" if count == 1 else "s")


def notes(results: Sequence[CaseResult]) -> list[str]:
    """Lines below the table: single calls, memory, probes, skipped peers, means."""
    counts = sorted({result.threads for result in results})
    lines = []
    for result in results:
        label = result.case.name
        if len(counts) > 1:
            label += f", {_threads(result.threads)}"
        lines += [f"{label}: {note}" for note in _case_notes(result)]
    lines += _skipped(results)
    for threads in counts:
        chosen = [result for result in results if result.threads == threads]
        suffix = f" on {_threads(threads)}" if len(counts) > 1 else ""
        lines += _means(chosen, suffix)
    return lines


def _case_notes(result: CaseResult) -> list[str]:
    found = []
    if OURS_FUNCTIONAL in result.timings:
        timing = result.timings[OURS_FUNCTIONAL]
        note = f"functional entry {format_spread(timing)}"
        over_torch = result.speedup(TORCH, OURS_FUNCTIONAL)
        found.append(note if over_torch is None else f"{note}, {over_torch:.2f}x torch")
    if OURS in result.cold:
        cold = {peer: format_seconds(one.median_s) for peer, one in result.cold.items()}
        found.append("cold " + ", ".join(f"{peer} {text}" for peer, text in cold.items()))
    for name, value in result.probes.items():
        shown = f"{value / 1e6:.2f} MB" if "bytes" in name else f"{value:.2f}"
        found.append(f"{name} {shown}")
    return found


def _skipped(results: Sequence[CaseResult]) -> list[str]:
    reasons: dict[tuple[str, str], int] = {}
    for result in results:
        for item in result.skipped.items():
            reasons[item] = reasons.get(item, 0) + 1
    return [
        f"{'failed' if name == 'case' else f'skipped {name} in'} "
        f"{count} case{'s' if count > 1 else ''}: {reason}"
        for (name, reason), count in reasons.items()
    ]


def _means(results: Sequence[CaseResult], suffix: str) -> list[str]:
    """Speed-up over torch, layer by layer, over cases that are a shape and nothing else."""
    lines = []
    for layer in LAYERS:
        for direction in DIRECTIONS:
            ratios = [
                ratio
                for result in results
                if (result.case.layer, result.case.direction) == (layer, direction)
                and result.case.plain
                and (ratio := result.torch_speedup()) is not None
            ]
            if len(ratios) > 1:
                mean, worst = statistics.geometric_mean(ratios), min(ratios)
                lines.append(
                    f"{layer} {direction}, {len(ratios)} plain cases{suffix}: "
                    f"geometric mean {mean:.2f}x torch, at least {worst:.2f}x"
                )
    return lines


def peers_in(results: Sequence[CaseResult]) -> list[str]:
    """The peers that were timed in any of the cases, in the order of tables."""
    return [peer for peer in PEERS.values() if any(peer in one.timings for one in results)]
