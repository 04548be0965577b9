"""Memory and vectors inside compiled functions: pointers of a type, and the product of matrices.

The product's innermost tile is written in LLVM's own vector types, because the loop vectorizer
keeps the sums of a plain triple loop in memory; here they stay in registers. LLVM turns the vectors
into whatever the processor has.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

__all__ = [
    "address_of",
    "compact",
    "inner",
    "outlined",
    "pointer",
    "product",
    "product_where_weighted",
    "round_up",
    "take",
    "wide_vectors",
]

# Multiply-adds may be fused, as in the C++ kernels. Nothing that reorders sums or assumes away NaN
# and Inf: reordering would break the split of an exponent in elementary.py, and hidden keys may
# hold anything.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}


def inner(function: Any) -> Any:
    """Compile a function that other compiled functions call."""
    return njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)(function)


_FEATURES = dict(llvm.get_host_cpu_features())
_VECTOR_BYTES = 64 if _FEATURES.get("avx512f") else 32 if _FEATURES.get("avx") else 16
# A tile is this many rows by two vectors of columns: as many sums as hide the latency of a
# multiply-add, and no more than there are registers for: 16 on x86 before AVX-512, else 32.
_TILE_ROWS = 4 if _FEATURES.get("sse2") and _VECTOR_BYTES < 64 else 8
_TILE_VECTORS = 2
_TILE_COLUMNS_32 = _TILE_VECTORS * _VECTOR_BYTES // 4

# Widest tile of any processor and dtype: what columns are padded to.
COLUMNS = 32
# What rows of a product's result are padded to.
ROWS = 8


@inner
def address_of(array: Any) -> int:
    """Where the array's memory begins, as a signed integer: unsigned ones mix into floats."""
    return np.int64(array.ctypes.data)


@intrinsic  # type: ignore[untyped-decorator]
def pointer(typingctx: Any, address: Any, like: Any) -> Any:
    """The address as a pointer to values of ``like``'s type; an index may be negative."""
    sig = types.CPointer(like.dtype)(address, like)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return sig, codegen


@intrinsic  # type: ignore[untyped-decorator]
def take(typingctx: Any, counter: Any) -> Any:
    """The number at an address, which goes up by one: no two threads get the same."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integer = ir.IntType(64)
        place = builder.inttoptr(args[0], integer.as_pointer())
        return builder.atomic_rmw("add", place, integer(1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def wide_vectors(typingctx: Any) -> Any:
    """Called in a function: have its loops use the widest vectors, of which LLVM is shy on x86."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _VECTOR_BYTES == 64:
            # llvmlite's own add() knows LLVM's plain attributes only.
            set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic  # type: ignore[untyped-decorator]
def outlined(typingctx: Any) -> Any:
    """Called in a function: LLVM keeps it one function, which is compiled once and not per call."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic  # type: ignore[untyped-decorator]
def compact(typingctx: Any) -> Any:
    """Called in a function that takes little of the time: LLVM keeps it one small function."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for attribute in ("noinline", "minsize", "optsize"):
            builder.function.attributes.add(attribute)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _tile(
    typingctx: Any,
    like: Any,
    c: Any,
    c_stride: Any,
    a: Any,
    a_row: Any,
    a_column: Any,
    b: Any,
    b_stride: Any,
    rows: Any,
    depth: Any,
    factor: Any,
) -> Any:
    """One tile of :func:`product`: ``rows`` of at most ``_TILE_ROWS``; all of them are written."""
    sig = types.void(like, *(types.int64,) * 10)
    size = like.dtype.bitwidth // 8
    lanes = _VECTOR_BYTES // size

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, c, c_stride, a, a_row, a_column, b, b_stride, rows, depth, factor = args
        element = context.get_value_type(like.dtype)
        vector = ir.VectorType(element, lanes)
        index = c_stride.type
        zero, one = index(0), index(1)

        def address(base: Any, offset: Any, target: Any) -> Any:
            place = builder.add(base, builder.mul(offset, index(size)))
            return builder.inttoptr(place, target.as_pointer())

        def load(base: Any, offset: Any) -> Any:
            return builder.load(address(base, offset, vector), align=size)

        def column(v: int) -> Any:
            return index(v * lanes)

        # Rows past the last one compute what that computes: nothing is read outside of a.
        last = builder.sub(rows, one)
        a_rows = []
        for i in range(_TILE_ROWS):
            inside = builder.icmp_signed("<", index(i), last)
            row = builder.select(inside, index(i), last)
            a_rows.append(builder.mul(row, a_row))
        before = builder.block
        loop = builder.append_basic_block("products")
        after = builder.append_basic_block("sums")
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(index)
        k.add_incoming(zero, before)
        sums = [[builder.phi(vector) for _ in range(_TILE_VECTORS)] for _ in range(_TILE_ROWS)]
        b_row = builder.mul(k, b_stride)
        right = [load(b, builder.add(b_row, column(v))) for v in range(_TILE_VECTORS)]
        a_place = builder.mul(k, a_column)
        totals = []
        for i in range(_TILE_ROWS):
            left = builder.load(address(a, builder.add(a_rows[i], a_place), element), align=size)
            wide = builder.insert_element(
                ir.Constant(vector, ir.Undefined), left, ir.IntType(32)(0)
            )
            mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
            wide = builder.shuffle_vector(wide, ir.Constant(vector, ir.Undefined), mask)
            totals.append(
                [
                    builder.fadd(
                        builder.fmul(wide, right[v], flags=("contract",)),
                        sums[i][v],
                        flags=("contract",),
                    )
                    for v in range(_TILE_VECTORS)
                ]
            )
        end = builder.block
        next_k = builder.add(k, one)
        k.add_incoming(next_k, end)
        empty = ir.Constant(vector, [element(0.0)] * lanes)
        for i in range(_TILE_ROWS):
            for v in range(_TILE_VECTORS):
                sums[i][v].add_incoming(empty, before)
                sums[i][v].add_incoming(totals[i][v], end)
        builder.cbranch(builder.icmp_signed("<", next_k, depth), loop, after)
        builder.position_at_end(after)
        adds = builder.icmp_signed("!=", factor, zero)
        with builder.if_else(adds) as (then, otherwise):
            with then:
                by = [load(factor, column(v)) for v in range(_TILE_VECTORS)]
                for i in range(_TILE_ROWS):
                    place = builder.mul(index(i), c_stride)
                    for v in range(_TILE_VECTORS):
                        at = address(c, builder.add(place, column(v)), vector)
                        old = builder.load(at, align=size)
                        total = builder.fadd(
                            builder.fmul(old, by[v], flags=("contract",)),
                            totals[i][v],
                            flags=("contract",),
                        )
                        builder.store(total, at, align=size)
            with otherwise:
                for i in range(_TILE_ROWS):
                    place = builder.mul(index(i), c_stride)
                    for v in range(_TILE_VECTORS):
                        at = address(c, builder.add(place, column(v)), vector)
                        builder.store(totals[i][v], at, align=size)
        return context.get_dummy_value()

    return sig, codegen


@inner
def round_up(count: int, multiple: int) -> int:
    """The smallest multiple that is at least ``count``."""
    return (count + multiple - 1) // multiple * multiple


@inner
def product(
    like: Any,
    c: int,
    c_stride: int,
    a: int,
    a_row: int,
    a_column: int,
    b: int,
    b_stride: int,
    rows: int,
    columns: int,
    depth: int,
    factor: int,
) -> None:
    """``c = a b``, or ``c = c * factor + a b`` where there is a factor.

    Each element of ``a b`` is one sum in the order of ``depth``, whatever the sizes are.

    Args:
        like: an array of the dtype.
        c: address of the result. Rows are written up to a multiple of ``ROWS``, columns up to one
            of ``COLUMNS``.
        c_stride: values from row to row.
        a: address of ``(rows, depth)`` values.
        a_row: values from row to row.
        a_column: values from column to column.
        b: address of ``(depth, columns)`` values, columns padded likewise.
        b_stride: values from row to row.
        rows: of ``a`` and ``c``.
        columns: of ``b`` and ``c``.
        depth: at least 1.
        factor: address of one factor per column, or 0.
    """
    outlined()
    size = like.itemsize
    width = _TILE_COLUMNS_32 * 4 // size
    for column in range(0, columns, width):
        by = factor + column * size if factor else 0
        for row in range(0, rows, _TILE_ROWS):
            _tile(
                like,
                c + (row * c_stride + column) * size,
                c_stride,
                a + row * a_row * size,
                a_row,
                a_column,
                b + column * size,
                b_stride,
                min(rows - row, _TILE_ROWS),
                depth,
                by,
            )


@inner
def product_where_weighted(
    like: Any,
    c: int,
    c_stride: int,
    a: int,
    a_row: int,
    a_column: int,
    b: int,
    b_stride: int,
    rows: int,
    columns: int,
    depth: int,
    factor: int,
    weights_left: bool,
) -> None:
    """:func:`product` for values with NaN or Inf: where a weight is zero, nothing is added.

    The weights are ``a`` where ``weights_left``, else ``b``.
    """
    compact()
    result, left, right = pointer(c, like), pointer(a, like), pointer(b, like)
    by = pointer(factor, like)
    for row in range(rows):
        for column in range(columns):
            place = row * c_stride + column
            total = like.dtype.type(0)
            for k in range(depth):
                one, other = left[row * a_row + k * a_column], right[k * b_stride + column]
                weight = one if weights_left else other
                if weight != 0:
                    total += one * other
            if factor:
                total += result[place] * by[column]
            result[place] = total
