"""Norms: tensors to arguments of the compiled CPU kernels. No maths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq import _config
from fastseq._norm import NormOptions
from fastseq.backends import cpu as _cpu  # connects the kernels to torch's exchange table

__all__ = ["norm_backward", "norm_forward", "plain_norm", "statistics_per_row"]

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

_kernels = _config.extension()
_forward = _kernels.norm_forward
_backward = _kernels.norm_backward
plain_norm = _kernels.plain_norm
_dense_forward = _kernels.dense_norm_forward
_dense_backward = _kernels.dense_norm_backward
_threads = torch.get_num_threads
assert _cpu is not None


def statistics_per_row(options: NormOptions) -> int:
    """How many numbers forward keeps of a row: see ``fastseq_norm_statistics``."""
    return 1 if options.rms else 3


def _matrix(tensor: Tensor | None, features: int) -> Any:
    """A view ``(M, features)`` with unit stride along the rows, of a copy if it must be."""
    if tensor is None:
        return None
    try:
        matrix = tensor.view(-1, features)
    except RuntimeError:
        return tensor.contiguous().view(-1, features)
    return matrix if features == 1 or matrix.stride(1) == 1 else matrix.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def norm_forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    options: NormOptions,
    save: bool,
    want_sum: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The norm, the sum that was normalized, with ``save`` each row's statistics.

    The sum is there if it is wanted or saved and differs from ``input``. Arguments as for
    :func:`fastseq.backends.reference_norm.norm`.
    """
    dims, rms, eps, dropout_p = options
    results = _dense_forward(
        _threads(), input, residual, weight, bias, dims, eps, rms, dropout_p, seed, want_sum, save
    )
    if results is not None:
        return results
    features = options.features(input)
    rows = input.numel() // features if features else 0
    output = input.new_empty(input.shape)
    adds = residual is not None or options.dropout_p > 0
    total = input.new_empty(input.shape) if adds and (save or want_sum) else None
    statistics = input.new_empty((statistics_per_row(options), rows)) if save else None
    if rows:
        _forward(
            1 if input.dtype is torch.float64 else 0,
            _threads(),
            options.rms,
            options.eps,
            options.dropout_p,
            seed,
            _matrix(input, features),
            _matrix(residual, features),
            _contiguous(weight),
            _contiguous(bias),
            output.view(-1, features),
            None if total is None else total.view(-1, features),
            statistics,
        )
    return output, total, statistics


def norm_backward(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    statistics: Tensor,
    options: NormOptions,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of the sum ``x``, of the input behind the dropout, of weight and bias.

    ``None`` where ``needs`` does not ask for them. Without dropout that of the input is that of
    the sum, and must not be asked for.
    """
    results = _dense_backward(
        _threads(),
        grad_output,
        grad_sum,
        x,
        weight,
        seed,
        statistics,
        options.dims,
        options.rms,
        options.dropout_p,
        needs,
    )
    if results is not None:
        return results
    features = options.features(x)
    shape = x.shape[x.dim() - options.dims :]
    grad_x = x.new_empty(x.shape) if needs[0] else None
    grad_input = x.new_empty(x.shape) if needs[1] else None
    grad_weight = x.new_empty(shape) if needs[2] else None
    grad_bias = x.new_empty(shape) if needs[3] else None
    grads = (grad_x, grad_input, grad_weight, grad_bias)
    if x.numel() == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return grads
    _backward(
        1 if x.dtype is torch.float64 else 0,
        _threads(),
        options.rms,
        options.dropout_p,
        seed,
        _matrix(grad_output, features),
        _matrix(grad_sum, features),
        _matrix(x, features),
        _contiguous(weight),
        statistics,
        None if grad_x is None else grad_x.view(-1, features),
        None if grad_input is None else grad_input.view(-1, features),
        grad_weight,
        grad_bias,
    )
    return grads
