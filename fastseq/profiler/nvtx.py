"""Ranges around calls of the CUDA kernels, for NVIDIA's profilers, while a profile of ours runs.

The kernels only enqueue work: a range spans the call on the host, and Nsight Systems projects it
onto what the device did. Importing this module does not import torch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

__all__ = ["Ranges", "marked", "recording"]

Function = TypeVar("Function", bound=Callable[..., Any])


class Ranges:
    """How many ranges there were in a ``recording`` block."""

    count = 0


_ranges: Ranges | None = None


@contextlib.contextmanager
def recording() -> Iterator[Ranges]:
    """Put ranges around the calls in the block."""
    global _ranges
    _ranges = ranges = Ranges()
    try:
        yield ranges
    finally:
        _ranges = None


def marked(function: Function) -> Function:
    """A function that calls kernels, in a range of its name and its first tensor's shape."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        ranges = _ranges
        if ranges is None:
            return function(*arguments, **options)
        import torch

        # A torch without CUDA has no such functions and raises.
        if not torch.cuda.is_available():
            return function(*arguments, **options)
        shape = next((tuple(one.shape) for one in arguments if torch.is_tensor(one)), ())
        ranges.count += 1
        torch.cuda.nvtx.range_push(f"fastseq::{function.__name__} {shape}")
        try:
            return function(*arguments, **options)
        finally:
            torch.cuda.nvtx.range_pop()

    return call  # type: ignore[return-value]
