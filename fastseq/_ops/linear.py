"""The ops ``fastseq::linear_forward`` and ``fastseq::linear_backward``."""

from __future__ import annotations

from torch import Tensor

from fastseq.backends import reference_linear

__all__ = ["linear", "plain_linear"]


def plain_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: int, residual: Tensor | None
) -> Tensor | None:
    """The most common inference call in one go; ``None`` where it is not as plain as that."""
    return None


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: int,
    dropout_p: float,
) -> Tensor:
    """See :func:`fastseq.backends.reference_linear.linear`."""
    return reference_linear.linear(input, weight, bias, residual, seed, activation, dropout_p)
