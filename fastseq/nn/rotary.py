"""Rotary position embedding, in plain torch operators."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RotaryEmbedding"]


class RotaryEmbedding(torch.nn.Module):
    """Rotates pairs of features by an angle that grows with the position.

    Pair ``i`` of ``dim / 2`` turns by ``position * base ** (-2 i / dim)``; the product of a rotated
    query and a rotated key then depends on the distance of their positions only (Su et al.,
    "RoFormer: Enhanced Transformer with Rotary Position Embedding", section 3.2.2,
    https://arxiv.org/abs/2104.09864). There are no parameters and no buffers.

    Args:
        dim: rotated features, even; features after them pass through unchanged.
        base: ratio of the slowest to the fastest turn.
        interleaved: pairs are neighbours ``(2 i, 2 i + 1)``, as in the paper; default: the halves
            ``(i, i + dim / 2)``, the layout of most published weights.

    Raises:
        ValueError: ``dim`` is not even and positive, or ``base`` is not positive.
    """

    def __init__(self, dim: int, base: float = 10000.0, interleaved: bool = False) -> None:
        super().__init__()
        if dim <= 0 or dim % 2:
            raise ValueError(f"dim must be even and positive, got {dim}")
        if base <= 0:
            raise ValueError(f"base must be positive, got {base}")
        self.dim = dim
        self.base = base
        self.interleaved = interleaved

    def forward(self, input: Tensor, positions: Tensor | None = None) -> Tensor:
        """Rotate ``input``.

        Args:
            input: ``(..., S, E)`` of any floating dtype, ``E >= dim``.
            positions: ``(S,)``, or any shape that broadcasts to ``(..., S)``; integers or floats.
                Default: ``0 .. S - 1``.

        Returns:
            A tensor shaped as ``input``. Angles are computed in float32, for float64 input in
            float64.

        Raises:
            ValueError: ``input`` has fewer than 2 dimensions or fewer than ``dim`` features, or
                ``positions`` do not fit to it.
        """
        if input.dim() < 2 or input.size(-1) < self.dim:
            raise ValueError(
                f"input must be (..., S, E) with E of at least {self.dim}, "
                f"got shape {tuple(input.shape)}"
            )
        steps = input.size(-2)
        if positions is None:
            positions = torch.arange(steps, device=input.device)
        elif positions.dim() == 0 or positions.size(-1) not in (1, steps):
            raise ValueError(
                f"positions must have {steps} entries in the last dimension, one for each row of "
                f"input, got shape {tuple(positions.shape)}"
            )
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        exponents = torch.arange(0, self.dim, 2, device=input.device, dtype=dtype) / self.dim
        angles = positions.to(dtype).unsqueeze(-1) * self.base**-exponents
        cosine, sine = angles.cos().to(input.dtype), angles.sin().to(input.dtype)

        rotated, rest = input[..., : self.dim], input[..., self.dim :]
        if self.interleaved:
            first, second = rotated[..., 0::2], rotated[..., 1::2]
        else:
            first, second = rotated.chunk(2, dim=-1)
        turned = (first * cosine - second * sine, second * cosine + first * sine)
        if self.interleaved:
            result = torch.stack(turned, dim=-1).flatten(-2)
        else:
            result = torch.cat(turned, dim=-1)
        return torch.cat((result, rest), dim=-1) if rest.size(-1) else result

    def extra_repr(self) -> str:
        """The arguments, for ``repr``."""
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}"
