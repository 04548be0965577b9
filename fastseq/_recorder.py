"""Calls of kernels that record themselves from Python, for ``fastseq.profile()``. No torch here.

The compiled kernels have a recorder of their own in C++, with one clock per thread. Kernels that
Numba compiles are seen from the thread that calls them, between one step of a call and the next:

    with _recorder.call("rnn_forward", "lstm", "float32", 2, sizes):
        _recorder.enter("input product")
        ...

While nothing is recorded, ``active`` is ``None``, and a call costs a look at it for every phase.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ["Recorder", "call", "enter", "merged"]

_NANOSECONDS_PER_SECOND = 10**9
# The phase in which a call begins.
_FIRST = "other"


class _Current:
    """A call that is running on a thread."""

    def __init__(self, begin: int) -> None:
        self.begin = self.since = begin
        self.phase = _FIRST
        self.ticks: dict[str, int] = {}
        self.counts: dict[str, int] = {}
        self.slices: list[tuple[str, int, int]] = []


class Recorder:
    """What has been recorded, in nanoseconds of ``time.perf_counter_ns``.

    Args:
        max_calls: calls beyond these are only counted.
        max_slices: likewise stretches of time in one phase, per call.
    """

    def __init__(self, max_calls: int, max_slices: int) -> None:
        self._max_calls, self._max_slices = max_calls, max_slices
        self._lock = threading.Lock()
        self._calls: list[dict[str, Any]] = []
        self._calls_dropped = self._slices_dropped = 0
        self._phases: dict[str, int] = {_FIRST: 0}
        self.running = threading.local()
        self._begin_time_ns = time.time_ns()
        self._begin = time.perf_counter_ns()

    def enter(self, phase: str) -> None:
        """The thread's call, if there is one, is in ``phase`` from now on."""
        current: _Current | None = getattr(self.running, "call", None)
        if current is not None:
            self._switch(current, phase)

    def _switch(self, current: _Current, phase: str) -> int:
        now = time.perf_counter_ns()
        before = current.phase
        current.ticks[before] = current.ticks.get(before, 0) + now - current.since
        current.counts[before] = current.counts.get(before, 0) + 1
        current.slices.append((before, current.since, now))
        current.phase, current.since = phase, now
        return now

    def keep(
        self,
        current: _Current,
        kernel: str,
        variant: str,
        dtype: str,
        team: int,
        shape: Mapping[str, int],
    ) -> None:
        """The call has ended."""
        end = self._switch(current, _FIRST)
        with self._lock:
            if len(self._calls) >= self._max_calls:
                self._calls_dropped += 1
                return
            slices = array("q")
            for phase, begin, stop in current.slices[: self._max_slices]:
                slices.extend((self._phases.setdefault(phase, len(self._phases)), begin, stop))
            self._slices_dropped += max(0, len(current.slices) - self._max_slices)
            thread = {
                "begin": current.begin,
                "end": end,
                "ticks": current.ticks,
                "counts": current.counts,
                "slices": slices,
            }
            self._calls.append(
                {
                    "kernel": kernel,
                    "variant": variant,
                    "dtype": dtype,
                    "isa": "numba",
                    "thread_id": threading.get_native_id(),
                    "begin": current.begin,
                    "end": end,
                    "shape": dict(shape),
                    "team": team,
                    "threads": [thread],
                }
            )

    def stop(self) -> dict[str, Any]:
        """Everything, in the form in which the compiled kernels hand theirs over."""
        with self._lock:
            return {
                "ticks_per_second": float(_NANOSECONDS_PER_SECOND),
                "begin": self._begin,
                "end": time.perf_counter_ns(),
                "begin_time_ns": self._begin_time_ns,
                "phases": list(self._phases),
                "calls_dropped": self._calls_dropped,
                "slices_dropped": self._slices_dropped,
                "calls": self._calls,
            }


# The recorder that runs; ``fastseq.profile()`` puts it here and takes it away.
active: Recorder | None = None


@contextmanager
def call(
    kernel: str, variant: str, dtype: str, team: int, shape: Mapping[str, int]
) -> Iterator[None]:
    """Record the block as one call; callers look at ``active`` first.

    Args:
        kernel: for instance "rnn_forward".
        variant: the cell; may be empty.
        dtype: of its elements, "float32" or "float64".
        team: threads that it may use.
        shape: sizes by name, flags as 0 or 1, as ``profiler/models.py`` reads them.
    """
    recorder = active
    if recorder is None or getattr(recorder.running, "call", None) is not None:
        yield
        return
    current = recorder.running.call = _Current(time.perf_counter_ns())
    try:
        yield
    finally:
        recorder.running.call = None
        recorder.keep(current, kernel, variant, dtype, team, shape)


def enter(phase: str) -> None:
    """The call that this thread is in, if it is recorded, is in ``phase`` from now on."""
    recorder = active
    if recorder is not None:
        recorder.enter(phase)


def merged(kernels: dict[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """The compiled kernels' recording with ours in it, on their clock."""
    per_nanosecond = kernels["ticks_per_second"] / ours["ticks_per_second"]
    # Both know what time of day it was when they began.
    begin = kernels["begin"]
    our_begin = ours["begin"] - (ours["begin_time_ns"] - kernels["begin_time_ns"])

    def tick(nanoseconds: int) -> int:
        return int(begin + round((nanoseconds - our_begin) * per_nanosecond))

    phases = list(kernels["phases"])
    for phase in ours["phases"]:
        if phase not in phases:
            phases.append(phase)
    calls = list(kernels["calls"])
    for one in ours["calls"]:
        threads = []
        for thread in one["threads"]:
            slices = array("q")
            flat = iter(thread["slices"])
            for phase, start, stop in zip(flat, flat, flat, strict=True):
                slices.extend((phases.index(ours["phases"][phase]), tick(start), tick(stop)))
            threads.append(
                {
                    "begin": tick(thread["begin"]),
                    "end": tick(thread["end"]),
                    "ticks": {n: round(t * per_nanosecond) for n, t in thread["ticks"].items()},
                    "counts": thread["counts"],
                    "slices": slices,
                }
            )
        calls.append(
            {**one, "begin": tick(one["begin"]), "end": tick(one["end"]), "threads": threads}
        )
    return {
        **kernels,
        "end": max(kernels["end"], tick(ours["end"])),
        "phases": phases,
        "calls": calls,
        "calls_dropped": kernels["calls_dropped"] + ours["calls_dropped"],
        "slices_dropped": kernels["slices_dropped"] + ours["slices_dropped"],
    }
