"""The ops ``fastseq::norm_forward`` and ``fastseq::norm_backward``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq import _config
from fastseq._norm import NormOptions
from fastseq._ops.shared import (
    differentiable_gradients,
    has_lazy_negation,
    is_observed,
    is_traced,
    is_watched,
    lacks_kernels,
    library,
    needs_differentiable_gradient,
    needs_gradient,
    or_empty,
    overrides_dispatch,
    runs_directly,
    wants_composite,
)
from fastseq.backends import reference_norm
from fastseq.backends.reference_dropout import element_dropout

__all__ = ["norm", "plain_norm"]

_OPTIONS = "int dims, bool rms, float eps, float dropout_p"

library.define(
    "norm_forward(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, "
    f"{_OPTIONS}, bool save, bool want_sum) -> (Tensor output, Tensor sum, Tensor statistics)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
library.define(
    "norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor x, Tensor? weight, Tensor? seed, "
    f"Tensor statistics, {_OPTIONS}, bool[] needs) "
    "-> (Tensor grad_x, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)

_backend: Any = None
_is_compiling = torch.compiler.is_compiling
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_get_tracing_state = torch._C._get_tracing_state


def _cpu() -> Any:
    global _backend
    if _backend is None:
        from fastseq.backends import cpu_norm

        _backend = cpu_norm
    return _backend


def _adds(residual: Tensor | None, options: NormOptions) -> bool:
    """Whether what is normalized is another tensor than the input."""
    return residual is not None or options.dropout_p > 0


# --- kernels


@torch.library.impl(library, "norm_forward", "CPU")
def _norm_forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dims: int,
    rms: bool,
    eps: float,
    dropout_p: float,
    save: bool,
    want_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = NormOptions(dims, rms, eps, dropout_p)
    output, total, statistics = _cpu().norm_forward(
        input, residual, weight, bias, seed, options, save, want_sum
    )
    return output, or_empty(total, input), or_empty(statistics, input)


@torch.library.impl(library, "norm_backward", "CPU")
def _norm_backward(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    statistics: Tensor,
    dims: int,
    rms: bool,
    eps: float,
    dropout_p: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    options = NormOptions(dims, rms, eps, dropout_p)
    grads = _cpu().norm_backward(grad_output, grad_sum, x, weight, seed, statistics, options, needs)
    return tuple(or_empty(grad, x) for grad in grads)


# --- fake kernels: shapes without values


@torch.library.register_fake("fastseq::norm_forward", lib=library)  # type: ignore[untyped-decorator]
def _norm_forward_fake(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    dims: int,
    rms: bool,
    eps: float,
    dropout_p: float,
    save: bool,
    want_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = NormOptions(dims, rms, eps, dropout_p)
    has_sum = _adds(residual, options) and (save or want_sum)
    rows = input.numel() // options.features(input)
    return (
        input.new_empty(input.shape),
        input.new_empty(input.shape if has_sum else (0,)),
        input.new_empty((_cpu().statistics_per_row(options), rows) if save else (0,)),
    )


@torch.library.register_fake("fastseq::norm_backward", lib=library)  # type: ignore[untyped-decorator]
def _norm_backward_fake(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    statistics: Tensor,
    dims: int,
    rms: bool,
    eps: float,
    dropout_p: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    shape = x.shape[x.dim() - dims :]
    shapes = (x.shape, x.shape, shape, shape)
    return tuple(x.new_empty(s if need else (0,)) for s, need in zip(shapes, needs, strict=True))


# --- autograd


def _needed(needs: Sequence[bool], dropout_p: float) -> list[bool]:
    """What to compute for gradients of input, residual, weight and bias."""
    if dropout_p > 0:
        return [needs[1], needs[0], needs[2], needs[3]]
    return [needs[0] or needs[1], False, needs[2], needs[3]]


def _gradients(found: Sequence[Any], needs: Sequence[bool], dropout_p: float) -> tuple[Any, ...]:
    """The gradients of input, residual, weight and bias from those of :func:`_needed`."""
    grad_x, grad_input, grad_weight, grad_bias = found
    if not dropout_p > 0:
        grad_input = grad_x
    grads = (grad_input, grad_x, grad_weight, grad_bias)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _differentiable_backward(
    grad_output: Tensor | None,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    options: NormOptions,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients by way of the composite.

    What was normalized hangs in the graph itself, as input or as a result of the very call whose
    gradient this is, so that nothing else need be kept for a second derivative.
    """
    grad_x, grad_weight, grad_bias = differentiable_gradients(
        lambda x, weight, bias: (reference_norm.normalize(x, weight, bias, options), x),
        (x, weight, bias),
        (needs[0] or needs[1], needs[2], needs[3]),
        (grad_output, grad_sum),
    )
    grad_input = grad_x
    if grad_x is not None and needs[0]:
        grad_input = element_dropout(grad_x, seed, options.dropout_p, options.features(x))
    grads = (grad_input, grad_x, grad_weight, grad_bias)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, residual, weight, bias, seed, *numbers = inputs
    _, total, statistics = output
    ctx.options = NormOptions(*numbers[:4])
    adds = _adds(residual, ctx.options)
    ctx.save_for_backward(total if adds else input, weight, bias, seed, statistics)
    # A sum that nobody asked for is a tensor without elements.
    ctx.mark_non_differentiable(statistics, *(() if adds else (total,)))
    ctx.set_materialize_grads(False)


def _op_backward(
    ctx: Any, grad_output: Tensor | None, grad_sum: Tensor | None, _grad_statistics: Tensor | None
) -> tuple[Any, ...]:
    x, weight, bias, seed, statistics = ctx.saved_tensors
    options, needs = ctx.options, ctx.needs_input_grad[:4]
    if needs_differentiable_gradient(grad_output, grad_sum):
        grads = _differentiable_backward(
            grad_output, grad_sum, x, weight, bias, seed, options, needs
        )
    else:
        found = torch.ops.fastseq.norm_backward(
            torch.zeros_like(x) if grad_output is None else grad_output,
            grad_sum,
            x,
            weight,
            seed,
            statistics,
            *options,
            _needed(needs, options.dropout_p),
        )
        grads = _gradients(found, needs, options.dropout_p)
    return *grads, *(None,) * 7


torch.library.register_autograd(
    "fastseq::norm_forward", _op_backward, setup_context=_setup_context, lib=library
)


class _Norm(torch.autograd.Function):
    """The same formula for plain tensors, without the dispatcher in between."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        options: NormOptions,
    ) -> Any:
        output, total, statistics = _cpu().norm_forward(
            input, residual, weight, bias, seed, options, True, False
        )
        ctx.save_for_backward(input if total is None else total, weight, bias, seed, statistics)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return output, total

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_sum: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, seed, statistics = ctx.saved_tensors
        options, needs = ctx.options, ctx.needs_input_grad[:4]
        if needs_differentiable_gradient(grad_output, grad_sum):
            grads = _differentiable_backward(
                grad_output, grad_sum, x, weight, bias, seed, options, needs
            )
        else:
            arguments = (
                torch.zeros_like(x) if grad_output is None else grad_output,
                grad_sum,
                x,
                weight,
                seed,
                statistics,
            )
            wanted = _needed(needs, options.dropout_p)
            if is_watched() or has_lazy_negation(grad_output, grad_sum):
                found = torch.ops.fastseq.norm_backward(*arguments, *options, wanted)
            else:
                found = _cpu().norm_backward(*arguments, options, wanted)
            grads = _gradients(found, needs, options.dropout_p)
        return *grads, None, None


# --- entry points


def plain_norm(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    rms: bool,
    want_sum: bool,
) -> Any:
    """The most common call, checked and, in inference, run by the kernels' side in one go.

    No dropout, nobody watching. ``None`` whenever the call is not as plain as that
    or its arguments do not fit.
    """
    if _is_compiling() or _config._backend != "cpu" or is_observed():
        return None
    result = _cpu().plain_norm(input, residual, normalized_shape, weight, bias, eps, rms, want_sum)
    if result is not False:
        return result
    if eps is None:
        eps = torch.finfo(input.dtype).eps
    options = NormOptions(len(normalized_shape), rms, eps, 0.0)
    results = _Norm.apply(input, residual, weight, bias, None, options)
    return results if want_sum else results[0]


def norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    options: NormOptions,
    want_sum: bool,
) -> tuple[Tensor, Tensor]:
    """The norm and, if wanted, what was normalized. Arguments have been checked by the caller.

    Args and returns: see :func:`fastseq.backends.reference_norm.norm`.
    """
    differentiable = (input, residual, weight, bias)
    if overrides_dispatch(*differentiable) and not is_traced():
        return reference_norm.norm(input, residual, weight, bias, seed, options)
    if runs_directly(*differentiable):
        if wants_composite():
            return reference_norm.norm(input, residual, weight, bias, seed, options)
        if needs_gradient(differentiable):
            return _Norm.apply(input, residual, weight, bias, seed, options)
        output, total, _ = _cpu().norm_forward(
            input, residual, weight, bias, seed, options, False, want_sum
        )
        return output, total
    save = needs_gradient(differentiable)
    if lacks_kernels() or (not torch.compiler.is_compiling() and wants_composite()):
        return reference_norm.norm(input, residual, weight, bias, seed, options)
    output, total, _ = torch.ops.fastseq.norm_forward(
        input, residual, weight, bias, seed, *options, save, want_sum
    )
    return output, total
