"""One sequence through all steps, its units shared out among the threads.

The driver in ``drivers.py`` gives every thread sequences of its own. A single one would leave all
but one thread idle, and where the recurrent weights pass what a core's cache holds, that one reads
them from further away at every step. Here each thread has a range of units and the weights that
make them; threads meet twice a step, before and after the states change. An element's terms are
added up as in the other driver: the bits are the same.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from numba import types
from torch import Tensor

from fastseq.backends.numba.arguments import (
    ALIVE,
    BARRIER,
    DIRECTION_FIRST,
    FEW,
    GIVE_WAY,
    HIDDEN,
    HIDDEN_BIAS,
    MASK_STEP,
    MASKS,
    OUTPUT,
    OUTPUT_STARTS,
    OUTPUT_STEP,
    OUTPUT_WIDTH,
    PARAMETERS,
    PRODUCT,
    RECORD_SIZE,
    RECORDS,
    SAVE,
    STARTS,
    STATES,
    STEP,
    STEPS,
    UNITS,
    WEIGHTS,
)
from fastseq.backends.numba.call import Arguments, Call
from fastseq.backends.numba.compile import compiled, sources_digest
from fastseq.backends.numba.intrinsics import (
    PLANS,
    barrier,
    cell_forward,
    copy,
    integer_at,
    part_number,
    product,
)
from fastseq.backends.numba.threads import openmp_library
from fastseq.backends.numba.vectors import lanes
from fastseq.cells.plan import Plan

__all__ = ["forward_kernel", "prepare", "shares_units"]

# With less, two threads take longer to meet than one to read the weights.
_LEAST_WEIGHT_BYTES = 512 << 10


def shares_units(call: Call, hidden_weights: Tensor | None, threads: int) -> bool:
    """Whether a call is for this module."""
    return (
        threads > 1
        and call.batch == 1
        and call.directions == 1
        and not call.projected
        and hidden_weights is not None
        and hidden_weights.nbytes >= _LEAST_WEIGHT_BYTES
        and openmp_library() is not None
    )


@functools.cache
def _give_way_address() -> int:
    return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0


def prepare(arguments: Arguments, threads: int) -> None:
    """What :func:`forward_kernel` needs besides the arguments of the other driver."""
    arguments.address(BARRIER, torch.zeros(1, dtype=torch.int64))
    arguments.values[GIVE_WAY] = _give_way_address()
    arguments.threads = threads


@functools.cache
def forward_kernel(plan: Plan, item_bytes: int) -> Any:
    """The forward driver of a cell for one sequence in one direction."""
    PLANS[plan.key] = plan
    sources = sources_digest()  # part of the closure, and so of what Numba's cache goes by
    key = plan.key
    recurrent_state = plan.recurrent_state
    hidden_first = plan.hidden_first
    hidden_only = plan.hidden_only
    slots = len(plan.slots)
    panel_columns = 2 * lanes(item_bytes)

    def forward_of_one(a: Any) -> None:
        sources  # noqa: B018
        part, parts = part_number(a[0], a[1]), a[2]
        units, hidden = a[UNITS], a[HIDDEN]
        d = DIRECTION_FIRST
        panels = units // panel_columns
        first_panel = panels * part // parts
        own_panels = panels * (part + 1) // parts - first_panel
        first, count = first_panel * panel_columns, own_panels * panel_columns
        own = first * item_bytes
        panel_stride = hidden * panel_columns
        states = a[d + STATES]
        for t in range(a[STEPS]):
            if a[ALIVE] and integer_at(a[ALIVE], t) == 0:
                break  # the sequence is shorter than its tensor
            row = integer_at(a[STARTS], t) if a[STARTS] else t * a[STEP]
            record = a[d + RECORDS] + row * a[RECORD_SIZE] * item_bytes + own
            for slot in range(hidden_first, slots):
                to = record + slot * units * item_bytes
                if slot >= hidden_only and a[d + HIDDEN_BIAS]:
                    bias = a[d + HIDDEN_BIAS] + (slot - hidden_only) * units * item_bytes
                    copy(item_bytes, to, bias + own, count)
                panel = (slot - hidden_first) * panels + first_panel
                product(
                    a[PRODUCT],
                    states + recurrent_state * units * item_bytes,
                    units,
                    1,
                    1,
                    a[d + WEIGHTS] + panel * panel_stride * item_bytes,
                    panel_columns,
                    panel_stride,
                    hidden,
                    own_panels,
                    to,
                    a[RECORD_SIZE],
                    a[FEW],
                )
            barrier(a[BARRIER], parts, a[GIVE_WAY])
            factors = a[d + MASKS] + t * a[d + MASK_STEP] * item_bytes + own
            learned = a[d + PARAMETERS] + own
            state = states + own
            if a[SAVE]:
                cell_forward(key, item_bytes, 1, units, count, record, state, learned, factors)
            else:
                cell_forward(key, item_bytes, 0, units, count, record, state, learned, factors)
            barrier(a[BARRIER], parts, a[GIVE_WAY])
            row = integer_at(a[OUTPUT_STARTS], t) if a[OUTPUT_STARTS] else t * a[OUTPUT_STEP]
            output = a[OUTPUT] + row * a[OUTPUT_WIDTH] * item_bytes
            copy(item_bytes, output + own, state, max(0, min(count, hidden - first)))

    return compiled(types.void(types.CPointer(types.int64)), forward_of_one)
