"""The slots of a few rows, from weights as they lie: dot products, which need nothing packed."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

from numba import types
from torch import Tensor

from fastseq.backends.numba import threads
from fastseq.backends.numba.compile import compiled, sources_digest
from fastseq.backends.numba.intrinsics import fill_zero, integer_at, part_number
from fastseq.backends.numba.matrix_pack import threads_for
from fastseq.backends.numba.matrix_vector import row_products

__all__ = ["fill_slots"]

_ROWS, _HIDDEN, _UNITS, _SLOTS = 3, 4, 5, 6
_RESULT, _RESULT_ROW = 7, 8
_OF_SLOTS = 9  # address of an array: for each slot twice weights and bias, 0 for none
_X, _X_ROW, _X_TERMS = 10, 11, 12  # what the first of the two multiply, [rows, terms]
_H, _H_ROW, _H_TERMS = 13, 14, 15

# Rows of weights that stay in a first-level cache while all rows of the factor pass.
_CHUNK = 16


@functools.cache
def _kernel(item_bytes: int) -> Any:
    sources = sources_digest()
    chunk = _CHUNK

    def slots(a: Any) -> None:
        sources  # noqa: B018
        part, parts = part_number(a[0], a[1]), a[2]
        rows, hidden, units, row = a[_ROWS], a[_HIDDEN], a[_UNITS], a[_RESULT_ROW]
        chunks = (hidden + chunk - 1) // chunk
        for task in range(part, a[_SLOTS] * chunks, parts):
            slot, first = task // chunks, task % chunks * chunk
            count = min(chunk, hidden - first)
            to = a[_RESULT] + (slot * units + first) * item_bytes
            if first + count == hidden:
                for i in range(rows):
                    pad = to + (i * row + count) * item_bytes
                    fill_zero(item_bytes, pad, units - hidden)
            filled = 0
            for operand in range(2):
                x, step, terms = a[_X], a[_X_ROW], a[_X_TERMS]
                if operand:
                    x, step, terms = a[_H], a[_H_ROW], a[_H_TERMS]
                w = integer_at(a[_OF_SLOTS], 4 * slot + 2 * operand)
                bias = integer_at(a[_OF_SLOTS], 4 * slot + 2 * operand + 1)
                if not w:
                    continue
                w += first * terms * item_bytes
                if bias:
                    bias += first * item_bytes
                i = 0
                while i < rows:
                    v = x + i * step * item_bytes
                    c = to + i * row * item_bytes
                    if rows - i >= 4:
                        if filled:
                            row_products(item_bytes, 1, 4, w, count, terms, v, step, bias, c, row)
                        else:
                            row_products(item_bytes, 0, 4, w, count, terms, v, step, bias, c, row)
                        i += 4
                    elif rows - i >= 2:
                        if filled:
                            row_products(item_bytes, 1, 2, w, count, terms, v, step, bias, c, row)
                        else:
                            row_products(item_bytes, 0, 2, w, count, terms, v, step, bias, c, row)
                        i += 2
                    else:
                        if filled:
                            row_products(item_bytes, 1, 1, w, count, terms, v, step, bias, c, row)
                        else:
                            row_products(item_bytes, 0, 1, w, count, terms, v, step, bias, c, row)
                        i += 1
                filled = 1
            if not filled:
                for i in range(rows):
                    fill_zero(item_bytes, to + i * row * item_bytes, count)

    return compiled(types.void(types.CPointer(types.int64)), slots)


def fill_slots(
    result: Tensor,
    hidden: int,
    units: int,
    of_slots: Sequence[tuple[int, int, int, int]],
    x: Tensor | None,
    h: Tensor | None,
) -> None:
    """``result[:, slot] = W_x x + b_x + W_h h + b_h`` for each slot, padded with zeros.

    Args:
        result: ``(rows, slots * units or more)``, last stride 1.
        hidden: values of a slot that exist.
        units: values of a slot in memory.
        of_slots: for each slot the addresses of ``W_x`` ``[hidden, terms]``, ``b_x`` ``[hidden]``
            and the same for h; 0 for none.
        x: ``(rows, terms)``, last stride 1; ``None`` if no slot has a ``W_x``.
        h: likewise.
    """
    item_bytes = result.element_size()
    array = (ctypes.c_int64 * (4 * len(of_slots)))(*(a for slot in of_slots for a in slot))
    rows, operands, terms = result.size(0), [], 0
    for operand in (x, h):
        if operand is None:
            operands += [0, 0, 0]
            continue
        operands += [operand.data_ptr(), operand.stride(0), operand.size(1)]
        terms += operand.size(1)
    values = (ctypes.c_int64 * 16)(
        0, 0, 0, rows, hidden, units, len(of_slots), result.data_ptr(), result.stride(0),
        ctypes.addressof(array), *operands,
    )  # fmt: skip
    # Weights are read once, whatever the number of rows: that is the time of few of them.
    work = len(of_slots) * hidden * terms * (rows + 3) // 4
    threads.run(_kernel(item_bytes), values, threads_for(work))
