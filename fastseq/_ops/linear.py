"""The ops ``fastseq::linear_forward`` and ``fastseq::linear_backward``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq import _config, _products
from fastseq._linear import NONE, RELU
from fastseq._ops.shared import (
    are_plain,
    has_lazy_negation,
    is_observed,
    is_traced,
    is_watched,
    lacks_kernels,
    library,
    needs_differentiable_gradient,
    needs_gradient,
    or_empty,
    runs_directly,
    wants_composite,
)
from fastseq.backends import FUSED_DTYPES, reference_linear

__all__ = ["linear", "plain_linear"]

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

library.define(
    "linear_forward(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor? seed, "
    "int activation, float dropout_p, bool save) -> (Tensor output, Tensor saved)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
library.define(
    "linear_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor? seed, "
    "Tensor? saved, int activation, float dropout_p, bool[] needs) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)

_backend: Any = None
_is_compiling = torch.compiler.is_compiling
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_get_tracing_state = torch._C._get_tracing_state


def _cpu() -> Any:
    global _backend
    if _backend is None:
        from fastseq.backends import cpu_linear

        _backend = cpu_linear
    return _backend


# --- kernels


@torch.library.impl(library, "linear_forward", "CPU")
def _linear_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: int,
    dropout_p: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    output, z = _cpu().linear_forward(
        input, weight, bias, residual, seed, activation, dropout_p, save
    )
    return output, or_empty(z, input)


@torch.library.impl(library, "linear_backward", "CPU")
def _linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    seed: Tensor | None,
    saved: Tensor | None,
    activation: int,
    dropout_p: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    grads = _cpu().linear_backward(
        grad_output, input, weight, seed, saved, activation, dropout_p, needs
    )
    return tuple(or_empty(grad, grad_output) for grad in grads)


# --- fake kernels: shapes without values


@torch.library.register_fake("fastseq::linear_forward", lib=library)  # type: ignore[untyped-decorator]
def _linear_forward_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: int,
    dropout_p: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    outputs = weight.shape[0]
    keeps = save and keeps_preactivation(activation, residual is not None)
    saved_shape = (math.prod(input.shape[:-1]), outputs) if keeps else (0,)
    return input.new_empty((*input.shape[:-1], outputs)), input.new_empty(saved_shape)


@torch.library.register_fake("fastseq::linear_backward", lib=library)  # type: ignore[untyped-decorator]
def _linear_backward_fake(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    seed: Tensor | None,
    saved: Tensor | None,
    activation: int,
    dropout_p: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    *batch, outputs = grad_output.shape
    shapes: list[tuple[int, ...]] = [(0,), (0,), (0,)]
    if needs[0]:
        assert weight is not None
        shapes[0] = (*batch, weight.shape[1])
    if needs[1]:
        assert input is not None
        shapes[1] = (outputs, input.shape[-1])
    if needs[2]:
        shapes[2] = (outputs,)
    return tuple(grad_output.new_empty(shape) for shape in shapes)


# --- what forward keeps for backward


def keeps_preactivation(activation: int, has_residual: bool) -> bool:
    """Whether backward needs a tensor of its own for the activation's derivative.

    A ReLU's derivative can be read off the output, which the next layer keeps anyway, unless
    something was added to it: the gradient at a dropped element, 0 there, is 0 in any case.
    """
    return activation != NONE and (activation != RELU or has_residual)


def _keep(ctx: Any, arguments: tuple[Any, ...], output: Tensor, z: Tensor | None) -> None:
    """Save on ``ctx`` what the gradients asked for take; ``arguments`` are those of the call.

    With an activation, double backward computes the pre-activation again, from all that it comes
    from.
    """
    input, weight, bias, residual, seed, activation, dropout_p = arguments
    needs = ctx.needs_input_grad[:3]
    ctx.activation, ctx.dropout_p = activation, dropout_p
    if not any(needs):  # the residual alone
        ctx.save_for_backward(None, None, None, None, None)
        return
    active = activation != NONE
    if active and not keeps_preactivation(activation, residual is not None):
        z = output
    ctx.save_for_backward(
        input if needs[1] or active else None,
        weight if needs[0] or active else None,
        bias if active else None,
        seed,
        z if active else None,
    )


def _backward(ctx: Any, grad_output: Tensor, differentiable: bool, backward: Any) -> Gradients:
    needs = ctx.needs_input_grad[:3]
    if not any(needs):
        return None, None, None
    input, weight, bias, seed, z = ctx.saved_tensors
    activation, dropout_p = ctx.activation, ctx.dropout_p
    if differentiable:
        if activation != NONE:
            z = torch.nn.functional.linear(input, weight, bias)
        keep = reference_linear.dropout_keep(seed, dropout_p, grad_output)
        return reference_linear.gradients(
            grad_output, input, weight, z, keep, activation, dropout_p, needs
        )
    found = backward(grad_output, input, weight, seed, z, activation, dropout_p, needs)
    return tuple(grad if need else None for grad, need in zip(found, needs, strict=True))  # type: ignore[return-value]


# --- autograd of the op


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _keep(ctx, inputs[:-1], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _op_backward(
    ctx: Any, grad_output: Tensor | None, _grad_saved: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 8
    differentiable = needs_differentiable_gradient(grad_output)
    grads = _backward(ctx, grad_output, differentiable, torch.ops.fastseq.linear_backward)
    grad_residual = grad_output if ctx.needs_input_grad[3] else None
    return *grads, grad_residual, None, None, None, None


torch.library.register_autograd(
    "fastseq::linear_forward", _op_backward, setup_context=_setup_context, lib=library
)


class _Linear(torch.autograd.Function):
    """The same formula for plain tensors, without the dispatcher in between."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        seed: Tensor | None,
        activation: int,
        dropout_p: float,
    ) -> Tensor:
        arguments = (input, weight, bias, residual, seed, activation, dropout_p)
        output, z = _cpu().linear_forward(*arguments, any(ctx.needs_input_grad[:3]))
        _keep(ctx, arguments, output, z)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        watched = is_watched() or has_lazy_negation(grad_output)
        backward = torch.ops.fastseq.linear_backward if watched else _cpu().linear_backward
        grads = _backward(ctx, grad_output, needs_differentiable_gradient(grad_output), backward)
        grad_residual = grad_output if ctx.needs_input_grad[3] else None
        return *grads, grad_residual, None, None, None


# --- entry points


def plain_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: int, residual: Tensor | None
) -> Tensor | None:
    """The most common call, checked and, in inference, run by the kernels' side in one go.

    No dropout, nobody watching, a residual in the output's shape. ``None`` whenever the call is
    not as plain as that or its arguments do not fit.
    """
    if _is_compiling() or _config._backend != "cpu" or is_observed():
        return None
    if not _config.fused_everywhere and not _is_fused(input, weight, bias, residual):
        return _torchs_linear(input, weight, bias, activation, residual)
    result: Any = _cpu().plain_linear(input, weight, bias, activation, residual)
    if result is False:  # for the gradients alone
        result = _Linear.apply(input, weight, bias, residual, None, activation, 0.0)
    return result


def _is_fused(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Whether the kernels' product is to run on these tensors, should they fit together."""
    if (
        input is None
        or weight is None
        or not are_plain(input, weight, bias, residual)
        or input.is_nested
        or input.layout is not torch.strided
        or input.dim() == 0
        or weight.dim() != 2
    ):
        return True  # for others to judge
    recorded = needs_gradient((input, weight, bias, residual))
    return _products.fused(recorded, input.dtype, math.prod(input.shape[:-1]), *weight.shape)


def _torchs_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: int, residual: Tensor | None
) -> Tensor | None:
    """Torch's own layer, gradients and all: nothing stands between the caller and torch.

    ``None`` for anything that the general way has to look at.
    """
    outputs, features = weight.shape
    if (
        activation != NONE
        or input.shape[-1] != features
        or (bias is not None and bias.shape != (outputs,))
        or (residual is not None and residual.shape != (*input.shape[:-1], outputs))
        or input.dtype not in FUSED_DTYPES
    ):
        return None
    for tensor in (input, weight, bias, residual):
        if tensor is not None and (tensor.dtype is not input.dtype or not tensor.is_cpu):
            return None
    output = torch.nn.functional.linear(input, weight, bias)
    return output if residual is None else output + residual


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: int,
    dropout_p: float,
) -> Tensor:
    """The layer, differentiable. Arguments have been checked by the caller.

    Args and returns: see :func:`fastseq.backends.reference_linear.linear`; ``residual`` has the
    shape of the output.
    """
    arguments = (input, weight, bias, residual, seed, activation, dropout_p)
    if not is_traced():
        # Other types (weights quantized by a wrapper, say) know torch's operators, not ours.
        if wants_composite() or not are_plain(input, weight, bias, residual):
            return reference_linear.linear(*arguments)
        if runs_directly(input, weight, bias, residual):
            if needs_gradient((input, weight, bias, residual)):
                return _Linear.apply(*arguments)
            output: Tensor = _cpu().linear_forward(*arguments, False)[0]
            return output
    elif lacks_kernels() or (not torch.compiler.is_compiling() and wants_composite()):
        return reference_linear.linear(*arguments)
    save = needs_gradient((input, weight, bias))
    watched: Tensor = torch.ops.fastseq.linear_forward(*arguments, save)[0]
    return watched
