"""Layer norm and RMS norm as functions, alone and behind ``residual + dropout(input)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq import _ops
from fastseq._checks import norm as _checks
from fastseq._checks.scalars import number
from fastseq._dropout import draw_seed
from fastseq._norm import NormOptions
from fastseq.backends import FUSED_DTYPES, fallback_reason, reference_norm, warn_fallback

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]

_NESTED = "nested tensors have no fused norm"


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` over the last dimensions.

    The formula of https://arxiv.org/abs/1607.06450, the variance being the biased one; signature
    and results of :func:`torch.nn.functional.layer_norm`.

    Args:
        input: ``(..., *normalized_shape)``. The fused CPU kernels take float32 and float64; other
            dtypes and devices are answered by torch operators. Rows may lie any distance apart;
            within a row elements lie side by side, or there is a copy.
        normalized_shape: sizes of the dimensions that are normalized together, the last ones.
        weight: ``normalized_shape``, or ``None`` for ones.
        bias: ``normalized_shape``, or ``None`` for zeros.
        eps: added to the variance.

    Returns:
        A dense tensor shaped as ``input``.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together.
        TypeError: an argument has the wrong type.
        NotImplementedError: ``input`` is not floating point.
    """
    result = _ops.plain_norm(input, None, normalized_shape, weight, bias, eps, False, False)
    if result is not None:
        return result
    _checks.tensor("input", input)
    if input.is_nested:
        warn_fallback(_NESTED)
        return torch.layer_norm(input, normalized_shape, weight, bias, eps, False)
    options = _layer_options(input, normalized_shape, weight, bias, eps, 0.0)
    return _run(input, None, weight, bias, options, False)[0]


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimensions.

    The formula of https://arxiv.org/abs/1910.07467; signature and results of
    :func:`torch.nn.functional.rms_norm`.

    Args:
        input: ``(..., *normalized_shape)``, see :func:`layer_norm`.
        normalized_shape: sizes of the dimensions that are normalized together, the last ones.
        weight: ``normalized_shape``, or ``None`` for ones.
        eps: added to the mean of squares; default: the machine epsilon of the arithmetic's dtype.

    Returns:
        A dense tensor shaped as ``input``.

    Raises:
        RuntimeError: shapes or devices do not fit together.
        ValueError: ``input`` has fewer dimensions than ``normalized_shape``.
        TypeError: an argument has the wrong type.
        NotImplementedError: ``input`` is not floating point.
    """
    result = _ops.plain_norm(input, None, normalized_shape, weight, None, eps, True, False)
    if result is not None:
        return result
    _checks.tensor("input", input)
    if input.is_nested:
        warn_fallback(_NESTED)
        return torch.rms_norm(input, normalized_shape, weight, eps)
    options = _rms_options(input, normalized_shape, weight, eps, 0.0)
    return _run(input, None, weight, None, options, False)[0]


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    return_sum: bool = False,
) -> Any:
    """:func:`layer_norm` of ``sum = residual + dropout(input)``, in one pass over memory.

    Args:
        input: ``(..., *normalized_shape)``.
        residual: broadcastable to the shape of ``input``.
        normalized_shape: sizes of the dimensions that are normalized together, the last ones.
        weight: ``normalized_shape``, or ``None`` for ones.
        bias: ``normalized_shape``, or ``None`` for zeros.
        eps: added to the variance.
        dropout_p: probability of zeroing an element of ``input``, the others being divided by
            ``1 - dropout_p``. Applied whenever it is positive. The seed comes from torch's default
            generator; a mask is a function of the seed, independent of threads.
        return_sum: also return the sum.

    Returns:
        The norm, or ``(norm, sum)``; dense tensors shaped as ``input``.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together.
        ValueError: ``dropout_p`` is no probability.
        TypeError: an argument has the wrong type.
        NotImplementedError: ``input`` is not floating point.
    """
    if dropout_p == 0:
        result = _ops.plain_norm(
            input, residual, normalized_shape, weight, bias, eps, False, return_sum
        )
        if result is not None:
            return result
    _checks.tensor("input", input)
    options = _layer_options(input, normalized_shape, weight, bias, eps, dropout_p)
    residual = _checks.residual(residual, input)
    results = _run(input, residual, weight, bias, options, return_sum)
    return results if return_sum else results[0]


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    return_sum: bool = False,
) -> Any:
    """:func:`rms_norm` of ``sum = residual + dropout(input)``, in one pass over memory.

    Args:
        input: ``(..., *normalized_shape)``.
        residual: broadcastable to the shape of ``input``.
        normalized_shape: sizes of the dimensions that are normalized together, the last ones.
        weight: ``normalized_shape``, or ``None`` for ones.
        eps: added to the mean of squares; default: the machine epsilon of the arithmetic's dtype.
        dropout_p: see :func:`add_layer_norm`.
        return_sum: also return the sum.

    Returns:
        The norm, or ``(norm, sum)``; dense tensors shaped as ``input``.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together.
        ValueError: ``dropout_p`` is no probability, or ``input`` has fewer dimensions than
            ``normalized_shape``.
        TypeError: an argument has the wrong type.
        NotImplementedError: ``input`` is not floating point.
    """
    if dropout_p == 0:
        result = _ops.plain_norm(
            input, residual, normalized_shape, weight, None, eps, True, return_sum
        )
        if result is not None:
            return result
    _checks.tensor("input", input)
    options = _rms_options(input, normalized_shape, weight, eps, dropout_p)
    residual = _checks.residual(residual, input)
    results = _run(input, residual, weight, None, options, return_sum)
    return results if return_sum else results[0]


def _layer_options(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
) -> NormOptions:
    dims = _checks.normalized_shape(normalized_shape, input, RuntimeError)
    # torch mixes half-precision inputs with float32 weights, and nothing else.
    same_dtype = input.dtype in FUSED_DTYPES or not input.is_floating_point()
    _checks.affine("weight", weight, input, dims, same_dtype)
    _checks.affine("bias", bias, input, dims, same_dtype)
    _checks.floating(input)
    return NormOptions(dims, False, number("eps", eps), _checks.probability(dropout_p))


def _rms_options(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    dropout_p: float,
) -> NormOptions:
    _checks.floating(input)
    dims = _checks.normalized_shape(normalized_shape, input, ValueError)
    _checks.affine("weight", weight, input, dims, same_dtype=False)
    if eps is None:
        wide = torch.float64 if input.dtype is torch.float64 else torch.float32
        eps = torch.finfo(wide).eps
    return NormOptions(dims, True, number("eps", eps), _checks.probability(dropout_p))


def _fallback_reason(input: Tensor, weight: Tensor | None) -> str | None:
    if weight is not None and weight.dtype is not input.dtype and input.dtype in FUSED_DTYPES:
        return f"a weight of {weight.dtype} for an input of {input.dtype} has no fused norm"
    return fallback_reason(input)


def _run(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    options: NormOptions,
    want_sum: bool,
) -> tuple[Tensor, Tensor]:
    """The kernels where they apply, torch operators elsewhere. The sum is there if wanted."""
    seed = draw_seed(options.dropout_p)
    reason = _fallback_reason(input, weight)
    if reason is None and options.features(input):
        return _ops.norm(input, residual, weight, bias, seed, options, want_sum)
    if reason is not None:
        warn_fallback(reason)
    return reference_norm.norm(input, residual, weight, bias, seed, options)
