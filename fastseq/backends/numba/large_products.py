"""The products that do not wait for the recurrence: one of all rows with one matrix each.

They go straight into and out of the drivers' memory. Few rows meet weights as they lie, many pay
for a copy of the weights in panels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq.backends.numba.call import Call
from fastseq.backends.numba.matrix_pack import pack, panel_columns
from fastseq.backends.numba.matrix_product import as_it_lies, in_panels, multiply
from fastseq.backends.numba.matrix_rows import fill_slots
from fastseq.backends.numba.weights import (
    blocks_in_order,
    by_gate,
    by_slot,
    packed_transpose,
    packed_weights,
)
from fastseq.backends.reference_cells import CellWeights
from fastseq.cells.plan import Plan

__all__ = ["both_products", "input_gradient", "input_product", "weight_gradients"]

# Up to so many rows weights are read as they lie.
_FEW_ROWS = 32


def input_product(plan: Plan, call: Call, w: CellWeights, records: Tensor) -> None:
    """``W_ih x + b_ih``, and ``b_hh`` of gates that are sums, into the slots of all rows."""
    if w.input is None:
        return
    units, hidden, gates = call.units, call.hidden, plan.input_gates
    bias = None
    if w.input_bias is not None:
        bias = by_slot(w.input_bias, gates, hidden, units)
        both = len(gates) - plan.hidden_first
        if both and w.hidden_bias is not None:
            sums = by_slot(w.hidden_bias, plan.hidden_gates, hidden, units)[: both * units]
            bias = bias.clone()
            bias[plan.hidden_first * units :] += sums
    if call.rows.size(0) <= _FEW_ROWS:
        size = w.input.element_size()
        block = hidden * w.input.size(1) * size
        address = w.input.data_ptr()
        biases = [0] * len(gates)
        if bias is not None:
            biases = [bias.data_ptr() + slot * units * size for slot in range(len(gates))]
        of_slots = [
            (address + number * block, at, 0, 0)
            for number, at in zip(blocks_in_order(gates), biases, strict=True)
        ]
        fill_slots(records, hidden, units, of_slots, call.rows, None)
        return
    slots = records[:, : len(gates) * units]
    if bias is not None:
        slots.copy_(bias)
    _multiply_by_slot(call.rows, w.input, gates, hidden, slots, add=bias is not None)


def _multiply_by_slot(
    rows: Tensor, weight: Tensor, gates: Sequence[int], hidden: int, slots: Tensor, add: bool
) -> None:
    """``slots (+)= rows @ weight^T``, the columns in slot order and padded."""
    packed = packed_weights(weight, gates, hidden, slots.size(1) // len(gates))
    right = in_panels(packed.unsqueeze(0), slots.size(1))
    multiply(rows, right, slots, add=add)


def both_products(plan: Plan, call: Call, w: CellWeights, states: Tensor, records: Tensor) -> None:
    """All slots of a single step.

    Few rows take weights as they lie: packing them would take longer.
    """
    if call.rows.size(0) <= _FEW_ROWS:
        _both_of_few_rows(plan, call, w, states, records)
        return
    units, hidden = call.units, call.hidden
    slots = records[:, : len(plan.slots) * units]
    slots.zero_()
    for gates, first, bias in (
        (plan.input_gates, 0, w.input_bias),
        (plan.hidden_gates, plan.hidden_first, w.hidden_bias),
    ):
        if bias is not None:
            part = slots[:, first * units : (first + len(gates)) * units]
            part += by_slot(bias, gates, hidden, units)
    if w.input is not None:
        part = slots[:, : len(plan.input_gates) * units]
        _multiply_by_slot(call.rows, w.input, plan.input_gates, hidden, part, add=True)
    if w.hidden is not None:
        state = states[: call.rows.size(0), plan.recurrent_state, :hidden]
        part = slots[:, plan.hidden_first * units :]
        _multiply_by_slot(state, w.hidden, plan.hidden_gates, hidden, part, add=True)


def _both_of_few_rows(
    plan: Plan, call: Call, w: CellWeights, states: Tensor, records: Tensor
) -> None:
    hidden = call.hidden
    state = None
    if w.hidden is not None:
        state = states[: call.rows.size(0), plan.recurrent_state, :hidden]
    input_blocks, hidden_blocks = sorted(plan.input_gates), sorted(plan.hidden_gates)
    of_slots = []
    for slot in plan.slots:
        addresses = []
        for matrix, bias, blocks, other in (
            (w.input, w.input_bias, input_blocks, "h"),
            (w.hidden, w.hidden_bias, hidden_blocks, "x"),
        ):
            if matrix is None or slot.kind == other:
                addresses += [0, 0]
                continue
            first = blocks.index(slot.gate) * hidden
            addresses += [
                matrix.data_ptr() + first * matrix.size(1) * matrix.element_size(),
                0 if bias is None else bias.data_ptr() + first * bias.element_size(),
            ]
        of_slots.append((addresses[0], addresses[1], addresses[2], addresses[3]))
    fill_slots(records, hidden, call.units, of_slots, call.rows, state)


def input_gradient(
    plan: Plan, call: Call, by_direction: Sequence[CellWeights], gradients: Tensor, input: Tensor
) -> Tensor:
    """``sum over directions of gradient of W_ih x @ W_ih``, laid out as the input's rows are."""
    units, gates, hidden = call.units, plan.input_gates, call.hidden
    rows, features = call.rows.size(0), input.size(-1)
    columns = panel_columns(input.element_size())
    # Whole panels are written, of which the last may stick out.
    width = (features + columns - 1) // columns * columns
    wide = input.new_empty((rows, width))
    for direction, w in enumerate(by_direction):
        if w.input is None:
            wide.zero_()
            continue
        from_slots = gradients[direction][:, : len(gates) * units]
        order, matrix = blocks_in_order(gates), w.input.contiguous()
        add = direction > 0
        if rows > _FEW_ROWS:
            right = in_panels(packed_transpose(matrix, gates, hidden, width), features)
            multiply(from_slots, right, wide, left_step=units, add=add)
        elif units == hidden and order == sorted(order):
            multiply(from_slots, as_it_lies(matrix, [0], matrix.size(0)), wide, add=add)
        else:
            right = as_it_lies(matrix, order, hidden)
            multiply(from_slots, right, wide, left_step=units, add=add)
    grad_rows = wide[:, :features].contiguous()
    if input.dim() == 2:
        return grad_rows
    first, second, _ = input.shape
    inner_is_second = call.order.stride == 1
    batch_is_first = call.batch == first and call.steps == second
    if first == second:
        batch_is_first = call.output_order.stride != 1
    if inner_is_second != batch_is_first or first == 1 or second == 1:
        return grad_rows.view(first, second, features)
    return grad_rows.view(second, first, features).transpose(0, 1)


# torch's library is faster at products this large whose left factor is read across its rows (a
# quarter of LSTM's and GRU's training at B32 H512). Where columns fill whole panels its bits were
# the same for one to four threads on the processor where others were not (docs/numba.md).
_TORCHS_WORK = 1 << 26
# The shorter a running sum, the more digits it keeps: the C++ kernels' longest, too.
_LONGEST_SUM = 256


def _sum_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """``left.t() @ right``, whose sums over rows go by way of the result in parts."""
    rows, columns = right.shape
    of_panel = panel_columns(right.element_size())
    if columns % of_panel == 0 and rows * columns * left.shape[1] >= _TORCHS_WORK:
        total = torch.mm(left[:_LONGEST_SUM].t(), right[:_LONGEST_SUM])
        for begin in range(_LONGEST_SUM, rows, _LONGEST_SUM):
            part = slice(begin, begin + _LONGEST_SUM)
            total.addmm_(left[part].t(), right[part])
        return total
    panels = (columns + of_panel - 1) // of_panel
    if rows <= _FEW_ROWS:
        factor = as_it_lies(right, [0], rows)
    else:
        packed = right.new_empty((1, panels, rows, of_panel))
        steps = (0, rows * of_panel)
        pack([right.data_ptr()], rows, columns, (right.stride(0), 1), packed, steps, panels)
        factor = in_panels(packed, columns)
    wide = right.new_empty((left.shape[1], panels * of_panel))
    multiply(left.t(), factor, wide)
    return wide[:, :columns].contiguous()


def _column_sums(rows: Tensor) -> Tensor:
    """Sums of eight rows, and of those in float64.

    A bias has few gradients of many terms, which partly cancel: a running sum of all of them in
    float32 errs as much as everything before it. All of it in float64 would take ten times as long.
    """
    together = 8
    whole = rows.shape[0] // together * together
    parts = rows[:whole].unflatten(0, (-1, together)).sum(1)
    total = parts.sum(0, dtype=torch.float64) + rows[whole:].sum(0, dtype=torch.float64)
    return total.to(rows.dtype)


def weight_gradients(
    plan: Plan,
    call: Call,
    w: CellWeights,
    gradients: Tensor,
    records: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of one direction's weights, in their order."""
    units, hidden = call.units, call.hidden
    wanted = iter(needs)
    from_input = gradients[:, : len(plan.input_gates) * units]
    from_hidden = gradients[:, plan.hidden_first * units : len(plan.slots) * units]
    found: list[Tensor | None] = []
    if w.input is not None:
        grad = _sum_over_rows(from_input, call.rows) if next(wanted) else None
        found.append(None if grad is None else by_gate(grad, plan.input_gates, hidden, units))
    if w.hidden is not None:
        grad = None
        if next(wanted):
            column = plan.recurrent_entry * units
            if call.projected:
                column = plan.columns * units
            grad = _sum_over_rows(from_hidden, records[:, column : column + call.width])
            grad = by_gate(grad, plan.hidden_gates, hidden, units)
        found.append(grad)
    sums = None
    if any(needs[len(found) :]):
        sums = _column_sums(gradients)
    for bias, gates, first in (
        (w.input_bias, plan.input_gates, 0),
        (w.hidden_bias, plan.hidden_gates, plan.hidden_first),
    ):
        if bias is not None:
            grad = None
            if next(wanted):
                assert sums is not None
                part = sums[first * units : (first + len(gates)) * units]
                grad = by_gate(part, gates, hidden, units).clone()
            found.append(grad)
    for index in range(len(w.parameters)):
        grad = None
        if next(wanted):
            assert sums is not None
            column = (len(plan.slots) + index) * units
            grad = sums[column : column + hidden].clone()
        found.append(grad)
    if w.projection is not None:
        grad = None
        if next(wanted):
            column = plan.gradient_columns * units
            of_projected = gradients[:, column : column + call.width]
            column = plan.recurrent_entry * units
            grad = _sum_over_rows(of_projected, records[:, column : column + hidden])
        found.append(grad)
    return found
