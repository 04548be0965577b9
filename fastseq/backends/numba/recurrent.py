"""One layer of any cell on the Numba drivers: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq.backends.numba import arguments as at
from fastseq.backends.numba import drivers, step
from fastseq.backends.numba.call import Arguments, Call, describe
from fastseq.backends.numba.large_products import (
    both_products,
    input_gradient,
    input_product,
    weight_gradients,
)
from fastseq.backends.numba.layout import Ragged, ragged
from fastseq.backends.numba.weights import (
    as_columns,
    by_slot,
    packed_transpose,
    packed_weights,
    padded_masks,
    padded_units,
)
from fastseq.backends.reference_cells import direction_weights, weights_per_direction
from fastseq.cells.plan import Plan

__all__ = ["Gradients", "backward", "forward", "reserve_elements"]


class Gradients(NamedTuple):
    """What :func:`backward` returns; ``None`` where nothing was asked for."""

    input: Tensor | None
    states: list[Tensor | None]
    weights: list[Tensor | None]


def reserve_elements(
    plan: Plan, rows: int, hidden_size: int, directions: int, item_bytes: int
) -> int:
    """Elements of what forward keeps for backward; sizes may be symbolic."""
    return rows * directions * plan.columns * padded_units(hidden_size, item_bytes)


def forward(
    plan: Plan,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    masks: Tensor | None,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    save: bool,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """One layer of a cell in one or both directions.

    Args:
        plan: the cell.
        input: ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, ``(rows, I)`` with
            ``batch_sizes``; any strides.
        states: the initial states, ``(D, B, H)`` each; ``None`` is zeros.
        weights: for each direction ``w_ih``, ``w_hh`` (where the cell has such gates), their
            biases with ``has_biases``, and the cell's learned values ``(H)``.
        masks: ``(D, T or 1, B or 1, masks, H)`` for a plan with masks.
        has_biases: whether there are biases.
        bidirectional: whether a second direction runs from the end.
        batch_first: layout of a padded input and output.
        batch_sizes: int64 ``(T,)``, for packed input.
        lengths: int64 ``(B,)``, for padded input.
        save: keep what :func:`backward` needs.

    Returns:
        The output, the final states ``(D, B, H)``, and the reserve or ``None``.
    """
    with torch.no_grad():
        if lengths is None:
            return _forward(
                plan, input, states, weights, masks, has_biases, bidirectional, batch_first,
                batch_sizes, save,
            )  # fmt: skip
        steps = input.size(1 if batch_first else 0)
        how = ragged(lengths, steps, batch_first)
        packed, final, reserve = _forward(
            plan,
            _gathered(input, how),
            _ordered(states, how.order, input),
            weights,
            _ordered_masks(masks, how.order),
            has_biases,
            bidirectional,
            False,
            how.batch_sizes,
            save,
            batch=lengths.numel(),
            # The reserve's size must not depend on values: graphs are recorded without them.
            capacity=steps * lengths.numel(),
        )
        output = _scattered(packed, how, (*input.shape[:-1], packed.size(1)))
        back = torch.argsort(how.order)
        return output, [state.index_select(1, back) for state in final], reserve


def _gathered(padded: Tensor, how: Ragged) -> Tensor:
    return padded.reshape(-1, padded.size(-1)).index_select(0, how.places)


def _scattered(packed: Tensor, how: Ragged, shape: Sequence[int]) -> Tensor:
    padded = packed.new_zeros(tuple(shape))
    padded.view(-1, shape[-1]).index_copy_(0, how.places, packed)
    return padded


def _ordered(states: Sequence[Tensor | None], order: Tensor, like: Tensor) -> list[Tensor | None]:
    return [None if state is None else state.index_select(1, order) for state in states]


def _ordered_masks(masks: Tensor | None, order: Tensor) -> Tensor | None:
    return masks if masks is None or masks.size(2) == 1 else masks.index_select(2, order)


def _forward(
    plan: Plan,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    masks: Tensor | None,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    save: bool,
    batch: int | None = None,
    capacity: int = 0,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    call = describe(plan, input, weights, bidirectional, batch_first, batch_sizes)
    if batch is not None:
        call = call._replace(batch=batch)
    units, hidden, directions = call.units, call.hidden, call.directions
    columns = plan.columns if save else len(plan.slots)
    row_count = call.rows.size(0)
    size = directions * columns * units
    reserve = input.new_empty(max(row_count, capacity) * size)
    records = reserve[: row_count * size].view(directions, row_count, columns * units)
    output = input.new_empty((*input.shape[:-1], directions * hidden))
    carried = _initial_states(plan, states, masks, call, input)
    if masks is not None:
        masks = padded_masks(masks, units)
    if call.steps == 1 and step.is_small(call.batch, weights):
        _one_step(plan, call, weights, has_biases, carried, masks, records, output, save)
    else:
        _all_steps(plan, call, weights, has_biases, carried, masks, records, output, save)
    kept = plan.states - (plan.recurrent_state > 0)
    # Not views of one tensor: an op's results must not share memory.
    final = [carried[:, :, index, :hidden].clone() for index in range(kept)]
    return output, final, reserve if save else None


def _one_step(
    plan: Plan,
    call: Call,
    weights: Sequence[Tensor],
    has_biases: bool,
    carried: Tensor,
    masks: Tensor | None,
    records: Tensor,
    output: Tensor,
    save: bool,
) -> None:
    """A single step of a few sequences; ``carried``, ``records`` and ``output`` are written."""
    for direction in range(call.directions):
        w = direction_weights(
            plan, [tensor.contiguous() for tensor in weights], has_biases, direction
        )
        first = direction * call.hidden
        step.run(
            plan,
            call.rows,
            w,
            call.hidden,
            call.units,
            records[direction],
            carried[direction],
            as_columns(w.parameters, call.units, carried) if w.parameters else None,
            None if masks is None else masks[direction, 0],
            output.view(call.batch, -1)[:, first : first + call.hidden],
            save,
        )


def _all_steps(
    plan: Plan,
    call: Call,
    weights: Sequence[Tensor],
    has_biases: bool,
    carried: Tensor,
    masks: Tensor | None,
    records: Tensor,
    output: Tensor,
    save: bool,
) -> None:
    """The driver over time; ``carried``, ``records`` and ``output`` are written."""
    units, hidden, input = call.units, call.hidden, call.rows
    arguments = Arguments(plan, call)
    arguments.values[at.COLUMNS] = records.size(-1) // units
    arguments.address(at.OUTPUT, output)
    if masks is not None:
        arguments.masks(masks)
    for direction in range(call.directions):
        w = direction_weights(plan, weights, has_biases, direction)
        if call.steps > 1:
            input_product(plan, call, w, records[direction])
        else:
            both_products(plan, call, w, carried[direction], records[direction])
        arguments.of_direction(direction, at.RECORDS, records[direction])
        arguments.of_direction(direction, at.STATES, carried[direction])
        if w.parameters:
            columns_of = as_columns(w.parameters, units, input)
            arguments.of_direction(direction, at.PARAMETERS, columns_of)
        if w.hidden is None or call.steps == 1:
            continue
        alone = len(plan.slots) - plan.hidden_only
        bias = input.new_zeros((alone, units))
        if w.hidden_bias is not None and alone:
            blocks = by_slot(w.hidden_bias, plan.hidden_gates, hidden, units)
            bias = blocks[-alone * units :].contiguous()
        arguments.of_direction(direction, at.HIDDEN_BIAS, bias)
        packed = packed_weights(plan, w.hidden, units)
        arguments.of_direction(direction, at.WEIGHTS, packed)
    arguments.values[at.SAVE] = int(save)
    arguments.run(drivers.forward_kernel(plan, input.element_size()))


def _initial_states(
    plan: Plan,
    states: Sequence[Tensor | None],
    masks: Tensor | None,
    call: Call,
    like: Tensor,
) -> Tensor:
    """States before the first step, ``(D, B, states, units)``."""
    shape = (call.directions, call.batch, plan.states, call.units)
    carried = like.new_zeros(shape)
    for index, state in enumerate(states):
        if state is not None:
            carried[:, :, index, : call.hidden] = state
    if plan.recurrent_state and states and states[0] is not None:
        assert masks is not None
        carried[:, :, plan.recurrent_state, : call.hidden] = states[0] * masks[:, 0, :, -1]
    return carried


def backward(
    plan: Plan,
    grad_output: Tensor | None,
    grad_states: Sequence[Tensor | None],
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    masks: Tensor | None,
    reserve: Tensor,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of one layer; ``needs`` says which of ``(input, *states, *weights)`` are wanted.

    ``grad_states`` are those of the final states. The other arguments are :func:`forward`'s.
    """
    with torch.no_grad():
        if lengths is None:
            return _backward(
                plan, grad_output, grad_states, input, states, weights, masks, reserve, has_biases,
                bidirectional, batch_first, batch_sizes, needs,
            )  # fmt: skip
        steps = input.size(1 if batch_first else 0)
        how = ragged(lengths, steps, batch_first)
        found = _backward(
            plan,
            None if grad_output is None else _gathered(grad_output, how),
            _ordered(grad_states, how.order, input),
            _gathered(input, how),
            _ordered(states, how.order, input),
            weights,
            _ordered_masks(masks, how.order),
            reserve,
            has_biases,
            bidirectional,
            False,
            how.batch_sizes,
            needs,
            batch=lengths.numel(),
        )
        grad_input = found.input
        if grad_input is not None:
            grad_input = _scattered(grad_input, how, input.shape)
        return Gradients(
            grad_input, _ordered(found.states, torch.argsort(how.order), input), found.weights
        )


def _backward(
    plan: Plan,
    grad_output: Tensor | None,
    grad_states: Sequence[Tensor | None],
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    masks: Tensor | None,
    reserve: Tensor,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    needs: Sequence[bool],
    batch: int | None = None,
) -> Gradients:
    call = describe(plan, input, weights, bidirectional, batch_first, batch_sizes)
    if batch is not None:
        call = call._replace(batch=batch)
    units, hidden, directions = call.units, call.hidden, call.directions
    row_count = call.rows.size(0)
    size = directions * plan.columns * units
    records = reserve[: row_count * size].view(directions, row_count, plan.columns * units)
    gradients = input.new_empty((directions, row_count, plan.gradient_columns * units))
    carried = input.new_zeros((directions, call.batch, plan.states, units))
    for index, grad in enumerate(grad_states):
        if grad is not None:
            carried[:, :, index, :hidden] = grad
    arguments = Arguments(plan, call)
    if grad_output is not None:
        arguments.address(at.GRAD_OUTPUT, grad_output.contiguous())
    if masks is not None:
        arguments.masks(padded_masks(masks, units))
    by_direction = [
        direction_weights(plan, weights, has_biases, direction) for direction in range(directions)
    ]
    for direction, w in enumerate(by_direction):
        arguments.of_direction(direction, at.RECORDS, records[direction])
        arguments.of_direction(direction, at.GRADIENTS, gradients[direction])
        arguments.of_direction(direction, at.STATE_GRADIENTS, carried[direction])
        if w.parameters:
            columns_of = as_columns(w.parameters, units, input)
            arguments.of_direction(direction, at.PARAMETERS, columns_of)
        if w.hidden is not None:
            packed = packed_transpose(plan, w.hidden.contiguous(), units)
            arguments.of_direction(direction, at.WEIGHTS, packed)
    arguments.run(drivers.backward_kernel(plan, input.element_size()))

    count = len(states)
    grad_input = None
    if needs[0]:
        grad_input = input_gradient(plan, call, by_direction, gradients, input)
    found_states: list[Tensor | None] = []
    for index in range(count):
        found = None
        if needs[1 + index]:
            found = carried[:, :, index, :hidden].contiguous()
            if index == 0 and plan.recurrent_state:
                assert masks is not None
                found += carried[:, :, plan.recurrent_state, :hidden] * masks[:, 0, :, -1]
        found_states.append(found)
    found_weights: list[Tensor | None] = []
    per_direction = weights_per_direction(plan, has_biases)
    for direction in range(directions):
        first = 1 + count + direction * per_direction
        wanted = needs[first : first + per_direction]
        found_weights += weight_gradients(
            plan, call, by_direction[direction], gradients[direction], records[direction], wanted
        )
    return Gradients(grad_input, found_states, found_weights)
