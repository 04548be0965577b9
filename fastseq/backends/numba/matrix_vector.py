"""The product of weights, as torch lays them out, with a few vectors.

For a few rows, for which weights would take longer to pack than to multiply. Rows of weights are
read in order, several at a time, each with a vector of sums per factor; these are added up at the
end.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastseq.backends.numba.vectors import Vectors, register_bytes

__all__ = ["row_products"]

_INT64 = ir.IntType(64)


def _rows_at_once(vectors: int) -> int:
    """As many as hide the latency of a multiply-add, and no more than there are registers for."""
    if vectors == 1:
        return 8
    return 4 if register_bytes() == 64 or vectors == 2 else 2


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
    vectors: Any,
    weights: Any,
    rows: Any,
    terms: Any,
    vector: Any,
    vector_stride: Any,
    bias: Any,
    result: Any,
    result_stride: Any,
) -> Any:
    """``result = weights @ vector + bias``, or ``result +=`` that where ``adds`` is 1.

    ``item_bytes``, ``adds`` and ``vectors``, the number of vectors, are constants. ``weights`` is
    [rows, terms], ``vector`` [vectors, terms], ``bias`` [rows] or address 0 for none, ``result``
    [vectors, rows]. An element has the same bits whatever ``vectors`` is.
    """
    factors = vectors.literal_value
    width, accumulates = item_bytes.literal_value, bool(adds.literal_value)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        weights_address, row_count, term_count, vector_address, vector_step = args[3:8]
        bias_address, to, to_step = args[8:]
        v, one = Vectors(builder, width), Vectors(builder, width, 1)
        at_once = _rows_at_once(factors)
        whole = builder.sub(term_count, builder.srem(term_count, _number(v.count)))
        blocks = builder.sub(row_count, builder.srem(row_count, _number(at_once)))
        has_bias = builder.icmp_signed("!=", bias_address, _number(0))
        scalar = ir.PointerType(v.scalar)
        ahead = [builder.mul(vector_step, _number(i)) for i in range(factors)]

        def at(address: Any, offset: Any) -> Any:
            return builder.inttoptr(
                builder.add(address, builder.mul(offset, _number(width))), scalar
            )

        def block(first: Any, count: int) -> None:
            """``count`` rows from ``first`` on."""
            starts = [builder.mul(builder.add(first, _number(r)), term_count) for r in range(count)]
            pairs = [(r, i) for r in range(count) for i in range(factors)]
            sums = {pair: cgutils.alloca_once_value(builder, v.constant(0.0)) for pair in pairs}
            for place in sums.values():
                builder.store(v.constant(0.0), place)
            with cgutils.for_range_slice(builder, _number(0), whole, _number(v.count)) as (k, _):
                x = [v.load(vector_address, builder.add(start, k)) for start in ahead]
                for r, start in enumerate(starts):
                    w = v.load(weights_address, builder.add(start, k))
                    for i in range(factors):
                        place = sums[r, i]
                        builder.store(v.multiply_add(w, x[i], builder.load(place)), place)
            totals = {}
            for pair, place in sums.items():
                totals[pair] = cgutils.alloca_once(builder, v.scalar)
                builder.store(_total(builder, v, builder.load(place)), totals[pair])
            with cgutils.for_range_slice(builder, whole, term_count, _number(1)) as (k, _):
                x = [builder.load(at(vector_address, builder.add(start, k))) for start in ahead]
                for r, start in enumerate(starts):
                    w = builder.load(at(weights_address, builder.add(start, k)))
                    for i in range(factors):
                        place = totals[r, i]
                        builder.store(one.multiply_add(w, x[i], builder.load(place)), place)
            with builder.if_then(has_bias):
                for (r, _), place in totals.items():
                    b = builder.load(at(bias_address, builder.add(first, _number(r))))
                    builder.store(builder.fadd(builder.load(place), b), place)
            for (r, i), place in totals.items():
                row = builder.add(first, _number(r))
                target = at(to, builder.add(builder.mul(to_step, _number(i)), row))
                total = builder.load(place)
                if accumulates:
                    total = builder.fadd(builder.load(target), total)
                builder.store(total, target)

        with cgutils.for_range_slice(builder, _number(0), blocks, _number(at_once)) as (row, _):
            block(row, at_once)
        with cgutils.for_range_slice(builder, blocks, row_count, _number(1)) as (row, _):
            block(row, 1)
        return context.get_dummy_value()

    return types.void(item_bytes, adds, vectors, *[types.int64] * 8), generate
