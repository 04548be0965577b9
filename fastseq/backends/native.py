"""torch's own layers and cells, which answer where the fused kernels do not apply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["rnn_cell", "rnn_layers"]

_LAYERS: dict[str, Callable[..., Any]] = {
    "lstm": torch._VF.lstm,
    "gru": torch._VF.gru,
    "rnn_tanh": torch._VF.rnn_tanh,
    "rnn_relu": torch._VF.rnn_relu,
}
_CELLS: dict[str, Callable[..., Any]] = {
    "lstm": torch._VF.lstm_cell,
    "gru": torch._VF.gru_cell,
    "rnn_tanh": torch._VF.rnn_tanh_cell,
    "rnn_relu": torch._VF.rnn_relu_cell,
}


def rnn_layers(
    cell: str,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    hidden_size: int,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    has_biases: bool,
    dropout: float,
    training: bool,
    proj_size: int,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All layers at once, with the arguments of :func:`fastseq.functional.lstm` and its kin.

    States are ``(L*D, B, ·)`` or ``None`` for zeros. Returns ``output``, ``h_n`` and ``c_n``,
    which is ``None`` for other cells than the LSTM.
    """
    rows = num_layers * (2 if bidirectional else 1)
    # Not made an int: while torch.jit.trace records, a size is a tensor and must stay one.
    batch: Any = batch_sizes[0] if batch_sizes is not None else input.size(0 if batch_first else 1)
    if hx is None:
        hx = _zeros(rows, batch, proj_size or hidden_size, input)
    if cell == "lstm" and cx is None:
        cx = _zeros(rows, batch, hidden_size, input)
    state = (hx, cx) if cell == "lstm" else hx
    options = (has_biases, num_layers, dropout, training, bidirectional)
    if batch_sizes is not None:
        result = _LAYERS[cell](input, batch_sizes, state, list(weights), *options)
    else:
        result = _LAYERS[cell](input, state, list(weights), *options, batch_first)
    output, h_n = result[:2]
    return output, h_n, result[2] if cell == "lstm" else None


def _zeros(rows: int, batch: Any, features: int, like: Tensor) -> Tensor:
    return torch.zeros(rows, batch, features, dtype=like.dtype, device=like.device)


def rnn_cell(
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    cell: str,
) -> tuple[Tensor, Tensor | None]:
    """One step: ``input`` (B, I), ``hx`` and ``cx`` (B, H), returns ``(hy, cy)``."""
    state = (hx, cx) if cell == "lstm" else hx
    result = _CELLS[cell](input, state, w_ih, w_hh, b_ih, b_hh)
    if cell == "lstm":
        return result[0], result[1]
    return result, None
