"""Recurrent cells as Python functions: the decorator, what a cell may use, and cells that ship."""

from __future__ import annotations

from fastseq.cells.definition import Cell, cell
from fastseq.cells.expression import CellTraceError
from fastseq.cells.vocabulary import (
    absolute,
    exp,
    log,
    maximum,
    minimum,
    relu,
    sigmoid,
    softplus,
    sqrt,
    tanh,
    where,
)

__all__ = [
    "Cell",
    "CellTraceError",
    "absolute",
    "cell",
    "exp",
    "log",
    "maximum",
    "minimum",
    "relu",
    "sigmoid",
    "softplus",
    "sqrt",
    "tanh",
    "where",
]
