"""Timing of peers side by side in one run."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

from fastseq.bench.settle import settle

# Visits shorter than this are filled with further calls, so that neither the clock's resolution nor
# what the previous peer left behind (cold caches, threads asleep, a slower clock rate) decides.
_VISIT_SECONDS = 2e-2
# Calls of such a visit are also timed one by one for their percentiles, up to this time and number.
_SINGLES_SECONDS = 5e-3
_SINGLES = 100
# Calls from which their number in a visit is found; one that takes longer is timed alone, surely.
_TRIALS = 4
_SLOW_SECONDS = 0.1
_LONG_SECONDS = 2.0
# What would go on for longer than this does not get its fewest visits.
_LIMIT_SECONDS = 30.0
# So often at most is what goes on between visits done.
_BETWEEN_SECONDS = 0.2
# Idle threads of one peer's pool keep spinning for a while; ``settle`` waits at least this long.
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
        p50_s: Median of calls timed one by one.
        p95_s: 95 % of them were as fast; None below 20 calls.
        p99_s: 99 % of them were as fast; None below 100 calls.
        minimum_s: The fastest of them.
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


def percentile(samples: Sequence[float], percent: float) -> float | None:
    """The smallest sample that at least ``percent`` of all samples do not exceed (nearest rank).

    None for fewer samples than put one beyond it (20 for 95 %, 100 for 99 %): that would be the
    maximum under another name.
    """
    if len(samples) * (100 - percent) < 100:
        return None
    rank = max(1, math.ceil(len(samples) * percent / 100))
    return sorted(samples)[rank - 1]


def summarize(
    samples: list[float], calls_per_visit: int, singles: Sequence[float] | None = None
) -> Timing:
    """Median and quartiles of seconds per call, percentiles of single calls.

    Args:
        samples: Seconds per call, one for each visit.
        calls_per_visit: Calls that a sample is the mean of.
        singles: Seconds of calls timed one by one; None where ``samples`` are that.
    """
    if len(samples) < 2:
        lower = upper = samples[0]
    else:
        lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive")
    if singles is None and calls_per_visit == 1:
        singles = samples
    median = statistics.median(samples)
    if not singles:
        return Timing(median, lower, upper, len(samples), calls_per_visit, median)
    return Timing(
        median,
        lower,
        upper,
        len(samples),
        calls_per_visit,
        statistics.median(singles),
        percentile(singles, 95),
        percentile(singles, 99),
        min(singles),
    )


def _calls_per_visit(call: Callable[[], object]) -> tuple[int, list[float]]:
    """How many calls fill a visit, going by the best of a few: the first ones may fetch memory.

    A call so long that these trials matter is a visit: its time comes second.
    """
    best = float("inf")
    for _ in range(_TRIALS):
        start = perf_counter()
        call()
        seconds = perf_counter() - start
        if seconds > _SLOW_SECONDS:
            return 1, [seconds] if seconds > _LONG_SECONDS else []
        best = min(best, seconds)
    return max(1, int(_VISIT_SECONDS / max(best, 1e-7))), []


def _singles(call: Callable[[], object]) -> list[float]:
    """Seconds of calls one by one, for a bounded time."""
    samples: list[float] = []
    now = perf_counter()
    deadline = now + _SINGLES_SECONDS
    while now < deadline and len(samples) < _SINGLES:
        start = perf_counter()
        call()
        now = perf_counter()
        samples.append(now - start)
    return samples


@dataclass(frozen=True)
class _Turns:
    """How often and for how long calls take turns, and what is done in between."""

    seconds: float
    minimum_visits: int
    maximum_visits: int
    limit_seconds: float
    between: Callable[[], object] | None = None

    def take(self, names: Sequence[str]) -> Iterator[str]:
        """Names in the order of visits: A B C, C B A, A B C, ...; no garbage is collected."""
        order = list(names)
        start = perf_counter()
        deadline, limit = start + self.seconds, start + self.limit_seconds
        between = _Seldom(self.between)
        collecting = gc.isenabled()
        gc.disable()
        try:
            for visit in range(self.maximum_visits):
                now = perf_counter()
                if (visit >= self.minimum_visits and now > deadline) or (visit and now > limit):
                    break
                between()
                yield from order
                order.reverse()
            between(last=True)
        finally:
            if collecting:
                gc.enable()


class _Seldom:
    """Calls something, but not again within a time, unless it is for the last time."""

    def __init__(self, call: Callable[[], object] | None) -> None:
        self._call, self._next = call, 0.0

    def __call__(self, *, last: bool = False) -> None:
        if self._call is not None and (last or perf_counter() >= self._next):
            self._call()
            self._next = perf_counter() + _BETWEEN_SECONDS


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
    limit_seconds: float = _LIMIT_SECONDS,
    between: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time several calls in turn: A B C, C B A, A B C, ...

    Taking turns exposes every peer to the same drift of the machine, and turning the order round
    exposes each of them equally to what its neighbour leaves behind.

    Args:
        calls: What to time, by name.
        seconds: Stop after this time, given ``minimum_visits``.
        minimum_visits: Visits to each call at least.
        maximum_visits: Visits to each call at most.
        settle_seconds: Shortest pause before each visit, see ``fastseq.bench.settle``.
        limit_seconds: Begin no further turn after this time, whatever ``minimum_visits`` says.
        between: Called before the first turn, after the last, and between turns now and then.
    """
    counts: dict[str, int] = {}
    samples: dict[str, list[float]] = {}
    for name, call in calls.items():
        settle(settle_seconds)
        counts[name], samples[name] = _calls_per_visit(call)
    singles: dict[str, list[float]] = {name: [] for name in calls}
    turns = _Turns(seconds, minimum_visits, maximum_visits, limit_seconds, between)
    for name in turns.take(list(calls)):
        settle(settle_seconds)
        samples[name].append(_visit(calls[name], counts[name]))
        if counts[name] > 1:
            singles[name] += _singles(calls[name])
    return {name: summarize(samples[name], counts[name], singles[name] or None) for name in calls}


def interleave_cold(
    calls: Mapping[str, Callable[[], object]],
    flush: Callable[[], object],
    *,
    seconds: float = 2.0,
    minimum_visits: int = 7,
    maximum_visits: int = 200,
    settle_seconds: float = _SETTLE_SECONDS,
    limit_seconds: float = _LIMIT_SECONDS,
) -> dict[str, Timing]:
    """Time several calls in turn, each finding the caches full of something else.

    Args:
        calls: What to time, by name.
        flush: Fills the caches; runs before every timed call. The pause comes after it, for it
            wakes threads too.
        seconds: Stop after this time, given ``minimum_visits``.
        minimum_visits: Calls of each at least.
        maximum_visits: Calls of each at most.
        settle_seconds: Shortest pause before each call, see ``fastseq.bench.settle``.
        limit_seconds: Begin no further turn after this time, whatever ``minimum_visits`` says.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    turns = _Turns(seconds, minimum_visits, maximum_visits, limit_seconds)
    for name in turns.take(list(calls)):
        flush()
        settle(settle_seconds)
        samples[name].append(_visit(calls[name], 1))
    return {name: summarize(samples[name], 1) for name in calls}
