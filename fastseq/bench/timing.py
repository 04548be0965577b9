"""Timing of peers side by side in one run."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

# Visits shorter than this are filled with further calls, so that the clock's resolution and the
# cold caches left behind by the previous peer do not decide a case of a few microseconds.
_VISIT_SECONDS = 2e-3
# Idle threads of one peer's pool keep spinning for a while; wait until they sleep, otherwise they
# take cores from the next peer.
_SETTLE_SECONDS = 2e-2


@dataclass(frozen=True)
class Timing:
    """Seconds per call over all visits to a peer.

    Attributes:
        median_s: The figure to report.
        lower_quartile_s: A quarter of the visits were faster.
        upper_quartile_s: A quarter of the visits were slower.
        visits: How many visits.
        calls_per_visit: Calls timed together in one visit.
        p50_s: Half of the single calls were faster; None in files that have no single calls.
        p95_s: 95 % of the single calls were faster.
        p99_s: 99 % of the single calls were faster.
        minimum_s: The fastest single call.
    """

    median_s: float
    lower_quartile_s: float
    upper_quartile_s: float
    visits: int
    calls_per_visit: int
    p50_s: float | None = None
    p95_s: float | None = None
    p99_s: float | None = None
    minimum_s: float | None = None


def summarize(samples: list[float], calls_per_visit: int) -> Timing:
    """Median and quartiles of seconds per call."""
    if len(samples) < 2:
        lower = upper = samples[0]
    else:
        lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(statistics.median(samples), lower, upper, len(samples), calls_per_visit)


def _calls_per_visit(call: Callable[[], object]) -> int:
    call()
    start = perf_counter()
    call()
    seconds = perf_counter() - start
    return max(1, int(_VISIT_SECONDS / max(seconds, 1e-7)))


def _visit(call: Callable[[], object], count: int) -> float:
    if count > 1:
        call()  # brings the peer's weights back into the caches, as a caller in a loop has them
    repeats = range(count)
    start = perf_counter()
    for _ in repeats:
        call()
    return (perf_counter() - start) / count


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 2.0,
    minimum_visits: int = 7,
    maximum_visits: int = 200,
    settle_seconds: float = _SETTLE_SECONDS,
) -> dict[str, Timing]:
    """Time several calls in turn: A B C, C B A, A B C, ...

    Taking turns exposes every peer to the same drift of the machine, and turning the order round
    exposes each of them equally to what its neighbour leaves behind.

    Args:
        calls: What to time, by name.
        seconds: Stop after this time, given ``minimum_visits``.
        minimum_visits: Visits to each call at least.
        maximum_visits: Visits to each call at most.
        settle_seconds: Pause before each visit.
    """
    counts = {name: _calls_per_visit(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        deadline = perf_counter() + seconds
        for visit in range(maximum_visits):
            if visit >= minimum_visits and perf_counter() > deadline:
                break
            for name in order:
                time.sleep(settle_seconds)
                samples[name].append(_visit(calls[name], counts[name]))
            order.reverse()
    finally:
        if collecting:
            gc.enable()
    return {name: summarize(samples[name], counts[name]) for name in calls}
