"""The linear layer written out with differentiable torch operators.

The readable definition of what the kernels must compute: any dtype and device, autocast,
``torch.func`` transforms, double backward. GELU is that of https://arxiv.org/abs/1606.08415, exact
or by its tanh approximation, SiLU that of https://arxiv.org/abs/1702.03118.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq._linear import GELU, GELU_TANH, NONE, RELU, SILU
from fastseq.backends.reference_dropout import element_keep

__all__ = ["activate", "activation_gradient", "drop", "dropout_keep", "gradients", "linear"]

_ACTIVATIONS: dict[int, Callable[[Tensor], Tensor]] = {
    NONE: lambda z: z,
    RELU: F.relu,
    GELU: F.gelu,
    GELU_TANH: lambda z: F.gelu(z, approximate="tanh"),
    SILU: F.silu,
}


def _silu_gradient(grad: Tensor, z: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(grad, z)
    # torch's operator has no derivative of its own.
    sigmoid = torch.sigmoid(z)
    return grad * sigmoid * (1 + z * (1 - sigmoid))


_GRADIENTS: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    NONE: lambda grad, z: grad,
    RELU: lambda grad, z: torch.ops.aten.threshold_backward(grad, z, 0),
    GELU: lambda grad, z: torch.ops.aten.gelu_backward(grad, z),
    GELU_TANH: lambda grad, z: torch.ops.aten.gelu_backward(grad, z, approximate="tanh"),
    SILU: _silu_gradient,
}


def activate(z: Tensor, activation: int) -> Tensor:
    """``act(z)``."""
    return _ACTIVATIONS[activation](z)


def activation_gradient(grad: Tensor, z: Tensor, activation: int) -> Tensor:
    """``grad * act'(z)``, itself differentiable."""
    return _GRADIENTS[activation](grad, z)


def dropout_keep(seed: Tensor | None, probability: float, like: Tensor) -> Tensor | None:
    """Which elements of ``like``, a matrix of its last dimension, are kept; ``None`` for all."""
    if not probability > 0:
        return None
    assert seed is not None
    columns = like.shape[-1]
    rows = math.prod(like.shape[:-1])
    keep = element_keep(seed.to(like.device), probability, rows, columns)
    return keep.reshape(like.shape)


def drop(tensor: Tensor, keep: Tensor | None, probability: float) -> Tensor:
    """Divide what is kept by ``1 - probability`` and multiply the rest by zero, as torch does."""
    if keep is None:
        return tensor
    scale = 1 / (1 - probability) if probability < 1 else 0.0
    return tensor * (keep.to(tensor.dtype) * scale)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: int,
    dropout_p: float,
) -> Tensor:
    """``dropout(act(input @ weight.T + bias)) + residual``.

    Args:
        input: ``(..., K)``.
        weight: ``(O, K)``.
        bias: ``(O,)`` or ``None``.
        residual: ``(..., O)`` or ``None``.
        seed: ``(2,)`` int64 key and offset of the dropout's generator; ``None`` without dropout.
        activation: one of the numbers of :mod:`fastseq._linear`.
        dropout_p: probability of zeroing an element.

    Returns:
        ``(..., O)``.
    """
    output = activate(F.linear(input, weight, bias), activation)
    output = drop(output, dropout_keep(seed, dropout_p, output), dropout_p)
    return output if residual is None else output + residual


def gradients(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    z: Tensor | None,
    keep: Tensor | None,
    activation: int,
    dropout_p: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, ``None`` where not needed; differentiable themselves.

    ``z`` is the pre-activation, shaped as ``grad_output``; ``keep`` what dropout kept. ``input`` is
    read for the weight's gradient only, ``weight`` for the input's.
    """
    grad = drop(grad_output, keep, dropout_p)
    if activation != NONE:
        assert z is not None
        grad = activation_gradient(grad, z, activation)
    grad_input = grad_weight = grad_bias = None
    if needs[0]:
        assert weight is not None
        grad_input = grad @ weight
    if needs[1] or needs[2]:
        rows = math.prod(grad.shape[:-1])
        grad = grad.reshape(rows, grad.shape[-1])
        if needs[1]:
            assert input is not None
            grad_weight = grad.t() @ input.reshape(rows, input.shape[-1])
        if needs[2]:
            grad_bias = grad.sum(0)
    return grad_input, grad_weight, grad_bias
