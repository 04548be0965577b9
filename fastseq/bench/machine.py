"""What a measurement was taken on."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

_LIBRARIES = ("fastseq", "torch", "numpy", "onnx", "onnxruntime", "openvino")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_CPUINFO = Path("/proc/cpuinfo")
# Idle threads of a run that has just ended, spinning, leave about one for each core behind.
_BUSY_PER_CORE = 1.5


def library_versions() -> dict[str, str]:
    """Versions of the libraries that take part; absent ones are left out."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def available_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def governor() -> str | None:
    """How the system chooses the first core's frequency, or None where it does not say."""
    try:
        return _GOVERNOR.read_text(encoding="ascii").strip()
    except OSError:
        return None


def virtualised() -> bool | None:
    """Whether this is a virtual machine, or None where the processor does not say."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("flags"):
            return "hypervisor" in line.split(":", 1)[1].split()
    return None


def load_average() -> float | None:
    """Processes that wanted to run during the last minute, or None where nobody counts."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def busy() -> str | None:
    """A warning where more wants to run than the machine has cores, else None.

    A library whose threads spin at a barrier may then take a hundred times as long, and another
    one twice as long: ratios say nothing about either.
    """
    load, cores = load_average(), os.cpu_count() or 1
    if load is None or load < _BUSY_PER_CORE * cores:
        return None
    return (
        f"the load average is {load:.1f} on {cores} core{'' if cores == 1 else 's'}: other "
        "programs run, or did a minute ago; neither times nor speed-ups mean much beside them"
    )


def warn_if_busy() -> None:
    """Print the warning of :func:`busy`, if there is one, on stderr."""
    warning = busy()
    if warning is not None:
        print(f"fastseq bench: warning: {warning}", file=sys.stderr)


def describe(threads: int | Sequence[int]) -> dict[str, Any]:
    """The record that goes into every result file.

    Args:
        threads: The number or numbers of threads that cases run on.
    """
    from fastseq._config import capabilities

    found = capabilities()
    return {
        "cpu": found["cpu"],
        "cores": available_cores(),
        "threads": [threads] if isinstance(threads, int) else list(threads),
        "caches_bytes": found["caches_bytes"],
        "virtualised": virtualised(),
        "governor": governor(),
        "load_average": load_average(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": library_versions(),
        # Whose kernels they are where they are not the compiled ones.
        "isa": found["isa_chosen"] if found["backend"] == "cpu" else found["backend"],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def threads_text(record: dict[str, Any]) -> str:
    """The record's numbers of threads in words; older files hold one number, not a list."""
    counts = record["threads"]
    counts = counts if isinstance(counts, list) else [counts]
    return f"{' and '.join(map(str, counts))} thread" + ("" if counts == [1] else "s")
