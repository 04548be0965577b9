"""RNN, LSTM and GRU as cells: what ``csrc/cells`` holds for the C++ kernels, gates in that order.

Formulas: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html (and ``GRU``, ``RNN``).
"""

from __future__ import annotations

from typing import Any

from fastseq.cells.definition import Cell, cell
from fastseq.cells.vocabulary import relu, sigmoid, tanh

__all__ = ["BUILTIN", "gru", "lstm", "rnn_relu", "rnn_tanh"]


@cell(gates=1)
def rnn_tanh(x: Any, h: Any, s: Any) -> Any:
    """Elman cell."""
    return tanh(x[0] + h[0])


@cell(gates=1)
def rnn_relu(x: Any, h: Any, s: Any) -> Any:
    """Elman cell with ReLU."""
    return relu(x[0] + h[0])


@cell(gates=4, states=2)
def lstm(x: Any, h: Any, s: Any) -> Any:
    """Long short-term memory; states h, c; gates i f g o."""
    i, f = sigmoid(x[0] + h[0]), sigmoid(x[1] + h[1])
    g, o = tanh(x[2] + h[2]), sigmoid(x[3] + h[3])
    c = f * s[1] + i * g
    return o * tanh(c), c


@cell(gates=3)
def gru(x: Any, h: Any, s: Any) -> Any:
    """Gated recurrent unit; the reset gate multiplies the recurrent product, as in torch."""
    r, z = sigmoid(x[0] + h[0]), sigmoid(x[1] + h[1])
    n = tanh(x[2] + r * h[2])
    return n + z * (s[0] - n)


BUILTIN: dict[str, Cell] = {
    "rnn_tanh": rnn_tanh,
    "rnn_relu": rnn_relu,
    "lstm": lstm,
    "gru": gru,
}
