"""Weights as the kernels read them: by slot instead of by gate, padded to whole tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq.backends.numba.vectors import lanes

__all__ = [
    "as_columns",
    "by_gate",
    "by_slot",
    "packed_transpose",
    "packed_weights",
    "padded_masks",
    "padded_units",
]


def padded_units(hidden_size: int, item_bytes: int) -> int:
    """Units of a column in memory: whole tiles of two vectors. Sizes may be symbolic."""
    columns = 2 * lanes(item_bytes)
    return (hidden_size + columns - 1) // columns * columns


def _slot_order(gates: Sequence[int]) -> list[int]:
    """Where the row block of each slot lies in a weight, whose blocks are in order of gates."""
    blocks = sorted(gates)
    return [blocks.index(gate) for gate in gates]


def by_slot(weight: Tensor, gates: Sequence[int], hidden: int, units: int) -> Tensor:
    """``(G*H, ...)`` with row blocks in slot order, each padded with zeros to ``units``."""
    blocks = weight.view(len(gates), hidden, *weight.shape[1:])
    order = _slot_order(gates)
    ordered = order == list(range(len(order)))
    if units == hidden:
        return weight if ordered else blocks[order].flatten(0, 1)
    padded = weight.new_zeros((len(gates), units, *weight.shape[1:]))
    padded[:, :hidden] = blocks if ordered else blocks[order]
    return padded.flatten(0, 1)


def by_gate(gradient: Tensor, gates: Sequence[int], hidden: int, units: int) -> Tensor:
    """The inverse of :func:`by_slot`: ``(slots*units, ...)`` to ``(G*H, ...)``, dense."""
    blocks = gradient.view(len(gates), units, *gradient.shape[1:])[:, :hidden]
    order = _slot_order(gates)
    if order != list(range(len(order))):
        blocks = blocks[[order.index(block) for block in range(len(order))]]
    return blocks.reshape(len(gates) * hidden, *gradient.shape[1:])


def packed_weights(weight: Tensor, gates: Sequence[int], hidden: int, units: int) -> Tensor:
    """``(G*hidden, terms)`` as panels ``[panel][term][column]`` for ``x @ W^T``."""
    blocks = by_slot(weight.contiguous(), gates, hidden, units)
    columns = 2 * lanes(weight.element_size())
    return blocks.view(-1, columns, weight.size(1)).transpose(1, 2).contiguous()


def packed_transpose(weight: Tensor, gates: Sequence[int], hidden: int, units: int) -> Tensor:
    """``(G*hidden, K)`` as ``[slot][panel][term][column]`` for the sum over slots of ``g @ W``.

    ``units`` is what K is padded to.
    """
    count, width = len(gates), weight.size(1)
    blocks = weight.contiguous().view(count, hidden, width)[_slot_order(gates)]
    if units != width:
        blocks = torch.nn.functional.pad(blocks, (0, units - width))
    columns = 2 * lanes(weight.element_size())
    panels = blocks.view(count, hidden, units // columns, columns)
    return panels.transpose(1, 2).contiguous()


def as_columns(tensors: Sequence[Tensor], units: int, like: Tensor) -> Tensor:
    """Vectors ``(H)`` as rows ``(count, units)``, padded with zeros."""
    result = like.new_zeros((len(tensors), units))
    for row, tensor in zip(result, tensors, strict=True):
        row[: tensor.size(0)] = tensor
    return result


def padded_masks(masks: Tensor, units: int) -> Tensor:
    """Masks ``(D, T or 1, B or 1, masks, H)`` with columns of ``units``."""
    if masks.size(-1) == units:
        return masks.contiguous()
    return torch.nn.functional.pad(masks, (0, units - masks.size(-1)))
