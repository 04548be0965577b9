"""An end for what may take forever."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN_SECONDS = 10.0


class DeadlineError(Exception):
    """Something took too long; the message says what and how long."""


@contextmanager
def deadline(seconds: float, what: str = "it takes") -> Iterator[None]:
    """Interrupt the block after a time, where signals can (the main thread, not on Windows).

    Python has to run for it: one call of a kernel that never returns is not interrupted. Blocks may
    lie in one another; the outer one's time goes on.

    Args:
        seconds: How long the block may take.
        what: Begins the error's message, which goes on "more than ... s".

    Raises:
        DeadlineError: It took longer.
    """
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise DeadlineError(f"{what} more than {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, interrupt)
    begin = time.monotonic()
    # Again after a while: something within the block may have caught the first one.
    remaining, _ = signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if remaining:
            # An outer time that ran out meanwhile ends its block now.
            left = remaining - (time.monotonic() - begin)
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3), _AGAIN_SECONDS)
