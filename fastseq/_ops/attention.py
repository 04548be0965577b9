"""The ops ``fastseq::attention_forward`` and ``fastseq::attention_backward``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq import _config
from fastseq._attention import (
    WEIGHTS_MEAN,
    WEIGHTS_NONE,
    WEIGHTS_PER_HEAD,
    Options,
    Terms,
    empty_heads,
)
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
from fastseq.backends import reference_attention

__all__ = ["attention", "plain_attention"]

Results = tuple[Tensor, Tensor | None, Tensor | None]
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]

# The tensors and options below stand in the order of Terms and Options.
_TERMS = (
    "Tensor? bias, Tensor? mask, Tensor? key_padding_mask, Tensor? query_lengths, "
    "Tensor? key_lengths, Tensor? query_starts, Tensor? key_starts, Tensor? block_table, "
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? seed"
)
_OPTIONS = (
    "int window_left, int window_right, bool bottom_right, float softcap, float dropout_p, "
    "float scale"
)
_TERM_COUNT, _OPTION_COUNT = len(Terms._fields), len(Options._fields)
# Which of the op's tensors have a gradient: query, key, value and these of Terms.
_BIAS, _SINKS = Terms._fields.index("bias"), Terms._fields.index("sinks")

library.define(
    f"attention_forward(Tensor query, Tensor key, Tensor value, {_TERMS}, {_OPTIONS}, "
    "bool save, int weights) "
    "-> (Tensor output, Tensor lse, Tensor row_maximum, Tensor row_scale, Tensor weights)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
library.define(
    "attention_backward(Tensor? grad_output, Tensor? grad_lse, Tensor query, Tensor key, "
    f"Tensor value, {_TERMS}, Tensor output, Tensor row_maximum, Tensor row_scale, {_OPTIONS}, "
    "bool[] needs) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias, "
    "Tensor grad_sinks)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)

_WITH_KERNELS = frozenset({"cpu", "numba"})
_cpu_module: Any = None
_numba_module: Any = None
_cuda_module: Any = None
_is_compiling = torch.compiler.is_compiling
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_get_tracing_state = torch._C._get_tracing_state


def _cpu() -> Any:
    global _cpu_module
    if _cpu_module is None:
        from fastseq.backends import cpu_attention as _cpu_module
    return _cpu_module


def _kernels(query: Tensor) -> Any:
    """The module that has the kernels for the tensor's device, on the CPU of the backend in use."""
    global _numba_module, _cuda_module
    if not query.is_cpu:
        if _cuda_module is None:
            from fastseq.backends import cuda_attention as _cuda_module
        return _cuda_module
    if (_config._backend or _config.backend_name()) == "numba":
        if _numba_module is None:
            from fastseq.backends.numba import attention as _numba_module
        return _numba_module
    return _cpu()


def _split_forward(rest: Sequence[Any]) -> tuple[Terms, Options, bool, int]:
    """What follows query, key and value in the arguments of ``attention_forward``."""
    terms = Terms(*rest[:_TERM_COUNT])
    options = Options(*rest[_TERM_COUNT : _TERM_COUNT + _OPTION_COUNT])
    save, weights = rest[_TERM_COUNT + _OPTION_COUNT :]
    return terms, options, save, weights


def _split_backward(
    rest: Sequence[Any],
) -> tuple[Terms, tuple[Tensor, Tensor, Tensor], Options, list[bool]]:
    """What follows query, key and value in the arguments of ``attention_backward``."""
    terms, rest = Terms(*rest[:_TERM_COUNT]), rest[_TERM_COUNT:]
    output, row_maximum, row_scale, *options, needs = rest
    return terms, (output, row_maximum, row_scale), Options(*options), needs


# --- kernels


@torch.library.impl(library, "attention_forward", "CUDA")
@torch.library.impl(library, "attention_forward", "CPU")
def _attention_forward(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    terms, options, save, weights = _split_forward(rest)
    output, lse, row_maximum, row_scale, probabilities = _kernels(query).attention_forward(
        query, key, value, terms, options, save, weights
    )
    return (
        output,
        lse,
        or_empty(row_maximum, query),
        or_empty(row_scale, query),
        or_empty(probabilities, query),
    )


@torch.library.impl(library, "attention_backward", "CUDA")
@torch.library.impl(library, "attention_backward", "CPU")
def _attention_backward(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    terms, saved, options, needs = _split_backward(rest)
    grads = _kernels(query).attention_backward(
        grad_output, grad_lse, query, key, value, terms, *saved, options, needs
    )
    return tuple(or_empty(grad, query) for grad in grads)


# --- fake kernels: shapes without values


@torch.library.register_fake("fastseq::attention_forward", lib=library)  # type: ignore[untyped-decorator]
def _attention_forward_fake(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, _, save, weights = _split_forward(rest)
    if query.dim() == 3:
        rows: tuple[int, ...] = (query.shape[1], query.shape[0])
        weights_shape: tuple[int, ...] = (0,)
    else:
        rows = tuple(query.shape[:3])
        weights_shape = (*rows, key.shape[2])
    if weights == WEIGHTS_NONE:
        weights_shape = (0,)
    elif weights == WEIGHTS_MEAN:
        weights_shape = (weights_shape[0], *weights_shape[2:])
    saved_shape = rows if save else (0,)
    # What is kept of a row has not the range it needs in half precision.
    sums = torch.float32 if query.dtype.itemsize == 2 else query.dtype
    return (
        empty_heads(query, value.shape[-1]),
        query.new_empty(rows, dtype=sums),
        query.new_empty(saved_shape, dtype=sums if save else query.dtype),
        query.new_empty(saved_shape, dtype=sums if save else query.dtype),
        query.new_empty(weights_shape),
    )


@torch.library.register_fake("fastseq::attention_backward", lib=library)  # type: ignore[untyped-decorator]
def _attention_backward_fake(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    terms, _, _, needs = _split_backward(rest)
    grads = []
    for tensor, needed in zip((query, key, value), needs[:3], strict=True):
        grads.append(empty_heads(tensor, tensor.shape[-1]) if needed else query.new_empty(0))
    for term, needed in zip((terms.bias, terms.sinks), needs[3:], strict=True):
        wanted = needed and term is not None
        grads.append(query.new_empty(term.shape if wanted else 0))  # type: ignore[union-attr]
    return tuple(grads)


# --- autograd of the ops


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, *rest = inputs
    terms, ctx.options, _, ctx.weights = _split_forward(rest)
    ctx.save_for_backward(query, key, value, output[0], output[2], output[3], *terms)
    # Weights that nobody asked for are a tensor without elements.
    ctx.mark_non_differentiable(*output[2:4], *(() if ctx.weights else output[4:]))
    ctx.set_materialize_grads(False)


def _op_backward(
    ctx: Any,
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    _grad_row_maximum: Tensor | None,
    _grad_row_scale: Tensor | None,
    grad_weights: Tensor | None,
) -> tuple[Any, ...]:
    query, key, value, output, row_maximum, row_scale, *rest = ctx.saved_tensors
    terms, saved = Terms(*rest), (output, row_maximum, row_scale)
    needs = _needed(ctx.needs_input_grad[:3], ctx.needs_input_grad[3 + _BIAS], ctx)
    if grad_weights is not None or needs_differentiable_gradient(grad_output, grad_lse):
        grads = _differentiable_backward(
            (grad_output, grad_lse, grad_weights),
            query,
            key,
            value,
            terms,
            ctx.options,
            ctx.weights,
            needs,
        )
    else:
        grads = _dispatched_backward(
            grad_output, grad_lse, query, key, value, terms, *saved, ctx.options, needs
        )
    result: list[Tensor | None] = [*grads[:3], *(None,) * (_TERM_COUNT + _OPTION_COUNT + 2)]
    result[3 + _BIAS], result[3 + _SINKS] = grads[3:]
    return tuple(result)


def _needed(inputs: Sequence[bool], bias: bool, ctx: Any) -> list[bool]:
    return [*inputs, bias, ctx.needs_input_grad[3 + _SINKS]]


torch.library.register_autograd(
    "fastseq::attention_forward", _op_backward, setup_context=_setup_context, lib=library
)


def _differentiable_backward(
    grads: Grads,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
    options: Options,
    weights: int,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients by way of the composite.

    It is a differentiable graph, for double backward, and has a gradient for the weights, for
    which there is no kernel.
    """

    def composite(
        query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, sinks: Tensor | None
    ) -> Results:
        inner = terms._replace(bias=bias, sinks=sinks)
        return reference_attention.attention(query, key, value, inner, options, weights)

    sources = (query, key, value, terms.bias, terms.sinks)
    return tuple(differentiable_gradients(composite, sources, needs, grads))


class _Attention(torch.autograd.Function):
    """The same formula for plain tensors, without the dispatcher in between."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        terms: Terms,
        options: Options,
        weights: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        output, lse, row_maximum, row_scale, probabilities = _kernels(query).attention_forward(
            query, key, value, terms, options, True, weights
        )
        ctx.save_for_backward(query, key, value, output, row_maximum, row_scale, *terms)
        ctx.options, ctx.weights = options, weights
        ctx.set_materialize_grads(False)
        return output, lse, probabilities

    @staticmethod
    def backward(
        ctx: Any,
        grad_output: Tensor | None,
        grad_lse: Tensor | None,
        grad_weights: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        query, key, value, output, row_maximum, row_scale, *rest = ctx.saved_tensors
        terms, needs = Terms(*rest), ctx.needs_input_grad[:5]
        if grad_weights is not None or needs_differentiable_gradient(grad_output, grad_lse):
            grads = _differentiable_backward(
                (grad_output, grad_lse, grad_weights),
                query,
                key,
                value,
                terms,
                ctx.options,
                ctx.weights,
                needs,
            )
        else:
            dispatched = is_watched() or has_lazy_negation(grad_output, grad_lse)
            backward = _dispatched_backward if dispatched else _kernels(query).attention_backward
            grads = backward(
                grad_output,
                grad_lse,
                query,
                key,
                value,
                terms,
                output,
                row_maximum,
                row_scale,
                ctx.options,
                needs,
            )
        return *grads, None, None, None


def _dispatched_backward(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
    output: Tensor,
    row_maximum: Tensor,
    row_scale: Tensor,
    options: Options,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The backend's ``attention_backward`` by way of the op."""
    saved = (output, row_maximum, row_scale)
    found = torch.ops.fastseq.attention_backward(
        grad_output, grad_lse, query, key, value, *terms, *saved, *options, needs
    )
    return tuple(grad if need else None for grad, need in zip(found, needs, strict=True))


# --- entry points


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    enable_gqa: bool,
    scale: float | None,
) -> Tensor | None:
    """The most common inference call, checked and run by the kernels' side in one go.

    4-D tensors, no options but causal, no gradients, nobody watching. ``None`` whenever the
    call is not as plain as that or its arguments do not fit.
    """
    if _is_compiling() or _config._backend != "cpu" or is_observed():
        return None
    result: Tensor | None = _cpu().plain_attention(query, key, value, is_causal, enable_gqa, scale)
    return result


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
    options: Options,
    weights: int = WEIGHTS_NONE,
) -> Results:
    """Attention with every option, differentiable. Arguments have been checked by the caller.

    Args and returns: see :func:`fastseq.backends.reference_attention.attention`.
    """
    assert weights in (WEIGHTS_NONE, WEIGHTS_PER_HEAD, WEIGHTS_MEAN)
    differentiable = (query, key, value, terms.bias, terms.sinks)
    if overrides_dispatch(*differentiable, terms.alibi_slopes) and not is_traced():
        return reference_attention.attention(query, key, value, terms, options, weights)
    if runs_directly(*differentiable, terms.alibi_slopes):
        if wants_composite(_WITH_KERNELS):
            return reference_attention.attention(query, key, value, terms, options, weights)
        if needs_gradient(differentiable):
            return _Attention.apply(
                query, key, value, terms.bias, terms.sinks, terms, options, weights
            )
        output, lse, _, _, probabilities = _kernels(query).attention_forward(
            query, key, value, terms, options, False, weights
        )
        return output, lse, probabilities
    save = needs_gradient(differentiable)
    compiling = torch.compiler.is_compiling()
    # A compiler asks for the gradient of every output, and that of the weights is a composite.
    composite = lacks_kernels(_WITH_KERNELS)
    composite = composite or (not compiling and wants_composite(_WITH_KERNELS))
    if composite or (compiling and save and weights):
        return reference_attention.attention(query, key, value, terms, options, weights)
    output, lse, _, _, probabilities = torch.ops.fastseq.attention_forward(
        query, key, value, *terms, *options, save, weights
    )
    return output, lse, probabilities if weights else None
