"""The ops ``fastseq::cell_forward`` and ``fastseq::cell_backward``, for cells that users define."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastseq._cells import COMPILED_CELL_LAYOUT, NUMBA_CELL_LAYOUT
from fastseq._ops.cell_kernels import (
    Options,
    of_layout,
    plan_of,
    run_backward,
    run_forward,
    runs_compiled,
)
from fastseq._ops.shared import (
    differentiable_gradients,
    has_lazy_negation,
    is_traced,
    is_watched,
    library,
    needs_differentiable_gradient,
    needs_gradient,
    or_empty,
    overrides_dispatch,
    runs_directly,
    wants_composite,
)
from fastseq.backends.reference_cells import cell_layer as composite
from fastseq.backends.reference_cells import sizes_of
from fastseq.cells.definition import find

__all__ = ["cell_layer"]

_WITH_KERNELS = frozenset({"cpu", "numba"})

library.define(
    "cell_forward(Tensor input, Tensor[] states, Tensor[] weights, Tensor? masks, "
    "Tensor? batch_sizes, Tensor? lengths, str cell, bool recurrent_dropout, bool zoneout, "
    "bool has_biases, bool bidirectional, bool batch_first, bool save, int reserve_layout) "
    "-> (Tensor output, Tensor[] final, Tensor reserve)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
library.define(
    "cell_backward(Tensor? grad_output, Tensor?[] grad_final, Tensor input, Tensor[] states, "
    "Tensor[] weights, Tensor? masks, Tensor reserve, "
    "Tensor? batch_sizes, Tensor? lengths, "
    "str cell, bool recurrent_dropout, bool zoneout, bool has_biases, bool bidirectional, "
    "bool batch_first, bool[] needs, int reserve_layout) "
    "-> (Tensor grad_input, Tensor[] grad_states, Tensor[] grad_weights)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


# --- kernels


@torch.library.impl(library, "cell_forward", "CPU")
def _cell_forward(
    input: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    masks: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    recurrent_dropout: bool,
    zoneout: bool,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    save: bool,
    reserve_layout: int,
) -> tuple[Tensor, list[Tensor], Tensor]:
    options = (cell, recurrent_dropout, zoneout, has_biases, bidirectional, batch_first)
    output, final, reserve = run_forward(
        input, states, weights, masks, batch_sizes, lengths, options, save, reserve_layout
    )
    return output, final, or_empty(reserve, input)


@torch.library.impl(library, "cell_backward", "CPU")
def _cell_backward(
    grad_output: Tensor | None,
    grad_final: list[Tensor | None],
    input: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    masks: Tensor | None,
    reserve: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    recurrent_dropout: bool,
    zoneout: bool,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    needs: list[bool],
    reserve_layout: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    options = (cell, recurrent_dropout, zoneout, has_biases, bidirectional, batch_first)
    grad_input, grad_states, grad_weights = run_backward(
        grad_output,
        grad_final,
        input,
        states,
        weights,
        masks,
        reserve,
        batch_sizes,
        lengths,
        options,
        needs,
        reserve_layout,
    )
    return (
        or_empty(grad_input, input),
        [or_empty(grad, input) for grad in grad_states],
        [or_empty(grad, input) for grad in grad_weights],
    )


# --- fake kernels: shapes without values


@torch.library.register_fake("fastseq::cell_forward", lib=library)  # type: ignore[untyped-decorator]
def _cell_forward_fake(
    input: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    masks: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    recurrent_dropout: bool,
    zoneout: bool,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    save: bool,
    reserve_layout: int,
) -> tuple[Tensor, list[Tensor], Tensor]:
    options = (cell, recurrent_dropout, zoneout, has_biases, bidirectional, batch_first)
    plan = plan_of(options)
    directions = 2 if bidirectional else 1
    hidden, proj_size = sizes_of(plan, weights, has_biases, bidirectional)
    width = proj_size or hidden
    if batch_sizes is None:
        batch = input.shape[0 if batch_first else 1]
        rows = input.shape[0] * input.shape[1]
    elif states:
        batch, rows = states[0].shape[1], input.shape[0]
    else:
        # The widest step is a value of batch_sizes, unknown while a graph is recorded.
        batch = cast(int, torch.library.get_ctx().new_dynamic_size())
        rows = input.shape[0]
    output = input.new_empty((*input.shape[:-1], directions * width))
    widths = [width, *[hidden] * (find(cell).states - 1)]
    final = [input.new_empty((directions, batch, size)) for size in widths]
    elements = 0
    if save:
        elements = of_layout(reserve_layout).reserve_elements(
            plan, rows, hidden, directions, input.dtype.itemsize, proj_size
        )
    return output, final, input.new_empty(elements)


@torch.library.register_fake("fastseq::cell_backward", lib=library)  # type: ignore[untyped-decorator]
def _cell_backward_fake(
    grad_output: Tensor | None,
    grad_final: list[Tensor | None],
    input: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    masks: Tensor | None,
    reserve: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    recurrent_dropout: bool,
    zoneout: bool,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    needs: list[bool],
    reserve_layout: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    def grad_of(tensor: Tensor, needed: bool) -> Tensor:
        return input.new_empty(tensor.shape if needed else 0)

    first = 1 + len(states)
    return (
        grad_of(input, needs[0]),
        [grad_of(state, needed) for state, needed in zip(states, needs[1:first], strict=True)],
        [grad_of(weight, needed) for weight, needed in zip(weights, needs[first:], strict=True)],
    )


# --- autograd


def _differentiable_backward(
    grad_output: Tensor | None,
    grad_final: Sequence[Tensor | None],
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    options: Options,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients by way of the composite."""

    def run(input: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        states, weights = rest[:count], rest[count:]
        output, final = composite(
            plan_of(options), input, states, weights, masks, *options[3:], batch_sizes, lengths
        )
        return output, *final

    count = len(states)
    sources = (input, *states, *weights)
    return differentiable_gradients(run, sources, needs, (grad_output, *grad_final))


def _dispatched_backward(
    arguments: tuple[Any, ...], options: Options, needs: Sequence[bool], reserve_layout: int
) -> list[Tensor | None]:
    """The gradients by way of the op."""
    grad_input, grad_states, grad_weights = torch.ops.fastseq.cell_backward(
        *arguments, *options, needs, reserve_layout
    )
    found = [grad_input, *grad_states, *grad_weights]
    return [grad if needed else None for grad, needed in zip(found, needs, strict=True)]


def _gradients(
    ctx: Any,
    saved: Sequence[Any],
    grad_output: Tensor | None,
    grad_final: Sequence[Tensor | None],
    needs: Sequence[bool],
    watched: bool,
) -> list[Tensor | None]:
    """Of input, states and weights, by whichever way this backward has to go."""
    input, masks, batch_sizes, lengths, reserve, *rest = saved
    states, weights = rest[: ctx.state_count], rest[ctx.state_count :]
    if needs_differentiable_gradient(grad_output, *grad_final):
        return _differentiable_backward(
            grad_output,
            grad_final,
            input,
            states,
            weights,
            masks,
            batch_sizes,
            lengths,
            ctx.options,
            needs,
        )
    arguments = (
        grad_output,
        list(grad_final),
        input,
        list(states),
        list(weights),
        masks,
        reserve,
        batch_sizes,
        lengths,
    )
    if watched:
        return _dispatched_backward(arguments, ctx.options, needs, ctx.reserve_layout)
    grad_input, grad_states, grad_weights = run_backward(
        *arguments, ctx.options, needs, ctx.reserve_layout
    )
    return [grad_input, *grad_states, *grad_weights]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    input, states, weights, masks, batch_sizes, lengths, *options, _, reserve_layout = inputs
    ctx.save_for_backward(input, masks, batch_sizes, lengths, output[2], *states, *weights)
    ctx.options, ctx.state_count = tuple(options), len(states)
    ctx.reserve_layout = reserve_layout
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    grad_output: Tensor | None,
    grad_final: list[Tensor | None],
    _grad_reserve: Tensor | None,
) -> tuple[Any, ...]:
    needs_input, needs_states, needs_weights, *_ = ctx.needs_input_grad
    counts = ctx.state_count, len(ctx.saved_tensors) - 5 - ctx.state_count
    needs = [needs_input]
    for needed, count in zip((needs_states, needs_weights), counts, strict=True):
        needs += [needed] * count if isinstance(needed, bool) else list(needed)
    found = _gradients(ctx, ctx.saved_tensors, grad_output, grad_final, needs, watched=True)
    first = 1 + ctx.state_count
    return found[0], found[1:first], found[first:], *(None,) * 11


torch.library.register_autograd(
    "fastseq::cell_forward", _backward, setup_context=_setup_context, lib=library
)


class _CellLayer(torch.autograd.Function):
    """The same formula for plain tensors, without the dispatcher in between."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        masks: Tensor | None,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        options: Options,
        state_count: int,
        reserve_layout: int,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        states, weights = rest[:state_count], rest[state_count:]
        output, final, reserve = run_forward(
            input, states, weights, masks, batch_sizes, lengths, options, True, reserve_layout
        )
        ctx.save_for_backward(input, masks, batch_sizes, lengths, reserve, *rest)
        ctx.options, ctx.state_count, ctx.reserve_layout = options, state_count, reserve_layout
        ctx.set_materialize_grads(False)
        return output, *final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, *grad_final = grads
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[7:]]
        watched = is_watched() or has_lazy_negation(*grads)
        found = _gradients(ctx, ctx.saved_tensors, grad_output, grad_final, needs, watched)
        return found[0], None, None, None, None, None, None, *found[1:]


# --- entry point


def cell_layer(
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Tensor | None,
    options: Options,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """One layer of a user's cell, differentiable. Arguments have been checked by the caller.

    Args and returns: see :func:`fastseq.backends.reference_cells.cell_layer`; ``options`` names
    the cell by its key, and whether its formulas have the masks of recurrent dropout and zoneout.
    """
    compiling = torch.compiler.is_compiling()
    own_way = not is_traced() and overrides_dispatch(input, *states, *weights)
    if own_way or (not compiling and wants_composite(_WITH_KERNELS)):
        return composite(
            plan_of(options), input, states, weights, masks, *options[3:], batch_sizes, lengths
        )
    save = needs_gradient((input, *states, *weights))
    compiled = runs_compiled(options[0], options[1], options[2], input.dtype)
    layout = COMPILED_CELL_LAYOUT if compiled else NUMBA_CELL_LAYOUT
    if runs_directly(input, *states, *weights):
        if save:
            output, *final = _CellLayer.apply(
                input, masks, batch_sizes, lengths, options, len(states), layout, *states, *weights
            )
            return output, final
        output, final, _ = run_forward(
            input, states, weights, masks, batch_sizes, lengths, options, False, layout
        )
        return output, final
    output, final, _ = torch.ops.fastseq.cell_forward(
        input, list(states), list(weights), masks, batch_sizes, lengths, *options, save, layout
    )
    return output, final
