"""Weights as the kernels read them: by slot instead of by gate, padded to whole tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq.backends.numba.matrix_pack import pack, panel_columns
from fastseq.backends.numba.vectors import lanes

__all__ = [
    "as_columns",
    "blocks_in_order",
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


def blocks_in_order(gates: Sequence[int]) -> list[int]:
    """Where the row block of each slot lies in a weight, whose blocks are in order of gates."""
    blocks = sorted(gates)
    return [blocks.index(gate) for gate in gates]


def by_slot(weight: Tensor, gates: Sequence[int], hidden: int, units: int) -> Tensor:
    """``(G*H, ...)`` with row blocks in slot order, each padded with zeros to ``units``."""
    blocks = weight.view(len(gates), hidden, *weight.shape[1:])
    order = blocks_in_order(gates)
    ordered = order == list(range(len(order)))
    if units == hidden:
        return weight if ordered else blocks[order].flatten(0, 1)
    padded = weight.new_zeros((len(gates), units, *weight.shape[1:]))
    padded[:, :hidden] = blocks if ordered else blocks[order]
    return padded.flatten(0, 1)


def by_gate(gradient: Tensor, gates: Sequence[int], hidden: int, units: int) -> Tensor:
    """The inverse of :func:`by_slot`: ``(slots*units, ...)`` to ``(G*H, ...)``, dense."""
    blocks = gradient.view(len(gates), units, *gradient.shape[1:])[:, :hidden]
    order = blocks_in_order(gates)
    if order != list(range(len(order))):
        blocks = blocks[[order.index(block) for block in range(len(order))]]
    return blocks.reshape(len(gates) * hidden, *gradient.shape[1:])


def _block_addresses(weight: Tensor, gates: Sequence[int], hidden: int) -> list[int]:
    size = hidden * weight.size(1) * weight.element_size()
    return [weight.data_ptr() + block * size for block in blocks_in_order(gates)]


def packed_weights(weight: Tensor, gates: Sequence[int], hidden: int, units: int) -> Tensor:
    """``(G*hidden, terms)`` as panels ``[panel][term][column]`` for ``x @ W^T``."""
    weight = weight.contiguous()
    terms, columns = weight.size(1), panel_columns(weight.element_size())
    panels = units // columns
    packed = weight.new_empty((len(gates) * panels, terms, columns))
    blocks, steps = _block_addresses(weight, gates, hidden), (terms * units, terms * columns)
    pack(blocks, terms, hidden, (1, terms), packed, steps, panels)
    return packed


def packed_transpose(weight: Tensor, gates: Sequence[int], hidden: int, units: int) -> Tensor:
    """``(G*hidden, K)`` as ``[slot][panel][term][column]`` for the sum over slots of ``g @ W``.

    ``units`` is what K is padded to.
    """
    weight = weight.contiguous()
    columns = panel_columns(weight.element_size())
    panels = units // columns
    packed = weight.new_empty((len(gates), panels, hidden, columns))
    blocks, steps = _block_addresses(weight, gates, hidden), (hidden * units, hidden * columns)
    pack(blocks, hidden, weight.size(1), (weight.size(1), 1), packed, steps, panels)
    return packed


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
