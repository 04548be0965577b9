"""Sinusoidal positional encoding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["PositionalEncoding"]


class PositionalEncoding(nn.Module):
    """Adds sines and cosines of the position to the features, then drops some.

    Features ``2 i`` and ``2 i + 1`` of position ``p`` get ``sin(p / 10000 ** (2 i / d_model))`` and
    the cosine of the same (Vaswani et al., "Attention Is All You Need", section 3.5,
    https://arxiv.org/abs/1706.03762). There are no parameters and nothing in ``state_dict``.

    Args:
        d_model: features.
        dropout: probability of dropping an element of the sum while training.
        max_len: positions that the table holds.
        batch_first: input is ``(B, S, d_model)``, otherwise ``(S, B, d_model)``.

    Raises:
        ValueError: ``d_model`` or ``max_len`` is not positive, or ``dropout`` is no probability.
    """

    table: Tensor

    def __init__(
        self, d_model: int, dropout: float = 0.1, max_len: int = 5000, batch_first: bool = False
    ) -> None:
        super().__init__()
        if d_model <= 0 or max_len <= 0:
            raise ValueError(
                f"d_model and max_len must be positive, got d_model={d_model} and max_len={max_len}"
            )
        self.d_model = d_model
        self.max_len = max_len
        self.batch_first = batch_first
        self.dropout = nn.Dropout(dropout)
        # In float64, rounded once: in float32 the angles of far positions would be off.
        positions = torch.arange(max_len, dtype=torch.float64).unsqueeze(1)
        pairs = torch.arange(0, d_model, 2, dtype=torch.float64)
        angles = positions * torch.exp(pairs * (-math.log(10000.0) / d_model))
        table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :d_model]
        self.register_buffer("table", table.to(torch.get_default_dtype()), persistent=False)

    def forward(self, input: Tensor, start: int = 0) -> Tensor:
        """Encode positions ``start``, ``start + 1``, ...

        Args:
            input: ``(S, B, d_model)``, ``(B, S, d_model)`` with ``batch_first``, or
                ``(S, d_model)``.
            start: position of the first row, for a decoder that goes on after what its cache
                holds.

        Returns:
            A tensor shaped as ``input``.

        Raises:
            ValueError: ``input`` has another rank or other features, or positions reach beyond
                ``max_len``.
        """
        if input.dim() not in (2, 3) or input.size(-1) != self.d_model:
            raise ValueError(
                f"input must be 2-D or 3-D with {self.d_model} features, "
                f"got shape {tuple(input.shape)}"
            )
        steps_at = 1 if self.batch_first and input.dim() == 3 else 0
        steps = input.size(steps_at)
        if start < 0 or start + steps > self.max_len:
            raise ValueError(
                f"positions must lie between 0 and max_len={self.max_len}, "
                f"got start={start} and {steps} positions"
            )
        rows = self.table[start : start + steps].to(input.dtype)
        if input.dim() == 3 and not self.batch_first:
            rows = rows.unsqueeze(1)
        return self.dropout(input + rows)

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return f"{self.d_model}, max_len={self.max_len}, batch_first={self.batch_first}"
