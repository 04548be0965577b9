"""What the kernels recorded: calls, the threads of a call, the phases of a thread.

The kernels' clock counts ticks of the processor's time stamp; everything here is in seconds since
the profile began.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["JOIN", "OTHER", "START", "Call", "Recording", "Slice", "ThreadTimes"]

# Phases of a call that no thread's own clock sees: until a thread begins, and after it has ended
# until the call returns (which is where a thread waits for a slower one).
START = "start threads"
JOIN = "join threads"
# What the kernels call time that they gave to no phase.
OTHER = "other"

Slice = tuple[str, float, float]  # phase, begin, end


@dataclass(frozen=True, slots=True)
class ThreadTimes:
    """One thread's part in a call.

    Attributes:
        begin_s: When it began, in seconds since the profile did.
        end_s: When it was done.
        seconds: Time in each phase; these add up to ``end_s - begin_s``.
        counts: How many times each phase was entered.
    """

    begin_s: float
    end_s: float
    seconds: Mapping[str, float]
    counts: Mapping[str, int]
    # Phase, begin and end in ticks, again and again: there may be millions.
    _slices: Sequence[int] = field(repr=False, compare=False)
    _recording: Recording = field(repr=False, compare=False)

    @property
    def slices(self) -> Iterator[Slice]:
        """Phases one after the other, as far as they were kept."""
        recording, flat = self._recording, iter(self._slices)
        for phase, begin, end in zip(flat, flat, flat, strict=True):
            yield recording.phases[phase], recording.since(begin), recording.since(end)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a kernel.

    Attributes:
        kernel: For instance "rnn_forward".
        variant: The cell, norm or activation; may be empty.
        dtype: "float32" or "float64".
        isa: Tier of kernels that ran.
        thread_id: The system's number of the calling thread.
        begin_s: When it was called, in seconds since the profile began.
        end_s: When it returned.
        shape: Sizes by name, and flags as 0 or 1.
        threads: Those that were watched, the caller first.
        team: How many took part; Numba's kernels are watched from the calling thread alone.
    """

    kernel: str
    variant: str
    dtype: str
    isa: str
    thread_id: int
    begin_s: float
    end_s: float
    shape: Mapping[str, int]
    threads: tuple[ThreadTimes, ...]
    team: int = 1

    @property
    def seconds(self) -> float:
        """Wall time of the call."""
        return self.end_s - self.begin_s

    @property
    def name(self) -> str:
        """Kernel and variant."""
        return f"{self.kernel} {self.variant}".rstrip()

    def phases(self) -> dict[str, float]:
        """Seconds of each phase, the mean over the threads: together they are the call's time."""
        if not self.threads:
            return {OTHER: self.seconds}
        totals = {START: 0.0}
        for thread in self.threads:
            totals[START] += thread.begin_s - self.begin_s
            for phase, seconds in thread.seconds.items():
                totals[phase] = totals.get(phase, 0.0) + seconds
        totals[JOIN] = sum(self.end_s - thread.end_s for thread in self.threads)
        # The kernels give every tick to a phase; what is left over here is rounding.
        return {
            phase: seconds / len(self.threads) for phase, seconds in totals.items() if seconds > 0
        }

    def phase_counts(self) -> dict[str, int]:
        """How many times the threads entered each phase, all together."""
        counts: dict[str, int] = {}
        for thread in self.threads:
            for phase, count in thread.counts.items():
                counts[phase] = counts.get(phase, 0) + count
        return counts


class Recording:
    """What a recorder handed over, in seconds and with names.

    Args:
        raw: The dict of ``fastseq._cpu.profile_stop()`` or ``fastseq._recorder``; it is kept as it
            is, because :meth:`Profile.to_json` writes it.
        check: Look at every slice; for what comes from a file.

    Raises:
        ValueError: ``raw`` is not such a dict.
    """

    def __init__(self, raw: Mapping[str, Any], check: bool = False) -> None:
        self.raw = raw
        self._check = check
        try:
            self._ticks_per_second = float(raw["ticks_per_second"])
            self._begin = int(raw["begin"])
            self.phases: tuple[str, ...] = tuple(str(name) for name in raw["phases"])
            self.begin_time_ns = int(raw["begin_time_ns"])
            self.calls_dropped = int(raw["calls_dropped"])
            self.slices_dropped = int(raw["slices_dropped"])
            if not self._ticks_per_second > 0:
                raise ValueError("ticks_per_second is not positive")
            self.wall_seconds = self.since(int(raw["end"]))
            # Calls of several Python threads are recorded as they return.
            calls = [self._call(call) for call in raw["calls"]]
            self.calls: tuple[Call, ...] = tuple(sorted(calls, key=lambda call: call.begin_s))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(f"not a recorded profile: {error!r}") from error

    def since(self, ticks: int) -> float:
        """Seconds between the begin of the profile and a time stamp."""
        return (ticks - self._begin) / self._ticks_per_second

    def _call(self, raw: Mapping[str, Any]) -> Call:
        threads = tuple(self._thread(thread) for thread in raw["threads"])
        if self._check and not all(0 <= int(size) < 1 << 63 for size in raw["shape"].values()):
            raise ValueError("sizes that no shape has")
        return Call(
            kernel=str(raw["kernel"]),
            variant=str(raw["variant"]),
            dtype=str(raw["dtype"]),
            isa=str(raw["isa"]),
            thread_id=int(raw["thread_id"]),
            begin_s=self.since(raw["begin"]),
            end_s=self.since(raw["end"]),
            shape={str(name): int(size) for name, size in raw["shape"].items()},
            threads=threads,
            team=int(raw.get("team", max(1, len(threads)))),
        )

    def _thread(self, raw: Mapping[str, Any]) -> ThreadTimes:
        slices = raw["slices"]
        if self._check and not (
            len(slices) % 3 == 0
            and all(isinstance(value, int) for value in slices)
            and all(0 <= phase < len(self.phases) for phase in slices[::3])
        ):
            raise ValueError("slices of no known phase")
        return ThreadTimes(
            begin_s=self.since(raw["begin"]),
            end_s=self.since(raw["end"]),
            seconds={name: ticks / self._ticks_per_second for name, ticks in raw["ticks"].items()},
            counts=dict(raw["counts"]),
            _slices=slices,
            _recording=self,
        )

    def outside_seconds(self) -> float:
        """Wall time in which no kernel ran on any thread."""
        inside, reached = 0.0, 0.0
        for call in self.calls:  # by begin
            inside += max(0.0, call.end_s - max(reached, call.begin_s))
            reached = max(reached, call.end_s)
        return max(0.0, self.wall_seconds - inside)
