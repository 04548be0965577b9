"""Tries several ways of running a case in one library and keeps the fastest that is right."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from time import perf_counter

from fastseq.bench.peers.expected import expected, matches
from fastseq.bench.peers.prepared import AnyBuilt, PeerSkippedError, PreparedPeer
from fastseq.bench.settle import settle

# Whoever takes this many times the best one's time is not timed again.
_HOPELESS = 1.5
# Rounds of two calls each, ended early by the time they take.
_ROUNDS = 3
_SECONDS = 0.3


def first_line(error: Exception) -> str:
    """What a library's error says, in a line fit for a table."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", lines[0])[:160]


def choose(built: AnyBuilt, makers: Sequence[Callable[[], PreparedPeer]]) -> PreparedPeer:
    """The fastest of several that agree with torch.

    Which form of a computation a library runs fastest depends on shape, machine and version; a
    user would find out, too. The times taken here decide between them and are not results.

    Raises:
        PeerSkippedError: None runs, or none agrees with torch; the message says why.
    """
    theirs = expected(built)
    contenders: list[tuple[float, PreparedPeer]] = []
    reasons = []
    for make in makers:
        try:
            prepared = make()
            if not matches(built, prepared.output(), theirs):
                reasons.append("its output differs from torch's")
                continue
            contenders.append((seconds_of(prepared.call), prepared))
        except ModuleNotFoundError:
            raise
        except PeerSkippedError as error:
            reasons.append(str(error))
        except Exception as error:  # the libraries' own errors share no type
            reasons.append(first_line(error))
        if contenders:
            limit = _HOPELESS * min(seconds for seconds, _ in contenders)
            contenders = [entry for entry in contenders if entry[0] <= limit]
    if not contenders:
        raise PeerSkippedError(reasons[0] if reasons else "no form of it fits into memory")
    if len(contenders) == 1:
        return contenders[0][1]
    best = [float("inf")] * len(contenders)
    spent = 0.0
    for _ in range(_ROUNDS):
        for index, (_, prepared) in enumerate(contenders):
            settle()
            best[index] = min(best[index], seconds_of(prepared.call))
            spent += 2 * best[index]
        if spent > _SECONDS:
            break
    return contenders[best.index(min(best))][1]


def seconds_of(call: Callable[[], object]) -> float:
    """Time of the second of two calls."""
    call()  # brings back what others have pushed out of the caches
    start = perf_counter()
    call()
    return perf_counter() - start
