"""Checks of numbers, for whichever function takes one."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def number(name: str, value: Any) -> float:
    """A number that is no tensor."""
    # hasattr comes last, and not for the usual types: a compiler cannot ask a symbolic number.
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, (str, Tensor)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    return float(value)
