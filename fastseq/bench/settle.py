"""Waits until the threads of the library that ran last are asleep."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

# A thread that spins uses a whole core; one that sleeps, nothing.
_LOOK_SECONDS = 4e-3
_BUSY_SHARE = 0.1
_LIMIT_SECONDS = 0.5


def settle(seconds: float = _LOOK_SECONDS) -> None:
    """Wait until no thread of this process computes or waits for a core to compute on.

    A library's idle threads spin for a while in case more work comes, and would take cores from
    the library that is called next. How long differs: about 5 ms for OpenMP's, 55 ms for
    onnxruntime's (measured), so that no fixed pause is right for all.

    Args:
        seconds: Wait at least this long; 0 to not wait at all.
    """
    if not seconds:
        return
    time.sleep(max(0.0, seconds - _LOOK_SECONDS))
    deadline = time.perf_counter() + _LIMIT_SECONDS
    while time.perf_counter() < deadline:
        start, used = time.perf_counter(), time.process_time()
        time.sleep(_LOOK_SECONDS)
        elapsed = time.perf_counter() - start
        if time.process_time() - used < _BUSY_SHARE * elapsed and not _others_want_a_core():
            return


def _others_want_a_core() -> bool:
    """Say whether a thread of this process besides the caller runs or waits for a core.

    One that spins looks idle by its time alone while the machine gives its core to somebody else.
    Linux only; elsewhere time decides.
    """
    own = str(threading.get_native_id())
    for task in Path("/proc/self/task").glob("*"):
        if task.name == own:
            continue
        with contextlib.suppress(OSError):  # it may have ended
            # "id (name) state ...", where the name may hold anything.
            if (task / "stat").read_text().rpartition(")")[2].split()[0] == "R":
                return True
    return False
