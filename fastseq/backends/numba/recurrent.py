"""Tensors to the drivers' arguments, and the matrix products that do not wait for the recurrence.

The product with the input is one of all rows with one matrix, and so are the gradients of input and
weights: torch's own product does them, with all its threads, straight into and out of the drivers'
memory. The product inside the recurrence is ``product.py``'s.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq.backends.numba import arguments as at
from fastseq.backends.numba import drivers, threads
from fastseq.backends.numba.layout import (
    Ragged,
    Rows,
    as_rows,
    packed_rows,
    ragged,
    rows_of_output,
)
from fastseq.backends.numba.product import FEW_ROWS, product_kernel
from fastseq.backends.numba.vectors import lanes
from fastseq.backends.reference_cells import (
    CellWeights,
    direction_weights,
    weights_per_direction,
)
from fastseq.cells.plan import Plan

__all__ = ["Gradients", "backward", "forward", "padded_units", "reserve_elements"]


class Gradients(NamedTuple):
    """What :func:`backward` returns; ``None`` where nothing was asked for."""

    input: Tensor | None
    states: list[Tensor | None]
    weights: list[Tensor | None]


class _Call(NamedTuple):
    """Sizes and rows of one call."""

    steps: int
    batch: int
    hidden: int
    units: int
    directions: int
    rows: Tensor  # the input, [rows, I]
    order: Rows
    output_order: Rows
    alive: Tensor


def padded_units(hidden_size: int, item_bytes: int) -> int:
    """Units of a column in memory: whole tiles of two vectors. Sizes may be symbolic."""
    columns = 2 * lanes(item_bytes)
    return (hidden_size + columns - 1) // columns * columns


def reserve_elements(
    plan: Plan, rows: int, hidden_size: int, directions: int, item_bytes: int
) -> int:
    """Elements of what forward keeps for backward; sizes may be symbolic."""
    return rows * directions * plan.columns * padded_units(hidden_size, item_bytes)


def _hidden_size(plan: Plan, weights: Sequence[Tensor]) -> int:
    gates = len(plan.input_gates) or len(plan.hidden_gates)
    return weights[0].size(0) // gates


def _describe(
    plan: Plan,
    input: Tensor,
    weights: Sequence[Tensor],
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
) -> _Call:
    hidden = _hidden_size(plan, weights)
    units = padded_units(hidden, input.element_size())
    directions = 2 if bidirectional else 1
    if batch_sizes is not None:
        batch_sizes = batch_sizes.contiguous()
        steps = batch_sizes.size(0)
        batch = int(batch_sizes[0]) if steps else 0
        order = packed_rows(batch_sizes)
        rows = input if input.stride(1) == 1 else input.contiguous()
        return _Call(steps, batch, hidden, units, directions, rows, order, order, batch_sizes)
    first, second, _ = input.shape
    steps, batch = (second, first) if batch_first else (first, second)
    rows, order = as_rows(input, batch_first)
    alive = torch.full((steps,), batch)
    output_order = rows_of_output(steps, batch, batch_first)
    return _Call(steps, batch, hidden, units, directions, rows, order, output_order, alive)


def _slot_order(gates: Sequence[int]) -> list[int]:
    """Where the row block of each slot lies in a weight, whose blocks are in order of gates."""
    blocks = sorted(gates)
    return [blocks.index(gate) for gate in gates]


def _by_slot(weight: Tensor, gates: Sequence[int], hidden: int, units: int) -> Tensor:
    """``(G*H, ...)`` with row blocks in slot order, each padded with zeros to ``units``."""
    blocks = weight.view(len(gates), hidden, *weight.shape[1:])
    order = _slot_order(gates)
    ordered = order == list(range(len(order)))
    if units == hidden:
        return weight if ordered else blocks[order].flatten(0, 1)
    padded = weight.new_zeros((len(gates), units, *weight.shape[1:]))
    padded[:, :hidden] = blocks if ordered else blocks[order]
    return padded.flatten(0, 1)


def _by_gate(gradient: Tensor, gates: Sequence[int], hidden: int, units: int) -> Tensor:
    """The inverse of :func:`_by_slot`: ``(slots*units, ...)`` to ``(G*H, ...)``, dense."""
    blocks = gradient.view(len(gates), units, *gradient.shape[1:])[:, :hidden]
    order = _slot_order(gates)
    if order != list(range(len(order))):
        blocks = blocks[[order.index(block) for block in range(len(order))]]
    return blocks.reshape(len(gates) * hidden, *gradient.shape[1:])


def _packed_weights(plan: Plan, w_hh: Tensor, units: int) -> Tensor:
    """``(G*H, H)`` as panels ``[panel][term][column]`` for ``h @ W^T``."""
    hidden = w_hh.size(1)
    by_slot = _by_slot(w_hh.contiguous(), plan.hidden_gates, hidden, units)
    columns = 2 * lanes(w_hh.element_size())
    return by_slot.view(-1, columns, hidden).transpose(1, 2).contiguous()


def _packed_transpose(plan: Plan, w_hh: Tensor, units: int) -> Tensor:
    """``(G*H, H)`` as ``[slot][panel][term][column]`` for the sum over slots of ``g @ W``."""
    hidden = w_hh.size(1)
    gates = len(plan.hidden_gates)
    blocks = w_hh.view(gates, hidden, hidden)[_slot_order(plan.hidden_gates)]
    if units != hidden:
        blocks = torch.nn.functional.pad(blocks, (0, units - hidden))
    columns = 2 * lanes(w_hh.element_size())
    panels = blocks.view(gates, hidden, units // columns, columns)
    return panels.transpose(1, 2).contiguous()


def _columns(tensors: Sequence[Tensor], units: int, like: Tensor) -> Tensor:
    """Vectors ``(H)`` as rows ``(count, units)``, padded with zeros."""
    result = like.new_zeros((max(len(tensors), 1), units))
    for row, tensor in zip(result, tensors, strict=False):
        row[: tensor.size(0)] = tensor
    return result


def _padded_masks(masks: Tensor | None, units: int, like: Tensor) -> Tensor:
    """Masks ``(D, T or 1, B or 1, masks, H)`` with columns of ``units``."""
    if masks is None:
        return like.new_empty((2, 1, 1, 1, 0))
    if masks.size(-1) == units:
        return masks.contiguous()
    return torch.nn.functional.pad(masks, (0, units - masks.size(-1)))


class _Arguments:
    """The array of addresses and sizes, with all tensors in it kept alive."""

    def __init__(self, plan: Plan, call: _Call) -> None:
        self.values = (ctypes.c_int64 * at.SIZE)()
        self.kept: list[Tensor] = []
        values = self.values
        values[at.STEPS], values[at.BATCH] = call.steps, call.batch
        values[at.HIDDEN], values[at.UNITS] = call.hidden, call.units
        values[at.DIRECTIONS] = call.directions
        values[at.STRIDE], values[at.OUTPUT_STRIDE] = call.order.stride, call.output_order.stride
        values[at.OUTPUT_WIDTH] = call.directions * call.hidden
        values[at.FEW] = int(call.batch <= FEW_ROWS)
        values[at.COLUMNS] = plan.columns
        values[at.PRODUCT] = product_kernel(call.rows.element_size()).address
        self.address(at.ALIVE, call.alive)
        self.address(at.STARTS, call.order.starts)
        self.address(at.OUTPUT_STARTS, call.output_order.starts)
        self.directions = call.directions
        self.threads = max(1, min(torch.get_num_threads(), call.batch * call.directions))

    def address(self, index: int, tensor: Tensor) -> None:
        """Put the address of ``tensor`` there."""
        self.kept.append(tensor)
        self.values[index] = tensor.data_ptr()

    def of_direction(self, direction: int, index: int, tensor: Tensor) -> None:
        """The same for an argument that each direction has."""
        self.address(at.DIRECTION_FIRST + direction * at.DIRECTION_SIZE + index, tensor)

    def masks(self, masks: Tensor) -> None:
        """Masks ``(D, T or 1, B or 1, masks, units)``."""
        for direction in range(self.directions):
            self.of_direction(direction, at.MASKS, masks[direction])
            first = at.DIRECTION_FIRST + direction * at.DIRECTION_SIZE
            size = masks.size(3) * masks.size(4)
            sequences = masks.size(2) > 1
            self.values[first + at.MASK_SEQUENCE] = size if sequences else 0
            self.values[first + at.MASK_STEP] = size * masks.size(2) if masks.size(1) > 1 else 0

    def run(self, kernel: object) -> None:
        """Run the kernel on as many threads as torch uses."""
        threads.run(kernel, self.values, self.threads)


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
    return padded.reshape(-1, padded.size(-1)).index_select(0, how.index)


def _scattered(packed: Tensor, how: Ragged, shape: Sequence[int]) -> Tensor:
    padded = packed.new_zeros(tuple(shape))
    padded.view(-1, shape[-1]).index_copy_(0, how.index, packed)
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
    call = _describe(plan, input, weights, bidirectional, batch_first, batch_sizes)
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
    arguments = _Arguments(plan, call)
    arguments.values[at.COLUMNS] = columns
    arguments.address(at.OUTPUT, output)
    arguments.masks(_padded_masks(masks, units, input))
    for direction in range(directions):
        w = direction_weights(plan, weights, has_biases, direction)
        if call.steps > 1:
            _input_product(plan, call, w, records[direction])
        else:
            _both_products(plan, call, w, carried[direction], records[direction])
        arguments.of_direction(direction, at.RECORDS, records[direction])
        arguments.of_direction(direction, at.STATES, carried[direction])
        arguments.of_direction(direction, at.PARAMETERS, _columns(w.parameters, units, input))
        if w.hidden is None or call.steps == 1:
            continue
        alone = len(plan.slots) - plan.hidden_only
        bias = input.new_zeros((alone, units))
        if w.hidden_bias is not None and alone:
            by_slot = _by_slot(w.hidden_bias, plan.hidden_gates, hidden, units)
            bias = by_slot[-alone * units :].contiguous()
        arguments.of_direction(direction, at.HIDDEN_BIAS, bias)
        packed = _packed_weights(plan, w.hidden, units)
        arguments.of_direction(direction, at.WEIGHTS, packed)
    arguments.values[at.SAVE] = int(save)
    arguments.run(drivers.forward_kernel(plan, input.element_size()))
    kept = plan.states - (plan.recurrent_state > 0)
    # Not views of one tensor: an op's results must not share memory.
    final = [carried[:, :, index, :hidden].contiguous() for index in range(kept)]
    return output, final, reserve if save else None


def _initial_states(
    plan: Plan,
    states: Sequence[Tensor | None],
    masks: Tensor | None,
    call: _Call,
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


def _input_product(plan: Plan, call: _Call, w: CellWeights, records: Tensor) -> None:
    """``W_ih x + b_ih``, and ``b_hh`` of gates that are sums, into the slots of all rows."""
    if w.input is None:
        return
    units, hidden = call.units, call.hidden
    gates = plan.input_gates
    matrix = _by_slot(w.input.contiguous(), gates, hidden, units)
    slots = records[:, : len(gates) * units]
    if w.input_bias is None:
        torch.mm(call.rows, matrix.t(), out=slots)
        return
    bias = _by_slot(w.input_bias, gates, hidden, units)
    both = len(gates) - plan.hidden_first
    if both and w.hidden_bias is not None:
        sums = _by_slot(w.hidden_bias, plan.hidden_gates, hidden, units)[: both * units]
        bias = bias.clone()
        bias[plan.hidden_first * units :] += sums
    torch.addmm(bias, call.rows, matrix.t(), out=slots)


def _both_products(plan: Plan, call: _Call, w: CellWeights, states: Tensor, records: Tensor) -> None:
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
    if ordered and plan.input_gates == plan.hidden_gates:
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
    call = _describe(plan, input, weights, bidirectional, batch_first, batch_sizes)
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
    arguments = _Arguments(plan, call)
    if grad_output is not None:
        arguments.address(at.GRAD_OUTPUT, grad_output.contiguous())
    arguments.masks(_padded_masks(masks, units, input))
    by_direction = [
        direction_weights(plan, weights, has_biases, direction) for direction in range(directions)
    ]
    for direction, w in enumerate(by_direction):
        arguments.of_direction(direction, at.RECORDS, records[direction])
        arguments.of_direction(direction, at.GRADIENTS, gradients[direction])
        arguments.of_direction(direction, at.STATE_GRADIENTS, carried[direction])
        arguments.of_direction(direction, at.PARAMETERS, _columns(w.parameters, units, input))
        if w.hidden is not None:
            packed = _packed_transpose(plan, w.hidden.contiguous(), units)
            arguments.of_direction(direction, at.WEIGHTS, packed)
    arguments.run(drivers.backward_kernel(plan, input.element_size()))

    count = len(states)
    grad_input = None
    if needs[0]:
        grad_input = _input_gradient(plan, call, by_direction, gradients, input)
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
        found_weights += _weight_gradients(
            plan, call, by_direction[direction], gradients[direction], records[direction], wanted
        )
    return Gradients(grad_input, found_states, found_weights)


def _input_gradient(
    plan: Plan, call: _Call, by_direction: Sequence[CellWeights], gradients: Tensor, input: Tensor
) -> Tensor:
    """``sum over directions of gradient of W_ih x @ W_ih``, laid out as the input's rows are."""
    units, gates = call.units, plan.input_gates
    grad_rows = input.new_empty((call.rows.size(0), input.size(-1)))
    for direction, w in enumerate(by_direction):
        if w.input is None:
            grad_rows.zero_()
            continue
        matrix = _by_slot(w.input.contiguous(), gates, call.hidden, units)
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


def _weight_gradients(
    plan: Plan,
    call: _Call,
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
        grad = torch.mm(from_input.t(), call.rows) if next(wanted) else None
        found.append(None if grad is None else _by_gate(grad, plan.input_gates, hidden, units))
    if w.hidden is not None:
        grad = None
        if next(wanted):
            column = plan.recurrent_entry * units
            grad = torch.mm(from_hidden.t(), records[:, column : column + units])[:, :hidden]
            grad = _by_gate(grad.contiguous(), plan.hidden_gates, hidden, units)
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
                grad = _by_gate(part, gates, hidden, units).clone()
            found.append(grad)
    for index in range(len(w.parameters)):
        grad = None
        if next(wanted):
            assert sums is not None
            column = (len(plan.slots) + index) * units
            grad = sums[column : column + hidden].clone()
        found.append(grad)
    return found
