"""A single step of a few sequences, from weights as they lie: streaming.

One call of one compiled function does it all, on the thread that calls: a team of threads takes
longer to wake than such a step does to compute.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

from numba import types
from torch import Tensor

from fastseq.backends.numba.compile import compiled, sources_digest
from fastseq.backends.numba.intrinsics import PLANS, cell_forward, copy, fill_zero
from fastseq.backends.numba.matrix_vector import row_products
from fastseq.backends.numba.weights import padded_units
from fastseq.backends.reference_cells import CellWeights
from fastseq.cells.plan import Plan

__all__ = ["is_small", "run", "run_alone"]

# More sequences read weights more often than a matrix product would, and weights beyond a second-
# level cache are read faster by all threads.
_MOST_SEQUENCES = 4
_MOST_WEIGHTS_BYTES = 1 << 20

# Places of the arguments: addresses, and sizes in elements.
_ROWS, _HIDDEN, _UNITS, _FEATURES = 0, 1, 2, 3
_INPUT, _INPUT_STRIDE = 4, 5  # [rows, features], from row to row
_W_INPUT, _W_HIDDEN = 6, 7  # [gates * hidden, features], [gates * hidden, hidden]; 0: none
_B_INPUT, _B_HIDDEN = 8, 9  # [gates * hidden]; 0: none
_RECORDS, _RECORD_STRIDE = 10, 11  # [rows, columns, units], from row to row
_STATES, _STATE_STRIDE = 12, 13  # [rows, states, units], from row to row
_PARAMETERS = 14  # [parameters, units]
_MASKS, _MASK_STRIDE = 15, 16  # [rows or 1, masks, units], from row to row
_OUTPUT, _OUTPUT_STRIDE = 17, 18  # [rows, hidden], from row to row
_SAVE = 19  # 1: keep entries for backward
_ALONE = 20  # 1: states come from _FIRST_STATE and go to it, not from and to _STATES
_FIRST_STATE = 21  # for each state where it comes from, 0 for zeros, and where it goes: [rows, H]
# Behind these, for each slot which row block of _W_INPUT and which of _W_HIDDEN makes it, or -1.


def is_small(sequences: int, weights: Sequence[Tensor | None]) -> bool:
    """Whether a step of so many sequences is for this module; all of a layer's weights count."""
    if sequences > _MOST_SEQUENCES:
        return False
    size = 0
    for tensor in weights:
        if tensor is not None:
            size += tensor.nbytes
    return size <= _MOST_WEIGHTS_BYTES


@functools.cache
def _blocks(plan: Plan) -> tuple[int, ...]:
    """The last arguments, which depend on nothing but the cell."""
    of_input, of_hidden = sorted(plan.input_gates), sorted(plan.hidden_gates)
    found = []
    for kind, gate in plan.slots:
        found.append(-1 if kind == "h" else of_input.index(gate))
        found.append(-1 if kind == "x" else of_hidden.index(gate))
    return tuple(found)


@functools.cache
def _kernel(plan: Plan, item_bytes: int) -> Any:
    """The step of a cell."""
    PLANS[plan.key] = plan
    sources = sources_digest()  # part of the closure, and so of what Numba's cache goes by
    key = plan.key
    states = plan.states
    recurrent_state = plan.recurrent_state
    slots = len(plan.slots)
    first_block = _FIRST_STATE + 2 * states

    def step(a: Any) -> None:
        sources  # noqa: B018
        hidden, units, features = a[_HIDDEN], a[_UNITS], a[_FEATURES]
        for row in range(a[_ROWS]):
            x = a[_INPUT] + row * a[_INPUT_STRIDE] * item_bytes
            record = a[_RECORDS] + row * a[_RECORD_STRIDE] * item_bytes
            state = a[_STATES] + row * a[_STATE_STRIDE] * item_bytes
            if a[_ALONE]:
                for index in range(states):
                    to = state + index * units * item_bytes
                    source = a[_FIRST_STATE + 2 * index]
                    fill_zero(item_bytes, to, units)
                    if source:
                        copy(item_bytes, to, source + row * hidden * item_bytes, hidden)
            h = state + recurrent_state * units * item_bytes
            for slot in range(slots):
                to = record + slot * units * item_bytes
                fill_zero(item_bytes, to, units)
                block = a[first_block + 2 * slot]
                if block >= 0:
                    first = block * hidden
                    weights = a[_W_INPUT] + first * features * item_bytes
                    bias = a[_B_INPUT] + first * item_bytes if a[_B_INPUT] else 0
                    row_products(item_bytes, 0, 1, weights, hidden, features, x, 0, bias, to, 0)
                block = a[first_block + 2 * slot + 1]
                if block >= 0:
                    first = block * hidden
                    weights = a[_W_HIDDEN] + first * hidden * item_bytes
                    bias = a[_B_HIDDEN] + first * item_bytes if a[_B_HIDDEN] else 0
                    row_products(item_bytes, 1, 1, weights, hidden, hidden, h, 0, bias, to, 0)
            factors = a[_MASKS] + row * a[_MASK_STRIDE] * item_bytes
            if a[_SAVE]:
                cell_forward(
                    key, item_bytes, 1, units, units, record, state, a[_PARAMETERS], factors
                )
            else:
                cell_forward(
                    key, item_bytes, 0, units, units, record, state, a[_PARAMETERS], factors
                )
            out = a[_OUTPUT] + row * a[_OUTPUT_STRIDE] * item_bytes
            copy(item_bytes, out, state, hidden)
            if a[_ALONE]:
                for index in range(states):
                    to = a[_FIRST_STATE + 2 * index + 1]
                    if to:
                        at = state + index * units * item_bytes
                        copy(item_bytes, to + row * hidden * item_bytes, at, hidden)

    return compiled(types.void(types.CPointer(types.int64)), step)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def run(
    plan: Plan,
    rows: Tensor,
    w: CellWeights,
    hidden: int,
    units: int,
    records: Tensor,
    states: Tensor,
    parameters: Tensor | None,
    masks: Tensor | None,
    output: Tensor,
    save: bool,
) -> None:
    """One step of one direction, in the driver's memory.

    Args:
        plan: the cell.
        rows: the input ``(B, I)``, last stride 1.
        w: the direction's weights, dense.
        hidden: H.
        units: what a column of memory holds.
        records: ``(B, columns * units)``, out.
        states: ``(B, states, units)``, before the step in, after it out.
        parameters: learned values ``(parameters, units)``.
        masks: ``(B or 1, masks, units)``, dense.
        output: ``(B, H)``, last stride 1, out.
        save: keep entries for backward.
    """
    batch = rows.size(0)
    mask_stride = 0 if masks is None or masks.size(0) == 1 else masks.stride(0)
    values = (
        batch,
        hidden,
        units,
        rows.size(1),
        rows.data_ptr(),
        rows.stride(0),
        _address(w.input),
        _address(w.hidden),
        _address(w.input_bias),
        _address(w.hidden_bias),
        records.data_ptr(),
        records.stride(0),
        states.data_ptr(),
        states.stride(0),
        _address(parameters),
        _address(masks),
        mask_stride,
        output.data_ptr(),
        output.stride(0),
        int(save),
        0,
        *(0,) * (2 * plan.states),
        *_blocks(plan),
    )
    _kernel(plan, rows.element_size()).ctypes((ctypes.c_int64 * len(values))(*values))


def run_alone(
    plan: Plan,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    outputs: Sequence[Tensor],
) -> None:
    """One step of a cell without masks and learned values, nothing kept; all tensors are dense.

    Args:
        plan: the cell.
        input: B rows of I.
        states: before the step, ``(..., B, H)`` each; ``None`` is zeros.
        weights: ``w_ih``, ``w_hh`` and, where there are biases, ``b_ih`` and ``b_hh``.
        outputs: the layer's output, B rows of H, and the states after the step, ``(..., B, H)``
            each; out.
    """
    item_bytes = input.element_size()
    features = input.size(-1)
    batch, hidden = outputs[1].shape[-2:]
    kernel, array, blocks = _prepared(plan, item_bytes)
    units = padded_units(hidden, item_bytes)
    slots, count = len(plan.slots), plan.states
    scratch = input.new_empty((slots + count) * units)
    first = scratch.data_ptr()
    carried: list[int] = []
    for before, after in zip(states, outputs[1:], strict=True):
        carried += (0 if before is None else before.data_ptr(), after.data_ptr())
    w_ih, w_hh, *biases = [tensor.data_ptr() for tensor in weights]
    b_ih, b_hh = biases or (0, 0)
    kernel(
        array(
            batch,
            hidden,
            units,
            features,
            input.data_ptr(),
            features,
            w_ih,
            w_hh,
            b_ih,
            b_hh,
            first,
            0,
            first + slots * units * item_bytes,
            0,
            0,
            0,
            0,
            outputs[0].data_ptr(),
            hidden,
            0,
            1,
            *carried,
            *blocks,
        )
    )


@functools.cache
def _prepared(plan: Plan, item_bytes: int) -> tuple[Any, Any, tuple[int, ...]]:
    """What is the same at every call: the function, the kind of its argument and that one's end."""
    blocks = _blocks(plan)
    size = _FIRST_STATE + 2 * plan.states + len(blocks)
    return _kernel(plan, item_bytes).ctypes, ctypes.c_int64 * size, blocks
