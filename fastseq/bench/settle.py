"""Waits until the threads of the library that ran last are asleep."""

from __future__ import annotations

import time

# A thread that spins uses a whole core; one that sleeps, nothing.
_LOOK_SECONDS = 4e-3
_BUSY_SHARE = 0.1
_LIMIT_SECONDS = 0.5


def settle(seconds: float = 0.0) -> None:
    """Wait until no thread of this process computes.

    A library's idle threads spin for a while in case more work comes, and would take cores from
    the library that is called next. How long differs: about 5 ms for OpenMP's, 55 ms for
    onnxruntime's (measured), so that no fixed pause is right for all.

    Args:
        seconds: Wait at least this long.
    """
    time.sleep(seconds)
    deadline = time.perf_counter() + _LIMIT_SECONDS
    while time.perf_counter() < deadline:
        start, used = time.perf_counter(), time.process_time()
        time.sleep(_LOOK_SECONDS)
        if time.process_time() - used < _BUSY_SHARE * (time.perf_counter() - start):
            return
