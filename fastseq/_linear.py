"""The linear projections of the modules: one name, so that one place decides what runs them."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear as _linear

__all__ = ["linear"]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input @ weight.T + bias`` over the last dimension.

    Args:
        input: ``(..., I)``.
        weight: ``(O, I)``.
        bias: ``(O)`` or ``None``.

    Returns:
        ``(..., O)``.

    Raises:
        RuntimeError: sizes or dtypes do not fit together.
    """
    return _linear(input, weight, bias)
