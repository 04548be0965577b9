"""Picks between ways of doing the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter


def fastest(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """The call with the best of a few times; a choice between them, not a result."""
    return min(calls, key=_seconds)


def _seconds(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(5):
        start = perf_counter()
        call()
        best = min(best, perf_counter() - start)
    return best
