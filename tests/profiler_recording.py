"""A recorded profile written by hand, with numbers that can be worked out on paper."""

from __future__ import annotations

from array import array
from typing import Any

from fastseq.profiler.roofs import Bandwidth, MultiplyAdds, Roofs

PHASES = ("other", "pack", "input product", "recurrent product", "gate update", "barrier wait")
# One tick is a microsecond; the profile begins at tick 1000 and lasts 10 ms.
BEGIN, END = 1000, 11000


def thread(begin: int, end: int, *stretches: tuple[str, int]) -> dict[str, Any]:
    """A thread that was in one phase after the other, each for so many ticks."""
    ticks: dict[str, int] = {}
    counts: dict[str, int] = {}
    slices = array("q")
    now = begin
    for phase, length in stretches:
        ticks[phase] = ticks.get(phase, 0) + length
        counts[phase] = counts.get(phase, 0) + 1
        slices.extend((PHASES.index(phase), now, now + length))
        now += length
    assert now == end
    return {"begin": begin, "end": end, "ticks": ticks, "counts": counts, "slices": slices}


def lstm_call(begin: int, thread_id: int = 77) -> dict[str, Any]:
    """A forward of 1000 us on two threads: the second begins 40 us late and ends 60 us early."""
    return {
        "kernel": "rnn_forward",
        "variant": "lstm",
        "dtype": "float32",
        "isa": "avx512",
        "thread_id": thread_id,
        "begin": begin,
        "end": begin + 1000,
        "shape": {
            "T": 10,
            "B": 4,
            "I": 16,
            "H": 32,
            "P": 0,
            "D": 1,
            "rows": 40,
            "training": 0,
        },
        "threads": [
            thread(
                begin,
                begin + 1000,
                ("pack", 100),
                ("input product", 300),
                ("recurrent product", 400),
                ("gate update", 100),
                ("barrier wait", 100),
            ),
            thread(
                begin + 40,
                begin + 940,
                ("pack", 100),
                ("input product", 300),
                ("recurrent product", 400),
                ("gate update", 100),
            ),
        ],
    }


def norm_call(begin: int, length: int) -> dict[str, Any]:
    """A layer norm on one thread."""
    return {
        "kernel": "norm_forward",
        "variant": "layer_norm",
        "dtype": "float32",
        "isa": "avx512",
        "thread_id": 77,
        "begin": begin,
        "end": begin + length,
        "shape": {"M": 100, "F": 32, "dropout": 0, "residual": 1, "sum": 0},
        "threads": [thread(begin, begin + length, ("other", length))],
    }


def recording(*calls: dict[str, Any]) -> dict[str, Any]:
    """What ``profile_stop()`` would return; two LSTM calls and four norms unless given."""
    return {
        "ticks_per_second": 1e6,
        "begin": BEGIN,
        "end": END,
        "begin_time_ns": 1_700_000_000_000_000_000,
        "phases": list(PHASES),
        "calls_dropped": 0,
        "slices_dropped": 0,
        "calls": list(calls)
        or [
            lstm_call(1500),
            lstm_call(3000),
            *(norm_call(5000 + 200 * i, 50 * (i + 1)) for i in range(4)),
        ],
    }


def roofs() -> Roofs:
    """Roofs in round numbers."""
    multiply_adds = [
        MultiplyAdds("avx512", dtype, threads, gflops * threads)
        for dtype, gflops in (("float32", 100.0), ("float64", 50.0))
        for threads in (1, 2)
    ]
    bandwidths = [
        Bandwidth(level, kind, threads, 1024, gbytes * threads / (2 if kind == "copy" else 1))
        for level, gbytes in (("L1", 200.0), ("L2", 100.0), ("L3", 40.0), ("DRAM", 10.0))
        for kind in ("read", "copy")
        for threads in (1, 2)
    ]
    return Roofs(
        cpu="paper",
        caches_bytes={"L1d": 32 << 10, "L2": 1 << 20, "L3": 8 << 20},
        version="1",
        threads=(1, 2),
        measured="2026-01-01",
        multiply_adds=tuple(multiply_adds),
        bandwidths=tuple(bandwidths),
    )
