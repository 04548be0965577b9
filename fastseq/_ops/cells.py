"""The ops ``fastseq::cell_forward`` and ``fastseq::cell_backward``, for cells that users define."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor

from fastseq import _recorder
from fastseq._cells import COMPILED_CELL_LAYOUT, NUMBA_CELL_LAYOUT
from fastseq._ops.shared import (
    PLAIN_TYPES,
    has_lazy_negation,
    is_watched,
    library,
    needs_gradient,
    or_empty,
    wants_composite,
)
from fastseq.backends.reference_cells import cell_layer as composite
from fastseq.backends.reference_cells import sizes_of
from fastseq.cells.definition import find
from fastseq.cells.plan import Plan

__all__ = ["cell_layer", "runs_compiled"]

# What is not a tensor: (key of the cell, recurrent_dropout, zoneout, has_biases, bidirectional,
# batch_first).
Options = tuple[str, bool, bool, bool, bool, bool]
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
    "Tensor[] weights, Tensor? masks, Tensor? output, Tensor reserve, "
    "Tensor? batch_sizes, Tensor? lengths, "
    "str cell, bool recurrent_dropout, bool zoneout, bool has_biases, bool bidirectional, "
    "bool batch_first, bool[] needs, int reserve_layout) "
    "-> (Tensor grad_input, Tensor[] grad_states, Tensor[] grad_weights)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)

_backend: Any = None
_compiled_backend: Any = None
_is_chosen: Any = None


def _numba() -> Any:
    """The driver with Numba behind it; imported by the first call."""
    global _backend
    if _backend is None:
        from fastseq.backends.numba import recurrent

        _backend = recurrent
    return _backend


def _compiled() -> Any:
    """The C++ driver for cells that are compiled where they are used."""
    global _compiled_backend
    if _compiled_backend is None:
        from fastseq.backends.compiled_cells import recurrent

        _compiled_backend = recurrent
    return _compiled_backend


def _of_layout(reserve_layout: int) -> Any:
    """The driver that reads and writes this layout, whichever would be chosen by now."""
    return _compiled() if reserve_layout > 0 else _numba()


# Compiles and loads a library, which is nothing for a compiler's graph; the answer is.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def runs_compiled(key: str, recurrent_dropout: bool, zoneout: bool, dtype: torch.dtype) -> bool:
    """Whether the cell runs on the C++ driver, compiled by now."""
    global _is_chosen
    if _is_chosen is None:
        from fastseq.backends.compiled_cells.choice import is_chosen

        _is_chosen = is_chosen
    answer: bool = _is_chosen(find(key).regularised(recurrent_dropout, zoneout), dtype)
    return answer


def _plan(options: Options) -> Plan:
    key, recurrent_dropout, zoneout, *_ = options
    return find(key).regularised(recurrent_dropout, zoneout)


def _recorded(
    kernel: str,
    input: Tensor,
    weights: Sequence[Tensor],
    options: Options,
    rows: tuple[Tensor | None, Tensor | None],
    more: dict[str, int],
) -> AbstractContextManager[None]:
    """The call as a profile keeps it, with what its model has to know of the cell."""
    from fastseq.backends.numba.recording import recurrent_call

    key, _, _, has_biases, bidirectional, batch_first = options
    cell, plan = find(key), _plan(options)
    return recurrent_call(
        kernel,
        cell.name,
        input,
        *sizes_of(plan, weights, has_biases, bidirectional),
        has_biases,
        bidirectional,
        batch_first,
        *rows,
        {
            "input_gates": len(plan.input_gates),
            "hidden_gates": len(plan.hidden_gates),
            "states": plan.states,
            "saved": len(plan.entries),
            "parameters": plan.parameters,
            **more,
        },
    )


def _run_forward(
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    options: Options,
    save: bool,
    reserve_layout: int,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    arguments = (input, states, weights, masks, *options[3:], batch_sizes, lengths, save)
    # The C++ driver records itself.
    if _recorder.active is None or reserve_layout > 0:
        return _of_layout(reserve_layout).forward(_plan(options), *arguments)
    rows = (batch_sizes, lengths)
    with _recorded("cell_forward", input, weights, options, rows, {"training": int(save)}):
        return _numba().forward(_plan(options), *arguments)


def _run_backward(
    grad_output: Tensor | None,
    grad_final: Sequence[Tensor | None],
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Tensor | None,
    output: Tensor | None,
    reserve: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    options: Options,
    needs: Sequence[bool],
    reserve_layout: int,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    rows, plan = (batch_sizes, lengths), _plan(options)
    given = (grad_output, grad_final, input, states, weights, masks)
    if reserve_layout > 0:
        return _compiled().backward(plan, *given, output, reserve, *options[3:], *rows, needs)
    arguments = (*given, reserve, *options[3:], *rows, needs)
    if _recorder.active is None:
        return _numba().backward(plan, *arguments)
    asked = {"needs_x": int(needs[0]), "needs_w": int(any(needs[1 + len(states) :]))}
    with _recorded("cell_backward", input, weights, options, rows, asked):
        return _numba().backward(plan, *arguments)


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
    output, final, reserve = _run_forward(
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
    output: Tensor | None,
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
    grad_input, grad_states, grad_weights = _run_backward(
        grad_output,
        grad_final,
        input,
        states,
        weights,
        masks,
        output,
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
    plan = _plan(options)
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
        elements = _of_layout(reserve_layout).reserve_elements(
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
    output: Tensor | None,
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
    """The gradients as a differentiable graph, for double backward, by way of the composite."""
    sources = [input, *states, *weights]
    wanted = [tensor for tensor, needed in zip(sources, needs, strict=True) if needed]
    with torch.enable_grad():
        output, final = composite(
            _plan(options), input, states, weights, masks, *options[3:], batch_sizes, lengths
        )
        pairs = [
            (result, grad)
            for result, grad in zip((output, *final), (grad_output, *grad_final), strict=True)
            if grad is not None
        ]
        found = iter(
            torch.autograd.grad(
                [result for result, _ in pairs],
                wanted,
                [grad for _, grad in pairs],
                create_graph=True,
                allow_unused=True,
            )
        )
    return [next(found) if needed else None for needed in needs]


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
    input, masks, batch_sizes, lengths, output, reserve, *rest = saved
    states, weights = rest[: ctx.state_count], rest[ctx.state_count :]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
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
        output,
        reserve,
        batch_sizes,
        lengths,
    )
    if watched:
        return _dispatched_backward(arguments, ctx.options, needs, ctx.reserve_layout)
    grad_input, grad_states, grad_weights = _run_backward(
        *arguments, ctx.options, needs, ctx.reserve_layout
    )
    return [grad_input, *grad_states, *grad_weights]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    input, states, weights, masks, batch_sizes, lengths, *options, _, reserve_layout = inputs
    kept = output[0] if reserve_layout > 0 else None
    ctx.save_for_backward(input, masks, batch_sizes, lengths, kept, output[2], *states, *weights)
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
    counts = ctx.state_count, len(ctx.saved_tensors) - 6 - ctx.state_count
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
        output, final, reserve = _run_forward(
            input, states, weights, masks, batch_sizes, lengths, options, True, reserve_layout
        )
        kept = output if reserve_layout > 0 else None
        ctx.save_for_backward(input, masks, batch_sizes, lengths, kept, reserve, *rest)
        ctx.options, ctx.state_count, ctx.reserve_layout = options, state_count, reserve_layout
        ctx.set_materialize_grads(False)
        return output, *final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, *grad_final = grads
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[7:]]
        found = _gradients(
            ctx, ctx.saved_tensors, grad_output, grad_final, needs, watched=is_watched()
        )
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
    if not compiling and wants_composite(_WITH_KERNELS):
        return composite(
            _plan(options), input, states, weights, masks, *options[3:], batch_sizes, lengths
        )
    save = needs_gradient((input, *states, *weights))
    compiled = runs_compiled(options[0], options[1], options[2], input.dtype)
    layout = COMPILED_CELL_LAYOUT if compiled else NUMBA_CELL_LAYOUT
    plain = type(input) in PLAIN_TYPES and not is_watched()
    if plain and not has_lazy_negation(input, *states):
        if save:
            output, *final = _CellLayer.apply(
                input, masks, batch_sizes, lengths, options, len(states), layout, *states, *weights
            )
            return output, final
        output, final, _ = _run_forward(
            input, states, weights, masks, batch_sizes, lengths, options, False, layout
        )
        return output, final
    output, final, _ = torch.ops.fastseq.cell_forward(
        input, list(states), list(weights), masks, batch_sizes, lengths, *options, save, layout
    )
    return output, final
