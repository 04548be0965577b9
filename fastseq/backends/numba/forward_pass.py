"""One layer forward, all sequences in dense or packed rows: products, then the driver."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq import _recorder
from fastseq.backends.numba import arguments as at
from fastseq.backends.numba import drivers, step, unit_parts
from fastseq.backends.numba.call import Arguments, Call, describe
from fastseq.backends.numba.large_products import both_products, input_product
from fastseq.backends.numba.weights import as_columns, by_slot, packed_weights, padded_masks
from fastseq.backends.reference_cells import CellWeights, direction_weights
from fastseq.cells.plan import Plan

__all__ = ["forward_rows"]


def forward_rows(
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
    """As :func:`fastseq.backends.numba.recurrent.forward`, without lengths.

    ``batch``: sequences, where some have no row at all; ``capacity``: rows that the reserve is to
    have room for.
    """
    _recorder.enter("states")
    weights = [w if w.is_contiguous() else w.contiguous() for w in weights]
    call = describe(plan, input, weights, bidirectional, batch_first, batch_sizes)
    if batch is not None:
        call = call._replace(batch=batch)
    directions = call.directions
    record_size = (plan.columns if save else len(plan.slots)) * call.units
    if save:
        record_size += call.extra
    row_count = call.rows.size(0)
    size = directions * record_size
    reserve = input.new_empty(max(row_count, capacity) * size)
    records = reserve[: row_count * size].view(directions, row_count, record_size)
    output = input.new_empty((*input.shape[:-1], directions * call.width))
    carried = _initial_states(plan, states, masks, call, input)
    projected = None
    if call.projected:
        projected = input.new_zeros((directions, call.batch, call.width_units))
        if states and states[0] is not None:
            projected[:, :, : call.width] = states[0]
    if masks is not None:
        masks = padded_masks(masks, call.units)
    by_direction = direction_weights(plan, weights, has_biases, directions)
    if call.steps == 1 and not call.projected and step.is_small(call.batch, weights):
        _one_step(plan, call, by_direction, carried, masks, records, output, save)
    else:
        _all_steps(plan, call, by_direction, carried, projected, masks, records, output, save)
    _recorder.enter("states")
    kept = plan.states - (plan.recurrent_state > 0)
    # Not views of one tensor: an op's results must not share memory.
    final = [carried[:, :, index, : call.hidden].clone() for index in range(kept)]
    if projected is not None:
        final[0] = projected[:, :, : call.width].clone()
    return output, final, reserve if save else None


def _initial_states(
    plan: Plan,
    states: Sequence[Tensor | None],
    masks: Tensor | None,
    call: Call,
    like: Tensor,
) -> Tensor:
    """States before the first step, ``(D, B, states, units)``, but for a projected one."""
    shape = (call.directions, call.batch, plan.states, call.units)
    carried = like.new_zeros(shape)
    for index, state in enumerate(states):
        if state is not None and not (call.projected and index == 0):
            carried[:, :, index, : call.hidden] = state
    if plan.recurrent_state and states and states[0] is not None:
        assert masks is not None
        carried[:, :, plan.recurrent_state, : call.hidden] = states[0] * masks[:, 0, :, -1]
    return carried


def _one_step(
    plan: Plan,
    call: Call,
    by_direction: Sequence[CellWeights],
    carried: Tensor,
    masks: Tensor | None,
    records: Tensor,
    output: Tensor,
    save: bool,
) -> None:
    """A single step of a few sequences; ``carried``, ``records`` and ``output`` are written."""
    _recorder.enter("single step")
    rows = output.view(call.batch, output.size(-1))
    for direction, w in enumerate(by_direction):
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
            rows[:, first : first + call.hidden],
            save,
        )


def _all_steps(
    plan: Plan,
    call: Call,
    by_direction: Sequence[CellWeights],
    carried: Tensor,
    projected: Tensor | None,
    masks: Tensor | None,
    records: Tensor,
    output: Tensor,
    save: bool,
) -> None:
    """The driver over time; ``carried``, ``projected``, ``records`` and ``output`` are written."""
    units, hidden = call.units, call.hidden
    arguments = Arguments(call, records.size(-1))
    arguments.address(at.OUTPUT, output)
    if masks is not None:
        arguments.masks(masks)
    # Packing the weights for one step would take longer than their product.
    products = call.steps == 1 and not call.projected
    for direction, w in enumerate(by_direction):
        _recorder.enter("products" if products else "input product")
        if products:
            both_products(plan, call, w, carried[direction], records[direction])
        else:
            input_product(plan, call, w, records[direction])
        _recorder.enter("pack")
        arguments.of_direction(direction, at.RECORDS, records[direction])
        arguments.of_direction(direction, at.STATES, carried[direction])
        if w.parameters:
            columns_of = as_columns(w.parameters, units, carried)
            arguments.of_direction(direction, at.PARAMETERS, columns_of)
        if w.hidden is None or products:
            continue
        alone = len(plan.slots) - plan.hidden_only
        bias = carried.new_zeros((alone, units))
        if w.hidden_bias is not None and alone:
            blocks = by_slot(w.hidden_bias, plan.hidden_gates, hidden, units)
            bias = blocks[-alone * units :].contiguous()
        arguments.of_direction(direction, at.HIDDEN_BIAS, bias)
        packed = packed_weights(w.hidden, plan.hidden_gates, hidden, units)
        arguments.of_direction(direction, at.WEIGHTS, packed)
        if w.projection is not None:
            assert projected is not None
            packed = packed_weights(w.projection, (0,), call.width, call.width_units)
            arguments.of_direction(direction, at.PROJECTION, packed)
            arguments.of_direction(direction, at.PROJECTED, projected[direction])
    arguments.values[at.SAVE] = int(save)
    _recorder.enter("gate update" if products else "recurrence")
    threads = torch.get_num_threads()
    if not products and unit_parts.shares_units(call, by_direction[0].hidden, threads):
        unit_parts.prepare(arguments, threads)
        arguments.run(unit_parts.forward_kernel(plan, carried.element_size()))
    else:
        arguments.run(drivers.forward_kernel(plan, carried.element_size()))
