"""Sizes and rows of a call, and the array of numbers in which a driver gets them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq.backends.numba import arguments as at
from fastseq.backends.numba import threads
from fastseq.backends.numba.layout import Rows, as_rows, packed_rows, rows_of_output
from fastseq.backends.numba.product import FEW_ROWS, product_kernel
from fastseq.backends.numba.weights import padded_units
from fastseq.cells.plan import Plan

__all__ = ["Arguments", "Call", "describe"]


class Call(NamedTuple):
    """Sizes and rows of one call."""

    steps: int
    batch: int
    hidden: int
    units: int
    directions: int
    width: int  # of a hidden state: hidden, or the projection's size
    rows: Tensor  # the input, [rows, I]
    order: Rows
    output_order: Rows
    alive: Tensor | None

    @property
    def projected(self) -> bool:
        """Whether the hidden state is projected: to fewer values than there are units."""
        return self.width != self.hidden

    @property
    def width_units(self) -> int:
        """What ``width`` is padded to."""
        return padded_units(self.width, self.rows.element_size())

    @property
    def extra(self) -> int:
        """Elements behind the columns of a record that is kept, and of a row of gradients."""
        return self.width_units if self.projected else 0


def _hidden_size(plan: Plan, weights: Sequence[Tensor]) -> int:
    gates = len(plan.input_gates) or len(plan.hidden_gates)
    return weights[0].size(0) // gates


def describe(
    plan: Plan,
    input: Tensor,
    weights: Sequence[Tensor],
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
) -> Call:
    """Sizes and rows; the input is copied only where its rows are not dense."""
    hidden = _hidden_size(plan, weights)
    units = padded_units(hidden, input.element_size())
    directions = 2 if bidirectional else 1
    width = hidden
    if plan.hidden_gates:
        width = weights[1 if plan.input_gates else 0].size(1)
    if batch_sizes is not None:
        batch_sizes = batch_sizes.contiguous()
        steps = batch_sizes.size(0)
        batch = int(batch_sizes[0]) if steps else 0
        order = packed_rows(batch_sizes)
        rows = input if input.stride(1) == 1 else input.contiguous()
        return Call(steps, batch, hidden, units, directions, width, rows, order, order, batch_sizes)
    first, second, _ = input.shape
    steps, batch = (second, first) if batch_first else (first, second)
    rows, order = as_rows(input, batch_first)
    output_order = rows_of_output(steps, batch, batch_first)
    return Call(steps, batch, hidden, units, directions, width, rows, order, output_order, None)


class Arguments:
    """The array of addresses and sizes, with all tensors in it kept alive."""

    def __init__(self, call: Call, record_size: int) -> None:
        self.values = (ctypes.c_int64 * at.SIZE)()
        self.kept: list[Tensor] = []
        values = self.values
        values[at.STEPS], values[at.BATCH] = call.steps, call.batch
        values[at.HIDDEN], values[at.UNITS] = call.hidden, call.units
        values[at.DIRECTIONS] = call.directions
        values[at.STRIDE], values[at.OUTPUT_STRIDE] = call.order.stride, call.output_order.stride
        values[at.OUTPUT_WIDTH] = call.directions * call.width
        values[at.WIDTH], values[at.WIDTH_UNITS] = call.width, call.width_units
        values[at.FEW] = int(call.batch <= FEW_ROWS)
        values[at.RECORD_SIZE] = record_size
        values[at.PRODUCT] = product_kernel(call.rows.element_size()).address
        values[at.STEP], values[at.OUTPUT_STEP] = call.order.step, call.output_order.step
        if call.alive is not None:
            assert call.order.starts is not None
            self.address(at.ALIVE, call.alive)
            self.address(at.STARTS, call.order.starts)
            self.address(at.OUTPUT_STARTS, call.order.starts)
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
