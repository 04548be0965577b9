"""Imports openvino without its usage reports."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from typing import Any

_REPORTS = "openvino_telemetry"


@cache
def library() -> Any:
    """The openvino package.

    Importing it starts a thread that sends a usage report to its makers; nobody who runs a
    benchmark asked for one, and it would run beside the timings. The package that sends is
    optional to openvino, hence hidden here while it is imported, unless it has been before.

    Raises:
        ModuleNotFoundError: openvino is not installed.
    """
    hidden = _REPORTS not in sys.modules
    if hidden:
        sys.modules[_REPORTS] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("openvino")
    finally:
        if hidden:
            del sys.modules[_REPORTS]


@cache
def core() -> Any:
    """Its one runtime of this process."""
    return library().Core()
