"""Recurrent cells as Python functions: the decorator, what a cell may use, and cells that ship."""

from __future__ import annotations

from fastseq.cells.builtin import gru, lstm, rnn_relu, rnn_tanh
from fastseq.cells.definition import Cell, cell
from fastseq.cells.expression import CellTraceError
from fastseq.cells.shipped import (
    coupled_lstm,
    ind_rnn,
    janet,
    minimal_gated_unit,
    peephole_lstm,
    s_lstm,
)
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
    "coupled_lstm",
    "exp",
    "gru",
    "ind_rnn",
    "janet",
    "log",
    "lstm",
    "maximum",
    "minimal_gated_unit",
    "minimum",
    "peephole_lstm",
    "relu",
    "rnn_relu",
    "rnn_tanh",
    "s_lstm",
    "sigmoid",
    "softplus",
    "sqrt",
    "tanh",
    "where",
]
