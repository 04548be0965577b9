"""Results as the tables of the README."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from fastseq.bench.attention_cases import AttentionCase
from fastseq.bench.cases import GATES, Case
from fastseq.bench.machine import threads_text
from fastseq.bench.results import COMPILED, ONNX, OPENVINO, OURS, TORCH, CaseResult
from fastseq.bench.timing import Timing
from fastseq.bench.transformer_cases import TransformerCase

NOTHING = "-"  # in a table cell


def format_seconds(seconds: float) -> str:
    """Three significant digits with a unit that suits them."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def format_ratio(ratio: float | None) -> str:
    """A speed-up; a dash where there is none."""
    return NOTHING if ratio is None else f"{ratio:.2f}x"


def format_spread(timing: Timing) -> str:
    """A median with half the distance between the quartiles."""
    half = (timing.upper_quartile_s - timing.lower_quartile_s) / 2 / timing.median_s
    return f"{format_seconds(timing.median_s)} ±{half:.0%}"


def at_most_threads(
    results: Sequence[CaseResult], machine: dict[str, Any]
) -> tuple[list[CaseResult], dict[str, Any]]:
    """What tables and pictures without a column for threads show: the most that were used.

    Args:
        results: Of any thread counts.
        machine: Record of the machine.

    Returns:
        The results at that count, and the record as if it had been the only one.
    """
    most = max((result.threads for result in results), default=0)
    chosen = [result for result in results if result.threads == most]
    return chosen, machine | {"threads": most} if most else machine


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
    engines = [(name, result.peer_speedup(name)) for name in (ONNX, OPENVINO)]
    return ", ".join([text, *(f"{ratio:.2f}x {name}" for name, ratio in engines if ratio)])


def _readme_machine(machine: dict[str, Any]) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    return (
        f"{machine['cpu']}, {threads_text(machine)}, {machine['isa']} kernels, "
        f"{libraries}, {machine['date']}"
    )


def fill_markers(text: str, results: Sequence[CaseResult], machine: dict[str, Any]) -> str:
    """Replace what stands between ``<!-- bench:NAME -->`` and ``<!-- /bench -->``.

    Markers of other suites stay as they are: a document may show all. Of several thread counts the
    tables show the highest.

    Raises:
        ValueError: The text has no marker, or one with an unknown name.
    """
    results, machine = at_most_threads(results, machine)
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
