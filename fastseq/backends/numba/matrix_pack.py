"""Weights and other right factors in panels, the order in which a tile reads them.

A panel is ``[terms][two vectors of columns]``. torch could permute a tensor into it, at a tenth of
the speed: its copy of a permuted tensor goes element by element.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from fastseq.backends.numba import threads
from fastseq.backends.numba.compile import compiled, sources_digest
from fastseq.backends.numba.intrinsics import copy, fill_zero, integer_at, part_number
from fastseq.backends.numba.vectors import Vectors, lanes

__all__ = ["pack", "panel_columns", "threads_for"]

_INT64 = ir.IntType(64)
# Elements of work (moved, or multiplied and added) that a second thread's waking costs.
_ALONE = 1 << 16

_COUNT, _TERMS, _COLUMNS, _PANELS = 3, 4, 5, 6
_TERM_STRIDE, _COLUMN_STRIDE = 7, 8
_RESULT, _PANEL_STEP, _BLOCK_STEP = 9, 10, 11
_SOURCES = 12  # address of an array with each block's address


def panel_columns(item_bytes: int) -> int:
    """Columns of a panel."""
    return 2 * lanes(item_bytes)


def threads_for(work: int) -> int:
    """How many threads so many elements of work are for."""
    return 1 if work < _ALONE else torch.get_num_threads()


def _number(value: int) -> ir.Constant:
    return ir.Constant(_INT64, value)


def _exchanged(builder: ir.IRBuilder, rows: list[Any]) -> list[Any]:
    """The transpose of as many vectors as each has lanes."""
    count, step = len(rows), 1
    while step < count:
        low = [j if not j & step else count + j - step for j in range(count)]
        high = [j + step if not j & step else count + j for j in range(count)]
        kind = ir.VectorType(ir.IntType(32), count)
        after = list(rows)
        for i in range(count):
            if not i & step:
                pair = rows[i], rows[i + step]
                after[i] = builder.shuffle_vector(*pair, ir.Constant(kind, low))
                after[i + step] = builder.shuffle_vector(*pair, ir.Constant(kind, high))
        rows, step = after, 2 * step
    return rows


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _turned(
    typingctx: Any,
    item_bytes: Any,
    to: Any,
    to_stride: Any,
    source: Any,
    stride: Any,
    count: Any,
) -> Any:
    """``to[k, c] = source[c, k]`` for a vector of columns c and ``count`` terms k.

    ``to_stride`` is from term to term, ``stride`` from column to column.
    """
    width = item_bytes.literal_value

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _, to_address, to_step, address, step, terms = args
        v, one = Vectors(builder, width), Vectors(builder, width, 1)
        whole = builder.sub(terms, builder.srem(terms, _number(v.count)))
        starts = [builder.mul(step, _number(c)) for c in range(v.count)]
        with cgutils.for_range_slice(builder, _number(0), whole, _number(v.count)) as (k, _):
            rows = [v.load(address, builder.add(start, k)) for start in starts]
            for index, row in enumerate(_exchanged(builder, rows)):
                at = builder.mul(builder.add(k, _number(index)), to_step)
                v.store(row, to_address, at)
        with cgutils.for_range_slice(builder, whole, terms, _number(1)) as (k, _):
            at = builder.mul(k, to_step)
            for c, start in enumerate(starts):
                element = one.load(address, builder.add(start, k))
                one.store(element, to_address, builder.add(at, _number(c)))
        return context.get_dummy_value()

    return types.void(item_bytes, *[types.int64] * 5), generate


@functools.cache
def _kernel(item_bytes: int) -> Any:
    sources = sources_digest()
    vector = lanes(item_bytes)
    columns = 2 * vector

    def packing(a: Any) -> None:
        sources  # noqa: B018
        part, parts = part_number(a[0], a[1]), a[2]
        terms, panels = a[_TERMS], a[_PANELS]
        for task in range(part, a[_COUNT] * panels, parts):
            block, panel = task // panels, task % panels
            first = panel * columns
            source = integer_at(a[_SOURCES], block) + first * a[_COLUMN_STRIDE] * item_bytes
            to = a[_RESULT] + (block * a[_BLOCK_STEP] + panel * a[_PANEL_STEP]) * item_bytes
            exist = min(columns, a[_COLUMNS] - first)
            if a[_COLUMN_STRIDE] == 1:
                for k in range(terms):
                    row = to + k * columns * item_bytes
                    before = source + k * a[_TERM_STRIDE] * item_bytes
                    if exist == columns:
                        copy(item_bytes, row, before, columns)
                    else:
                        copy(item_bytes, row, before, exist)
                        fill_zero(item_bytes, row + exist * item_bytes, columns - exist)
                continue
            if exist < columns:
                fill_zero(item_bytes, to, terms * columns)
            for half in range(2):
                turned = source + half * vector * a[_COLUMN_STRIDE] * item_bytes
                place = to + half * vector * item_bytes
                if exist >= (half + 1) * vector:
                    _turned(item_bytes, place, columns, turned, a[_COLUMN_STRIDE], terms)
                    continue
                for c in range(exist - half * vector):
                    column = turned + c * a[_COLUMN_STRIDE] * item_bytes
                    for k in range(terms):
                        at = place + (k * columns + c) * item_bytes
                        copy(item_bytes, at, column + k * item_bytes, 1)

    return compiled(types.void(types.CPointer(types.int64)), packing)


def pack(
    blocks: Sequence[int],
    terms: int,
    columns: int,
    strides: tuple[int, int],
    result: Tensor,
    steps: tuple[int, int],
    panels: int,
) -> None:
    """Blocks ``[terms, columns]``, padded with zeros to whole panels.

    Args:
        blocks: the address of each.
        terms: of a block.
        columns: of a block.
        strides: elements from term to term and from column to column; one of them is 1.
        result: where to, floats of the blocks' type.
        steps: elements there from block to block and from one panel of a block to the next.
        panels: of a block.
    """
    item_bytes = result.element_size()
    array = (ctypes.c_int64 * len(blocks))(*blocks)
    values = (ctypes.c_int64 * (_SOURCES + 1))(
        0, 0, 0, len(blocks), terms, columns, panels, *strides,
        result.data_ptr(), steps[1], steps[0], ctypes.addressof(array),
    )  # fmt: skip
    work = len(blocks) * panels * terms * panel_columns(item_bytes)
    threads.run(_kernel(item_bytes), values, threads_for(work))
