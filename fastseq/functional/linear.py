"""The linear layer with everything that may follow it inside: argument checks, no maths."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq import _ops
from fastseq._checks import linear as _checks
from fastseq._dropout import draw_seed
from fastseq.backends import fallback_reason, reference_linear, warn_fallback

__all__ = ["linear"]


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
) -> Tensor:
    """``dropout(act(input @ weight.T + bias)) + residual`` over the last dimension.

    Args:
        input: ``(..., K)``. The fused CPU kernels take float32 and float64; other dtypes and
            devices are answered by torch operators. Rows at one distance from each other with a
            unit last stride are read in place, others are copied.
        weight: ``(O, K)``.
        bias: ``(O,)`` or ``None``.
        activation: ``None``, ``"relu"``, ``"gelu"`` (https://arxiv.org/abs/1606.08415, exact),
            ``"gelu_tanh"`` (its approximation) or ``"silu"`` (https://arxiv.org/abs/1702.03118).
        residual: added at the end; ``(..., O)`` or any shape that broadcasts to it.
        dropout_p: probability of zeroing an element of the activation's result, the others being
            divided by ``1 - dropout_p``. Applied whenever it is positive: leave it out where the
            model does not train. The seed comes from torch's default generator; a mask is a
            function of the seed, independent of threads.

    Returns:
        ``(..., O)``, contiguous.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together.
        ValueError: ``activation`` is none of the above, ``dropout_p`` no probability.
        TypeError: an argument has the wrong type.
    """
    number = _checks.activation(activation)
    if not dropout_p:
        result = _ops.plain_linear(input, weight, bias, number, residual)
        if result is not None:
            return result
    _checks.tensors(input, weight, bias, residual)
    probability = _checks.probability(dropout_p)
    reason = fallback_reason(input)
    if input.layout is not torch.strided or input.is_nested:
        reason = f"layout {'nested' if input.is_nested else input.layout} has no fused kernels"
    else:
        _checks.shapes(input, weight, bias)
        if not torch._C._is_any_autocast_enabled():
            _checks.same_kind(input, weight, bias, residual)
        if residual is not None:
            residual = _checks.residual_like(residual, (*input.shape[:-1], weight.shape[0]))
    seed = draw_seed(probability)
    if reason is None:
        return _ops.linear(input, weight, bias, residual, seed, number, probability)
    warn_fallback(reason)
    return reference_linear.linear(input, weight, bias, residual, seed, number, probability)
