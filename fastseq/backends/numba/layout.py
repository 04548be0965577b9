"""Where the rows of a call lie: memory of torch's tensors as the drivers walk through it.

A row is one sequence at one step. Input, records and gradients share the input's order of rows,
whichever it is; the output has its own. Padded batches with lengths are gathered into packed ones:
nothing is computed for padding, at the price of a copy of the input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Ragged", "Rows", "as_rows", "ragged", "rows_of_output"]


class Rows(NamedTuple):
    """Row numbers: ``starts[t] + b * stride`` is that of sequence b at step t.

    Attributes:
        starts: int64 ``(T,)``; ``None`` for ``t * step``.
        step: rows from one step to the next.
        stride: rows from one sequence to the next.
    """

    starts: Tensor | None
    step: int
    stride: int


class Ragged(NamedTuple):
    """A padded batch with lengths, as a packed one.

    Attributes:
        order: int64 ``(B,)``, sequences from the longest to the shortest.
        batch_sizes: int64 ``(T,)``, how many take part in each step.
        places: int64 ``(rows,)``, which row of the flattened padded batch each packed one is.
    """

    order: Tensor
    batch_sizes: Tensor
    places: Tensor


def as_rows(input: Tensor, batch_first: bool) -> tuple[Tensor, Rows]:
    """A padded ``input`` (T, B, I) or (B, T, I) as a matrix of rows, copied only if it must be."""
    first, second, features = input.shape
    steps = second if batch_first else first
    outer, inner, unit = input.stride()
    dense = (unit == 1 or features == 1) and min(outer, inner) >= features
    if dense and (inner * second == outer or first == 1):
        rows, time_inner = input.as_strided((first * second, features), (inner, 1)), batch_first
    elif dense and (outer * first == inner or second == 1):
        rows, time_inner = input.as_strided((first * second, features), (outer, 1)), not batch_first
    else:
        rows, time_inner = input.reshape(first * second, features).contiguous(), batch_first
    batch = first if batch_first else second
    return rows, _rectangle(steps, batch, time_inner)


def rows_of_output(steps: int, batch: int, batch_first: bool) -> Rows:
    """Rows of a dense output (T, B, ·) or (B, T, ·)."""
    return _rectangle(steps, batch, batch_first)


def _rectangle(steps: int, batch: int, time_inner: bool) -> Rows:
    return Rows(None, 1, steps) if time_inner else Rows(None, batch, 1)


def packed_rows(batch_sizes: Tensor) -> Rows:
    """Rows of a packed sequence's data."""
    return Rows(batch_sizes.cumsum(0) - batch_sizes, 0, 1)


def ragged(lengths: Tensor, steps: int, batch_first: bool) -> Ragged:
    """How a padded batch whose sequences have ``lengths`` is packed."""
    order = torch.argsort(lengths, descending=True, stable=True)
    ended = torch.bincount(lengths, minlength=steps + 1).cumsum(0)  # sequences of length <= t
    batch_sizes = lengths.numel() - ended[:steps]
    inside = torch.arange(lengths.numel()) < batch_sizes.unsqueeze(1)  # (T, B), longest first
    step, place = inside.nonzero(as_tuple=True)
    sequence = order[place]
    index = sequence * steps + step if batch_first else step * lengths.numel() + sequence
    return Ragged(order, batch_sizes, index)
