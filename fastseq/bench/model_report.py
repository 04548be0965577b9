"""What ``bench model`` shows and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastseq.bench.model_check import Check
from fastseq.bench.model_layers import OURS, TORCH, Layer, Whole
from fastseq.bench.report import NOTHING, format_ratio, format_seconds
from fastseq.bench.timing import Timing
from fastseq.convert import Report

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["check_lines", "table", "to_json", "verdict"]

FORMAT = 1
# The offending results that are listed; a wrong layer spoils all that come before it.
_SHOWN = 10


def check_lines(check: Check) -> list[str]:
    """The gate's verdict, what was out of bounds, and under which circumstances."""
    lines = []
    if check.failure:
        lines.append(f"gate FAILED: {check.failure}")
    elif not check.passed:
        failed = check.failed
        lines.append(
            f"gate FAILED for {len(failed)} of {len(check.gate.errors)} results; "
            "nothing is timed. The worst:"
        )
        lines += [
            f"  {error.name}: error {error.ours:.2e}, torch's {error.torch:.2e}, "
            f"limit {error.limit:.2e}"
            for error in failed[:_SHOWN]
        ]
    elif check.gate.errors:
        worst = check.gate.worst
        lines.append(
            f"gate passed: {len(check.gate.errors)} outputs and gradients; closest to its limit is "
            f"{worst.name}: error {worst.ours:.2e}, torch's {worst.torch:.2e}, "
            f"limit {worst.limit:.2e}"
        )
    else:
        lines.append("gate: the model has no floating-point output to check")
    return [*lines, *(f"  {note}" for note in check.notes)]


def table(whole: Whole) -> Table:
    """One direction: a row per layer, then totals."""
    from rich.table import Table
    from rich.text import Text

    what = "forward, no_grad, eval()" if whole.direction == "inference" else "forward and backward"
    result = Table(
        title=f"{whole.direction}: {what}; times are medians per call, more than 1x is faster",
        title_justify="left",
    )
    result.add_column("layer", overflow="fold")
    result.add_column("old -> new", overflow="fold")
    result.add_column("input", overflow="fold")
    for heading in ("calls", "torch", "fastseq", "speed-up", "of model"):
        result.add_column(heading, justify="right", no_wrap=True)
    result.add_column("note", overflow="fold")
    for layer in whole.layers:
        result.add_row(
            Text(_names(layer)),
            Text(f"{layer.old} -> {layer.new}" if layer.new else layer.old),
            Text(layer.shape),
            str(layer.calls or NOTHING),
            _time(layer.timings.get(TORCH)),
            _time(layer.timings.get(OURS)) if layer.new else NOTHING,
            _coloured(layer.speedup),
            _percent(whole.share(layer)),
            Text(_note(layer)),
            style=None if layer.new else "dim",
        )
    result.add_section()
    whole_torch = whole.timings[TORCH].median_s
    for name, converted in (("converted layers", True), ("layers left on torch", False)):
        theirs, ours = whole.total(TORCH, converted), whole.total(OURS, converted)
        if theirs:
            _add_total(result, name, theirs, ours if converted else None, whole_torch)
    rest = whole.rest(TORCH), whole.rest(OURS)
    shown = [format_seconds(seconds) if seconds > 0 else "~0" for seconds in rest]
    share = _percent(max(rest[0], 0.0) / whole_torch)
    result.add_row("the model's own code", "", "", "", *shown, "", share, "what is left over")
    result.add_section()
    result.add_row(
        "whole model",
        "",
        "",
        "",
        _spread(whole.timings[TORCH]),
        _spread(whole.timings[OURS]),
        _coloured(whole.speedup),
        "100%",
        "",
        style="bold",
    )
    return result


def _add_total(table: Table, name: str, theirs: float, ours: float | None, whole: float) -> None:
    table.add_row(
        name,
        "",
        "",
        "",
        format_seconds(theirs),
        NOTHING if ours is None else format_seconds(ours),
        _coloured(theirs / ours if ours else None),
        _percent(theirs / whole),
        "calls x time, one forward of the model",
    )


def _names(layer: Layer) -> str:
    first, *others = layer.names
    name = first or "(root)"
    return f"{name} and {len(others)} alike" if others else name


def _note(layer: Layer) -> str:
    return "; ".join(text for text in (layer.problem, layer.reason) if text)


def _time(timing: Timing | None) -> str:
    return NOTHING if timing is None else format_seconds(timing.median_s)


def _spread(timing: Timing) -> str:
    half = (timing.upper_quartile_s - timing.lower_quartile_s) / 2 / timing.median_s
    return f"{format_seconds(timing.median_s)} ±{half:.0%}"


def _coloured(ratio: float | None) -> str:
    text = format_ratio(ratio)
    return f"[red]{text}[/red]" if ratio is not None and ratio < 1 else text


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.0%}"


def verdict(wholes: Sequence[Whole]) -> list[str]:
    """One line per direction."""
    lines = []
    for whole in wholes:
        theirs, ours = (format_seconds(whole.timings[one].median_s) for one in (TORCH, OURS))
        word = "faster" if whole.speedup >= 1 else "slower"
        lines.append(
            f"{whole.direction}: {theirs} with torch, {ours} with fastseq: "
            f"{format_ratio(whole.speedup)} ({word})"
        )
    return lines


def to_json(
    *,
    machine: dict[str, Any],
    target: str,
    seed: int,
    report: Report,
    check: Check,
    wholes: Sequence[Whole],
) -> dict[str, Any]:
    """Everything that was found, for a file."""
    return {
        "format": FORMAT,
        "kind": "model",
        "machine": machine,
        "model": target,
        "seed": seed,
        "conversion": [asdict(row) for row in report.rows],
        "gate": {
            "passed": check.passed,
            "failure": check.failure,
            "notes": list(check.notes),
            "errors": [asdict(error) for error in check.gate.errors],
        },
        "directions": {whole.direction: _direction(whole) for whole in wholes},
    }


def _direction(whole: Whole) -> dict[str, Any]:
    libraries = (TORCH, OURS)
    return {
        "timings": {name: asdict(timing) for name, timing in whole.timings.items()},
        "speedup": whole.speedup,
        "layers": [
            {
                "names": layer.names,
                "old": layer.old,
                "new": layer.new,
                "reason": layer.reason,
                "problem": layer.problem,
                "input": layer.shape,
                "calls": layer.calls,
                "timings": {name: asdict(timing) for name, timing in layer.timings.items()},
                "speedup": layer.speedup,
                "share": whole.share(layer),
            }
            for layer in whole.layers
        ],
        "converted_s": {library: whole.total(library, True) for library in libraries},
        "left_on_torch_s": whole.total(TORCH, False),
        "own_code_s": {library: whole.rest(library) for library in libraries},
    }
