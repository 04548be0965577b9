"""The processor's own counters over a block: cycles, instructions, cache misses.

Through Linux's ``perf_event_open``, for every thread of the process and those it starts. Where
the kernel does not allow it, or a virtual machine has no counters, there is a reason instead of
numbers.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Counters", "HardwareCounters"]

# perf_event_open(2): generalized hardware events.
_EVENTS = {"cycles": 0, "instructions": 1, "cache misses": 3}
_SYSCALLS = {"x86_64": 298, "aarch64": 241}
# struct perf_event_attr as its first published version has it, 64 bytes: type, size, config,
# sample period, sample type, read format, flags, wakeup, breakpoint type, breakpoint address.
_ATTRIBUTES = struct.Struct("=IIQQQQQIIQ")
_READ_FORMAT = 1 | 2  # with the time enabled and the time counted
_DISABLED, _INHERIT, _NO_KERNEL, _NO_HYPERVISOR = 1 << 0, 1 << 1, 1 << 5, 1 << 6
_CLOSE_ON_EXEC = 1 << 3
_ENABLE, _DISABLE = 0x2400, 0x2401  # ioctl
_PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")


@dataclass(frozen=True)
class Counters:
    """What was counted, or why nothing was.

    Attributes:
        values: Events by name, over all threads of the process; empty with a reason.
        reason: Why there are no values; ``None`` where there are.
    """

    values: dict[str, int] = field(default_factory=dict)
    reason: str | None = None

    def line(self) -> str:
        """One line for below a table."""
        if self.reason is not None:
            return f"hardware counters: n/a ({self.reason})"
        parts = [f"{value:,} {name}" for name, value in self.values.items()]
        cycles = self.values.get("cycles", 0)
        if cycles and "instructions" in self.values:
            parts.append(f"{self.values['instructions'] / cycles:.2f} instructions per cycle")
        return "hardware counters: " + ", ".join(parts)


class HardwareCounters:
    """Counts from :meth:`start` to :meth:`stop`."""

    def __init__(self) -> None:
        self._open: list[tuple[str, int]] = []
        self._reason: str | None = None

    def start(self) -> None:
        """Begin to count; never raises, :meth:`stop` tells what went wrong."""
        number = _SYSCALLS.get(platform.machine())
        if not sys.platform.startswith("linux"):
            self._reason = f"needs Linux, this is {platform.system()}"
            return
        if number is None:
            self._reason = f"not known for {platform.machine()} processors"
            return
        try:
            threads = [int(name) for name in os.listdir("/proc/self/task")]
            call = ctypes.CDLL(None, use_errno=True).syscall
        except (OSError, AttributeError) as error:
            self._reason = str(error)
            return
        for thread in threads:
            for name, event in _EVENTS.items():
                descriptor = _open_event(call, number, event, thread)
                if descriptor >= 0:
                    self._open.append((name, descriptor))
                elif -descriptor != errno.ESRCH:  # a thread that ended meanwhile is no failure
                    self._reason = _reason(-descriptor)
        if self._open:
            # Some events are enough; the others are missing from the values.
            self._reason = None
        self._control(_ENABLE)

    def stop(self) -> Counters:
        """Stop counting; what was counted."""
        self._control(_DISABLE)
        values: dict[str, int] = {}
        for name, descriptor in self._open:
            try:
                count, enabled, running = struct.unpack("=QQQ", os.read(descriptor, 24))
            except (OSError, struct.error):
                continue
            finally:
                os.close(descriptor)
            # With more events than the processor counts at once, each is counted part of the time.
            values[name] = values.get(name, 0) + (int(count * enabled / running) if running else 0)
        self._open = []
        if not values:
            return Counters(reason=self._reason or "no thread could be counted")
        return Counters(values)

    def _control(self, request: int) -> None:
        import fcntl

        for _, descriptor in self._open:
            try:
                fcntl.ioctl(descriptor, request, 0)
            except OSError:
                continue


def _open_event(call: Any, number: int, event: int, thread: int) -> int:
    """A file descriptor, or the negative error number."""
    flags = _DISABLED | _INHERIT | _NO_KERNEL | _NO_HYPERVISOR
    packed = _ATTRIBUTES.pack(0, _ATTRIBUTES.size, event, 0, 0, _READ_FORMAT, flags, 0, 0, 0)
    attributes = ctypes.create_string_buffer(packed, _ATTRIBUTES.size)
    descriptor: int = call(
        ctypes.c_long(number),
        attributes,
        ctypes.c_long(thread),
        ctypes.c_long(-1),
        ctypes.c_long(-1),
        ctypes.c_ulong(_CLOSE_ON_EXEC),
    )
    return descriptor if descriptor >= 0 else -ctypes.get_errno()


def _reason(error: int) -> str:
    name = errno.errorcode.get(error, str(error))
    if error in (errno.EACCES, errno.EPERM):
        try:
            level = _PARANOID.read_text().strip()
        except OSError:
            level = "unknown"
        return f"{name}: the kernel does not allow it, perf_event_paranoid is {level}"
    if error in (errno.ENOENT, errno.EOPNOTSUPP, errno.ENODEV):
        return f"{name}: no such counters, as in most virtual machines"
    return f"{name}: {os.strerror(error)}"
