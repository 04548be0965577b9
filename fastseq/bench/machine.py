"""What a measurement was taken on."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

_LIBRARIES = ("fastseq", "torch", "numpy", "onnx", "onnxruntime")


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


def describe(threads: int) -> dict[str, Any]:
    """The record that goes into every result file."""
    from fastseq._config import capabilities

    found = capabilities()
    return {
        "cpu": found["cpu"],
        "cores": available_cores(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": library_versions(),
        "isa": found["isa_chosen"],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
