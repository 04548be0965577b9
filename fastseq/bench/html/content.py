"""All that the page says, from result files: numbers and words, no markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastseq.bench.html import figures
from fastseq.bench.html.cells import (
    FAMILIES,
    Cell,
    cell,
    failure,
    family,
    our_entry,
    threads_text,
)
from fastseq.bench.html.charts import Chart
from fastseq.bench.html.heat_maps import Panel, panel
from fastseq.bench.ratios import geometric_mean, peers_of
from fastseq.bench.report import NOTHING, format_ratio, format_seconds
from fastseq.bench.results import OURS, OURS_FUNCTIONAL, CaseResult
from fastseq.bench.timing import Timing

# Of a machine's record, in this order and in words; other plain entries follow under their key.
_FACTS = {
    "cpu": "Processor",
    "cores": "Cores",
    "threads": "Threads",
    "caches_bytes": "Caches",
    "isa": "Kernels",
    "system": "System",
    "python": "Python",
    "libraries": "Libraries",
    "date": "Date",
}


@dataclass(frozen=True)
class Source:
    """A result file.

    Attributes:
        name: Of the file.
        results: What is in it.
        machine: Record of the machine.
    """

    name: str
    results: list[CaseResult]
    machine: dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """How often we are faster than a peer."""

    peer: str
    threads: int
    cases: int
    faster: int
    slower: int
    noise: int
    mean: str


@dataclass(frozen=True)
class Loss:
    """A case in which a peer is faster."""

    cell: Cell
    ours: str
    theirs: str


@dataclass(frozen=True)
class Failure:
    """A case without numbers."""

    case: str
    threads: int
    reason: str


@dataclass(frozen=True)
class PeerRow:
    """One library's figures in one case, in words."""

    peer: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class CaseRows:
    """One case in the table of everything."""

    case: str
    threads: int
    work: str
    failure: str | None
    rows: tuple[PeerRow, ...]
    extras: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Skip:
    """A peer or measurement that was left out, with the cases it concerns."""

    name: str
    reason: str
    cases: tuple[str, ...]


COLUMNS = (
    "median",
    "quartiles",
    "fastseq is",
    "p50",
    "p95",
    "p99",
    "fastest",
    "GFLOP/s",
    "cold",
    "first call",
    "peak memory",
)


@dataclass(frozen=True)
class Page:
    """Everything on the page, in its order."""

    facts: tuple[tuple[str, tuple[str, ...]], ...]
    notes: tuple[str, ...]
    peers: tuple[str, ...]
    threads: tuple[int, ...]
    summaries: tuple[Summary, ...]
    losses: tuple[Loss, ...]
    failures: tuple[Failure, ...]
    panels: tuple[Panel, ...]
    peaks: tuple[figures.DotPlot, ...]
    latencies: tuple[Chart, ...]
    memories: tuple[Chart, ...]
    memory_plots: tuple[figures.DotPlot, ...]
    scaling: tuple[figures.DotPlot, ...]
    rooflines: tuple[Chart, ...]
    has_bandwidth: bool
    columns: tuple[str, ...]
    cases: tuple[CaseRows, ...]
    skips: tuple[Skip, ...]


def build(sources: Sequence[Source], roofs: dict[str, Any]) -> Page:
    """The content of a page about one or several result files.

    Args:
        sources: The files, at least one. A case (at one thread count) that is in several is shown
            as in the last.
        roofs: As ``fastseq roof --json`` writes them, or empty.
    """
    merged: dict[tuple[str, int], CaseResult] = {}
    repeated: dict[str, int] = {}
    for source in sources:
        for result in source.results:
            key = result.case.name, result.threads
            if key in merged:
                repeated[source.name] = repeated.get(source.name, 0) + 1
            merged[key] = result
    results = list(merged.values())
    peers, threads = peers_of(results), figures.thread_counts(results)
    notes = [
        f"{count} case{'s' if count > 1 else ''} of {name} {'are' if count > 1 else 'is'} in an "
        "earlier file, too; shown as in the later one."
        for name, count in repeated.items()
    ]
    rooflines = figures.rooflines(results, roofs)
    return Page(
        facts=tuple(_facts(sources)),
        notes=tuple(notes),
        peers=tuple(peers),
        threads=tuple(threads),
        summaries=tuple(_summaries(results, peers, threads)),
        losses=tuple(_losses(results, peers)),
        failures=tuple(_failures(results)),
        panels=tuple(_panels(results, peers, threads)),
        peaks=tuple(figures.peak_plots(results)),
        latencies=tuple(figures.latency_charts(results)),
        memories=tuple(figures.memory_charts(results)),
        memory_plots=tuple(figures.memory_plots(results)),
        scaling=tuple(figures.scaling_plots(results)),
        rooflines=tuple(rooflines),
        has_bandwidth=any(figures.bandwidth_roofs(roofs, count) for count in threads),
        columns=COLUMNS,
        cases=tuple(_case_rows(result) for result in results),
        skips=tuple(_skips(results)),
    )


def _facts(sources: Sequence[Source]) -> list[tuple[str, tuple[str, ...]]]:
    """The machine's record in words; where files differ, each value with its files."""
    found: dict[str, dict[str, list[str]]] = {}
    for source in sources:
        record = source.machine
        known = {word: record[key] for key, word in _FACTS.items() if key in record}
        others = {
            key.replace("_", " ").capitalize(): value
            for key, value in record.items()
            if key not in _FACTS and isinstance(value, (str, int, float, list)) and value != []
        }
        for word, value in (known | others).items():
            found.setdefault(word, {}).setdefault(_fact(value), []).append(source.name)
    names = tuple(source.name for source in sources)
    facts = [
        (word, tuple(values if len(values) == 1 else _with_files(values)))
        for word, values in found.items()
    ]
    return [*facts, ("Files", (", ".join(names),))]


def _with_files(values: dict[str, list[str]]) -> list[str]:
    return [f"{value} ({', '.join(names)})" for value, names in values.items()]


def _fact(value: object) -> str:
    if isinstance(value, dict):
        entries = {
            name: _binary(entry) if isinstance(entry, int) else entry
            for name, entry in value.items()
        }
        return ", ".join(f"{name} {entry}" for name, entry in entries.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list):
        return ", ".join(_fact(entry) for entry in value)
    return str(value)


def _binary(count: int) -> str:
    scale, unit = (1 << 20, "MiB") if count >= 1 << 20 else (1 << 10, "KiB")
    return f"{count / scale:.3g} {unit}"


def _summaries(
    results: Sequence[CaseResult], peers: Sequence[str], threads: Sequence[int]
) -> list[Summary]:
    found = []
    for peer in peers:
        for count in threads:
            chosen = [
                (result, shown)
                for result in results
                if result.threads == count and (shown := cell(result, peer)).ratio is not None
            ]
            if not chosen:
                continue
            plain = [shown.ratio for result, shown in chosen if result.case.plain]
            mean = geometric_mean(ratio for ratio in plain if ratio is not None)
            slower = sum(shown.loss for _, shown in chosen)
            noise = sum(shown.loss and shown.noise for _, shown in chosen)
            cases, faster = len(chosen), len(chosen) - slower
            found.append(Summary(peer, count, cases, faster, slower, noise, format_ratio(mean)))
    return found


def _losses(results: Sequence[CaseResult], peers: Sequence[str]) -> list[Loss]:
    found = []
    for result in results:
        for peer in peers:
            shown = cell(result, peer)
            if shown.loss:
                ours = result.timings[our_entry(result, peer)].median_s
                theirs = result.timings[peer].median_s
                found.append(Loss(shown, format_seconds(ours), format_seconds(theirs)))
    return sorted(found, key=lambda loss: loss.cell.ratio or 0.0)


def _failures(results: Sequence[CaseResult]) -> list[Failure]:
    return [
        Failure(result.case.name, result.threads, reason)
        for result in results
        if (reason := failure(result)) is not None
    ]


def _panels(
    results: Sequence[CaseResult], peers: Sequence[str], threads: Sequence[int]
) -> list[Panel]:
    found = []
    for peer in peers:
        for count in threads:
            for kind in FAMILIES:
                if any(family(r.case) == kind and r.threads == count for r in results):
                    found.append(panel(results, kind, peer, count))
    return found


def _seconds(value: float | None) -> str:
    return NOTHING if value is None else format_seconds(value)


def _peer_row(result: CaseResult, peer: str, timing: Timing) -> PeerRow:
    ours = peer in (OURS, OURS_FUNCTIONAL)
    rate = result.gflops(peer)
    memory = figures.peak_memory(result).get(peer)
    cold = result.cold.get(peer)
    low, high = format_seconds(timing.lower_quartile_s), format_seconds(timing.upper_quartile_s)
    return PeerRow(
        peer,
        (
            format_seconds(timing.median_s),
            f"{low} to {high}",
            NOTHING if ours else cell(result, peer).text,
            _seconds(timing.p50_s),
            _seconds(timing.p95_s),
            _seconds(timing.p99_s),
            _seconds(timing.minimum_s),
            NOTHING if rate is None else f"{rate:.3g}",
            NOTHING if cold is None else format_seconds(cold.median_s),
            _seconds(result.first_call_s.get(peer)),
            NOTHING if memory is None else figures.format_bytes(memory),
        ),
    )


def _case_rows(result: CaseResult) -> CaseRows:
    case = result.case
    work = [figures.format_flops(case.flops())] if case.flops() else []
    work.append(figures.format_bytes(case.bytes()))
    if result.fma_peak_gflops:
        work.append(f"FMA peak {result.fma_peak_gflops:.0f} GFLOP/s")
    failed = failure(result)
    rows: tuple[PeerRow, ...] = ()
    extras: tuple[tuple[str, str], ...] = ()
    if failed is None:
        order = [OURS, OURS_FUNCTIONAL, *peers_of([result])]
        timed = [(peer, result.timings[peer]) for peer in order if peer in result.timings]
        rows = tuple(_peer_row(result, peer, timing) for peer, timing in timed)
        extras = tuple(
            (name.replace("_", " "), figures.format_bytes(v) if "bytes" in name else f"{v:.3g}")
            for name, v in result.probes.items()
            if not name.startswith("peak_memory_bytes")  # has a column
        )
    return CaseRows(case.name, result.threads, ", ".join(work), failed, rows, extras)


def _skips(results: Sequence[CaseResult]) -> list[Skip]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for name, reason in result.skipped.items():
            if name != "case":
                where = f"{result.case.name}, {threads_text(result.threads)}"
                reasons.setdefault((name, reason), []).append(where)
    return [Skip(name, reason, tuple(cases)) for (name, reason), cases in reasons.items()]
