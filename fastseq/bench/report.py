"""Results as JSON, as a table on the terminal, and as the tables of the README."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastseq.bench.attention_cases import AttentionCase
from fastseq.bench.cases import GATES, LAYERS, Case, from_record
from fastseq.bench.gate import GateResult, TensorError
from fastseq.bench.runner import COMPILED, ONNX, OURS, OURS_FUNCTIONAL, TORCH, CaseResult
from fastseq.bench.timing import Timing
from fastseq.bench.transformer_cases import TransformerCase

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 2
READABLE_FORMATS = (1, 2)
NOTHING = "-"  # in a table cell


def to_json(results: Sequence[CaseResult], machine: dict[str, Any], suite: str) -> dict[str, Any]:
    """A result file: what was measured, on what, and the figures derived from it."""
    records = []
    for result in results:
        record = asdict(result)
        record["gate"]["passed"] = result.gate.passed
        record["derived"] = {
            "flops": result.case.flops(),
            "bytes": result.case.bytes(),
            "gflops": {peer: result.gflops(peer) for peer in result.timings},
            "share_of_fma_peak": result.share_of_peak(),
            "speedup_over_torch": result.speedup(TORCH),
            "speedup_over_torch_compile": result.speedup(COMPILED),
            "speedup_over_onnxruntime": result.onnx_speedup(),
        }
        records.append(record)
    return {"format": FORMAT, "suite": suite, "machine": machine, "results": records}


def from_json(document: dict[str, Any]) -> list[CaseResult]:
    """The results in a file written by ``to_json``; derived figures are computed afresh.

    Format 1 had one thread count for all cases, no percentiles, no cold and no first calls.
    """
    if document.get("format") not in READABLE_FORMATS:
        known = " or ".join(map(str, READABLE_FORMATS))
        raise ValueError(f"expected a result file of format {known}")
    results = []
    for record in document["results"]:
        gate = GateResult(tuple(TensorError(**error) for error in record["gate"]["errors"]))
        results.append(
            CaseResult(
                from_record(record["case"]),
                gate,
                _timings(record["timings"]),
                record["skipped"],
                record["probes"],
                record["fma_peak_gflops"],
                record.get("threads") or document["machine"]["threads"],
                _timings(record.get("cold", {})),
                record.get("first_call_s", {}),
                record.get("peak_memory_bytes", {}),
            )
        )
    return results


def _timings(records: dict[str, dict[str, Any]]) -> dict[str, Timing]:
    return {peer: Timing(**timing) for peer, timing in records.items()}


def load(path: Path) -> tuple[list[CaseResult], dict[str, Any]]:
    """Results and machine record of a file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a result file.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return from_json(document), document["machine"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else error
        raise ValueError(f"{path} is not a result file ({what})") from error


def format_seconds(seconds: float) -> str:
    """Three significant digits with a unit that suits them."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def format_ratio(ratio: float | None) -> str:
    """A speed-up; a dash where there is none."""
    return NOTHING if ratio is None else f"{ratio:.2f}x"


def _spread(timing: Timing) -> str:
    half = (timing.upper_quartile_s - timing.lower_quartile_s) / 2 / timing.median_s
    return f"{format_seconds(timing.median_s)} ±{half:.0%}"


def new_table(suite: str = "rnn") -> Table:
    """An empty table for ``add_row``; the suite decides on the second peer."""
    from rich.table import Table

    other = "vs compiled" if suite == "transformer" else "vs onnxruntime"
    table = Table(title="median ± half the quartile range; more than 1x is faster than the peer")
    table.add_column("case", no_wrap=True)
    for heading in ("torch", "fastseq", "vs torch", other, "GFLOP/s", "of FMA peak"):
        table.add_column(heading, justify="right")
    table.add_column("gate")
    return table


def add_row(table: Table, result: CaseResult) -> None:
    """Append one result; a failed gate shows the offending tensor instead of times."""
    if not result.gate.passed:
        table.add_row(result.case.name, *[NOTHING] * 6, f"[red]{result.gate.summary()}[/red]")
        return
    share = result.share_of_peak()
    rate = result.gflops()
    table.add_row(
        result.case.name,
        _spread(result.timings[TORCH]),
        _spread(result.timings[OURS]),
        _coloured(result.speedup(TORCH)),
        _coloured(_second_speedup(result)),
        NOTHING if rate is None else f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}",
        NOTHING if share is None else f"{share:.0%}",
        "passed",
    )


def _second_speedup(result: CaseResult) -> float | None:
    if isinstance(result.case, TransformerCase):
        return result.speedup(COMPILED)
    return result.onnx_speedup()


def _coloured(ratio: float | None) -> str:
    text = format_ratio(ratio)
    return f"[red]{text}[/red]" if ratio is not None and ratio < 1 else text


def notes(results: Sequence[CaseResult]) -> list[str]:
    """Lines below the table: functional entry, probes, skipped peers, means."""
    lines = []
    for result in results:
        if OURS_FUNCTIONAL in result.timings:
            lines.append(f"{result.case.name}: {_functional_note(result)}")
        for name, value in result.probes.items():
            shown = f"{value / 1e6:.2f} MB" if "bytes" in name else f"{value:.2f}"
            lines.append(f"{result.case.name}: {name} {shown}")
    reasons: dict[tuple[str, str], int] = {}
    for result in results:
        for item in result.skipped.items():
            reasons[item] = reasons.get(item, 0) + 1
    for (name, reason), count in reasons.items():
        lines.append(f"skipped {name} in {count} case{'s' if count > 1 else ''}: {reason}")
    for layer in LAYERS:
        for direction in ("inference", "training"):
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
                    f"{layer} {direction}, {len(ratios)} plain cases: "
                    f"geometric mean {mean:.2f}x torch, at least {worst:.2f}x"
                )
    return lines


def _functional_note(result: CaseResult) -> str:
    timing = result.timings[OURS_FUNCTIONAL]
    over_torch = format_ratio(result.speedup(TORCH, OURS_FUNCTIONAL))
    return f"functional entry {_spread(timing)}, {over_torch} torch"


# --- README ---------------------------------------------------------------------------------


def _readme_table(results: Sequence[CaseResult], direction: str) -> str:
    """Speed-up over torch for every plain case, one column per layer, losses in bold."""
    by_key: dict[tuple[str, int, int, int], CaseResult] = {}
    for result in results:
        case = result.case
        if isinstance(case, Case) and case.direction == direction and case.plain:
            by_key[case.layer, case.T, case.B, case.H] = result
    headings = " | ".join(layer.upper() for layer in GATES)
    lines = [f"| T, B, H | {headings} |", "|---" * (1 + len(GATES)) + "|"]
    for shape in sorted({key[1:] for key in by_key}):
        cells = [_readme_cell(by_key.get((layer, *shape))) for layer in GATES]
        lines.append(f"| {', '.join(map(str, shape))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _readme_attention(results: Sequence[CaseResult]) -> str:
    """Attention, a line for every shape and option, a column for each direction."""
    by_key: dict[tuple[str, str], dict[str, CaseResult]] = {}
    for result in results:
        case = result.case
        if isinstance(case, AttentionCase):
            words = case.options.suffix().strip("-").replace("-", ", ") or "full"
            label = f"{words}, module" if case.layer == "mha" else words
            by_key.setdefault((case.shape_label, label), {})[case.direction] = result
    lines = ["| shape | mask and options | forward | forward and backward |", "|---|---|---|---|"]
    for (shape, label), found in by_key.items():
        cells = [_readme_cell(found.get(direction)) for direction in ("inference", "training")]
        lines.append(f"| {shape} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _readme_transformer(results: Sequence[CaseResult]) -> str:
    """The Transformer and its parts, a line for every shape, a column for each direction."""
    by_key: dict[tuple[str, str, str], dict[str, CaseResult]] = {}
    for result in results:
        case = result.case
        if isinstance(case, TransformerCase):
            layer = case.layer.replace("_", " ")
            by_key.setdefault((layer, case.shape_label, case.words), {})[case.direction] = result
    lines = ["| case | shape | options | inference | training |", "|---|---|---|---|---|"]
    for (layer, shape, words), found in by_key.items():
        cells = [_transformer_cell(found.get(d)) for d in ("inference", "training")]
        lines.append(f"| {layer} | {shape} | {words or NOTHING} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _transformer_cell(result: CaseResult | None) -> str:
    """Time, speed-up over either form of torch, and how near the hardware's limit we are."""
    if result is None:
        return NOTHING
    eager, compiled = result.speedup(TORCH), result.speedup(COMPILED)
    slowest = result.torch_speedup()
    if eager is None or slowest is None:
        return "gate failed"
    shown = NOTHING if compiled is None else f"{compiled:.2f}x"
    text = f"{format_seconds(result.timings[OURS].median_s)} ({eager:.2f}x, {shown})"
    if slowest < 1:
        text = f"**{text}**"
    notes = []
    for probe in ("copy", "clone", "read"):
        share = result.probes.get(f"share_of_{probe}_bandwidth")
        if share is not None:
            notes.append(f"{share:.0%} of {probe}")
    share = result.share_of_peak()
    if share is not None and result.case.layer == "linear":
        notes.append(f"{share:.0%} of peak")
    if "peak_memory_bytes" in result.probes:
        ratio = result.probes["peak_memory_bytes"] / result.probes["peak_memory_bytes_torch"]
        notes.append(f"memory {ratio:.2f}x")
    return ", ".join([text, *notes])


def _readme_cell(result: CaseResult | None) -> str:
    if result is None:
        return NOTHING
    ratio = result.speedup(TORCH)
    if ratio is None:
        return "gate failed"
    text = f"{format_seconds(result.timings[OURS].median_s)} ({ratio:.2f}x)"
    if ratio < 1:
        text = f"**{text}**"
    onnx = result.onnx_speedup()
    return text if onnx is None else f"{text}, {onnx:.2f}x {ONNX}"


def _readme_machine(machine: dict[str, Any]) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']} kernels, "
        f"{libraries}, {machine['date']}"
    )


def fill_markers(text: str, results: Sequence[CaseResult], machine: dict[str, Any]) -> str:
    """Replace what stands between ``<!-- bench:NAME -->`` and ``<!-- /bench -->``.

    Markers of other suites stay as they are: a document may show all.

    Raises:
        ValueError: The text has no marker, or one with an unknown name.
    """
    recurrent: dict[str, Callable[[], str]] = {
        "inference": lambda: _readme_table(results, "inference"),
        "training": lambda: _readme_table(results, "training"),
        "machine": lambda: _readme_machine(machine),
    }
    attention: dict[str, Callable[[], str]] = {
        "attention": lambda: _readme_attention(results),
        "attention_machine": lambda: _readme_machine(machine),
    }
    transformer: dict[str, Callable[[], str]] = {
        "transformer": lambda: _readme_transformer(results),
        "transformer_machine": lambda: _readme_machine(machine),
    }
    every = recurrent | attention | transformer
    shown: dict[str, Callable[[], str]] = {}
    for kind, names in (
        (Case, recurrent),
        (AttentionCase, attention),
        (TransformerCase, transformer),
    ):
        if any(isinstance(result.case, kind) for result in results):
            shown |= names

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in every:
            known = ", ".join(every)
            raise ValueError(f"unknown marker bench:{name}; known: {known}")
        if name not in shown:
            return match[0]
        return f"<!-- bench:{name} -->\n{shown[name]()}\n<!-- /bench -->"

    pattern = r"<!-- bench:(?P<name>\w+) -->.*?<!-- /bench -->"
    filled, count = re.subn(pattern, fill, text, flags=re.DOTALL)
    if not count:
        raise ValueError("the text has no <!-- bench:NAME --> marker")
    return filled
