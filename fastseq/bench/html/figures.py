"""The page's charts, from results: share of the peak, lengths, threads, roofline."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastseq.bench.attention_cases import AttentionCase
from fastseq.bench.cases import AnyCase, Case
from fastseq.bench.html.cells import FAMILIES, case_label, family, threads_text
from fastseq.bench.html.charts import Chart, Series, line_chart, roofline
from fastseq.bench.ratios import peers_of
from fastseq.bench.report import format_seconds
from fastseq.bench.results import OURS, CaseResult

# Fewer points than this make no curve.
_POINTS_OF_A_CURVE = 3


@dataclass(frozen=True)
class Dot:
    """A value on a row's scale: its place in per cent of the width, its kind and its words."""

    at: float
    key: str
    tip: str


@dataclass(frozen=True)
class DotRow:
    """One case on a common scale.

    Attributes:
        label: The case.
        dots: What is drawn.
        values: The same in words.
    """

    label: str
    dots: tuple[Dot, ...]
    values: str


@dataclass(frozen=True)
class DotPlot:
    """Cases one below the other on a common scale.

    Attributes:
        title: Heading.
        rows: One for each case.
        ticks: (place in per cent, label).
        threads: Thread count that it is about; 0 for all.
    """

    title: str
    rows: tuple[DotRow, ...]
    ticks: tuple[tuple[float, str], ...]
    threads: int = 0


def key_of(peer: str) -> str:
    """A peer's name as a class of the style sheet."""
    return re.sub(r"\W+", "-", peer.lower())


def thread_counts(results: Iterable[CaseResult]) -> list[int]:
    """Every thread count, most threads first: what is shown until another is chosen."""
    return sorted({result.threads for result in results}, reverse=True)


def _timed(results: Iterable[CaseResult]) -> list[CaseResult]:
    return [result for result in results if result.gate.passed and OURS in result.timings]


def format_bytes(count: float) -> str:
    """Three significant digits with a unit that suits them."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.3g} B"


def format_flops(count: float) -> str:
    """Three significant digits with a unit that suits them."""
    for scale, unit in ((1e9, "GFLOP"), (1e6, "MFLOP")):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.3g} kFLOP"


def _full_label(case: AnyCase) -> str:
    return f"{case_label(case)}, {case.direction}"


# --- share of the FMA peak


def peak_plots(results: Sequence[CaseResult]) -> list[DotPlot]:
    """Share of the measured FMA peak: one plot for each family and thread count."""
    plots = []
    for threads in thread_counts(results):
        for kind, title in FAMILIES.items():
            rows = []
            for result in _timed(results):
                if family(result.case) != kind or result.threads != threads:
                    continue
                row = _peak_row(result)
                if row is not None:
                    rows.append(row)
            if rows:
                ticks = tuple((float(at), f"{at} %") for at in (0, 25, 50, 75, 100))
                plots.append(
                    DotPlot(f"{title}, {threads_text(threads)}", tuple(rows), ticks, threads)
                )
    return plots


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{100 * share:.2g}%"


def _peak_row(result: CaseResult) -> DotRow | None:
    if not result.fma_peak_gflops or not result.case.flops():
        return None
    dots, words = [], []
    for peer in (OURS, *peers_of([result])):
        rate = result.gflops(peer)
        if rate is None:
            continue
        share = rate / result.fma_peak_gflops
        text = f"{peer} {_percent(share)}"
        words.append(text)
        tip = f"{_full_label(result.case)}: {text} of {result.fma_peak_gflops:.0f} GFLOP/s"
        # Clocks vary: a case may run above the peak measured just before it.
        dots.append(Dot(min(100.0, 100 * share), key_of(peer), f"{tip} ({rate:.3g} GFLOP/s)"))
    return DotRow(_full_label(result.case), tuple(reversed(dots)), ", ".join(words))


# --- curves over a length


def _length(case: AnyCase) -> int:
    """Steps or rows: what the curves go over."""
    if isinstance(case, Case):
        return case.T
    return case.Skv if isinstance(case, AttentionCase) else case.S


def _family_of_curve(case: AnyCase) -> tuple[str, str]:
    """All but the length: cases that agree in it lie on one curve. Second, the curve's title."""
    record: dict[str, Any] = asdict(case)
    for name in ("name", "T", "S", "Sq", "Skv", "tags"):
        record.pop(name, None)
    for name in ("probes", "tags"):
        record["options"].pop(name, None)
    if isinstance(case, AttentionCase):
        record["square"] = case.Sq == case.Skv
        record["queries"] = None if case.Sq == case.Skv else case.Sq
    # The length goes out of the label, which is made for people.
    length = r"\bT\d+ ?" if isinstance(case, Case) else r"\bS[\d/]+ ?|\b\d+(?=x\d)"
    label = re.sub(length, "", _full_label(case), count=1)
    if not isinstance(case, Case):
        label = re.sub(r" x(?=\d)", " rows x ", label)
    return json.dumps(record, sort_keys=True, default=str), label


def _curves(results: Iterable[CaseResult], points: int) -> list[tuple[str, list[CaseResult]]]:
    groups: dict[tuple[str, int], tuple[str, list[CaseResult]]] = {}
    for result in results:
        key, label = _family_of_curve(result.case)
        groups.setdefault((key, result.threads), (label, []))[1].append(result)
    return [
        (label, sorted(found, key=lambda result: _length(result.case)))
        for label, found in groups.values()
        if len({_length(result.case) for result in found}) >= points
    ]


def latency_charts(results: Sequence[CaseResult]) -> list[Chart]:
    """Seconds per call over steps or rows, for every kind of case run at several lengths."""
    charts = []
    for label, found in _curves(_timed(results), _POINTS_OF_A_CURVE):
        threads = found[0].threads
        series = []
        for peer in (OURS, *peers_of(found)):
            points = tuple(
                (
                    float(_length(result.case)),
                    result.timings[peer].median_s,
                    f"{peer}, {_axis(result.case)} {_length(result.case)}: "
                    f"{format_seconds(result.timings[peer].median_s)}",
                )
                for result in found
                if peer in result.timings
            )
            if points:
                series.append(Series(peer, key_of(peer), points))
        title = f"{label}, {threads_text(threads)}"
        axis = "steps T" if isinstance(found[0].case, Case) else "rows S"
        charts.append(
            line_chart(title, axis, "time per call", series, format_seconds, threads=threads)
        )
    return charts


def _axis(case: AnyCase) -> str:
    return "T" if isinstance(case, Case) else "S"


def peak_memory(result: CaseResult) -> dict[str, float]:
    """Peak memory by library; files of format 1 have it among the probes."""
    if result.peak_memory_bytes:
        return dict(result.peak_memory_bytes)
    names = {OURS: "peak_memory_bytes", "torch": "peak_memory_bytes_torch"}
    return {k: result.probes[name] for k, name in names.items() if name in result.probes}


def memory_charts(results: Sequence[CaseResult]) -> list[Chart]:
    """Peak memory over steps or rows."""
    # A call that adds nothing measurable has no place on a logarithmic axis.
    having = [r for r in results if any(value > 0 for value in peak_memory(r).values())]
    charts = []
    for label, found in _curves(having, 2):
        libraries = dict.fromkeys(name for result in found for name in peak_memory(result))
        series = []
        for library in libraries:
            points = tuple(
                (
                    float(_length(result.case)),
                    value,
                    f"{library}, {_axis(result.case)} {_length(result.case)}: "
                    f"{format_bytes(value)}",
                )
                for result in found
                if (value := peak_memory(result).get(library, 0)) > 0
            )
            if points:
                series.append(Series(library, key_of(library), points))
        threads = found[0].threads
        title = f"{label}, {threads_text(threads)}"
        axis = "steps T" if isinstance(found[0].case, Case) else "rows S"
        charts.append(
            line_chart(title, axis, "peak memory of a call", series, format_bytes, threads=threads)
        )
    return charts


def memory_plots(results: Sequence[CaseResult]) -> list[DotPlot]:
    """Our peak memory over torch's, for cases measured at one length only."""
    measured = [result for result in results if peak_memory(result)]
    drawn = {id(result) for _, found in _curves(measured, 2) for result in found}
    rows = []
    for result in measured:
        found = peak_memory(result)
        if id(result) in drawn or not {OURS, "torch"} <= found.keys() or found["torch"] <= 0:
            continue
        share = found[OURS] / found["torch"]
        label = f"{_full_label(result.case)}, {threads_text(result.threads)}"
        words = f"fastseq {format_bytes(found[OURS])}, torch {format_bytes(found['torch'])}"
        dot = Dot(min(100.0, 50 * share), key_of(OURS), f"{label}: {words}")
        rows.append(DotRow(label, (dot,), f"{share:.2f}x ({words})"))
    ticks = ((0.0, "0x"), (50.0, "as torch"), (100.0, "2x"))
    return [DotPlot("Peak memory over torch's", tuple(rows), ticks)] if rows else []


# --- threads


def scaling_plots(results: Sequence[CaseResult]) -> list[DotPlot]:
    """How many times faster a case gets with more threads than the fewest measured."""
    by_case: dict[str, dict[int, CaseResult]] = {}
    for result in _timed(results):
        by_case.setdefault(result.case.name, {})[result.threads] = result
    groups: dict[tuple[str, int, int], list[dict[int, CaseResult]]] = {}
    for found in by_case.values():
        fewest, most = min(found), max(found)
        if fewest < most:
            key = family(found[most].case), fewest, most
            groups.setdefault(key, []).append(found)
    plots = []
    for (kind, fewest, most), cases in groups.items():
        perfect = most / fewest
        scale = 1.1 * perfect
        marks = sorted({1.0, perfect} | ({perfect / 2} if perfect >= 4 else set()))
        ticks = tuple((100 * mark / scale, f"{mark:g}x") for mark in marks)
        rows = tuple(_scaling_row(found[fewest], found[most], scale) for found in cases)
        title = f"{FAMILIES[kind]}, {fewest} to {threads_text(most)}"
        plots.append(DotPlot(title, rows, ticks))
    return plots


def _scaling_row(fewest: CaseResult, most: CaseResult, scale: float) -> DotRow:
    """A row whose dots lie at their ratio in per cent of ``scale``."""
    label = _full_label(most.case)
    dots, words = [], []
    for peer in (OURS, *peers_of([most])):
        if peer not in fewest.timings or peer not in most.timings:
            continue
        ratio = fewest.timings[peer].median_s / most.timings[peer].median_s
        text = f"{peer} {ratio:.2f}x"
        words.append(text)
        dots.append(Dot(min(100.0, 100 * ratio / scale), key_of(peer), f"{label}: {text}"))
    return DotRow(label, tuple(reversed(dots)), ", ".join(words))


# --- roofline


def bandwidth_roofs(roofs: dict[str, Any], threads: int) -> dict[str, float]:
    """Gigabytes per second by name, for one thread count.

    Args:
        roofs: As ``fastseq roof --json`` writes them, or empty.
        threads: Threads that read together.
    """
    return {
        f"{band['level']} {band['kind']}": float(band["gbytes"])
        for band in roofs.get("bandwidths", [])
        if band["threads"] == threads and band["kind"] == "read" and band["gbytes"] > 0
    }


def rooflines(results: Sequence[CaseResult], roofs: dict[str, Any]) -> list[Chart]:
    """Our arithmetic rate over flop per byte: one chart for each thread count."""
    charts = []
    for threads in thread_counts(results):
        by_family: dict[str, list[tuple[float, float, str]]] = {}
        rows, peaks = [], []
        for result in _timed(results):
            rate = result.gflops()
            if result.threads != threads or rate is None or not result.fma_peak_gflops:
                continue
            intensity = result.case.flops() / result.case.bytes()
            share = _percent(rate / result.fma_peak_gflops)
            tip = f"{result.case.name}: {rate:.3g} GFLOP/s at {intensity:.3g} flop/byte, "
            tip += f"{share} of the peak measured with it"
            by_family.setdefault(family(result.case), []).append((intensity, rate, tip))
            rows.append((result.case.name, f"{intensity:.3g}", f"{rate:.3g}", share))
            peaks.append(result.fma_peak_gflops)
        if rows:
            series = [Series(FAMILIES[k], k, tuple(p), joined=False) for k, p in by_family.items()]
            bandwidths = bandwidth_roofs(roofs, threads)
            title = threads_text(threads)
            charts.append(
                roofline(title, series, max(peaks), bandwidths, tuple(rows), threads=threads)
            )
    return charts
