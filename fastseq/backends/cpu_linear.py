"""The linear layer: tensors to arguments of the compiled CPU kernels, or of torch's product."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq import _config, _products
from fastseq._linear import NONE, RELU
from fastseq.backends import cpu as _cpu  # connects the kernels to torch's exchange table
from fastseq.backends import reference_linear

__all__ = ["dropout_keep", "linear_backward", "linear_forward", "plain_linear"]

_kernels = _config.extension()
_forward = _kernels.linear_forward
_backward = _kernels.linear_backward
plain_linear = _kernels.plain_linear
_dense_forward = _kernels.dense_linear_forward
_dense_backward = _kernels.dense_linear_backward
_threads = torch.get_num_threads
assert _cpu is not None


def dropout_keep(seed: Tensor, probability: float, rows: int, columns: int) -> Tensor:
    """Which elements of a ``(rows, columns)`` matrix the kernels' dropout keeps, bool."""
    keep = torch.empty((rows, columns), dtype=torch.uint8)
    _kernels.element_dropout_mask(rows, columns, probability, seed, keep)
    return keep.view(torch.bool)


def _matrix(tensor: Tensor, rows: int) -> Tensor:
    """``(rows, columns)`` with a unit last stride: a view wherever there is one."""
    if tensor.dim() != 2:
        tensor = tensor.reshape(rows, tensor.shape[-1])
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def _keep_like(tensor: Tensor, seed: Tensor | None, probability: float) -> Tensor | None:
    if not probability > 0:
        return None
    assert seed is not None
    columns = tensor.shape[-1]
    keep = dropout_keep(seed, probability, math.prod(tensor.shape[:-1]), columns)
    return keep.view(tensor.shape)


def linear_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: int,
    dropout_p: float,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """The output and, with ``save``, the pre-activation ``(M, O)`` where backward needs it.

    Arguments as for :func:`fastseq.backends.reference_linear.linear`. The derivative of a ReLU is
    read off the output where there is no residual.
    """
    saves = save and activation != NONE and (activation != RELU or residual is not None)
    batch = input.shape[:-1]
    rows = math.prod(batch)
    outputs, features = weight.shape
    if _products.fused(save, input.dtype, rows, outputs, features):
        results: tuple[Tensor, Tensor | None] | None = _dense_forward(
            _threads(), input, weight, bias, residual, activation, dropout_p, seed, saves
        )
        if results is not None:
            return results
    else:
        z = torch.nn.functional.linear(input, weight, bias)
        keep = _keep_like(z, seed, dropout_p)
        output = reference_linear.activate(z, activation)
        output = reference_linear.drop(output, keep, dropout_p)
        if residual is not None:
            output.add_(residual)
        return output, z.reshape(rows, outputs) if saves else None
    output = input.new_empty((*batch, outputs))
    saved = input.new_empty((rows, outputs)) if saves else None
    _forward(
        1 if input.dtype is torch.float64 else 0,
        _threads(),
        _matrix(input, rows),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if residual is None else _matrix(residual, rows),
        output if output.dim() == 2 else output.view(rows, outputs),
        saved,
        activation,
        dropout_p,
        seed,
    )
    return output, saved


def linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    seed: Tensor | None,
    saved: Tensor | None,
    activation: int,
    dropout_p: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias; ``None`` where not asked for.

    ``saved`` is what :func:`linear_forward` returned, or a ReLU's output in its place.
    """
    *batch, outputs = grad_output.shape
    rows = math.prod(batch)
    # With neither of the two the bias is all that is asked for.
    features = input.shape[-1] if input is not None else 1 if weight is None else weight.shape[1]
    dtype = grad_output.dtype
    if _products.fused(True, dtype, rows, outputs, features):
        grads: tuple[Tensor | None, Tensor | None, Tensor | None] | None = _dense_backward(
            _threads(), grad_output, input, weight, saved, activation, dropout_p, seed, needs
        )
        if grads is not None:
            return grads
    else:
        keep = _keep_like(grad_output, seed, dropout_p)
        z = None if saved is None else saved.view(grad_output.shape)
        return reference_linear.gradients(
            grad_output, input, weight, z, keep, activation, dropout_p, needs
        )
    grad_input = grad_output.new_empty((*batch, features)) if needs[0] else None
    grad_weight = grad_output.new_empty((outputs, features)) if needs[1] else None
    grad_bias = grad_output.new_empty((outputs,)) if needs[2] else None
    _backward(
        1 if dtype is torch.float64 else 0,
        _threads(),
        _matrix(grad_output, rows),
        _matrix(input, rows) if input is not None and needs[1] else None,
        weight.contiguous() if weight is not None and needs[0] else None,
        None if saved is None else saved.view(rows, outputs),
        activation,
        dropout_p,
        seed,
        None if grad_input is None else grad_input.view(rows, features),
        grad_weight,
        grad_bias,
    )
    return grad_input, grad_weight, grad_bias
