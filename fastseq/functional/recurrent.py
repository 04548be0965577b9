"""Recurrent layers and cells as functions: argument checks and layout, no maths.

The functions mirror what :mod:`torch.nn` runs under its modules, with weights passed as torch lays
them out. Formulas: https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html, ``LSTM``,
``GRU`` and the ``*Cell`` pages next to them.

Shapes use ``T`` time, ``B`` batch, ``I`` input, ``H`` hidden, ``P`` projection, ``L`` layers,
``D`` directions and ``R = proj_size or H``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import dropout as _dropout

from fastseq import _ops
from fastseq._checks import recurrent as _checks
from fastseq.backends import fallback_reason, native, reference, warn_fallback

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell", "rnn", "rnn_cell"]

States: TypeAlias = tuple[Tensor, Tensor]
Lengths: TypeAlias = Tensor | Sequence[int]

_NONLINEARITIES = {"tanh": "rnn_tanh", "relu": "rnn_relu"}


def lstm(
    input: Tensor,
    hx: States | None = None,
    weights: Sequence[Tensor] = (),
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    has_biases: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    proj_size: int = 0,
    batch_sizes: Tensor | None = None,
    lengths: Lengths | None = None,
) -> tuple[Tensor, States]:
    """Long short-term memory layers (https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html).

    Args:
        input: ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, ``(T, I)`` for one sequence, or
            ``(rows, I)`` with ``batch_sizes``. The fused CPU kernels take float32 and float64;
            torch's own layers answer for every other dtype and device.
        hx: initial states ``(h_0, c_0)`` of shapes ``(L*D, B, R)`` and ``(L*D, B, H)``, without
            ``B`` for one sequence. Default: zeros.
        weights: for each layer and direction ``w_ih (4H, I)``, ``w_hh (4H, R)``, with
            ``has_biases`` ``b_ih (4H)`` and ``b_hh (4H)``, with ``proj_size`` ``w_hr (P, H)``;
            the order in which a :class:`torch.nn.LSTM` registers its parameters.
        num_layers: stacked layers; from the second on, ``I`` is ``D*R``.
        bidirectional: add a second direction that runs from the end.
        batch_first: ``input`` and ``output`` are ``(B, T, ...)``. States are not affected.
        has_biases: whether ``weights`` holds biases.
        dropout: probability of zeroing an element between two layers, when ``training``.
        training: whether dropout is active.
        proj_size: size of the projected hidden state; 0 for none.
        batch_sizes: int64 CPU tensor ``(T,)``, the ``batch_sizes`` of a
            :class:`~torch.nn.utils.rnn.PackedSequence` whose data is ``input``.
        lengths: ``(B,)`` integers from 0 to T in any order, for padded input: outputs past a
            sequence's length are zero, its final states are those at its length.

    Returns:
        ``output``, shaped as ``input`` with ``D*R`` features, and ``(h_n, c_n)``, shaped as ``hx``.

    Raises:
        ValueError: ``input`` is not 2-D or 3-D, its dtype is not that of the weights, or
            ``lengths`` or ``batch_sizes`` are malformed.
        RuntimeError: sizes, dtypes or devices of ``input``, ``hx`` and ``weights`` do not fit
            together, or ``input`` has no time steps.
        TypeError: ``hx`` is not a pair of tensors.
    """
    h_0, c_0 = (None, None) if hx is None else _checks.pair(hx)
    output, h_n, c_n = run_layers(
        "lstm",
        input,
        h_0,
        c_0,
        weights,
        num_layers,
        bidirectional,
        batch_first,
        has_biases,
        dropout,
        training,
        proj_size,
        batch_sizes,
        lengths,
    )
    assert c_n is not None
    return output, (h_n, c_n)


def gru(
    input: Tensor,
    hx: Tensor | None = None,
    weights: Sequence[Tensor] = (),
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    has_biases: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Lengths | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated recurrent unit layers (https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html).

    The reset gate is applied after the recurrent product ("linear before reset"), as in torch.
    ``weights`` has ``3H`` rows per gate matrix, in the gate order reset, update, new; ``hx`` is
    ``h_0`` ``(L*D, B, H)``. Everything else is as for :func:`lstm`.

    Returns:
        ``output``, shaped as ``input`` with ``D*H`` features, and ``h_n`` ``(L*D, B, H)``.
    """
    output, h_n, _ = run_layers(
        "gru",
        input,
        hx,
        None,
        weights,
        num_layers,
        bidirectional,
        batch_first,
        has_biases,
        dropout,
        training,
        0,
        batch_sizes,
        lengths,
    )
    return output, h_n


def rnn(
    input: Tensor,
    hx: Tensor | None = None,
    weights: Sequence[Tensor] = (),
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    has_biases: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Lengths | None = None,
) -> tuple[Tensor, Tensor]:
    """Elman layers (https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html).

    ``nonlinearity`` is ``"tanh"`` or ``"relu"`` (another raises ``ValueError``); ``hx`` is ``h_0``
    ``(L*D, B, H)``. Everything else is as for :func:`lstm`.

    Returns:
        ``output``, shaped as ``input`` with ``D*H`` features, and ``h_n`` ``(L*D, B, H)``.
    """
    output, h_n, _ = run_layers(
        _rnn_kind(nonlinearity),
        input,
        hx,
        None,
        weights,
        num_layers,
        bidirectional,
        batch_first,
        has_biases,
        dropout,
        training,
        0,
        batch_sizes,
        lengths,
    )
    return output, h_n


def _rnn_kind(nonlinearity: str) -> str:
    kind = _NONLINEARITIES.get(nonlinearity)
    if kind is None:
        raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    return kind


def run_layers(
    cell: str,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    has_biases: bool,
    dropout: float,
    training: bool,
    proj_size: int,
    batch_sizes: Tensor | None,
    lengths: Lengths | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check the arguments, lift one unbatched sequence to a batch, run all layers."""
    if (
        num_layers == 1
        and has_biases
        and not proj_size
        and not bidirectional
        and batch_sizes is None
        and lengths is None
    ):
        result = _ops.plain_layer(cell, input, hx, cx, weights, batch_first)
        if result is not None:
            return result
    reason = fallback_reason(input, has_cuda_kernels=True)
    if proj_size and reason is None and not input.is_cpu:
        reason = "proj_size has no CUDA kernels"
    unbatched = batch_sizes is None and input.dim() == 2
    if unbatched:
        input = input.unsqueeze(1)
        hx, cx = _checks.unbatched_states(hx, cx)
        batch_first = False
    if batch_sizes is not None:
        input = _checks.packed(input, batch_sizes, lengths)
    if lengths is not None:
        lengths = _checks.lengths(lengths, input, batch_first)
    # Sizes are tensors while torch.jit.trace records: checking them would freeze them as constants.
    if reason is None or not torch._C._get_tracing_state():
        _checks.layers(
            cell,
            input,
            hx,
            cx,
            weights,
            num_layers,
            bidirectional,
            batch_first,
            has_biases,
            proj_size,
            batch_sizes,
            fused=reason is None,
        )
    if reason is not None:
        warn_fallback(reason)
        if lengths is None:
            result = native.rnn_layers(
                cell,
                input,
                hx,
                cx,
                weights,
                _checks.hidden_size(cell, weights),
                num_layers,
                bidirectional,
                batch_first,
                has_biases,
                dropout,
                training,
                proj_size,
                batch_sizes,
            )
            return _unlift(result) if unbatched else result
    layer = _ops.rnn_layer if reason is None else reference.rnn_layer
    if num_layers == 1:
        result = layer(
            input,
            hx,
            cx,
            weights,
            cell,
            has_biases,
            proj_size,
            bidirectional,
            batch_first,
            batch_sizes,
            lengths,
        )
        return _unlift(result) if unbatched else result

    # With dropout the layers run time-major, so that the random mask falls on the elements in the
    # order in which torch's own layers draw it: the same seed then gives the same numbers.
    drops = training and dropout > 0
    transpose = drops and batch_first and batch_sizes is None
    if transpose:
        input, batch_first = input.transpose(0, 1), False
    directions = 2 if bidirectional else 1
    per_layer = len(weights) // num_layers
    hidden_states, cell_states = [], []
    output = input
    for index in range(num_layers):
        states = slice(index * directions, (index + 1) * directions)
        output, h_n, c_n = layer(
            output,
            None if hx is None else hx[states],
            None if cx is None else cx[states],
            weights[index * per_layer : (index + 1) * per_layer],
            cell,
            has_biases,
            proj_size,
            bidirectional,
            batch_first,
            batch_sizes,
            lengths,
        )
        hidden_states.append(h_n)
        if c_n is not None:
            cell_states.append(c_n)
        if drops and index + 1 < num_layers:
            output = _dropout(output, dropout, True)
    if transpose:
        output = output.transpose(0, 1)
    h_n = torch.cat(hidden_states)
    c_n = torch.cat(cell_states) if cell_states else None
    return _unlift((output, h_n, c_n)) if unbatched else (output, h_n, c_n)


def _unlift(result: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take the batch dimension of size one away again."""
    output, h_n, c_n = result
    return output.squeeze(1), h_n.squeeze(1), None if c_n is None else c_n.squeeze(1)


def lstm_cell(
    input: Tensor,
    hx: States | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> States:
    """One LSTM step (https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTMCell.html).

    Args:
        input: ``(B, I)`` or ``(I)``, any floating dtype (float32 and float64 are fused on the CPU).
        hx: ``(h, c)``, each ``(B, H)``, or ``(H)`` with 1-D input. ``None`` is zeros.
        w_ih: ``(4H, I)``, gate order input, forget, cell, output.
        w_hh: ``(4H, H)``.
        b_ih: ``(4H)`` or ``None``.
        b_hh: ``(4H)`` or ``None``.

    Returns:
        ``(h', c')``, shaped as ``hx``.

    Raises:
        ValueError: ``input`` or a state is neither 1-D nor 2-D.
        RuntimeError: sizes, dtypes or devices do not fit together.
        TypeError: ``hx`` is not a pair of tensors.
    """
    h, c = (None, None) if hx is None else _checks.pair(hx, for_cell=True)
    hidden, cell = run_cell("lstm", input, h, c, w_ih, w_hh, b_ih, b_hh)
    assert cell is not None
    return hidden, cell


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One GRU step (https://docs.pytorch.org/docs/stable/generated/torch.nn.GRUCell.html).

    ``w_ih`` is ``(3H, I)`` and ``w_hh`` ``(3H, H)``, gate order reset, update, new; ``hx`` is
    ``(B, H)`` or ``(H)``. Returns ``h'``, shaped as ``hx``. Raises as :func:`lstm_cell` does.
    """
    return run_cell("gru", input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One Elman step (https://docs.pytorch.org/docs/stable/generated/torch.nn.RNNCell.html).

    ``nonlinearity`` is ``"tanh"`` or ``"relu"``; ``w_ih`` is ``(H, I)``, ``w_hh`` ``(H, H)`` and
    ``hx`` ``(B, H)`` or ``(H)``. Returns ``h'``, shaped as ``hx``. Raises as :func:`lstm_cell`.
    """
    return run_cell(_rnn_kind(nonlinearity), input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]


def run_cell(
    cell: str,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    if _checks.cell_fits(cell, input, hx, cx, w_ih, w_hh, b_ih, b_hh):
        assert hx is not None
        return _ops.rnn_cell(input, hx, cx, w_ih, w_hh, b_ih, b_hh, cell)
    reason = fallback_reason(input, has_cuda_kernels=True)
    _checks.cell_dims(cell, input, hx, cx)
    unbatched = input.dim() == 1
    if unbatched:
        input = input.unsqueeze(0)
        hx = None if hx is None else hx.unsqueeze(0)
        cx = None if cx is None else cx.unsqueeze(0)
    if hx is None or (cx is None and cell == "lstm"):
        zeros = torch.zeros(
            input.size(0),
            _checks.hidden_size(cell, (w_ih, w_hh)),
            dtype=input.dtype,
            device=input.device,
        )
        hx, cx = zeros if hx is None else hx, zeros if cell == "lstm" and cx is None else cx
    if reason is None or not torch._C._get_tracing_state():
        _checks.cell(cell, input, hx, cx, w_ih, w_hh, b_ih, b_hh, fused=reason is None)
    if reason is None:
        hidden, new_cell = _ops.rnn_cell(input, hx, cx, w_ih, w_hh, b_ih, b_hh, cell)
    else:
        warn_fallback(reason)
        hidden, new_cell = native.rnn_cell(input, hx, cx, w_ih, w_hh, b_ih, b_hh, cell)
    if unbatched:
        hidden = hidden.squeeze(0)
        new_cell = None if new_cell is None else new_cell.squeeze(0)
    return hidden, new_cell
