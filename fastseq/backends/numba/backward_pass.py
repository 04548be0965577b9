"""One layer back through time, all sequences in dense or packed rows: the driver, then products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq import _recorder
from fastseq.backends.numba import arguments as at
from fastseq.backends.numba import drivers
from fastseq.backends.numba.call import Arguments, Call, describe
from fastseq.backends.numba.large_products import input_gradient, weight_gradients
from fastseq.backends.numba.weights import as_columns, packed_transpose, padded_masks
from fastseq.backends.reference_cells import CellWeights, direction_weights
from fastseq.cells.plan import Plan

__all__ = ["Gradients", "backward_rows"]


class Gradients(NamedTuple):
    """What a backward returns; ``None`` where nothing was asked for."""

    input: Tensor | None
    states: list[Tensor | None]
    weights: list[Tensor | None]


def backward_rows(
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
    """As :func:`fastseq.backends.numba.recurrent.backward`, without lengths.

    ``batch``: sequences, where some have no row at all.
    """
    _recorder.enter("states")
    call = describe(plan, input, weights, bidirectional, batch_first, batch_sizes)
    if batch is not None:
        call = call._replace(batch=batch)
    units, directions = call.units, call.directions
    row_count = call.rows.size(0)
    record_size = plan.columns * units + call.extra
    size = directions * record_size
    records = reserve[: row_count * size].view(directions, row_count, record_size)
    gradient_size = plan.gradient_columns * units + call.extra
    gradients = input.new_empty((directions, row_count, gradient_size))
    carried = input.new_zeros((directions, call.batch, plan.states, units))
    projected = None
    if call.projected:
        projected = input.new_zeros((directions, call.batch, call.width_units))
    for index, grad in enumerate(grad_states):
        if grad is None:
            continue
        if projected is not None and index == 0:
            projected[:, :, : call.width] = grad
        else:
            carried[:, :, index, : call.hidden] = grad
    by_direction = direction_weights(plan, weights, has_biases, directions)
    factors = None if masks is None else padded_masks(masks, units)
    _through_time(
        plan, call, by_direction, grad_output, carried, projected, factors, records, gradients
    )

    count = len(states)
    grad_input = None
    if needs[0]:
        _recorder.enter("input gradient")
        grad_input = input_gradient(plan, call, by_direction, gradients, input)
    _recorder.enter("states")
    found_states = [
        _state_gradient(plan, call, index, carried, projected, masks) if needs[1 + index] else None
        for index in range(count)
    ]
    _recorder.enter("weight gradient")
    found_weights: list[Tensor | None] = []
    per_direction = len(weights) // directions
    for direction, w in enumerate(by_direction):
        first = 1 + count + direction * per_direction
        wanted = needs[first : first + per_direction]
        found_weights += weight_gradients(
            plan, call, w, gradients[direction], records[direction], wanted
        )
    return Gradients(grad_input, found_states, found_weights)


def _through_time(
    plan: Plan,
    call: Call,
    by_direction: Sequence[CellWeights],
    grad_output: Tensor | None,
    carried: Tensor,
    projected: Tensor | None,
    masks: Tensor | None,
    records: Tensor,
    gradients: Tensor,
) -> None:
    """The driver; ``carried``, ``projected`` and ``gradients`` are written."""
    arguments = Arguments(call, records.size(-1))
    if grad_output is not None:
        arguments.address(at.GRAD_OUTPUT, grad_output.contiguous())
    if masks is not None:
        arguments.masks(masks)
    hidden, units = call.hidden, call.units
    _recorder.enter("pack")
    for direction, w in enumerate(by_direction):
        arguments.of_direction(direction, at.RECORDS, records[direction])
        arguments.of_direction(direction, at.GRADIENTS, gradients[direction])
        arguments.of_direction(direction, at.STATE_GRADIENTS, carried[direction])
        if w.parameters:
            columns_of = as_columns(w.parameters, units, carried)
            arguments.of_direction(direction, at.PARAMETERS, columns_of)
        if w.hidden is not None:
            width_units = call.width_units if call.projected else units
            packed = packed_transpose(w.hidden, plan.hidden_gates, hidden, width_units)
            arguments.of_direction(direction, at.WEIGHTS, packed)
        if w.projection is not None:
            assert projected is not None
            packed = packed_transpose(w.projection, (0,), call.width, units)
            arguments.of_direction(direction, at.PROJECTION, packed)
            arguments.of_direction(direction, at.PROJECTED, projected[direction])
    _recorder.enter("recurrence")
    arguments.run(drivers.backward_kernel(plan, carried.element_size()))


def _state_gradient(
    plan: Plan,
    call: Call,
    index: int,
    carried: Tensor,
    projected: Tensor | None,
    masks: Tensor | None,
) -> Tensor:
    """That of initial state ``index``, after the driver has run."""
    # Not a view, though it may be dense: an op's results must not share memory.
    if projected is not None and index == 0:
        return projected[:, :, : call.width].clone(memory_format=torch.contiguous_format)
    found = carried[:, :, index, : call.hidden].clone(memory_format=torch.contiguous_format)
    if index == 0 and plan.recurrent_state:
        assert masks is not None
        found += carried[:, :, plan.recurrent_state, : call.hidden] * masks[:, 0, :, -1]
    return found
