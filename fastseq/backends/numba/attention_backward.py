"""Backward of attention: the weights are computed again from each row's maximum and 1 / sum.

    P = exp(scores - maximum) / sum,  dP = dO V^T,  dS = P (dP - delta),
    delta = rowsum(dO O) - dlse,  dV = P^T dO,  dQ = scale dS K,  dK = scale dS^T Q,  dbias = dS

(Dao et al.: FlashAttention, 2022.) A piece of work owns some blocks of keys of one key head and
walks, per query head, the queries that see them, so that gradients of keys and values are summed in
a fixed order. Where pieces of that kind are few, the keys are cut into a number of splits that
depends on sizes alone; each writes query gradients of its own. Pieces whose bias gradients meet are
done one after another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastseq.backends.numba.attention_problem import (
    CAP,
    KEPT_SCALE,
    KEY_BLOCK,
    PANEL,
    REST,
    SCALE,
    Heads,
    Problem,
    Span,
    copied_stride,
    heads_at,
    key_address,
    problem_of,
    rows_at,
    scores_at,
    seen_from,
    span_of,
    visible,
)
from fastseq.backends.numba.attention_scores import (
    HIDDEN,
    Panel,
    Scratch,
    all_finite,
    draw_keep,
    make_panel,
    new_scratch,
    score_block,
    score_factor,
    weighted_product,
)
from fastseq.backends.numba.elementary import exponential
from fastseq.backends.numba.tiles import (
    COLUMNS,
    ROWS,
    address_of,
    compact,
    inner,
    outlined,
    pointer,
    product,
    product_where_weighted,
    round_up,
    wide_vectors,
)

__all__ = ["backward_piece", "sink_gradient"]

# Places in the array of int64 after the problem's.
UNIT_BATCHES, UNIT_HEADS, SPLITS, GRAD_OUTPUT = range(REST, REST + 4)
OUTPUT = GRAD_OUTPUT + 4
GRAD_LSE = OUTPUT + 4
ROW_MAXIMUM = GRAD_LSE + 3
ROW_SCALE = ROW_MAXIMUM + 3
DELTA = ROW_SCALE + 3
GRAD_QUERY = DELTA + 3
GRAD_QUERY_SPLIT = GRAD_QUERY + 4  # from the query gradients of one split to those of the next
GRAD_KEY = GRAD_QUERY_SPLIT + 1
GRAD_VALUE = GRAD_KEY + 4
GRAD_BIAS = GRAD_VALUE + 4
GRAD_SINKS = GRAD_BIAS + 5
BACKWARD_INTEGERS = GRAD_SINKS + 1


# Queries of a head that are worked on together: what they take is all the memory of a thread.
CHUNK = 64 * PANEL


class PackedHead(NamedTuple):
    """Query rows of one head, as the products read them."""

    query: Any  # (panels, E, PANEL)
    grad_output: Any  # (panels, Ev, PANEL)
    query_rows: Any  # (panels * PANEL, E padded)
    grad_output_rows: Any  # (panels * PANEL, Ev padded)
    maximum: Any  # (panels, PANEL)
    scale: Any  # (panels, PANEL), 1 / sum
    delta: Any  # (panels, PANEL)
    finite: Any  # (panels, 2) bool: no NaN or Inf in queries, in gradients
    grad_query: Any  # (panels, E padded, PANEL)


class Block(NamedTuple):
    """Memory for one panel against one block of keys, and the block's gradients."""

    weights: Any  # (KEY_BLOCK, PANEL)
    grad_scores: Any  # (KEY_BLOCK, PANEL)
    cap_slope: Any  # (KEY_BLOCK, PANEL), without rows where there is no cap
    grad_key: Any  # (KEY_BLOCK + ROWS, E padded)
    grad_value: Any  # (KEY_BLOCK + ROWS, Ev padded)
    key_copy: Any
    value_copy: Any
    largest: Any  # (PANEL,)
    ones: Any  # (widest row,) factors of 1


@inner
def _new_head(problem: Problem, numbers: Any, queries: int) -> PackedHead:
    compact()
    panels, dtype = (queries + PANEL - 1) // PANEL, numbers.dtype
    rows, size, value_size = panels * PANEL, problem.size, problem.value_size
    return PackedHead(
        np.empty((panels, size, PANEL), dtype),
        np.empty((panels, value_size, PANEL), dtype),
        np.zeros((rows, round_up(size, COLUMNS)), dtype),
        np.zeros((rows, round_up(value_size, COLUMNS)), dtype),
        np.empty((panels, PANEL), dtype),
        np.empty((panels, PANEL), dtype),
        np.empty((panels, PANEL), dtype),
        np.empty((panels, 2), np.bool_),
        np.empty((panels, round_up(size, ROWS), PANEL), dtype),
    )


@inner
def _new_block(problem: Problem, numbers: Any) -> Block:
    compact()
    dtype, item = numbers.dtype, numbers.itemsize
    size, value_size = round_up(problem.size, COLUMNS), round_up(problem.value_size, COLUMNS)
    key_stride = copied_stride(problem, problem.key, problem.size, item)
    value_stride = copied_stride(problem, problem.value, problem.value_size, item)
    return Block(
        np.empty((KEY_BLOCK, PANEL), dtype),
        np.empty((KEY_BLOCK, PANEL), dtype),
        np.empty((KEY_BLOCK if numbers[CAP] != 0 else 0, PANEL), dtype),
        np.empty((KEY_BLOCK + ROWS, size), dtype),
        np.empty((KEY_BLOCK + ROWS, value_size), dtype),
        np.empty(KEY_BLOCK * key_stride, dtype),
        np.empty(KEY_BLOCK * value_stride, dtype),
        np.empty(PANEL, dtype),
        np.ones(max(size, value_size), dtype),
    )


@inner
def _pack_head(
    problem: Problem,
    integers: Any,
    numbers: Any,
    span: Span,
    batch: int,
    head: int,
    start: int,
    queries: int,
    packed: PackedHead,
) -> None:
    """So many rows of the head from ``start`` on into panels, and each row's ``delta``."""
    outlined()
    wide_vectors()
    query, grad_output = problem.query, heads_at(integers, GRAD_OUTPUT)
    first_row = span.query_start + start
    output, rows = heads_at(integers, OUTPUT), rows_at(integers, ROW_MAXIMUM)
    delta_rows = rows_at(integers, DELTA)
    deltas = pointer(delta_rows.address, numbers)
    maxima = pointer(rows.address, numbers)
    scales = pointer(integers[ROW_SCALE], numbers)
    query_values = pointer(query.address, numbers)
    gradients = pointer(grad_output.address, numbers)
    outputs = pointer(output.address, numbers)
    lse_rows = rows_at(integers, GRAD_LSE)
    for at in range(queries):
        p, lane, row = at // PANEL, at % PANEL, first_row + at
        place = batch * query.batch + head * query.head + row * query.row
        for k in range(problem.size):
            packed.query_rows[at, k] = query_values[place + k]
        place = batch * grad_output.batch + head * grad_output.head + row * grad_output.row
        other = batch * output.batch + head * output.head + row * output.row
        # Summed in the order of dP: a row that sees one key has output = value, and the two then
        # cancel to the last bit.
        delta = numbers.dtype.type(0)
        for k in range(problem.value_size):
            gradient = gradients[place + k]
            packed.grad_output_rows[at, k] = gradient
            delta += outputs[other + k] * gradient
        if lse_rows.address:
            place = batch * lse_rows.batch + head * lse_rows.head + row
            delta -= pointer(lse_rows.address, numbers)[place]
        place = batch * rows.batch + head * rows.head + row
        packed.maximum[p, lane], packed.scale[p, lane] = maxima[place], scales[place]
        packed.delta[p, lane] = delta
        deltas[batch * delta_rows.batch + head * delta_rows.head + row] = delta
    item = numbers.itemsize
    width, value_width = packed.query_rows.shape[1], packed.grad_output_rows.shape[1]
    for p in range((queries + PANEL - 1) // PANEL):
        first, count = p * PANEL, min(PANEL, queries - p * PANEL)
        for lane in range(PANEL):
            at = first + min(lane, count - 1)
            for k in range(problem.size):
                packed.query[p, k, lane] = packed.query_rows[at, k]
            for k in range(problem.value_size):
                packed.grad_output[p, k, lane] = packed.grad_output_rows[at, k]
        for lane in range(count, PANEL):
            packed.maximum[p, lane], packed.scale[p, lane] = 0, 0
            packed.delta[p, lane] = 0
        rows_address = address_of(packed.query_rows) + first * width * item
        packed.finite[p, 0] = all_finite(numbers, rows_address, width, count, problem.size)
        rows_address = address_of(packed.grad_output_rows) + first * value_width * item
        packed.finite[p, 1] = all_finite(
            numbers, rows_address, value_width, count, problem.value_size
        )
        packed.grad_query[p, :, :] = 0


@inner
def _score_gradients(
    problem: Problem,
    numbers: Any,
    packed: PackedHead,
    p: int,
    count: int,
    block: Block,
    keep: Any,
    keep_row: int,
) -> None:
    """weights: scores -> P after dropout; grad_scores: dP -> dS."""
    outlined()
    wide_vectors()
    factor, kept_scale = score_factor(problem, numbers), numbers[KEPT_SCALE]
    maximum, scale, delta = packed.maximum[p], packed.scale[p], packed.delta[p]
    weights, grad_scores = block.weights, block.grad_scores
    zero = numbers.dtype.type(0)
    # A product's tiles have rows past the last key: zeros, which change nobody's gradient.
    for k in range(count, round_up(count, ROWS)):
        for lane in range(PANEL):
            weights[k, lane], grad_scores[k, lane] = zero, zero
    if problem.drops:
        for k in range(count):
            for lane in range(PANEL):
                power = exponential((weights[k, lane] - maximum[lane]) * factor)
                weight = zero if power == zero else power * scale[lane]
                by = zero if keep[keep_row + k, lane] == 0 else kept_scale
                from_value = zero if by == zero else grad_scores[k, lane] * by
                gradient = weight * (from_value - delta[lane])
                weights[k, lane] = weight * by
                grad_scores[k, lane] = zero if weight == zero else gradient
        return
    for k in range(count):
        for lane in range(PANEL):
            # Zero for hidden pairs also where the row's sum is NaN.
            power = exponential((weights[k, lane] - maximum[lane]) * factor)
            weight = zero if power == zero else power * scale[lane]
            gradient = weight * (grad_scores[k, lane] - delta[lane])
            weights[k, lane] = weight
            # A hidden value may be NaN; its weight is zero, and so is its gradient.
            grad_scores[k, lane] = zero if weight == zero else gradient


@inner
def _add_bias_gradient(
    integers: Any, numbers: Any, panel: Panel, begin: int, count: int, grad_scores: Any
) -> None:
    outlined()
    table = scores_at(integers, GRAD_BIAS)
    target = pointer(table.address, numbers)
    base = panel.batch * table.batch + panel.head_of[0] * table.head + begin * table.key
    zero = numbers.dtype.type(0)
    if table.query:
        for lane in range(panel.rows):
            row = base + panel.query_of[lane] * table.query
            if table.key == 1:
                for k in range(count):
                    target[row + k] += grad_scores[k, lane]
            elif table.key:
                for k in range(count):
                    target[row + k * table.key] += grad_scores[k, lane]
            else:
                total = zero
                for k in range(count):
                    total += grad_scores[k, lane]
                target[row] += total
        return
    # Sums over a block first: what is added to a long sum has more digits then.
    over_keys = zero
    for k in range(count):
        total = zero
        for lane in range(panel.rows):
            total += grad_scores[k, lane]
        if table.key:
            target[base + k * table.key] += total
        over_keys += total
    if not table.key:
        target[base] += over_keys


@inner
def _add_rows(
    like: Any,
    gradient: Any,
    skipped: int,
    weights: Any,
    count: int,
    rows: Any,
    first: int,
    queries: int,
    size: int,
    plain: bool,
    ones: Any,
) -> None:
    """gradient[skipped + k] += sum over queries of weights[k, query] * rows[first + query]."""
    item, width = like.itemsize, rows.shape[1]
    c = address_of(gradient) + skipped * width * item
    b = address_of(rows) + first * width * item
    a, by = address_of(weights), address_of(ones)
    if plain:
        product(like, c, width, a, PANEL, 1, b, width, round_up(count, ROWS), width, queries, by)
    else:
        product_where_weighted(
            like, c, width, a, PANEL, 1, b, width, count, size, queries, by, True
        )


@inner
def _run_panel(
    problem: Problem,
    integers: Any,
    numbers: Any,
    span: Span,
    packed: PackedHead,
    block: Block,
    scratch: Scratch,
    panel: Panel,
    p: int,
    block_begin: int,
    begin: int,
    end: int,
    keys: int,
    key_row: int,
    values: int,
    value_row: int,
) -> None:
    """One panel against the keys ``[begin, end)`` of a block: its share of every gradient."""
    outlined()
    wide_vectors()
    item, count, skipped = numbers.itemsize, end - begin, begin - block_begin
    keys += skipped * key_row * item
    values += skipped * value_row * item
    kind = score_block(
        problem,
        numbers,
        panel,
        span,
        address_of(packed.query[p]),
        keys,
        key_row,
        begin,
        end,
        block.weights,
        block.largest,
        scratch,
        block.cap_slope,
    )
    if kind == HIDDEN:
        return
    product(
        numbers,
        address_of(block.grad_scores),
        PANEL,
        values,
        value_row,
        1,
        address_of(packed.grad_output[p]),
        PANEL,
        count,
        PANEL,
        problem.value_size,
        0,
    )
    keep_row = draw_keep(problem, panel, begin, end, scratch) if problem.drops else 0
    _score_gradients(problem, numbers, packed, p, count, block, scratch.keep, keep_row)
    if integers[GRAD_BIAS]:
        _add_bias_gradient(integers, numbers, panel, begin, count, block.grad_scores)
    if numbers[CAP] != 0:
        for k in range(count):
            for lane in range(PANEL):
                # The slope at a hidden score may be NaN.
                if block.grad_scores[k, lane] != 0:
                    block.grad_scores[k, lane] *= block.cap_slope[k, lane]
    if integers[GRAD_QUERY]:
        weighted_product(
            kind,
            numbers,
            address_of(packed.grad_query[p]),
            keys,
            key_row,
            problem.size,
            address_of(block.grad_scores),
            count,
            address_of(block.ones),
        )
    first = p * PANEL
    if integers[GRAD_VALUE]:
        _add_rows(
            numbers,
            block.grad_value,
            skipped,
            block.weights,
            count,
            packed.grad_output_rows,
            first,
            panel.rows,
            problem.value_size,
            packed.finite[p, 1],
            block.ones,
        )
    if integers[GRAD_KEY]:
        _add_rows(
            numbers,
            block.grad_key,
            skipped,
            block.grad_scores,
            count,
            packed.query_rows,
            first,
            panel.rows,
            problem.size,
            packed.finite[p, 0],
            block.ones,
        )


@inner
def _store_rows(
    numbers: Any,
    target: Heads,
    batch: int,
    head: int,
    first: int,
    count: int,
    gradient: Any,
    size: int,
    factor: Any,
    touched: bool,
    adds: bool,
) -> None:
    """Rows of a gradient times a factor to the result, or added to what is there."""
    outlined()
    rows = pointer(target.address, numbers)
    base = batch * target.batch + head * target.head + first * target.row
    for at in range(count):
        place = base + at * target.row
        for k in range(size):
            value = gradient[at, k] * factor if touched else 0
            rows[place + k] = rows[place + k] + value if adds else value


@inner
def _run_head(
    integers: Any,
    numbers: Any,
    packed: PackedHead,
    block: Block,
    scratch: Scratch,
    batch: int,
    head: int,
    start: int,
    adds: bool,
    split: int,
) -> None:
    """Every gradient of some queries of one head, from one split of its keys."""
    compact()
    problem, item = problem_of(integers), numbers.itemsize
    span = span_of(problem, batch)
    kv_head = head // (problem.heads // problem.kv_heads)
    queries = max(min(CHUNK, span.queries - start), 0)
    _pack_head(problem, integers, numbers, span, batch, head, start, queries, packed)
    all_keys = span.keys if problem.key_starts else problem.keys
    blocks = (all_keys + KEY_BLOCK - 1) // KEY_BLOCK
    splits = integers[SPLITS]
    key_stride = copied_stride(problem, problem.key, problem.size, item)
    value_stride = copied_stride(problem, problem.value, problem.value_size, item)
    one = numbers.dtype.type(1)
    for index in range(blocks * split // splits, blocks * (split + 1) // splits):
        first, last = index * KEY_BLOCK, min((index + 1) * KEY_BLOCK, all_keys)
        begin, end = max(first, span.first_key), min(last, span.last_key)
        query_begin, query_end = np.int64(0), np.int64(0)
        if end > begin:
            query_begin, query_end = seen_from(problem, span, begin, end - 1)
            query_begin = max(query_begin - start, 0)
            query_end = min(query_end - start, queries)
        touched = query_end > query_begin
        if touched:
            keys, key_row = key_address(
                problem,
                problem.key,
                span,
                batch,
                kv_head,
                begin,
                end,
                problem.size,
                block.key_copy,
                key_stride,
            )
            values, value_row = key_address(
                problem,
                problem.value,
                span,
                batch,
                kv_head,
                begin,
                end,
                problem.value_size,
                block.value_copy,
                value_stride,
            )
            block.grad_key[:, :] = 0
            block.grad_value[:, :] = 0
            for p in range(query_begin // PANEL, (query_end - 1) // PANEL + 1):
                rows = min(PANEL, queries - p * PANEL)
                panel = make_panel(span, batch, head, start + p * PANEL, rows)
                seen_begin, seen_end = visible(problem, span, panel.first, panel.last)
                seen_begin, seen_end = max(seen_begin, begin), min(seen_end, end)
                if seen_end > seen_begin:
                    _run_panel(
                        problem,
                        integers,
                        numbers,
                        span,
                        packed,
                        block,
                        scratch,
                        panel,
                        p,
                        begin,
                        seen_begin,
                        seen_end,
                        keys,
                        key_row,
                        values,
                        value_row,
                    )
        elif adds:
            continue
        for grad, gradient, size, factor in (
            (heads_at(integers, GRAD_KEY), block.grad_key, problem.size, numbers[SCALE]),
            (heads_at(integers, GRAD_VALUE), block.grad_value, problem.value_size, one),
        ):
            if grad.address == 0:
                continue
            first_key = span.key_start + first
            if not adds:
                # Keys of the block that nobody may see.
                edge = begin if touched else last
                _store_rows(
                    numbers,
                    grad,
                    batch,
                    kv_head,
                    first_key,
                    edge - first,
                    gradient,
                    size,
                    factor,
                    False,
                    False,
                )
                edge = end if touched else last
                _store_rows(
                    numbers,
                    grad,
                    batch,
                    kv_head,
                    span.key_start + edge,
                    last - edge,
                    gradient,
                    size,
                    factor,
                    False,
                    False,
                )
            if touched:
                _store_rows(
                    numbers,
                    grad,
                    batch,
                    kv_head,
                    span.key_start + begin,
                    end - begin,
                    gradient,
                    size,
                    factor,
                    True,
                    adds,
                )
    if integers[GRAD_QUERY]:
        _write_query(problem, integers, numbers, span, packed, batch, head, start, queries, split)


@inner
def _write_query(
    problem: Problem,
    integers: Any,
    numbers: Any,
    span: Span,
    packed: PackedHead,
    batch: int,
    head: int,
    start: int,
    queries: int,
    split: int,
) -> None:
    outlined()
    target = heads_at(integers, GRAD_QUERY)
    rows = pointer(target.address, numbers)
    base = batch * target.batch + head * target.head + split * integers[GRAD_QUERY_SPLIT]
    for query in range(queries):
        place = base + (span.query_start + start + query) * target.row
        for k in range(problem.size):
            gradient = packed.grad_query[query // PANEL, k, query % PANEL]
            rows[place + k] = gradient * numbers[SCALE]
    if problem.query_lengths and start == 0:
        for query in range(span.queries, problem.queries):
            place = base + query * target.row
            for k in range(problem.size):
                rows[place + k] = 0


@inner
def backward_piece(integers: Any, numbers: Any, piece: int) -> None:
    """The heads of a unit, one after another: their gradients are added to the same elements."""
    problem = problem_of(integers)
    splits, batches, heads = integers[SPLITS], integers[UNIT_BATCHES], integers[UNIT_HEADS]
    block, scratch = _new_block(problem, numbers), new_scratch(problem, numbers)
    unit, split = piece // splits, piece % splits
    heads_apart = problem.kv_heads // heads
    first_batch, first_head = unit // heads_apart * batches, unit % heads_apart * heads
    group = problem.heads // problem.kv_heads
    longest = np.int64(0)
    for batch in range(first_batch, first_batch + batches):
        longest = max(longest, span_of(problem, batch).queries)
    packed = _new_head(problem, numbers, min(longest, CHUNK))
    for batch in range(first_batch, first_batch + batches):
        for kv_head in range(first_head, first_head + heads):
            for member in range(group):
                # Once where there is no query at all: keys get a gradient of zero.
                for start in range(0, max(span_of(problem, batch).queries, 1), CHUNK):
                    _run_head(
                        integers,
                        numbers,
                        packed,
                        block,
                        scratch,
                        batch,
                        kv_head * group + member,
                        start,
                        member + start > 0,
                        split,
                    )


@inner
def sink_gradient(integers: Any, numbers: Any, head: int) -> None:
    """Over every row of the batch, of either sign: summed in float64."""
    problem = problem_of(integers)
    sink = pointer(problem.sinks, numbers)[head]
    factor = score_factor(problem, numbers)
    rows, deltas = rows_at(integers, ROW_MAXIMUM), rows_at(integers, DELTA)
    total = 0.0
    for batch in range(problem.batch):
        span = span_of(problem, batch)
        for query in range(span.queries):
            place = batch * rows.batch + head * rows.head + span.query_start + query
            scale = pointer(integers[ROW_SCALE], numbers)[place]
            if scale == 0:
                continue  # a row that sees nothing has no maximum either
            top = pointer(rows.address, numbers)[place]
            weight = exponential(sink - top * factor) * scale
            place = batch * deltas.batch + head * deltas.head + span.query_start + query
            delta = pointer(deltas.address, numbers)[place]
            total -= np.float64(weight) * np.float64(delta)
    pointer(integers[GRAD_SINKS], numbers)[head] = total
