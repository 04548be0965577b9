"""The compiled bodies of attention, one set per dtype, made when they are first needed."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from fastseq.backends.numba.attention_backward import (
    BACKWARD_INTEGERS,
    backward_piece,
    sink_gradient,
)
from fastseq.backends.numba.attention_forward import FORWARD_INTEGERS, forward_piece
from fastseq.backends.numba.attention_problem import NUMBERS, NUMBERS_ADDRESS
from fastseq.backends.numba.compiled import compile_body, integers_at, numbers_at, version

__all__ = ["bodies"]


def _forward(like: Any, state: int) -> Any:
    # What is not in these functions' own text must be in their closures, by which the cache tells
    # them apart: the dtype, and the state of everything they call.
    def attention_forward(arguments: int, piece: int) -> int:
        integers = integers_at(arguments, FORWARD_INTEGERS)
        numbers = numbers_at(integers[NUMBERS_ADDRESS], NUMBERS, like)
        forward_piece(integers, numbers, piece)
        return state

    return attention_forward


def _backward(like: Any, state: int) -> Any:
    def attention_backward(arguments: int, piece: int) -> int:
        integers = integers_at(arguments, BACKWARD_INTEGERS)
        numbers = numbers_at(integers[NUMBERS_ADDRESS], NUMBERS, like)
        backward_piece(integers, numbers, piece)
        return state

    return attention_backward


def _sinks(like: Any, state: int) -> Any:
    def attention_sinks(arguments: int, head: int) -> int:
        integers = integers_at(arguments, BACKWARD_INTEGERS)
        numbers = numbers_at(integers[NUMBERS_ADDRESS], NUMBERS, like)
        sink_gradient(integers, numbers, head)
        return state

    return attention_sinks


_MAKERS = {
    "attention_forward": _forward,
    "attention_backward": _backward,
    "attention_sinks": _sinks,
}


@functools.cache
def bodies(name: str, dtype: Any) -> Any:
    """The body of that name for arrays of a dtype; compiled at the first call."""
    return compile_body(_MAKERS[name](np.zeros(1, dtype), version()))
