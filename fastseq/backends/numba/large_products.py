"""The products that do not wait for the recurrence: one of all rows with one matrix each.

torch does them, with all its threads, straight into and out of the drivers' memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq.backends.numba.call import Call
from fastseq.backends.numba.weights import by_gate, by_slot
from fastseq.backends.reference_cells import CellWeights
from fastseq.cells.plan import Plan

__all__ = ["both_products", "input_gradient", "input_product", "weight_gradients"]


def input_product(plan: Plan, call: Call, w: CellWeights, records: Tensor) -> None:
    """``W_ih x + b_ih``, and ``b_hh`` of gates that are sums, into the slots of all rows."""
    if w.input is None:
        return
    units, hidden = call.units, call.hidden
    gates = plan.input_gates
    matrix = by_slot(w.input.contiguous(), gates, hidden, units)
    slots = records[:, : len(gates) * units]
    if w.input_bias is None:
        torch.mm(call.rows, matrix.t(), out=slots)
        return
    bias = by_slot(w.input_bias, gates, hidden, units)
    both = len(gates) - plan.hidden_first
    if both and w.hidden_bias is not None:
        sums = by_slot(w.hidden_bias, plan.hidden_gates, hidden, units)[: both * units]
        bias = bias.clone()
        bias[plan.hidden_first * units :] += sums
    torch.addmm(bias, call.rows, matrix.t(), out=slots)


def both_products(plan: Plan, call: Call, w: CellWeights, states: Tensor, records: Tensor) -> None:
    """All slots of a single step, from weights as they lie: packing them would take longer."""
    units, hidden = call.units, call.hidden
    from_input = from_hidden = None
    if w.input is not None:
        from_input = torch.nn.functional.linear(call.rows, w.input, w.input_bias)
    if w.hidden is not None:
        state = states[: call.rows.size(0), plan.recurrent_state, :hidden]
        from_hidden = torch.nn.functional.linear(state, w.hidden, w.hidden_bias)
    slots = records.view(call.rows.size(0), -1, units)
    if units != hidden:
        slots[:, : len(plan.slots)] = 0
    input_blocks, hidden_blocks = sorted(plan.input_gates), sorted(plan.hidden_gates)
    ordered = list(plan.input_gates) == input_blocks and units == hidden
    sums = from_input is not None and from_hidden is not None
    if sums and ordered and plan.input_gates == plan.hidden_gates:
        assert from_input is not None
        assert from_hidden is not None
        torch.add(from_input, from_hidden, out=records[:, : len(plan.slots) * units])
        return
    for index, slot in enumerate(plan.slots):
        parts = []
        if from_input is not None and slot.kind != "h":
            first = input_blocks.index(slot.gate) * hidden
            parts.append(from_input[:, first : first + hidden])
        if from_hidden is not None and slot.kind != "x":
            first = hidden_blocks.index(slot.gate) * hidden
            parts.append(from_hidden[:, first : first + hidden])
        to = slots[:, index, :hidden]
        if len(parts) == 2:
            torch.add(parts[0], parts[1], out=to)
        else:
            to.copy_(parts[0])


def input_gradient(
    plan: Plan, call: Call, by_direction: Sequence[CellWeights], gradients: Tensor, input: Tensor
) -> Tensor:
    """``sum over directions of gradient of W_ih x @ W_ih``, laid out as the input's rows are."""
    units, gates = call.units, plan.input_gates
    grad_rows = input.new_empty((call.rows.size(0), input.size(-1)))
    for direction, w in enumerate(by_direction):
        if w.input is None:
            grad_rows.zero_()
            continue
        matrix = by_slot(w.input.contiguous(), gates, call.hidden, units)
        from_slots = gradients[direction][:, : len(gates) * units]
        if direction:
            grad_rows.addmm_(from_slots, matrix)
        else:
            torch.mm(from_slots, matrix, out=grad_rows)
    if input.dim() == 2:
        return grad_rows
    first, second, features = input.shape
    inner_is_second = call.order.stride == 1
    batch_is_first = call.batch == first and call.steps == second
    if first == second:
        batch_is_first = call.output_order.stride != 1
    if inner_is_second != batch_is_first or first == 1 or second == 1:
        return grad_rows.view(first, second, features)
    return grad_rows.view(second, first, features).transpose(0, 1)


# The shorter a running sum, the more digits it keeps: the C++ kernels' longest, too.
_LONGEST_SUM = 256


def _sum_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """``left.t() @ right``, whose sums over rows go by way of the result in parts."""
    total = torch.mm(left[:_LONGEST_SUM].t(), right[:_LONGEST_SUM])
    for begin in range(_LONGEST_SUM, left.shape[0], _LONGEST_SUM):
        rows = slice(begin, begin + _LONGEST_SUM)
        total.addmm_(left[rows].t(), right[rows])
    return total


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
            before = records[:, column : column + call.width_units]
            grad = _sum_over_rows(from_hidden, before)[:, : call.width]
            grad = by_gate(grad.contiguous(), plan.hidden_gates, hidden, units)
        found.append(grad)
    sums = None
    if any(needs[len(found) :]):
        sums = gradients.sum(0)
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
