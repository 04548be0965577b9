"""Products of all rows with one matrix, from factors as they lie or in panels.

torch's products would do, but for their bits and digits: its library splits long sums over threads
where results are few, adds up the last columns in other ways for other numbers of threads, and how
it adds up may depend on how far apart rows lie. Here a thread has rows or columns of the result to
itself, and an element is summed up in the order of its terms, in parts of 256 that are added to
memory, whatever the thread and its share.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from numba import types
from torch import Tensor

from fastseq.backends.numba import threads
from fastseq.backends.numba.compile import compiled, sources_digest
from fastseq.backends.numba.intrinsics import (
    fill_zero,
    integer_at,
    part_number,
    product,
)
from fastseq.backends.numba.matrix_pack import pack, panel_columns, threads_for
from fastseq.backends.numba.product import FEW_ROWS, product_kernel
from fastseq.backends.numba.vectors import tile_rows

__all__ = ["Right", "as_it_lies", "in_panels", "multiply"]

_PRODUCT, _ROWS, _TERMS, _PANELS, _BLOCKS = 3, 4, 5, 6, 7
_LEFT_ROW, _LEFT_TERM = 8, 9
_RIGHT_TERM = 10
_RESULT, _RESULT_ROW = 11, 12
_ADD = 13  # 1: to what result holds
_TAIL, _TAIL_BLOCK = 14, 15  # the last panel, where it lies apart, and its step from block to block
_FEW = 16
_RIGHT_PANEL = 17
_SOURCES = 18  # address of an array: for each block the left factor's address and the right one's


class Right(NamedTuple):
    """A right factor ``[blocks * terms, columns]`` in memory.

    Attributes:
        blocks: each block's address.
        terms: of a block.
        columns: that exist.
        panels: that they make up.
        term_stride: elements from term to term.
        panel_step: elements from panel to panel of a block.
        tail: blocks of the last panel, padded with zeros, if the columns do not fill it.
        kept: the memory.
    """

    blocks: Sequence[int]
    terms: int
    columns: int
    panels: int
    term_stride: int
    panel_step: int
    tail: Tensor | None
    kept: Tensor


@functools.cache
def _kernel(item_bytes: int) -> Any:
    sources = sources_digest()
    columns = panel_columns(item_bytes)
    height = tile_rows()

    def multiply(a: Any) -> None:
        sources  # noqa: B018
        part, parts = part_number(a[0], a[1]), a[2]
        first, last, first_panel, last_panel = 0, a[_ROWS], 0, a[_PANELS]
        if a[_ROWS] >= 2 * height * parts:
            first, last = a[_ROWS] * part // parts, a[_ROWS] * (part + 1) // parts
        else:
            first_panel = a[_PANELS] * part // parts
            last_panel = a[_PANELS] * (part + 1) // parts
        rows, result_row = last - first, a[_RESULT_ROW]
        for panel in range(first_panel, last_panel):
            to = a[_RESULT] + (first * result_row + panel * columns) * item_bytes
            if not a[_ADD]:
                for i in range(rows):
                    fill_zero(item_bytes, to + i * result_row * item_bytes, columns)
            for block in range(a[_BLOCKS]):
                left = integer_at(a[_SOURCES], 2 * block) + first * a[_LEFT_ROW] * item_bytes
                right = integer_at(a[_SOURCES], 2 * block + 1)
                right += panel * a[_RIGHT_PANEL] * item_bytes
                stride = a[_RIGHT_TERM]
                if a[_TAIL] and panel == a[_PANELS] - 1:
                    right, stride = a[_TAIL] + block * a[_TAIL_BLOCK] * item_bytes, columns
                product(
                    a[_PRODUCT],
                    left,
                    a[_LEFT_ROW],
                    a[_LEFT_TERM],
                    rows,
                    right,
                    stride,
                    0,
                    a[_TERMS],
                    1,
                    to,
                    result_row,
                    a[_FEW],
                )

    return compiled(types.void(types.CPointer(types.int64)), multiply)


def as_it_lies(matrix: Tensor, blocks: Sequence[int], terms: int) -> Right:
    """Row blocks of a matrix, of ``terms`` rows each, at these numbers; last stride 1.

    Nothing is copied but columns that do not fill a panel.
    """
    columns, stride, size = matrix.size(1), matrix.stride(0), matrix.element_size()
    of_panel = panel_columns(size)
    panels = (columns + of_panel - 1) // of_panel
    addresses = [matrix.data_ptr() + block * terms * stride * size for block in blocks]
    tail = None
    if columns % of_panel:
        tail = matrix.new_empty(len(blocks) * terms * of_panel)
        ahead = (panels - 1) * of_panel
        starts = [address + ahead * size for address in addresses]
        pack(starts, terms, columns - ahead, (stride, 1), tail, (terms * of_panel, 0), 1)
    return Right(addresses, terms, columns, panels, stride, of_panel, tail, matrix)


def in_panels(packed: Tensor, columns: int) -> Right:
    """Blocks in panels, ``(blocks, panels, terms, columns of a panel)``; so many columns exist."""
    blocks, panels, terms, of_panel = packed.shape
    step = packed.stride(0) * packed.element_size()
    addresses = [packed.data_ptr() + block * step for block in range(blocks)]
    return Right(addresses, terms, columns, panels, of_panel, terms * of_panel, None, packed)


def multiply(
    left: Tensor, right: Right, result: Tensor, left_step: int = 0, add: bool = False
) -> None:
    """``result = left @ right``, or ``result +=`` that with ``add``.

    Args:
        left: ``(rows, terms)`` of any strides, the first block of terms.
        right: the other factor.
        result: ``(rows, panels * columns of a panel)``, last stride 1.
        left_step: elements from one block of terms in ``left`` to the next.
        add: see above.
    """
    item_bytes = left.element_size()
    rows, count = left.size(0), len(right.blocks)
    pairs = []
    for index, address in enumerate(right.blocks):
        pairs += [left.data_ptr() + index * left_step * item_bytes, address]
    array = (ctypes.c_int64 * len(pairs))(*pairs)
    values = (ctypes.c_int64 * (_SOURCES + 1))(
        0, 0, 0, product_kernel(item_bytes).address, rows, right.terms, right.panels, count,
        left.stride(0), left.stride(1), right.term_stride, result.data_ptr(), result.stride(0),
        int(add), 0 if right.tail is None else right.tail.data_ptr(),
        right.terms * panel_columns(item_bytes), int(rows <= FEW_ROWS), right.panel_step,
        ctypes.addressof(array),
    )  # fmt: skip
    threads.run(
        _kernel(item_bytes), values, threads_for(rows * count * right.terms * right.columns // 8)
    )
