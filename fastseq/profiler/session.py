"""``fastseq.profile()`` and what it returns."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, TextIO

from fastseq import _config, _recorder
from fastseq.profiler import nvtx, roofline, roofs, summary, table, trace
from fastseq.profiler.counters import Counters, HardwareCounters
from fastseq.profiler.record import Call, Recording
from fastseq.profiler.roofs import Roofs
from fastseq.profiler.summary import Row

__all__ = ["MAX_CALLS", "MAX_SLICES", "Profile", "profile"]

# Python needs about 4 kB for a call of two threads; the kernels keep at most 96 MiB of slices.
MAX_CALLS, MAX_SLICES = 20_000, 1_000
_FORMAT = 1
NO_KERNELS = "no kernels ran inside the profile"
_WHY_NONE = "is the model made of fastseq's layers, and did none of them fall back to torch?"
# A kernel so far beyond its roof says that the roof is wrong; less is the noise of both.
_BEYOND_ROOF = 1.1

# The kernels have one recorder, and Python one beside it.
_running = threading.Lock()


def profile(
    hardware_counters: bool = False, *, max_calls: int = MAX_CALLS, max_slices: int = MAX_SLICES
) -> Profile:
    """Record what the kernels do in a block: ``with fastseq.profile() as p: ...``.

    Kernels that Numba compiles are seen from the thread that calls them: their phases are coarser.

    Calls from all threads of the process are recorded, backward passes on autograd's included. An
    exception in the block ends the recording and keeps what was recorded. Not more than one profile
    runs at a time. Calls of the CUDA kernels are put into NVTX ranges and are not recorded.

    Args:
        hardware_counters: Also count cycles, instructions and cache misses, where the system lets
            a program do so.
        max_calls: Calls beyond these are only counted.
        max_slices: How many stretches of time in one phase are kept per thread and call, for the
            trace. The times in the table do not depend on it.

    Raises:
        RuntimeError: when the block is entered and a profile is running, the backend is
            "reference", or it is "cpu" and there are no compiled kernels.
        ValueError: ``max_calls`` is less than 1 or ``max_slices`` less than 0.
    """
    if max_calls < 1:
        raise ValueError(f"max_calls must be at least 1, got {max_calls}")
    if max_slices < 0:
        raise ValueError(f"max_slices must be at least 0, got {max_slices}")
    return Profile(hardware_counters, max_calls, max_slices)


class Profile:
    """A recording of kernel calls: made by :func:`profile` or read by :meth:`from_json`."""

    def __init__(self, hardware_counters: bool, max_calls: int, max_slices: int) -> None:
        self._counting = HardwareCounters() if hardware_counters else None
        self._limits = (max_calls, max_slices)
        self._kernels: ModuleType | None = None
        self._recorder: _recorder.Recorder | None = None
        self._marking = contextlib.ExitStack()
        self._ranges = nvtx.Ranges()
        self._recording: Recording | None = None
        self._machine: dict[str, Any] = {}
        self._counters: Counters | None = None
        self._roofs: Roofs | None = None
        # Roofs of this machine say nothing about a profile from another one.
        self._foreign = False

    # --- recording

    def __enter__(self) -> Profile:
        if self._recording is not None:
            raise RuntimeError("this profile is finished; call fastseq.profile() for a new one")
        if _config.backend_name() == "reference":
            raise RuntimeError(
                "backend 'reference' runs plain torch operators: there are no kernels to profile"
            )
        kernels: ModuleType | None = None
        try:
            kernels = _config.extension()
        except ImportError as error:
            if _config.backend_name() != "numba":
                raise RuntimeError(f"there are no compiled kernels to profile: {error}") from error
        if not _running.acquire(blocking=False):
            raise RuntimeError("a profile is already running; profiles do not nest")
        try:
            self._machine = _machine()
            if self._counting is not None:
                self._counting.start()
            if kernels is not None:
                kernels.profile_start(*self._limits)
            self._recorder = _recorder.active = _recorder.Recorder(*self._limits)
            self._ranges = self._marking.enter_context(nvtx.recording())
        except BaseException:
            _running.release()
            raise
        self._kernels = kernels
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._recorder is not None
        self._marking.close()
        try:
            _recorder.active = None
            raw = self._recorder.stop()
            if self._kernels is not None:
                raw = _recorder.merged(self._kernels.profile_stop(), raw)
            if self._counting is not None:
                self._counters = self._counting.stop()
        finally:
            self._kernels = self._recorder = None
            _running.release()
        self._recording = Recording(raw)
        # Kernels on a device only leave ranges.
        if not self._recording.calls and not self._ranges.count and error is None:
            warnings.warn(f"{NO_KERNELS}: {_WHY_NONE}", RuntimeWarning, stacklevel=2)

    def _finished(self) -> Recording:
        if self._recording is None:
            raise RuntimeError("the profile has not ended: leave its with block first")
        return self._recording

    # --- numbers

    @property
    def calls(self) -> tuple[Call, ...]:
        """Every call that was kept, by begin."""
        return self._finished().calls

    @property
    def wall_seconds(self) -> float:
        """Length of the block."""
        return self._finished().wall_seconds

    @property
    def outside_seconds(self) -> float:
        """Time of the block in which no kernel ran: Python, torch's own operators, waiting."""
        return self._finished().outside_seconds()

    @property
    def calls_dropped(self) -> int:
        """Calls beyond ``max_calls``; they are missing from every other number."""
        return self._finished().calls_dropped

    @property
    def slices_dropped(self) -> int:
        """Slices beyond ``max_slices``; only the trace misses them."""
        return self._finished().slices_dropped

    @property
    def hardware_counters(self) -> Counters | None:
        """What the processor counted; ``None`` if it was not asked."""
        self._finished()
        return self._counters

    @property
    def machine(self) -> Mapping[str, Any]:
        """What the profile was recorded on."""
        return dict(self._machine)

    @property
    def roofs(self) -> Roofs | None:
        """The machine's roofs, measured now if they never were (about ten seconds).

        ``None`` for a profile that was read from a file of another machine without roofs in it,
        and where there are no compiled kernels, which measure them.
        """
        if self._roofs is None and not self._foreign and _config.has_extension():
            self._roofs = roofs.load_or_measure(progress_on(sys.stderr))
        return self._roofs

    def rows(self, sort: str = "time", group: str = "phase") -> list[Row]:
        """The table's numbers; see :meth:`table`."""
        recording = self._finished()
        # Names are checked before anything is measured.
        summary.rows((), recording.wall_seconds, None, group, sort)
        known = self.roofs if recording.calls else None
        return summary.rows(recording.calls, recording.wall_seconds, known, group, sort)

    # --- reports

    def table(
        self, sort: str = "time", group: str = "phase", *, file: TextIO | None = None
    ) -> None:
        """Print what took how long.

        Args:
            sort: "time", "calls", "mean" or "name".
            group: "phase": kernels, each with its phases; "kernel": without them; "shape": kernels
                apart by shape.
            file: Where to; default: standard output. On a terminal that is too narrow, columns are
                left out and named.

        Raises:
            ValueError: ``sort`` or ``group`` is none of these.
        """
        target = sys.stdout if file is None else file
        width = shutil.get_terminal_size().columns if target.isatty() else None
        print(self.text(sort, group, width), file=target)

    def text(self, sort: str = "time", group: str = "phase", width: int | None = None) -> str:
        """The table as text, in at most ``width`` columns if given."""
        recording = self._finished()
        rows = self.rows(sort, group)
        shown = _visible(rows)
        lines = table.lines(shown, width) if rows else [f"{NO_KERNELS}: {_WHY_NONE}"]
        if len(shown) < len(rows):
            lines.append("phases of less than 0.1 % of their kernel are not shown")
        return "\n".join([*lines, "", *self._footer(recording, rows)])

    def __str__(self) -> str:
        return "a running profile" if self._recording is None else self.text()

    def _footer(self, recording: Recording, rows: list[Row]) -> list[str]:
        outside = recording.outside_seconds()
        wall = recording.wall_seconds
        share = 100 * outside / wall if wall > 0 else 0.0
        lines = [
            f"wall {wall * 1e3:,.2f} ms, of which {outside * 1e3:,.2f} ms ({share:.1f} %) "
            f"outside the kernels; {len(recording.calls):,} calls"
        ]
        if recording.calls:
            lines.append(
                "a phase's time is the mean over a call's threads; "
                "* modelled: the least bytes that must move"
            )
        if self._roofs is not None:
            lines.append(
                f"roofs of {self._roofs.cpu} (measured {self._roofs.measured}); "
                "fastseq roof shows them"
            )
            if any((row.roof_share or 0.0) > _BEYOND_ROOF for row in rows):
                lines.append(
                    "above 100 % of a roof: the roofs were measured while something else ran; "
                    "fastseq roof --measure does it again"
                )
        elif recording.calls and self._foreign:
            lines.append("no roofs: this profile was read from a file that has none")
        elif recording.calls:
            lines.append("no roofs: the compiled kernels, which measure them, are not there")
        if recording.calls_dropped:
            lines.append(
                f"{recording.calls_dropped:,} more calls were not recorded; raise max_calls"
            )
        if recording.slices_dropped:
            lines.append(
                f"{recording.slices_dropped:,} slices are missing from the trace; raise max_slices"
            )
        if self._counters is not None:
            lines.append(self._counters.line())
        return lines

    def roofline(self, path: str | os.PathLike[str]) -> None:
        """Write a page with every kernel under the machine's roofs.

        Raises:
            OSError: the file cannot be written.
        """
        recording = self._finished()
        rows = self.rows("time", "shape")
        page = roofline.page(rows, recording.calls, self._roofs, self._machine, recording)
        Path(path).write_text(page, encoding="utf-8")

    def trace(
        self, path: str | os.PathLike[str], *, merge: str | os.PathLike[str] | None = None
    ) -> None:
        """Write a Chrome trace, which https://ui.perfetto.dev opens.

        Args:
            path: The file to write.
            merge: A trace that ``torch.profiler`` exported of the same run: the file then holds
                both, on one clock.

        Raises:
            OSError: a file cannot be read or written.
            ValueError: ``merge`` is no Chrome trace.
        """
        recording = self._finished()
        if merge is None:
            document = trace.build(recording, self._machine.get("process"))
        else:
            document = trace.merge(recording, trace.read(merge))
        Path(path).write_text(json.dumps(document), encoding="utf-8")

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything that was recorded; :meth:`from_json` reads it.

        Raises:
            OSError: the file cannot be written.
        """
        raw = self._finished().raw
        known = self._roofs
        if known is None and not self._foreign:
            known = roofs.load()  # not worth ten seconds here
        counters = self._counters
        document = {
            "fastseq_profile": _FORMAT,
            "machine": self._machine,
            "roofs": None if known is None else known.to_dict(),
            "hardware_counters": None
            if counters is None
            else {"values": counters.values, "reason": counters.reason},
            "recorded": raw,
        }
        # Slices are arrays of machine integers until here.
        Path(path).write_text(json.dumps(document, default=list), encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Profile:
        """Read what :meth:`to_json` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no such file.
        """
        name = os.fspath(path)
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{name} is not JSON: {error}") from None
        if not isinstance(document, dict) or "fastseq_profile" not in document:
            raise ValueError(f"{name} is no profile of fastseq")
        if document["fastseq_profile"] != _FORMAT:
            raise ValueError(
                f"{name} has format {document['fastseq_profile']!r}, this version reads {_FORMAT}"
            )
        result = cls(False, MAX_CALLS, MAX_SLICES)
        result._foreign = True
        try:
            result._recording = Recording(document["recorded"], check=True)
            result._machine = dict(document["machine"])
            result._machine["libraries"] = dict(result._machine.get("libraries", {}))
            if document["roofs"] is not None:
                result._roofs = Roofs.from_dict(document["roofs"])
            if document["hardware_counters"] is not None:
                result._counters = Counters(**document["hardware_counters"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{name} is no profile of fastseq: {error}") from None
        return result


def _visible(rows: list[Row]) -> list[Row]:
    """Without the phases that take next to nothing."""
    shown: list[Row] = []
    kernel_s = 0.0
    for row in rows:
        if not row.phase:
            kernel_s = row.total_s
        if not row.phase or row.total_s >= 1e-3 * kernel_s:
            shown.append(row)
    return shown


def progress_on(stream: TextIO) -> roofs.Progress:
    """Progress of a measurement as one line that is written over; nothing without a terminal."""

    def show(done: int, count: int, name: str) -> None:
        if not stream.isatty():
            if done == 0:
                print("measuring the machine's roofs, once (about ten seconds)", file=stream)
            return
        text = f"measuring the machine's roofs, once: {done} of {count} {name}"
        # Back to the line's start; what was longer is overwritten with blanks.
        ended = done == count
        stream.write("\r" + ("" if ended else text).ljust(78) + ("\r" if ended else ""))
        stream.flush()

    return show


def _machine() -> dict[str, Any]:
    from fastseq.bench.machine import library_versions

    found = _config.capabilities()
    return {
        "cpu": found["cpu"],
        "threads": found["threads"],
        "isa": found["isa_chosen"],
        "libraries": {**library_versions(), "fastseq": found["version"]},
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "process": os.getpid(),
    }
