"""``torch.compile`` as a peer: compiled before timing, or given up with the reason."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

# Longer than this and the case goes without the compiled peer.
COMPILE_LIMIT_SECONDS = 60.0


class CompileSkippedError(Exception):
    """There is no compiled peer; the message says why."""


class _DeadlineError(Exception):
    pass


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Interrupt the block after a time, where signals can (the main thread, not on Windows)."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise _DeadlineError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compiled_call(
    callee: Callable[..., Any],
    make_call: Callable[[Callable[..., Any]], Callable[[], object]],
    *,
    dynamic: bool | None = None,
    limit_seconds: float = COMPILE_LIMIT_SECONDS,
) -> Callable[[], object]:
    """Compile something and return a call of it that has run twice.

    Args:
        callee: What to compile, with torch's default backend and mode.
        make_call: Makes the call that is timed from the compiled callee.
        dynamic: As ``torch.compile``'s: whether one compilation serves all shapes.
        limit_seconds: When to give up.

    Raises:
        CompileSkippedError: Compilation failed or took too long.
    """
    import torch._inductor.config as inductor

    # Worker processes would go on to take cores from the peers.
    inductor.compile_threads = 1
    # What earlier cases have left counts against dynamo's limit of recompilations.
    torch.compiler.reset()
    start = time.perf_counter()
    try:
        with _deadline(limit_seconds):
            call = make_call(torch.compile(callee, dynamic=dynamic))
            call()
            call()
    except Exception as error:  # the compiler's own errors are of many types, a deadline within
        torch.compiler.reset()
        if time.perf_counter() - start >= limit_seconds:
            raise CompileSkippedError(f"compiling takes more than {limit_seconds:g} s") from error
        reason = str(error).strip().splitlines() or [""]
        raise CompileSkippedError(f"{type(error).__name__}: {reason[0][:120]}") from error
    return call
