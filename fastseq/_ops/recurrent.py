"""The ops ``fastseq::rnn_forward`` and ``fastseq::rnn_backward``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastseq import _config
from fastseq._cells import GATES, NUMBA_RESERVE_LAYOUT, RESERVE_LAYOUT
from fastseq._ops.shared import (
    are_direct,
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
from fastseq.backends import reference

__all__ = ["plain_layer", "rnn_cell", "rnn_layer"]

Outputs = tuple[Tensor, Tensor, Tensor | None]

# What is not a tensor: (cell, has_biases, proj_size, bidirectional, batch_first).
Options = tuple[str, bool, int, bool, bool]

library.define(
    "rnn_forward(Tensor input, Tensor? hx, Tensor? cx, Tensor[] weights, "
    "Tensor? batch_sizes, Tensor? lengths, "
    "str cell, bool has_biases, int proj_size, bool bidirectional, bool batch_first, bool save, "
    "int reserve_layout) "
    "-> (Tensor output, Tensor hy, Tensor cy, Tensor reserve)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
library.define(
    "rnn_backward(Tensor? grad_output, Tensor? grad_hy, Tensor? grad_cy, "
    "Tensor input, Tensor? hx, Tensor? cx, "
    "Tensor[] weights, Tensor reserve, Tensor? batch_sizes, Tensor? lengths, "
    "str cell, bool has_biases, int proj_size, bool bidirectional, bool batch_first, bool[] needs, "
    "int reserve_layout) "
    "-> (Tensor grad_input, Tensor grad_hx, Tensor grad_cx, Tensor[] grad_weights)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


_WITH_KERNELS = frozenset({"cpu", "numba"})
_backend: Any = None
_numba_backend: Any = None
_cuda_backend: Any = None
_is_compiling = torch.compiler.is_compiling
_plain: Any = None


def _cpu() -> Any:
    global _backend
    if _backend is None:
        from fastseq.backends import cpu

        _backend = cpu
    return _backend


def _plain_kernel() -> Any:
    global _plain
    if _plain is None:
        _plain = _cpu().plain_layer
    return _plain


def _numba() -> Any:
    global _numba_backend
    if _numba_backend is None:
        from fastseq.backends.numba import layers

        _numba_backend = layers
    return _numba_backend


def _cuda() -> Any:
    global _cuda_backend
    if _cuda_backend is None:
        from fastseq.backends import cuda

        _cuda_backend = cuda
    return _cuda_backend


def _chosen_layout(input: Tensor) -> int:
    """The reserve's layout of ``_chosen``, without the imports there, which Dynamo cannot trace."""
    numba = input.is_cpu and _config.backend_name() == "numba"
    return NUMBA_RESERVE_LAYOUT if numba else RESERVE_LAYOUT


def _chosen(input: Tensor) -> tuple[Any, int]:
    """The backend for the tensor's device, on the CPU the user's, and its reserve's layout."""
    layout = _chosen_layout(input)
    if not input.is_cpu:
        return _cuda(), layout
    return (_numba() if layout == NUMBA_RESERVE_LAYOUT else _cpu()), layout


def _of_layout(reserve_layout: int, input: Tensor) -> Any:
    """The backend that reads and writes this layout, whichever is chosen by now."""
    if not input.is_cpu:
        return _cuda()
    return _numba() if reserve_layout < 0 else _cpu()


# --- kernels


@torch.library.impl(library, "rnn_forward", "CUDA")
@torch.library.impl(library, "rnn_forward", "CPU")
def _rnn_forward(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    has_biases: bool,
    proj_size: int,
    bidirectional: bool,
    batch_first: bool,
    save: bool,
    reserve_layout: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = (cell, has_biases, proj_size, bidirectional, batch_first)
    output, hy, cy, reserve = _of_layout(reserve_layout, input).rnn_forward(
        input, hx, cx, weights, *options, batch_sizes, lengths, save
    )
    return output, hy, or_empty(cy, input), or_empty(reserve, input)


@torch.library.impl(library, "rnn_backward", "CUDA")
@torch.library.impl(library, "rnn_backward", "CPU")
def _rnn_backward(
    grad_output: Tensor | None,
    grad_hy: Tensor | None,
    grad_cy: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: list[Tensor],
    reserve: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    has_biases: bool,
    proj_size: int,
    bidirectional: bool,
    batch_first: bool,
    needs: list[bool],
    reserve_layout: int,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    options = (cell, has_biases, proj_size, bidirectional, batch_first)
    grads = (grad_output, grad_hy, grad_cy)
    grad_input, grad_hx, grad_cx, grad_weights = _of_layout(reserve_layout, input).rnn_backward(
        *grads, input, hx, cx, weights, reserve, *options, batch_sizes, lengths, needs
    )
    return (
        or_empty(grad_input, input),
        or_empty(grad_hx, input),
        or_empty(grad_cx, input),
        [or_empty(grad, input) for grad in grad_weights],
    )


# --- fake kernels: shapes without values


@torch.library.register_fake("fastseq::rnn_forward", lib=library)  # type: ignore[untyped-decorator]
def _rnn_forward_fake(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    has_biases: bool,
    proj_size: int,
    bidirectional: bool,
    batch_first: bool,
    save: bool,
    reserve_layout: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    directions = 2 if bidirectional else 1
    hidden = weights[0].shape[0] // GATES[cell]
    width = proj_size or hidden
    if batch_sizes is None:
        batch = input.shape[0 if batch_first else 1]
        rows = input.shape[0] * input.shape[1]
    elif hx is not None:
        batch, rows = hx.shape[1], input.shape[0]
    else:
        # The widest step is a value of batch_sizes, unknown while a graph is recorded.
        batch = cast(int, torch.library.get_ctx().new_dynamic_size())
        rows = input.shape[0]
    output = input.new_empty((*input.shape[:-1], directions * width))
    hy = input.new_empty((directions, batch, width))
    cy = input.new_empty((directions, batch, hidden) if cell == "lstm" else 0)
    elements = 0
    if save and input.device.type == "cuda":
        elements = _cuda().rnn_reserve_elements(cell, rows, hidden, directions, input.dtype)
    elif save:
        elements = _of_layout(reserve_layout, input).rnn_reserve_elements(
            cell, rows, hidden, proj_size, directions, input.dtype
        )
    return output, hy, cy, input.new_empty(elements)


@torch.library.register_fake("fastseq::rnn_backward", lib=library)  # type: ignore[untyped-decorator]
def _rnn_backward_fake(
    grad_output: Tensor | None,
    grad_hy: Tensor | None,
    grad_cy: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: list[Tensor],
    reserve: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    has_biases: bool,
    proj_size: int,
    bidirectional: bool,
    batch_first: bool,
    needs: list[bool],
    reserve_layout: int,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    def grad_of(tensor: Tensor | None, needed: bool) -> Tensor:
        return input.new_empty(tensor.shape if tensor is not None and needed else 0)

    return (
        grad_of(input, needs[0]),
        grad_of(hx, needs[1]),
        grad_of(cx, needs[2]),
        [grad_of(weight, needed) for weight, needed in zip(weights, needs[3:], strict=True)],
    )


# --- autograd of the ops


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, hx, cx, weights, batch_sizes, lengths, *options, _, reserve_layout = inputs
    ctx.save_for_backward(input, hx, cx, batch_sizes, lengths, output[3], *weights)
    ctx.options = tuple(options)
    ctx.reserve_layout = reserve_layout
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    grad_output: Tensor | None,
    grad_hy: Tensor | None,
    grad_cy: Tensor | None,
    _grad_reserve: Tensor | None,
) -> tuple[Any, ...]:
    input, hx, cx, batch_sizes, lengths, reserve, *weights = ctx.saved_tensors
    needs_input, needs_hx, needs_cx, needs_weights, *_ = ctx.needs_input_grad
    if isinstance(needs_weights, bool):
        needs_weights = [needs_weights] * len(weights)
    needs = [needs_input, needs_hx, needs_cx, *needs_weights]
    if ctx.options[0] != "lstm":
        grad_cy = None
    grads = (grad_output, grad_hy, grad_cy)
    if needs_differentiable_gradient(*grads):
        result = _differentiable_backward(
            grads, input, hx, cx, weights, ctx.options, batch_sizes, lengths, needs
        )
    else:
        arguments = (*grads, input, hx, cx, weights, reserve)
        result = _dispatched_backward(
            arguments, ctx.options, batch_sizes, lengths, needs, ctx.reserve_layout
        )
    grad_input, grad_hx, grad_cx, grad_weights = result
    return grad_input, grad_hx, grad_cx, grad_weights, *(None,) * 9


def _dispatched_backward(
    arguments: tuple[Any, ...],
    options: Options,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    needs: Sequence[bool],
    reserve_layout: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
    """The backend's ``rnn_backward`` by way of the op."""
    *grads, grad_weights = torch.ops.fastseq.rnn_backward(
        *arguments, batch_sizes, lengths, *options, needs, reserve_layout
    )
    grad_input, grad_hx, grad_cx = (
        grad if need else None for grad, need in zip(grads, needs[:3], strict=True)
    )
    weights = [grad if need else None for grad, need in zip(grad_weights, needs[3:], strict=True)]
    return grad_input, grad_hx, grad_cx, weights


torch.library.register_autograd(
    "fastseq::rnn_forward", _backward, setup_context=_setup_context, lib=library
)


def _differentiable_backward(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    options: Options,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
    """The gradients by way of the composite."""

    def composite(input: Tensor, hx: Tensor | None, cx: Tensor | None, *weights: Tensor) -> Outputs:
        return reference.rnn_layer(input, hx, cx, weights, *options, batch_sizes, lengths)

    sources = (input, hx, cx, *weights)
    found = differentiable_gradients(composite, sources, needs, grads)
    grad_input, grad_hx, grad_cx, *grad_weights = found
    return grad_input, grad_hx, grad_cx, grad_weights


class _RnnLayer(torch.autograd.Function):
    """The same formula for plain tensors, without the dispatcher in between."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        hx: Tensor | None,
        cx: Tensor | None,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        options: Options,
        *weights: Tensor,
    ) -> Outputs:
        kernels, ctx.reserve_layout = _chosen(input)
        output, hy, cy, reserve = kernels.rnn_forward(
            input, hx, cx, weights, *options, batch_sizes, lengths, True
        )
        ctx.save_for_backward(input, hx, cx, batch_sizes, lengths, reserve, *weights)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return output, hy, cy

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_hy: Tensor | None, grad_cy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        input, hx, cx, batch_sizes, lengths, reserve, *weights = ctx.saved_tensors
        needs = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[6:]]
        grads = (grad_output, grad_hy, grad_cy)
        if needs_differentiable_gradient(*grads):
            grad_input, grad_hx, grad_cx, grad_weights = _differentiable_backward(
                grads, input, hx, cx, weights, ctx.options, batch_sizes, lengths, needs
            )
        else:
            arguments = (*grads, input, hx, cx, weights, reserve)
            if is_watched() or has_lazy_negation(*grads):
                grad_input, grad_hx, grad_cx, grad_weights = _dispatched_backward(
                    arguments, ctx.options, batch_sizes, lengths, needs, ctx.reserve_layout
                )
            else:
                kernels = _of_layout(ctx.reserve_layout, input)
                grad_input, grad_hx, grad_cx, grad_weights = kernels.rnn_backward(
                    *arguments, *ctx.options, batch_sizes, lengths, needs
                )
        return grad_input, grad_hx, grad_cx, None, None, None, *grad_weights


# --- entry points


def plain_layer(
    cell: str,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    batch_first: bool,
) -> Outputs | None:
    """The most common inference call, checked and run by the kernels' side in one go.

    One direction, biases, nothing packed, no gradients, nobody watching. ``None`` whenever the call
    is not as plain as that or its arguments do not fit: the general way decides then, and words
    the error where there is one. The weights are looked at anew at every call.
    """
    if _is_compiling():
        return None
    backend = _config._backend or _config.backend_name()
    if backend == "cpu":
        outputs: Outputs | None = _plain_kernel()(cell, input, hx, cx, weights, batch_first)
        return outputs
    if (
        backend != "numba"
        or torch.is_grad_enabled()
        or is_observed()
        or not are_direct(input, hx, cx, *weights)
    ):
        return None
    return _numba().plain_layer(cell, input, hx, cx, weights, batch_first)


def rnn_layer(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    has_biases: bool,
    proj_size: int,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Outputs:
    """One layer, all directions, differentiable. Arguments have been checked by the caller.

    Args and returns: see :func:`fastseq.backends.reference.rnn_layer`.
    """
    options = (cell, has_biases, proj_size, bidirectional, batch_first)
    arguments = (input, hx, cx, weights, *options, batch_sizes, lengths)
    if not is_traced():
        differentiable = (input, hx, cx, *weights)
        if wants_composite(_WITH_KERNELS) or overrides_dispatch(*differentiable):
            return reference.rnn_layer(*arguments)
        if runs_directly(*differentiable):
            if needs_gradient(differentiable):
                return _RnnLayer.apply(input, hx, cx, batch_sizes, lengths, options, *weights)
            return _chosen(input)[0].rnn_forward(*arguments, False)[:3]
    elif lacks_kernels(_WITH_KERNELS) or (not _is_compiling() and wants_composite(_WITH_KERNELS)):
        return reference.rnn_layer(*arguments)
    save = needs_gradient((input, hx, cx, *weights))
    layout = _chosen_layout(input)
    output, hy, cy, _ = torch.ops.fastseq.rnn_forward(
        input, hx, cx, list(weights), batch_sizes, lengths, *options, save, layout
    )
    return output, hy, cy if cell == "lstm" else None


def rnn_cell(
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    cell: str,
) -> tuple[Tensor, Tensor | None]:
    """One step, differentiable: ``input`` (B, I), states (B, H); returns ``(hy, cy)``."""
    tensors = [w_ih, w_hh]
    has_biases = b_ih is not None or b_hh is not None
    if has_biases:
        tensors += [
            w_ih.new_zeros(w_ih.size(0)) if b_ih is None else b_ih,
            w_ih.new_zeros(w_ih.size(0)) if b_hh is None else b_hh,
        ]
    if (
        not is_watched()
        and are_direct(input, hx, cx, *tensors)
        and not wants_composite(_WITH_KERNELS)
        and not needs_gradient((input, hx, cx, *tensors))
    ):
        return _chosen(input)[0].rnn_cell(input, hx, cx, tensors, cell, has_biases)
    _, hy, cy = rnn_layer(
        input.unsqueeze(0),
        hx.unsqueeze(0),
        None if cx is None else cx.unsqueeze(0),
        tensors,
        cell,
        has_biases,
        0,
        False,
        False,
    )
    return hy.squeeze(0), None if cy is None else cy.squeeze(0)
