"""The loops over time, for any cell: forward, and backward through time.

A task is one direction and every n-th of its sequences, from the first step to the last, so that
threads never wait for each other. Sequences are dealt out in turn because packed ones come longest
first. Matrix products that do not wait for the recurrence (with the input, and those of all weight
gradients) happen before and after, in ``large_products.py``.

Nothing in here is specific to a cell but its key, by which Numba files the compiled code.
"""

from __future__ import annotations

import functools
from typing import Any

from numba import types

from fastseq.backends.numba.arguments import (
    ALIVE,
    BATCH,
    DIRECTION_FIRST,
    DIRECTION_SIZE,
    DIRECTIONS,
    FEW,
    GRAD_OUTPUT,
    GRADIENTS,
    HIDDEN,
    HIDDEN_BIAS,
    MASK_SEQUENCE,
    MASK_STEP,
    MASKS,
    OUTPUT,
    OUTPUT_STARTS,
    OUTPUT_STEP,
    OUTPUT_STRIDE,
    OUTPUT_WIDTH,
    PARAMETERS,
    PRODUCT,
    PROJECTED,
    PROJECTION,
    RECORD_SIZE,
    RECORDS,
    SAVE,
    STARTS,
    STATE_GRADIENTS,
    STATES,
    STEP,
    STEPS,
    STRIDE,
    UNITS,
    WEIGHTS,
    WIDTH,
    WIDTH_UNITS,
)
from fastseq.backends.numba.compile import compiled, sources_digest
from fastseq.backends.numba.intrinsics import (
    PLANS,
    add_to,
    cell_backward,
    cell_forward,
    copy,
    fill_zero,
    integer_at,
    part_number,
    product,
)
from fastseq.backends.numba.vectors import lanes
from fastseq.cells.plan import Plan

__all__ = ["backward_kernel", "forward_kernel"]

_SIGNATURE = types.void(types.CPointer(types.int64))


@functools.cache
def forward_kernel(plan: Plan, item_bytes: int) -> Any:
    """The forward driver of a cell."""
    PLANS[plan.key] = plan
    sources = sources_digest()  # part of the closure, and so of what Numba's cache goes by
    key = plan.key
    states = plan.states
    recurrent_state = plan.recurrent_state
    hidden_first = plan.hidden_first
    hidden_only = plan.hidden_only
    slots = len(plan.slots)
    # What a projection multiplies takes the place of the state before the step, which no formula
    # of such a cell reads.
    unprojected = plan.recurrent_entry if plan.hidden_gates else 0
    columns = plan.columns
    panel_columns = 2 * lanes(item_bytes)

    def forward(a: Any) -> None:
        sources  # noqa: B018
        part, parts = part_number(a[0], a[1]), a[2]
        directions, units, hidden = a[DIRECTIONS], a[UNITS], a[HIDDEN]
        width, width_units, record_size = a[WIDTH], a[WIDTH_UNITS], a[RECORD_SIZE]
        splits = (parts + directions - 1) // directions
        for task in range(part, directions * splits, parts):
            direction, first = task // splits, task % splits
            d = DIRECTION_FIRST + direction * DIRECTION_SIZE
            states_first = a[d + STATES] + first * states * units * item_bytes
            # Where the product finds the hidden state.
            recurrent = states_first + recurrent_state * units * item_bytes
            recurrent_stride = splits * states * units
            if a[d + PROJECTION]:
                recurrent = a[d + PROJECTED] + first * width_units * item_bytes
                recurrent_stride = splits * width_units
            panels = (slots - hidden_first) * units // panel_columns
            for index in range(a[STEPS]):
                t = a[STEPS] - 1 - index if direction else index
                alive = integer_at(a[ALIVE], t) if a[ALIVE] else a[BATCH]
                rows = (alive - first + splits - 1) // splits
                if rows <= 0:
                    continue
                start = integer_at(a[STARTS], t) if a[STARTS] else t * a[STEP]
                row = start + first * a[STRIDE]
                record = a[d + RECORDS] + row * record_size * item_bytes
                record_stride = splits * a[STRIDE] * record_size
                if hidden_only < slots and a[d + HIDDEN_BIAS]:
                    for i in range(rows):
                        to = record + (i * record_stride + hidden_only * units) * item_bytes
                        copy(item_bytes, to, a[d + HIDDEN_BIAS], (slots - hidden_only) * units)
                if a[d + WEIGHTS]:
                    to = record + hidden_first * units * item_bytes
                    product(
                        a[PRODUCT],
                        recurrent,
                        recurrent_stride,
                        1,
                        rows,
                        a[d + WEIGHTS],
                        panel_columns,
                        width * panel_columns,
                        width,
                        panels,
                        to,
                        record_stride,
                        a[FEW],
                    )
                mask = (
                    a[d + MASKS]
                    + (t * a[d + MASK_STEP] + first * a[d + MASK_SEQUENCE]) * item_bytes
                )
                start = integer_at(a[OUTPUT_STARTS], t) if a[OUTPUT_STARTS] else t * a[OUTPUT_STEP]
                out = start + first * a[OUTPUT_STRIDE]
                output = a[OUTPUT] + (out * a[OUTPUT_WIDTH] + direction * width) * item_bytes
                for i in range(rows):
                    state = states_first + i * splits * states * units * item_bytes
                    slot = record + i * record_stride * item_bytes
                    factors = mask + i * splits * a[d + MASK_SEQUENCE] * item_bytes
                    learned = a[d + PARAMETERS]
                    if a[SAVE]:
                        cell_forward(
                            key, item_bytes, 1, units, units, slot, state, learned, factors
                        )
                    else:
                        cell_forward(
                            key, item_bytes, 0, units, units, slot, state, learned, factors
                        )
                    if a[d + PROJECTION]:
                        now = recurrent + i * recurrent_stride * item_bytes
                        if a[SAVE]:
                            to = slot + columns * units * item_bytes
                            copy(item_bytes, to, now, width)
                            to = slot + unprojected * units * item_bytes
                            copy(item_bytes, to, state, hidden)
                        fill_zero(item_bytes, now, width_units)
                if a[d + PROJECTION]:
                    product(
                        a[PRODUCT],
                        states_first,
                        splits * states * units,
                        1,
                        rows,
                        a[d + PROJECTION],
                        panel_columns,
                        hidden * panel_columns,
                        hidden,
                        width_units // panel_columns,
                        recurrent,
                        recurrent_stride,
                        a[FEW],
                    )
                for i in range(rows):
                    source = states_first + i * splits * states * units * item_bytes
                    if a[d + PROJECTION]:
                        source = recurrent + i * recurrent_stride * item_bytes
                    to = output + i * splits * a[OUTPUT_STRIDE] * a[OUTPUT_WIDTH] * item_bytes
                    copy(item_bytes, to, source, width)

    return compiled(_SIGNATURE, forward)


@functools.cache
def backward_kernel(plan: Plan, item_bytes: int) -> Any:
    """The way back through time: gradients of slots, learned values and initial states."""
    PLANS[plan.key] = plan
    sources = sources_digest()
    key = plan.key
    states = plan.states
    recurrent_state = plan.recurrent_state
    hidden_first = plan.hidden_first
    slots = len(plan.slots)
    gradient_columns = plan.gradient_columns
    panel_columns = 2 * lanes(item_bytes)

    def backward(a: Any) -> None:
        sources  # noqa: B018
        part, parts = part_number(a[0], a[1]), a[2]
        directions, units, hidden = a[DIRECTIONS], a[UNITS], a[HIDDEN]
        splits = (parts + directions - 1) // directions
        width, width_units, record_size = a[WIDTH], a[WIDTH_UNITS], a[RECORD_SIZE]
        for task in range(part, directions * splits, parts):
            direction, first = task // splits, task % splits
            d = DIRECTION_FIRST + direction * DIRECTION_SIZE
            states_first = a[d + STATE_GRADIENTS] + first * states * units * item_bytes
            # Where the gradient of the hidden state gathers.
            hidden_state, hidden_stride = states_first, splits * states * units
            recurrent = states_first + recurrent_state * units * item_bytes
            gradient_size, panels = gradient_columns * units, units // panel_columns
            if a[d + PROJECTION]:
                hidden_state = a[d + PROJECTED] + first * width_units * item_bytes
                hidden_stride = splits * width_units
                recurrent = hidden_state
                gradient_size += width_units
                panels = width_units // panel_columns
            recurrent_stride = hidden_stride
            for index in range(a[STEPS]):
                t = index if direction else a[STEPS] - 1 - index
                alive = integer_at(a[ALIVE], t) if a[ALIVE] else a[BATCH]
                rows = (alive - first + splits - 1) // splits
                if rows <= 0:
                    continue
                start = integer_at(a[STARTS], t) if a[STARTS] else t * a[STEP]
                row = start + first * a[STRIDE]
                record = a[d + RECORDS] + row * record_size * item_bytes
                record_stride = splits * a[STRIDE] * record_size
                gradient = a[d + GRADIENTS] + row * gradient_size * item_bytes
                gradient_stride = splits * a[STRIDE] * gradient_size
                mask = (
                    a[d + MASKS]
                    + (t * a[d + MASK_STEP] + first * a[d + MASK_SEQUENCE]) * item_bytes
                )
                start = integer_at(a[OUTPUT_STARTS], t) if a[OUTPUT_STARTS] else t * a[OUTPUT_STEP]
                out = start + first * a[OUTPUT_STRIDE]
                output = a[GRAD_OUTPUT] + (out * a[OUTPUT_WIDTH] + direction * width) * item_bytes
                if a[GRAD_OUTPUT]:
                    for i in range(rows):
                        arriving = i * splits * a[OUTPUT_STRIDE] * a[OUTPUT_WIDTH] * item_bytes
                        to = hidden_state + i * hidden_stride * item_bytes
                        add_to(item_bytes, to, output + arriving, width)
                if a[d + PROJECTION]:
                    product(
                        a[PRODUCT],
                        hidden_state,
                        hidden_stride,
                        1,
                        rows,
                        a[d + PROJECTION],
                        panel_columns,
                        width * panel_columns,
                        width,
                        units // panel_columns,
                        states_first,
                        splits * states * units,
                        a[FEW],
                    )
                    for i in range(rows):
                        source = hidden_state + i * hidden_stride * item_bytes
                        to = gradient + i * gradient_stride * item_bytes
                        copy(item_bytes, to + gradient_columns * units * item_bytes, source, width)
                        fill_zero(item_bytes, source, width_units)
                for i in range(rows):
                    state = states_first + i * splits * states * units * item_bytes
                    to = gradient + i * gradient_stride * item_bytes
                    cell_backward(
                        key,
                        item_bytes,
                        units,
                        record + i * record_stride * item_bytes,
                        to,
                        state,
                        a[d + PARAMETERS],
                        mask + i * splits * a[d + MASK_SEQUENCE] * item_bytes,
                    )
                    if hidden < units:
                        # What pads a column may be NaN, and the products to come would spread it.
                        for column in range(gradient_columns):
                            pad = to + (column * units + hidden) * item_bytes
                            fill_zero(item_bytes, pad, units - hidden)
                if a[d + WEIGHTS]:
                    size = hidden * panels * panel_columns * item_bytes
                    for slot in range(hidden_first, slots):
                        left = gradient + slot * units * item_bytes
                        weights = a[d + WEIGHTS] + (slot - hidden_first) * size
                        product(
                            a[PRODUCT],
                            left,
                            gradient_stride,
                            1,
                            rows,
                            weights,
                            panel_columns,
                            hidden * panel_columns,
                            hidden,
                            panels,
                            recurrent,
                            recurrent_stride,
                            a[FEW],
                        )

    return compiled(_SIGNATURE, backward)
