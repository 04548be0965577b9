"""The pieces of the kernels that are written in LLVM's own instructions, as Numba functions.

Addresses are 64-bit integers and counts are in elements. ``item_bytes`` (4 or 8) and ``key`` (of a
:class:`fastseq.cells.plan.Plan`) must be constants where a function is compiled: Numba reads them
as literal types, and files its compiled code under them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastseq.backends.numba.vectors import Vectors
from fastseq.cells.expression import topological
from fastseq.cells.plan import Plan

__all__ = [
    "PLANS",
    "PRODUCT_ARGUMENTS",
    "TERMS",
    "add_to",
    "barrier",
    "cell_backward",
    "cell_forward",
    "copy",
    "fill_zero",
    "integer_at",
    "part_number",
    "product",
    "tile",
]

# Plans by key, for cell_forward and cell_backward to find while they are compiled.
PLANS: dict[str, Plan] = {}

_INT64 = ir.IntType(64)
# Terms that are summed up in registers before they are added to memory: short sums err less.
TERMS = 256


# What product.py's product takes: left, left_stride, left_term, rows, weights, weights_stride,
# panel_stride, terms, panels, result, result_stride, few.
PRODUCT_ARGUMENTS = 12


def _number(value: int) -> ir.Constant:
    return ir.Constant(_INT64, value)


@intrinsic  # type: ignore[untyped-decorator]
def part_number(typingctx: Any, function: Any, otherwise: Any) -> Any:
    """What the function at that address returns; ``otherwise`` for address 0."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        address, number = args
        given = builder.icmp_signed("!=", address, _number(0))
        result = cgutils.alloca_once_value(builder, number)
        with builder.if_then(given):
            kind = ir.FunctionType(ir.IntType(32), [])
            called = builder.call(builder.inttoptr(address, ir.PointerType(kind)), [])
            builder.store(builder.sext(called, _INT64), result)
        return builder.load(result)

    return types.int64(types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def integer_at(typingctx: Any, address: Any, index: Any) -> Any:
    """Element ``index`` of an array of 64-bit integers."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.PointerType(_INT64))
        return builder.load(builder.gep(pointer, [args[1]]))

    return types.int64(types.int64, types.int64), generate


# Turns of waiting before the processor is given away: some microseconds.
_TURNS_OF_SPINNING = 4096


@intrinsic  # type: ignore[untyped-decorator]
def barrier(typingctx: Any, counter: Any, parts: Any, give_way: Any) -> Any:
    """Wait until all ``parts`` threads are here.

    ``counter`` is the address of an int64 that was 0 when they started and is used for nothing
    else; ``give_way`` that of a function like ``sched_yield``.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        address, size, function = args
        place = builder.inttoptr(address, ir.PointerType(_INT64))
        before = builder.atomic_rmw("add", place, _number(1), "acq_rel")
        # The end of the round that this arrival belongs to; the counter only grows.
        target = builder.mul(builder.add(builder.sdiv(before, size), _number(1)), size)
        turn = cgutils.alloca_once_value(builder, _number(0))
        check = builder.append_basic_block("barrier.check")
        wait = builder.append_basic_block("barrier.wait")
        done = builder.append_basic_block("barrier.done")
        builder.branch(check)
        builder.position_at_end(check)
        arrived = builder.load_atomic(place, "acquire", 8)
        builder.cbranch(builder.icmp_signed("<", arrived, target), wait, done)
        builder.position_at_end(wait)
        turns = builder.add(builder.load(turn), _number(1))
        builder.store(turns, turn)
        with builder.if_then(builder.icmp_signed(">", turns, _number(_TURNS_OF_SPINNING))):
            kind = ir.FunctionType(ir.IntType(32), [])
            builder.call(builder.inttoptr(function, ir.PointerType(kind)), [])
        builder.branch(check)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def product(
    typingctx: Any,
    function: Any,
    left: Any,
    left_stride: Any,
    left_term: Any,
    rows: Any,
    weights: Any,
    weights_stride: Any,
    panel_stride: Any,
    terms: Any,
    panels: Any,
    result: Any,
    result_stride: Any,
    few: Any,
) -> Any:
    """Call the compiled product at that address, see ``product.py``.

    By address, because its many tiles would otherwise be compiled into every driver again.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_INT64] * PRODUCT_ARGUMENTS)
        builder.call(builder.inttoptr(args[0], ir.PointerType(kind)), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * (1 + PRODUCT_ARGUMENTS)), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def copy(typingctx: Any, item_bytes: Any, to: Any, source: Any, count: Any) -> Any:
    """``to[:count] = source[:count]``."""
    width = item_bytes.literal_value

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _, to_address, from_address, elements = args
        kind = ir.PointerType(ir.IntType(8))
        cgutils.raw_memcpy(
            builder,
            builder.inttoptr(to_address, kind),
            builder.inttoptr(from_address, kind),
            elements,
            width,
        )
        return context.get_dummy_value()

    return types.void(item_bytes, types.int64, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def fill_zero(typingctx: Any, item_bytes: Any, to: Any, count: Any) -> Any:
    """``to[:count] = 0``."""
    width = item_bytes.literal_value

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _, address, elements = args
        size = builder.mul(elements, _number(width))
        pointer = builder.inttoptr(address, ir.PointerType(ir.IntType(8)))
        cgutils.memset(builder, pointer, size, 0)
        return context.get_dummy_value()

    return types.void(item_bytes, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def add_to(typingctx: Any, item_bytes: Any, to: Any, source: Any, count: Any) -> Any:
    """``to[:count] += source[:count]``."""
    width = item_bytes.literal_value

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _, to_address, from_address, elements = args
        wide, narrow = Vectors(builder, width), Vectors(builder, width, 1)
        whole = builder.mul(builder.sdiv(elements, _number(wide.count)), _number(wide.count))
        for v, start, stop in ((wide, _number(0), whole), (narrow, whole, elements)):
            with cgutils.for_range_slice(builder, start, stop, _number(v.count)) as (offset, _):
                total = v.add(v.load(to_address, offset), v.load(from_address, offset))
                v.store(total, to_address, offset)
        return context.get_dummy_value()

    return types.void(item_bytes, types.int64, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def tile(
    typingctx: Any,
    item_bytes: Any,
    rows: Any,
    sums: Any,
    left: Any,
    left_stride: Any,
    left_term: Any,
    panel: Any,
    panel_stride: Any,
    terms: Any,
    result: Any,
    result_stride: Any,
) -> Any:
    """``result += left @ panel`` for ``rows`` rows by two vectors of columns, sums in registers.

    ``item_bytes``, ``rows`` and ``sums`` are constants; ``sums`` is in how many the terms of one
    element are added up, which keeps the multipliers busy where there are few rows. ``left`` is
    [rows, terms] and ``result`` [rows, two vectors], with ``left_stride`` and ``result_stride``
    elements from row to row and ``left_term`` from term to term; ``panel`` is [terms, two vectors]
    with ``panel_stride`` from term to term.
    """
    width, count, split = item_bytes.literal_value, rows.literal_value, sums.literal_value

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        left_address, left_step, left_term_step, weights, weights_step = args[3:8]
        terms_count, to, to_step = args[8:]
        v = Vectors(builder, width)
        bytes_per_item = _number(width)
        starts = [
            builder.add(
                left_address, builder.mul(builder.mul(left_step, _number(r)), bytes_per_item)
            )
            for r in range(count)
        ]
        before = builder.block
        function = builder.function
        loop = function.append_basic_block("tile")
        rest = function.append_basic_block("tile.rest")
        rest_loop = function.append_basic_block("tile.rest.loop")
        done = function.append_basic_block("tile.done")
        zero = v.constant(0.0)
        whole = builder.sub(terms_count, builder.srem(terms_count, _number(split)))

        def step(k: Any, totals: list[Any], which: int) -> list[Any]:
            """Term k, added to the sums number ``which``."""
            at, term = builder.mul(k, weights_step), builder.mul(k, left_term_step)
            w = [v.load(weights, at), v.load(weights, builder.add(at, _number(v.count)))]
            totals = list(totals)
            for r in range(count):
                a = v.load_broadcast(starts[r], term)
                for half in range(2):
                    index = (which * count + r) * 2 + half
                    totals[index] = v.multiply_add(a, w[half], totals[index])
            return totals

        size = split * count * 2
        builder.cbranch(builder.icmp_signed(">", whole, _number(0)), loop, rest)

        builder.position_at_end(loop)
        k = builder.phi(_INT64)
        phis = [builder.phi(v.type) for _ in range(size)]
        k.add_incoming(_number(0), before)
        totals: list[Any] = list(phis)
        for which in range(split):
            totals = step(builder.add(k, _number(which)), totals, which)
        following = builder.add(k, _number(split))
        k.add_incoming(following, loop)
        for phi, total in zip(phis, totals, strict=True):
            phi.add_incoming(zero, before)
            phi.add_incoming(total, loop)
        builder.cbranch(builder.icmp_signed("<", following, whole), loop, rest)

        builder.position_at_end(rest)
        rest_start = builder.phi(_INT64)
        rest_start.add_incoming(_number(0), before)
        rest_start.add_incoming(following, loop)
        rest_phis = [builder.phi(v.type) for _ in range(size)]
        for phi, total in zip(rest_phis, totals, strict=True):
            phi.add_incoming(zero, before)
            phi.add_incoming(total, loop)
        if split == 1:
            finals: list[Any] = list(rest_phis)
            builder.branch(done)
            builder.position_at_end(rest_loop)
            builder.unreachable()
            builder.position_at_end(done)
        else:
            builder.cbranch(builder.icmp_signed("<", rest_start, terms_count), rest_loop, done)
            builder.position_at_end(rest_loop)
            k = builder.phi(_INT64)
            k.add_incoming(rest_start, rest)
            loop_phis = [builder.phi(v.type) for _ in range(size)]
            totals = step(k, list(loop_phis), 0)
            following = builder.add(k, _number(1))
            k.add_incoming(following, rest_loop)
            for phi, first, total in zip(loop_phis, rest_phis, totals, strict=True):
                phi.add_incoming(first, rest)
                phi.add_incoming(total, rest_loop)
            builder.cbranch(builder.icmp_signed("<", following, terms_count), rest_loop, done)
            builder.position_at_end(done)
            finals = [builder.phi(v.type) for _ in range(size)]
            for final, first, total in zip(finals, rest_phis, totals, strict=True):
                final.add_incoming(first, rest)
                final.add_incoming(total, rest_loop)

        for r in range(count):
            row = builder.add(to, builder.mul(builder.mul(to_step, _number(r)), bytes_per_item))
            for half in range(2):
                parts = [finals[(which * count + r) * 2 + half] for which in range(split)]
                while len(parts) > 1:
                    parts = [v.add(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
                offset = half * v.count
                v.store(v.add(v.load(row, offset), parts[0]), row, offset)
        return context.get_dummy_value()

    integers = [types.int64] * 8
    return types.void(item_bytes, rows, sums, *integers), generate


def _values(v: Vectors, outputs: Any, leaves: dict[Any, Any]) -> dict[Any, Any]:
    """Instructions for every node of ``outputs``; those in ``leaves`` are there already."""
    values = dict(leaves)
    todo = list(outputs)
    while todo:
        node = todo[-1]
        if node in values:
            todo.pop()
            continue
        missing = [a for a in node.arguments if a not in values]
        if missing:
            todo += missing
            continue
        if node.operation == "constant":
            values[node] = v.constant(node.value)
        else:
            method = getattr(v, node.operation)
            values[node] = method(*(values[a] for a in node.arguments))
        todo.pop()
    return values


def _over_units(builder: ir.IRBuilder, item_bytes: int, units: Any) -> Any:
    v = Vectors(builder, item_bytes)
    return v, cgutils.for_range_slice(builder, _number(0), units, _number(v.count))


def _leaves_of(outputs: Any, known: Any) -> set[Any]:
    """Leaves that are met before any of ``known``."""
    found, todo, seen = set(), list(outputs), set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in known:
            continue
        if node.operation == "leaf":
            found.add(node)
        todo += node.arguments
    return found


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def cell_forward(
    typingctx: Any,
    key: Any,
    item_bytes: Any,
    save: Any,
    units: Any,
    count: Any,
    row: Any,
    states: Any,
    parameters: Any,
    masks: Any,
) -> Any:
    """One step of one sequence: the first ``count`` of ``units`` values in each column.

    ``key``, ``item_bytes`` and ``save`` are constants; ``save`` is 1 to keep entries for backward.
    ``row`` is [columns, units], slots in, entries out; ``states`` [states, units], before the step
    in, after it out; ``parameters`` and ``masks`` are [parameters, units] and [masks, units].
    """
    plan, width = PLANS[key.literal_value], item_bytes.literal_value
    keep = bool(save.literal_value)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        stride, count, row_address, state_address, parameter_address, mask_address = args[3:]
        v, loop = _over_units(builder, width, count)
        slot_at = {(s.kind, s.gate): index for index, s in enumerate(plan.slots)}
        with loop as (unit, _):

            def at(index: int) -> Any:
                return builder.add(builder.mul(stride, _number(index)), unit)

            wanted = [*plan.new_states, *(plan.entries if keep else ())]
            leaves = {}
            for node in topological(wanted):
                if node.operation != "leaf":
                    continue
                kind, index = node.value
                if kind == "s":
                    leaves[node] = v.load(state_address, at(index))
                elif kind == "p":
                    leaves[node] = v.load(parameter_address, at(index))
                elif kind == "m":
                    leaves[node] = v.load(mask_address, at(index))
                else:
                    leaves[node] = v.load(row_address, at(slot_at[node.value]))
            values = _values(v, wanted, leaves)
            for index, node in enumerate(plan.new_states):
                v.store(values[node], state_address, at(index))
            if keep:
                for index, node in enumerate(plan.entries):
                    v.store(values[node], row_address, at(index))
        return context.get_dummy_value()

    return types.void(key, item_bytes, save, *[types.int64] * 6), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def cell_backward(
    typingctx: Any,
    key: Any,
    item_bytes: Any,
    units: Any,
    row: Any,
    gradients: Any,
    state_gradients: Any,
    parameters: Any,
    masks: Any,
) -> Any:
    """The way back through one step of one sequence.

    ``key`` and ``item_bytes`` are constants. ``row`` is [columns, units], what forward kept;
    ``gradients`` is [gradient columns, units], out: those of slots and parameters;
    ``state_gradients`` is [states, units], of the states after the step in, of those before it, but
    for what comes through the recurrent product, out. ``parameters`` and ``masks`` as in forward.
    """
    plan, width = PLANS[key.literal_value], item_bytes.literal_value

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        stride, row_address, to, state_address, parameter_address, mask_address = args[2:]
        v, loop = _over_units(builder, width, stride)
        entries = {node: index for index, node in enumerate(plan.entries)}
        with loop as (unit, _):

            def at(index: int) -> Any:
                return builder.add(builder.mul(stride, _number(index)), unit)

            results = [*plan.slot_gradients, *plan.parameter_gradients]
            wanted = [*results, *plan.state_gradients]
            leaves = {node: v.load(row_address, at(index)) for node, index in entries.items()}
            for node in _leaves_of(wanted, entries):
                kind, index = node.value
                source = {"g": state_address, "p": parameter_address, "m": mask_address}[kind]
                leaves[node] = v.load(source, at(index))
            values = _values(v, wanted, leaves)
            for index, node in enumerate(results):
                v.store(values[node], to, at(index))
            for index, node in enumerate(plan.state_gradients):
                v.store(values[node], state_address, at(index))
        return context.get_dummy_value()

    return types.void(key, item_bytes, *[types.int64] * 6), generate
