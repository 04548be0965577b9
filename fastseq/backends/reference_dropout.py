"""Element dropout in torch's integers: what ``csrc/cpu/dropout.h`` decides, for every device.

One run of Philox4x32-10 (https://doi.org/10.1145/2063384.2063405) decides for four elements of a
row that lie eight columns apart, so that a vector of runs decides for neighbours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastseq.backends.reference_attention import philox

__all__ = ["element_dropout", "element_keep"]

_LOW_32 = 0xFFFFFFFF


def element_keep(seed: Tensor, probability: float, rows: int, columns: int) -> Tensor:
    """Which elements of a ``(rows, columns)`` matrix dropout keeps, bool.

    The generator's key is ``seed[0]``, its counter ``(8 * (column // 32) + column % 8, row's low
    half, its high half, low half of seed[1])``; the element gets word ``column % 32 // 8`` and is
    dropped when that is less than ``probability * 2^32``.
    """
    device = seed.device
    groups = (columns + 31) // 32
    row = torch.arange(rows, device=device).unsqueeze(-1)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    counter = [
        torch.arange(groups * 8, device=device).unsqueeze(0),
        row & _LOW_32,
        row >> 32,
        (seed[1] & _LOW_32) + zero,
    ]
    words = philox(seed[0] & _LOW_32, (seed[0] >> 32) & _LOW_32, counter)
    shape = (rows, groups, 8)
    drawn = torch.stack([word.expand(rows, groups * 8).reshape(shape) for word in words], dim=2)
    keep = drawn >= math.floor(probability * 2**32 + 0.5)
    return keep.reshape(rows, groups * 32)[:, :columns]


def element_dropout(input: Tensor, seed: Tensor | None, probability: float, columns: int) -> Tensor:
    """``input``, read as a matrix of ``columns``, with elements dropped and the others scaled."""
    if not probability > 0:
        return input
    assert seed is not None
    rows = input.numel() // max(columns, 1)
    keep = element_keep(seed.to(input.device), probability, rows, columns).reshape(input.shape)
    # Where everything is dropped an infinite scale would make NaN of the gradient's zeros.
    scale = 1 / (1 - probability) if probability < 1 else 1.0
    return torch.where(keep, input * scale, 0.0)
