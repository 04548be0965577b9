"""A profile as a Chrome trace, which Perfetto opens; alone, or together with torch's.

Calls are slices on a track of the calling thread, phases lie inside them; other threads of a call
have tracks of their own. Times are microseconds after ``baseTimeNanoseconds``, an instant of the
system's clock, as in what :class:`torch.profiler.profile` exports.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastseq.profiler.models import model
from fastseq.profiler.record import Call, Recording
from fastseq.profiler.summary import shape_label

__all__ = ["build", "merge", "read"]

Event = dict[str, Any]
# Thread numbers of the tracks: above every number that Linux gives to threads (2^22), so that they
# collide with no track of a trace they are merged into.
_TRACKS = 1 << 24
_COUNTER = "fastseq GFLOP/s"


def build(recording: Recording, process: int | None = None) -> dict[str, Any]:
    """The trace as one JSON object, beginning at time 0."""
    base = recording.begin_time_ns
    return {
        "schemaVersion": 1,
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": base,
        "traceName": "fastseq",
        "fastseqCallsDropped": recording.calls_dropped,
        "fastseqSlicesDropped": recording.slices_dropped,
        "traceEvents": list(_events(recording, base, process or os.getpid())),
    }


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A trace file that :func:`merge` can take.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no Chrome trace.
    """
    try:
        trace = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} is not JSON: {error}") from None
    if isinstance(trace, list):  # the bare form: nothing but the events
        trace = {"traceEvents": trace}
    if not isinstance(trace, dict) or not isinstance(trace.get("traceEvents"), list):
        raise ValueError(f"{os.fspath(path)} is no Chrome trace: it has no traceEvents")
    return trace


def merge(recording: Recording, other: Mapping[str, Any]) -> dict[str, Any]:
    """Another trace of the same process with the kernels' tracks added, on its clock."""
    process = next(
        (
            event["pid"]
            for event in other["traceEvents"]
            if isinstance(event, dict)
            and event.get("cat") == "cpu_op"
            and isinstance(event.get("pid"), int)
        ),
        None,
    )
    base = other.get("baseTimeNanoseconds", 0)
    if isinstance(base, bool) or not isinstance(base, int):
        raise ValueError(f"baseTimeNanoseconds is {base!r}")
    added = list(_events(recording, base, process or os.getpid()))
    return {**other, "traceEvents": [*other["traceEvents"], *added]}


def _events(recording: Recording, base_ns: int, process: int) -> Iterator[Event]:
    offset_ns = recording.begin_time_ns - base_ns
    # Positions of the callers' tracks, in order of appearance.
    callers = list(dict.fromkeys(call.thread_id for call in recording.calls))
    tracks: dict[int, str] = {}
    for call in recording.calls:
        first = _TRACKS + 1024 * callers.index(call.thread_id)
        tracks.setdefault(first, f"fastseq calls of thread {call.thread_id}")
        yield _call_event(call, offset_ns, process, first)
        for index, thread in enumerate(call.threads):
            track = first + index
            if index:
                tracks.setdefault(track, f"fastseq thread {index + 1} of {call.thread_id}")
                begin, end = thread.begin_s, thread.end_s
                yield _slice(call.name, "kernel_thread", process, track, begin, end, offset_ns)
            for phase, begin, end in thread.slices:
                yield _slice(phase, "phase", process, track, begin, end, offset_ns)
    yield from _counters(recording, offset_ns, process)
    for track, name in tracks.items():
        common = {"ph": "M", "ts": offset_ns / 1e3, "pid": process, "tid": track}
        yield {**common, "name": "thread_name", "args": {"name": name}}
        # Below torch's own tracks, together.
        yield {**common, "name": "thread_sort_index", "args": {"sort_index": track}}
    if not tracks:
        yield {
            "ph": "M",
            "ts": offset_ns / 1e3,
            "pid": process,
            "tid": 0,
            "name": "process_labels",
            "args": {"labels": "fastseq: no kernels ran"},
        }


def _slice(
    name: str, category: str, process: int, track: int, begin: float, end: float, offset_ns: int
) -> Event:
    # Begin and end go to whole nanoseconds each on its own, so that slices that nest still do.
    begin_ns, end_ns = round(begin * 1e9), round(end * 1e9)
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": process,
        "tid": track,
        "ts": (offset_ns + begin_ns) / 1e3,
        "dur": (end_ns - begin_ns) / 1e3,
    }


def _call_event(call: Call, offset_ns: int, process: int, track: int) -> Event:
    event = _slice(call.name, "kernel", process, track, call.begin_s, call.end_s, offset_ns)
    event["args"] = {
        "shape": shape_label(call),
        "dtype": call.dtype,
        "ISA": call.isa,
        "threads": call.team,
        **{f"{phase} (us)": round(time * 1e6, 3) for phase, time in call.phases().items()},
    }
    known = model(call)
    if known is not None and call.seconds > 0:
        event["args"]["GFLOP/s"] = round(known.flops / call.seconds / 1e9, 3)
        event["args"]["GB/s (modelled)"] = round(known.traffic.total / call.seconds / 1e9, 3)
    return event


def _counters(recording: Recording, offset_ns: int, process: int) -> Iterator[Event]:
    """The rate of all calls that run at an instant, wherever it changes."""
    changes: list[tuple[float, float]] = []
    for call in recording.calls:
        known = model(call)
        if known is not None and known.flops and call.seconds > 0:
            rate = known.flops / call.seconds / 1e9
            changes += [(call.begin_s, rate), (call.end_s, -rate)]
    total, running = 0.0, 0
    for time, change in sorted(changes):
        running += 1 if change > 0 else -1
        # What is left of rounding must not look like work.
        total = total + change if running else 0.0
        yield {
            "ph": "C",
            "name": _COUNTER,
            "pid": process,
            "tid": 0,
            "ts": (offset_ns + round(time * 1e9)) / 1e3,
            "args": {"GFLOP/s": round(total, 3)},
        }
