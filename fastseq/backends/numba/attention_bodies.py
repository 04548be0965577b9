"""The compiled functions of attention, one set per dtype, made when they are first needed.

A body is a C function of the address of a call's numbers. Threads that run it take pieces of work
from one counter until none is left.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import carray, types

from fastseq.backends.numba.attention_backward import (
    BACKWARD_INTEGERS,
    backward_piece,
    sink_gradient,
)
from fastseq.backends.numba.attention_forward import FORWARD_INTEGERS, forward_piece
from fastseq.backends.numba.attention_problem import COUNT, COUNTER, NUMBERS, NUMBERS_ADDRESS
from fastseq.backends.numba.compile import compiled, sources_digest
from fastseq.backends.numba.tiles import inner, pointer, take

__all__ = ["body"]


@inner
def _numbers(integers: Any, like: Any) -> Any:
    return carray(pointer(integers[NUMBERS_ADDRESS], like), NUMBERS)


# What is not in these functions' own text must be in their closures, by which the cache tells them
# apart: the dtype, and the state of everything they call.


def _forward(like: Any, sources: str) -> Any:
    def attention_forward(arguments: Any) -> None:
        sources  # noqa: B018
        integers = carray(arguments, FORWARD_INTEGERS)
        numbers = _numbers(integers, like)
        piece = take(integers[COUNTER])
        while piece < integers[COUNT]:
            forward_piece(integers, numbers, piece)
            piece = take(integers[COUNTER])

    return attention_forward


def _backward(like: Any, sources: str) -> Any:
    def attention_backward(arguments: Any) -> None:
        sources  # noqa: B018
        integers = carray(arguments, BACKWARD_INTEGERS)
        numbers = _numbers(integers, like)
        piece = take(integers[COUNTER])
        while piece < integers[COUNT]:
            backward_piece(integers, numbers, piece)
            piece = take(integers[COUNTER])

    return attention_backward


def _sinks(like: Any, sources: str) -> Any:
    def attention_sinks(arguments: Any) -> None:
        sources  # noqa: B018
        integers = carray(arguments, BACKWARD_INTEGERS)
        numbers = _numbers(integers, like)
        head = take(integers[COUNTER])
        while head < integers[COUNT]:
            sink_gradient(integers, numbers, head)
            head = take(integers[COUNTER])

    return attention_sinks


_MAKERS = {"forward": _forward, "backward": _backward, "sinks": _sinks}
_MODULES = ("attention", "elementary", "tiles")
_SIGNATURE = types.void(types.CPointer(types.int64))


@functools.cache
def body(name: str, item_bytes: int) -> Any:
    """``"forward"``, ``"backward"`` or ``"sinks"`` for floats of so many bytes."""
    like = np.zeros(1, np.float32 if item_bytes == 4 else np.float64)
    return compiled(_SIGNATURE, _MAKERS[name](like, sources_digest(_MODULES)))
