"""Layer norm and RMS norm written out with differentiable torch operators.

The readable definition of what the kernels must compute: any dtype and device, autocast,
``torch.func`` transforms, double backward.

Formulas: layer normalization https://arxiv.org/abs/1607.06450, root mean square normalization
https://arxiv.org/abs/1910.07467.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq._norm import NormOptions
from fastseq.backends.reference_dropout import element_dropout

__all__ = ["add", "norm", "normalize"]


def add(
    input: Tensor, residual: Tensor | None, seed: Tensor | None, options: NormOptions
) -> Tensor:
    """``residual + dropout(input)``."""
    features = options.features(input)
    total = element_dropout(input, seed, options.dropout_p, features)
    return total if residual is None else residual + total


def normalize(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, options: NormOptions
) -> Tensor:
    """The norm over the last ``options.dims`` dimensions."""
    shape = input.shape[input.dim() - options.dims :]
    if not options.rms:
        return torch.layer_norm(input, shape, weight, bias, options.eps, False)
    # Half precision has not the digits for a mean of squares.
    half = input.dtype in (torch.bfloat16, torch.float16)
    wide = input.float() if half else input
    dims = list(range(-options.dims, 0))
    normal = wide * torch.rsqrt(wide.square().mean(dims, keepdim=True) + options.eps)
    return (normal if weight is None else normal * weight).to(input.dtype)


def norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    options: NormOptions,
) -> tuple[Tensor, Tensor]:
    """``norm(sum)`` and ``sum = residual + dropout(input)``.

    Args:
        input: ``(..., *normalized_shape)``.
        residual: shaped as ``input``, or ``None`` for none.
        weight: ``normalized_shape``, or ``None`` for ones.
        bias: ``normalized_shape``, or ``None`` for zeros.
        seed: ``(2,)`` int64 key and offset of the dropout's generator; needed with dropout.
        options: everything else.
    """
    total = add(input, residual, seed, options)
    return normalize(total, weight, bias, options), total
