"""The product of weights, as torch lays them out, with one vector.

For a single step, whose weights would take longer to pack than to multiply. Rows of weights are
read in order, eight at a time, each with a vector of sums that are added up at the end.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastseq.backends.numba.vectors import Vectors

__all__ = ["row_products"]

_INT64 = ir.IntType(64)
# Rows at once: as many sums as hide the latency of a multiply-add.
_ROWS = 8


def _number(value: int) -> ir.Constant:
    return ir.Constant(_INT64, value)


def _total(builder: ir.IRBuilder, v: Vectors, vector: Any) -> Any:
    """The sum of a vector's lanes, by halves."""
    count = v.count
    while count > 1:
        half = count // 2
        kind = ir.VectorType(ir.IntType(32), half)
        undefined = ir.Constant(vector.type, ir.Undefined)
        low = builder.shuffle_vector(vector, undefined, ir.Constant(kind, list(range(half))))
        high = builder.shuffle_vector(
            vector, undefined, ir.Constant(kind, list(range(half, count)))
        )
        vector, count = builder.fadd(low, high), half
    return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def row_products(
    typingctx: Any,
    item_bytes: Any,
    adds: Any,
    weights: Any,
    rows: Any,
    terms: Any,
    vector: Any,
    bias: Any,
    result: Any,
) -> Any:
    """``result = weights @ vector + bias``, or ``result +=`` that where ``adds`` is 1.

    ``item_bytes`` and ``adds`` are constants. ``weights`` is [rows, terms], ``vector`` [terms],
    ``bias`` [rows] or address 0 for none, ``result`` [rows].
    """
    width, accumulates = item_bytes.literal_value, bool(adds.literal_value)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        weights_address, row_count, term_count, vector_address, bias_address, to = args[2:]
        v, one = Vectors(builder, width), Vectors(builder, width, 1)
        whole = builder.sub(term_count, builder.srem(term_count, _number(v.count)))
        blocks = builder.sub(row_count, builder.srem(row_count, _number(_ROWS)))
        has_bias = builder.icmp_signed("!=", bias_address, _number(0))
        scalar = ir.PointerType(v.scalar)

        def at(address: Any, offset: Any) -> Any:
            return builder.inttoptr(
                builder.add(address, builder.mul(offset, _number(width))), scalar
            )

        def block(first: Any, count: int) -> None:
            """``count`` rows from ``first`` on."""
            starts = [builder.mul(builder.add(first, _number(r)), term_count) for r in range(count)]
            sums = [cgutils.alloca_once_value(builder, v.constant(0.0)) for _ in range(count)]
            for place in sums:
                builder.store(v.constant(0.0), place)
            with cgutils.for_range_slice(builder, _number(0), whole, _number(v.count)) as (k, _):
                x = v.load(vector_address, k)
                for place, start in zip(sums, starts, strict=True):
                    w = v.load(weights_address, builder.add(start, k))
                    builder.store(v.multiply_add(w, x, builder.load(place)), place)
            totals = []
            for place in sums:
                total = cgutils.alloca_once(builder, v.scalar)
                builder.store(_total(builder, v, builder.load(place)), total)
                totals.append(total)
            with cgutils.for_range_slice(builder, whole, term_count, _number(1)) as (k, _):
                x = builder.load(at(vector_address, k))
                for place, start in zip(totals, starts, strict=True):
                    w = builder.load(at(weights_address, builder.add(start, k)))
                    builder.store(one.multiply_add(w, x, builder.load(place)), place)
            with builder.if_then(has_bias):
                for r, place in enumerate(totals):
                    b = builder.load(at(bias_address, builder.add(first, _number(r))))
                    builder.store(builder.fadd(builder.load(place), b), place)
            for r, place in enumerate(totals):
                target = at(to, builder.add(first, _number(r)))
                total = builder.load(place)
                if accumulates:
                    total = builder.fadd(builder.load(target), total)
                builder.store(total, target)

        with cgutils.for_range_slice(builder, _number(0), blocks, _number(_ROWS)) as (row, _):
            block(row, _ROWS)
        with cgutils.for_range_slice(builder, blocks, row_count, _number(1)) as (row, _):
            block(row, 1)
        return context.get_dummy_value()

    return types.void(item_bytes, adds, *[types.int64] * 6), generate
