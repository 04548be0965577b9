"""Tensors to arguments of the compiled CPU kernels: layout, allocation, strides. No maths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq import _config
from fastseq._cells import CELLS, CellSizes
from fastseq.backends.layout import unit_stride as _unit_stride

__all__ = [
    "layer_backward",
    "layer_forward",
    "layer_reserve_elements",
    "plain_layer",
    "rnn_backward",
    "rnn_cell",
    "rnn_forward",
    "rnn_reserve_elements",
]

_kernels = _config.extension()
_CELLS = _kernels.CELLS
_forward = _kernels.rnn_forward
_backward = _kernels.rnn_backward
_threads = torch.get_num_threads

_PADDED_MULTIPLE = 32  # csrc/cpu/gemm.h: padded_multiple


def rnn_reserve_elements(
    cell: str,
    rows: int,
    hidden_size: int,
    proj_size: int,
    directions: int,
    dtype: torch.dtype | None = None,
) -> int:
    """Elements of what forward keeps for backward, in any dtype; sizes may be symbolic."""
    return layer_reserve_elements(CELLS[cell], rows, hidden_size, proj_size, directions)


def layer_reserve_elements(
    sizes: CellSizes, rows: int, hidden_size: int, proj_size: int, directions: int
) -> int:
    """The same for a cell that is given in numbers."""
    saved = sizes.saved + (1 if proj_size else 0)
    output = _padded(proj_size or hidden_size)
    return rows * directions * (_padded(hidden_size) * saved + _PADDED_MULTIPLE + output)


def _padded(size: int) -> int:
    return (size + _PADDED_MULTIPLE - 1) // _PADDED_MULTIPLE * _PADDED_MULTIPLE


# What the short ways into the kernels need, and torch's exchange table where it has one.
_kernels.connect(
    getattr(Tensor, "__dlpack_c_exchange_api__", None),
    Tensor,
    torch.nn.Parameter,
    torch.empty_like,
    torch.float64,
    torch.is_grad_enabled,
    _threads,
    {name: (_CELLS[name], sizes.gates, sizes.has_cell_state) for name, sizes in CELLS.items()},
)
plain_layer = _kernels.plain_layer


class _Rows(NamedTuple):
    """Which rows are alive at each step of a padded or packed batch."""

    batch_sizes: Tensor | None
    order: Tensor | None
    packed: bool


_RECTANGLE = _Rows(None, None, False)


def _alive_rows(batch_sizes: Tensor | None, lengths: Tensor | None, steps: int) -> _Rows:
    if batch_sizes is not None:
        return _Rows(batch_sizes.contiguous(), None, True)
    if lengths is None:
        return _RECTANGLE
    order = torch.argsort(lengths, descending=True, stable=True)
    ended = torch.bincount(lengths, minlength=steps + 1).cumsum(0)  # sequences of length <= t
    return _Rows(lengths.numel() - ended[:steps], order, False)


def _strides(tensor: Tensor, batch_first: bool, packed: bool) -> tuple[int, int]:
    """Elements from one step to the next and from one row to the next."""
    strides = tensor.stride()
    if packed:
        return 0, strides[0]
    return (strides[1], strides[0]) if batch_first else (strides[0], strides[1])


def rnn_forward(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    has_biases: bool,
    proj_size: int,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer, see :func:`fastseq.backends.reference.rnn_layer`.

    Returns ``(output, hy, cy, reserve)``; ``reserve`` is ``None`` unless ``save``.
    """
    return layer_forward(
        _CELLS[cell], CELLS[cell], input, hx, cx, weights, has_biases, proj_size, bidirectional,
        batch_first, batch_sizes, lengths, save,
    )  # fmt: skip


def layer_forward(
    kernels: int,
    sizes: CellSizes,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    has_biases: bool,
    proj_size: int,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The same on the kernels of that number, built-in or loaded, for a cell of these sizes."""
    if not input.is_contiguous():
        input = _unit_stride(input)
    packed = batch_sizes is not None
    if packed:
        assert batch_sizes is not None
        steps, features = batch_sizes.size(0), input.size(1)
        batch = int(batch_sizes[0]) if steps else 0
        output_shape = [input.size(0), 0]
    else:
        first, second, features = input.shape
        steps, batch = (second, first) if batch_first else (first, second)
        output_shape = [first, second, 0]
    hidden = weights[0].size(0) // sizes.gates
    directions = 2 if bidirectional else 1
    width = proj_size or hidden
    output_shape[-1] = directions * width

    output = input.new_empty(output_shape)
    hy = input.new_empty((directions, batch, width))
    cy = input.new_empty((directions, batch, hidden)) if sizes.has_cell_state else None
    reserve = None
    if save:
        rows = input.size(0) if packed else steps * batch
        reserve = input.new_empty(
            layer_reserve_elements(sizes, rows, hidden, proj_size, directions)
        )
    rows_alive = _alive_rows(batch_sizes, lengths, steps)
    _forward(
        kernels,
        1 if input.dtype is torch.float64 else 0,
        _threads(),
        (steps, batch, features, hidden, proj_size, directions),
        input,
        _strides(input, batch_first, packed),
        output,
        _strides(output, batch_first, packed),
        hx if hx is None or hx.is_contiguous() else hx.contiguous(),
        cx if cx is None or cx.is_contiguous() else cx.contiguous(),
        hy,
        cy,
        [w if w.is_contiguous() else w.contiguous() for w in weights],
        has_biases,
        reserve,
        rows_alive.batch_sizes,
        rows_alive.order,
        packed,
    )
    return output, hy, cy, reserve


def rnn_cell(
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    has_biases: bool,
) -> tuple[Tensor, Tensor | None]:
    """One step without gradients: ``input`` (B, I), states (B, H); returns ``(hy, cy)``."""
    if not input.is_contiguous():
        input = _unit_stride(input)
    batch, features = input.shape
    if not hx.is_contiguous():
        hx = hx.contiguous()
    if cx is not None and not cx.is_contiguous():
        cx = cx.contiguous()
    hidden = hx.shape[1]
    hy = torch.empty_like(hx)
    cy = None if cx is None else torch.empty_like(cx)
    _forward(
        _CELLS[cell],
        1 if input.dtype is torch.float64 else 0,
        _threads(),
        (1, batch, features, hidden, 0, 1),
        input,
        (0, input.stride(0)),
        hy,  # a single step's output is the final state: both are written to the same place
        (0, hidden),
        hx,
        cx,
        hy,
        cy,
        [w if w.is_contiguous() else w.contiguous() for w in weights],
        has_biases,
        None,
        None,
        None,
        False,
    )
    return hy, cy


def rnn_backward(
    grad_output: Tensor | None,
    grad_hy: Tensor | None,
    grad_cy: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    reserve: Tensor,
    cell: str,
    has_biases: bool,
    proj_size: int,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of one layer: of ``input``, ``hx``, ``cx`` and each weight.

    ``needs`` says for ``(input, hx, cx, *weights)`` which are asked for; the others are ``None``.
    """
    return layer_backward(
        _CELLS[cell], CELLS[cell], grad_output, grad_hy, grad_cy, input, hx, cx, weights, reserve,
        has_biases, proj_size, bidirectional, batch_first, batch_sizes, lengths, needs,
    )  # fmt: skip


def layer_backward(
    kernels: int,
    sizes: CellSizes,
    grad_output: Tensor | None,
    grad_hy: Tensor | None,
    grad_cy: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    reserve: Tensor,
    has_biases: bool,
    proj_size: int,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
    """The same on the kernels of that number, built-in or loaded, for a cell of these sizes."""
    input = _unit_stride(input)
    packed = batch_sizes is not None
    if packed:
        assert batch_sizes is not None
        steps, features = batch_sizes.size(0), input.size(1)
        batch = int(batch_sizes[0]) if steps else 0
    else:
        first, second, features = input.shape
        steps, batch = (second, first) if batch_first else (first, second)
    hidden = weights[0].size(0) // sizes.gates
    directions = 2 if bidirectional else 1
    width = proj_size or hidden

    if grad_output is not None:
        grad_output = _unit_stride(grad_output)
    grad_input = (
        torch.empty_like(input, memory_format=torch.contiguous_format) if needs[0] else None
    )
    grad_hx = input.new_empty((directions, batch, width)) if needs[1] else None
    grad_cx = input.new_empty((directions, batch, hidden)) if needs[2] else None
    dense = [w if w.is_contiguous() else w.contiguous() for w in weights]
    grad_weights = [
        torch.empty_like(w) if needed else None for w, needed in zip(dense, needs[3:], strict=True)
    ]
    rows_alive = _alive_rows(batch_sizes, lengths, steps)
    _backward(
        kernels,
        1 if input.dtype is torch.float64 else 0,
        _threads(),
        (steps, batch, features, hidden, proj_size, directions),
        input,
        _strides(input, batch_first, packed),
        grad_output,
        (0, 0) if grad_output is None else _strides(grad_output, batch_first, packed),
        grad_input,
        (0, 0) if grad_input is None else _strides(grad_input, batch_first, packed),
        None if hx is None else hx.contiguous(),
        None if cx is None else cx.contiguous(),
        None if grad_hy is None else grad_hy.contiguous(),
        None if grad_cy is None else grad_cy.contiguous(),
        grad_hx,
        grad_cx,
        dense,
        grad_weights,
        has_biases,
        reserve,
        rows_alive.batch_sizes,
        rows_alive.order,
        packed,
    )
    return grad_input, grad_hx, grad_cx, grad_weights
