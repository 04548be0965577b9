"""From recorded calls to the rows of a table: per kernel, per shape, per phase."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastseq._work import OwnCell
from fastseq.profiler.models import Model, model
from fastseq.profiler.record import Call
from fastseq.profiler.roofs import LeastTime, Roofs

__all__ = ["GROUPS", "SORTS", "Row", "percentile", "rows", "shape_label"]

GROUPS = ("phase", "kernel", "shape")
SORTS = ("time", "calls", "mean", "name")

# Flags of a shape, by what a label says when they are set.
_FLAGS = {
    "training": "training",
    "residual": "residual",
    "dropout": "dropout",
    "saves": "saves",
    "sum": "sum",
}
# What backward is usually asked for, by what a label says when it was not.
_GRADIENTS = {
    "needs_x": "no input gradient",
    "needs_w": "no weight gradient",
    "needs_weight": "no weight gradient",
    "needs_query": "no query gradient",
    "needs_key": "no key gradient",
    "needs_value": "no value gradient",
}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: Kernel and variant, or a phase.
        phase: Whether this is a phase of the kernel above it.
        calls: How many calls (of a phase: calls that have it).
        total_s: Their time; of a phase the mean over a call's threads.
        share: Of the wall time of the whole profile.
        mean_s: Per call, as are the next two.
        p50_s: Median.
        p95_s: 95th percentile.
        shapes: Labels of the shapes that occurred, the one with most time first.
        dtype: Element type.
        isa: Tier of kernels.
        threads: Thread counts that occurred.
        gflops: Rate of the matrix products; ``None`` where there are none.
        gbytes: Modelled traffic per second; ``None`` for a phase.
        intensity: Operations per modelled byte.
        roof_share: Least time by the roof over the time taken, 0 to 1.
        roof: The roof that binds, for most of the time.
    """

    name: str
    phase: bool
    calls: int
    total_s: float
    share: float
    mean_s: float
    p50_s: float
    p95_s: float
    shapes: tuple[str, ...]
    dtype: str
    isa: str
    threads: tuple[int, ...]
    gflops: float | None = None
    gbytes: float | None = None
    intensity: float | None = None
    roof_share: float | None = None
    roof: str | None = None


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of ``values`` lies, on the line between its neighbours."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def shape_label(call: Call) -> str:
    """The call's sizes and what is unusual about it, in a few words."""
    shape = call.shape
    words = []
    for name, size in shape.items():
        if name in _FLAGS:
            if size:
                words.append(_FLAGS[name])
        elif name in _GRADIENTS:
            if not size:
                words.append(_GRADIENTS[name])
        elif name == "bias":
            if not size:
                words.append("no bias")
        elif name == "needs_input" and call.kernel == "linear_backward":
            if not size:
                words.append(_GRADIENTS["needs_x"])
        elif name.startswith(("needs_", "grad_")) or _is_usual(name, size, shape):
            continue
        else:
            words.append(f"{name}{'=' if len(name) > 3 else ''}{size}")
    return " ".join(words)


def _is_usual(name: str, size: int, shape: Any) -> bool:
    """A size that the others imply."""
    if name == "rows":
        return size == shape.get("T", 0) * shape.get("B", 0)
    if name == "rows_handed_on":  # follows from the rows and from whether the state has a gradient
        return True
    if name == "pairs":
        return size == shape.get("B", 0) * shape.get("Sq", 0) * shape.get("Skv", 0)
    if name == "query_rows":
        return size == shape.get("B", 0) * shape.get("Sq", 0)
    if name == "key_rows":
        return size == shape.get("B", 0) * shape.get("Skv", 0)
    if name == "Ev":
        return size == shape.get("E")
    if name == "Hkv":
        return size == shape.get("Hq")
    if name in OwnCell._fields:  # the cell's name says it
        return True
    return (name == "P" and size == 0) or (name == "D" and size == 1)


@dataclass(frozen=True)
class _Measured:
    """A call with its model and least time."""

    call: Call
    model: Model | None
    least: LeastTime | None


def _measured(call: Call, roofs: Roofs | None) -> _Measured:
    known = model(call)
    least = None
    if known is not None and roofs is not None:
        least = roofs.least_time(known, call.isa, call.dtype, call.team)
    return _Measured(call, known, least)


def rows(
    calls: Iterable[Call], wall_seconds: float, roofs: Roofs | None, group: str, sort: str
) -> list[Row]:
    """The rows of a table.

    Args:
        calls: What was recorded.
        wall_seconds: Of the whole profile.
        roofs: The machine's, or ``None``: no share of a roof.
        group: "kernel": a row per kernel, variant, dtype and tier; "shape": these apart by shape
            and threads; "phase": a row per kernel, below it one for each of its phases.
        sort: "time", "calls", "mean" (largest first) or "name".

    Raises:
        ValueError: ``group`` or ``sort`` is none of these.
    """
    if group not in GROUPS:
        raise ValueError(f"group must be one of {list(GROUPS)}, got {group!r}")
    if sort not in SORTS:
        raise ValueError(f"sort must be one of {list(SORTS)}, got {sort!r}")
    grouped: dict[Hashable, list[_Measured]] = {}
    for call in calls:
        key: tuple[Hashable, ...] = (call.kernel, call.variant, call.dtype, call.isa)
        if group == "shape":
            key += (shape_label(call), call.team)
        grouped.setdefault(key, []).append(_measured(call, roofs))
    order = _ORDERS[sort]
    kernels = [(_kernel_row(members, wall_seconds), members) for members in grouped.values()]
    kernels.sort(key=lambda pair: order(pair[0]))
    result = []
    for row, members in kernels:
        result.append(row)
        if group == "phase":
            phases = _phase_rows(row, members, wall_seconds, roofs)
            result += sorted(phases, key=order)
    return result


_ORDERS: dict[str, Callable[[Row], Any]] = {
    "time": lambda row: -row.total_s,
    "calls": lambda row: (-row.calls, -row.total_s),
    "mean": lambda row: -row.mean_s,
    "name": lambda row: row.name,
}


def _kernel_row(members: list[_Measured], wall_seconds: float) -> Row:
    first = members[0].call
    seconds = [one.call.seconds for one in members]
    total = sum(seconds)
    shapes: dict[str, float] = {}
    for one in members:
        label = shape_label(one.call)
        shapes[label] = shapes.get(label, 0.0) + one.call.seconds
    # Calls without a model must not lower the rates of the others.
    modelled = [(one.call.seconds, one.model) for one in members if one.model is not None]
    modelled_s = sum(time for time, _ in modelled)
    flops = sum(known.flops for _, known in modelled)
    moved = sum(known.traffic.total for _, known in modelled)
    return Row(
        name=first.name,
        phase=False,
        calls=len(members),
        total_s=total,
        share=_ratio(total, wall_seconds) or 0.0,
        mean_s=total / len(members),
        p50_s=percentile(seconds, 0.5),
        p95_s=percentile(seconds, 0.95),
        shapes=tuple(sorted(shapes, key=lambda label: -shapes[label])),
        dtype=first.dtype,
        isa=first.isa,
        threads=tuple(sorted({one.call.team for one in members})),
        gflops=_ratio(flops / 1e9, modelled_s) if flops else None,
        gbytes=_ratio(moved / 1e9, modelled_s) if moved else None,
        intensity=_ratio(flops, moved) if flops else None,
        **_roof((one.call.seconds, one.least) for one in members if one.least is not None),
    )


def _phase_rows(
    kernel: Row, members: list[_Measured], wall_seconds: float, roofs: Roofs | None
) -> list[Row]:
    seconds: dict[str, list[float]] = {}
    flops: dict[str, int] = {}
    least: dict[str, list[tuple[float, LeastTime]]] = {}
    for one in members:
        call = one.call
        for phase, time in call.phases().items():
            seconds.setdefault(phase, []).append(time)
            work = one.model.phase_flops.get(phase, 0) if one.model is not None else 0
            if not work:
                continue
            flops[phase] = flops.get(phase, 0) + work
            threads = call.team
            peak = roofs.gflops(call.isa, call.dtype, threads) if roofs is not None else None
            if peak:
                roof = f"FMA {call.dtype} {call.isa} x{threads}"
                bound = LeastTime(work / (peak * 1e9), roof)
                least.setdefault(phase, []).append((time, bound))
    return [
        Row(
            name=phase,
            phase=True,
            calls=len(times),
            total_s=sum(times),
            share=_ratio(sum(times), wall_seconds) or 0.0,
            mean_s=sum(times) / len(times),
            p50_s=percentile(times, 0.5),
            p95_s=percentile(times, 0.95),
            shapes=(),
            dtype=kernel.dtype,
            isa=kernel.isa,
            threads=kernel.threads,
            gflops=_ratio(flops[phase] / 1e9, sum(times)) if phase in flops else None,
            **_roof(least.get(phase, ())),
        )
        for phase, times in seconds.items()
    ]


def _roof(bounds: Iterable[tuple[float, LeastTime]]) -> dict[str, Any]:
    """Share of the roof over calls, and the roof that is behind most of their least time."""
    taken, least = 0.0, 0.0
    by_roof: dict[str, float] = {}
    for seconds, bound in bounds:
        taken += seconds
        least += bound.seconds
        by_roof[bound.roof] = by_roof.get(bound.roof, 0.0) + bound.seconds
    if not by_roof:
        return {}
    return {
        "roof_share": _ratio(least, taken),
        "roof": max(by_roof, key=lambda roof: by_roof[roof]),
    }


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None
