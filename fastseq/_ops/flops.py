"""The work of the ops for :class:`torch.utils.flop_counter.FlopCounterMode`.

Matrix products only, as for torch's own operators; the norms have none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastseq._attention import Terms
from fastseq._cells import GATES
from fastseq._ops import attention, cells, linear, recurrent  # noqa: F401  they define the ops
from fastseq._ops.shared import PLAIN_TYPES
from fastseq._work import AttentionSizes, LinearSizes, RecurrentSizes
from fastseq.cells.definition import find

_TERMS = len(Terms._fields)

# --- recurrent layers


def _rows(input: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None) -> int:
    """(sequence, step) pairs that exist."""
    if batch_sizes is not None:
        return input.shape[0]
    if lengths is not None and _is_known(lengths):
        return int(lengths.sum())
    return input.shape[0] * input.shape[1]


def _rows_without_predecessor(
    input: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    batch_first: bool,
    reverse: bool,
) -> int:
    """Rows of the step that a direction begins with; 0 where values would have to say it."""
    if batch_sizes is not None:
        return int(batch_sizes[-1 if reverse else 0]) if _is_known(batch_sizes) else 0
    steps, batch = input.shape[:2][:: -1 if batch_first else 1]
    if lengths is not None:
        if not _is_known(lengths):
            return 0
        return int((lengths == steps).sum() if reverse else (lengths > 0).sum())
    return batch


def _is_known(tensor: Tensor) -> bool:
    """Whether the tensor holds values, not only a shape."""
    return type(tensor) in PLAIN_TYPES and not tensor.is_meta


def _sizes(cell: str, weights: Sequence[Tensor], proj_size: int, rows: int) -> RecurrentSizes:
    """One direction."""
    gate_rows, inputs = weights[0].shape
    return RecurrentSizes(cell, rows, 0, inputs, gate_rows // GATES[cell], proj_size)


@register_flop_formula(torch.ops.fastseq.rnn_forward, get_raw=True)
def _rnn_forward_flops(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    has_biases: bool,
    proj_size: int,
    bidirectional: bool,
    batch_first: bool,
    *_: Any,
    out_val: Any = None,
    **__: Any,
) -> int:
    rows = _rows(input, batch_sizes, lengths)
    return (2 if bidirectional else 1) * _sizes(cell, weights, proj_size, rows).forward_flops()


@register_flop_formula(torch.ops.fastseq.rnn_backward, get_raw=True)
def _rnn_backward_flops(
    grad_output: Tensor | None,
    grad_hy: Tensor | None,
    grad_cy: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    reserve: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    has_biases: bool,
    proj_size: int,
    bidirectional: bool,
    batch_first: bool,
    needs: Sequence[bool],
    *_: Any,
    out_val: Any = None,
    **__: Any,
) -> int:
    """As autograd counts: the way back through each product, and the gradient of each weight."""
    rows = _rows(input, batch_sizes, lengths)
    sizes = _sizes(cell, weights, proj_size, rows)
    directions = 2 if bidirectional else 1
    each = len(weights) // directions
    total = 0
    for direction in range(directions):
        first = _rows_without_predecessor(input, batch_sizes, lengths, batch_first, direction == 1)
        needs_weights = needs[3 + direction * each : 3 + (direction + 1) * each]
        # The step that a direction begins with hands nothing on unless the initial state asks.
        handed_on = sizes if needs[1] else sizes._replace(rows=rows - first)
        total += handed_on.recurrent_product() + sizes.projection()
        total += sizes.input_product() * (needs[0] + needs_weights[0])
        total += sizes.recurrent_product() * needs_weights[1]
        total += sizes.projection() * needs_weights[-1]
    return total


# --- users' cells


def _products(weights: Sequence[Tensor], rows: int) -> list[int]:
    """Operations of a direction's products with each of its weights; 0 for what is no matrix."""
    return [2 * rows * math.prod(w.shape) if w.dim() == 2 else 0 for w in weights]


@register_flop_formula(torch.ops.fastseq.cell_forward, get_raw=True)
def _cell_forward_flops(
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    recurrent_dropout: bool,
    zoneout: bool,
    has_biases: bool,
    bidirectional: bool,
    *_: Any,
    out_val: Any = None,
    **__: Any,
) -> int:
    rows = _rows(input, batch_sizes, lengths)
    return sum(_products(weights, rows))


@register_flop_formula(torch.ops.fastseq.cell_backward, get_raw=True)
def _cell_backward_flops(
    grad_output: Tensor | None,
    grad_final: Sequence[Tensor | None],
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Tensor | None,
    reserve: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    recurrent_dropout: bool,
    zoneout: bool,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    needs: Sequence[bool],
    *_: Any,
    out_val: Any = None,
    **__: Any,
) -> int:
    """What the kernels do: the way back through time, and each gradient that is asked for."""
    rows = _rows(input, batch_sizes, lengths)
    products = _products(weights, rows)
    total = sum(
        size for size, needed in zip(products, needs[1 + len(states) :], strict=True) if needed
    )
    directions = 2 if bidirectional else 1
    for first in range(0, len(weights), len(weights) // directions):
        of_direction = products[first : first + len(weights) // directions]
        if find(cell).plan.input_gates and not needs[0]:
            of_direction = of_direction[1:]
        total += sum(of_direction)
    return total


# --- attention


def _pairs(query: Tensor, key: Tensor, terms: Terms) -> int:
    """(query, key) pairs of one head; as for torch's own op, masks do not lessen them."""
    if query.dim() == 4:
        keys = key.shape[2]
        if terms.block_table is not None:
            keys *= terms.block_table.shape[1]
        return query.shape[0] * query.shape[2] * keys
    assert terms.query_starts is not None
    assert terms.key_starts is not None
    if _is_known(terms.query_starts):
        pairs = int((terms.query_starts.diff() * terms.key_starts.diff()).sum())
    else:  # values are unknown: as if all sequences were equally long
        pairs = query.shape[0] * key.shape[0] // max(terms.query_starts.shape[0] - 1, 1)
    return pairs


def _attention_sizes(
    query: Tensor, key: Tensor, value: Tensor, rest: Sequence[Any]
) -> AttentionSizes:
    # Either layout has heads second. Rows matter to the traffic only.
    pairs = _pairs(query, key, Terms(*rest[:_TERMS]))
    return AttentionSizes(query.shape[1], 0, 0, 0, key.shape[-1], value.shape[-1], pairs)


@register_flop_formula(torch.ops.fastseq.attention_forward, get_raw=True)
def _attention_forward_flops(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any = None, **_: Any
) -> int:
    return _attention_sizes(query, key, value, rest).forward_flops()


@register_flop_formula(torch.ops.fastseq.attention_backward, get_raw=True)
def _attention_backward_flops(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
    out_val: Any = None,
    **_: Any,
) -> int:
    # As torch counts, whichever gradients are asked for.
    return _attention_sizes(query, key, value, rest).backward_flops()


# --- linear


@register_flop_formula(torch.ops.fastseq.linear_forward)
def _linear_forward_flops(
    input_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, **__: Any
) -> int:
    return LinearSizes(math.prod(input_shape[:-1]), *reversed(weight_shape)).product()


@register_flop_formula(torch.ops.fastseq.linear_backward)
def _linear_backward_flops(
    grad_shape: Sequence[int],
    input_shape: Sequence[int] | None,
    weight_shape: Sequence[int] | None,
    seed: Any,
    saved: Any,
    activation: int,
    dropout_p: float,
    needs: Sequence[bool],
    **_: Any,
) -> int:
    *batch, outputs = grad_shape
    features = weight_shape[1] if weight_shape is not None else (input_shape or [0])[-1]
    return LinearSizes(math.prod(batch), features, outputs).backward_flops(*needs[:2])
