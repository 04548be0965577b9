"""Forward of attention: softmax(scores) V without ever holding the scores of more than one block.

A piece of work is one panel of query rows of one head. It walks the visible keys block by block
with a running maximum and sum (Milakov, Gimelshein: Online normalizer calculation for softmax,
2018; Dao et al.: FlashAttention, 2022). Pieces share nothing, so that bits do not depend on the
number of threads.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastseq.backends.numba.attention_problem import (
    KEPT_SCALE,
    KEY_BLOCK,
    PANEL,
    REST,
    Problem,
    Span,
    copied_stride,
    heads_at,
    key_address,
    problem_of,
    rows_at,
    span_of,
    visible,
)
from fastseq.backends.numba.attention_scores import (
    HIDDEN,
    Panel,
    Scratch,
    draw_keep,
    final_weights,
    make_panel,
    new_scratch,
    score_block,
    score_factor,
    weighted_product,
)
from fastseq.backends.numba.elementary import exponential
from fastseq.backends.numba.tiles import (
    ROWS,
    address_of,
    compact,
    inner,
    outlined,
    pointer,
    round_up,
    wide_vectors,
)

__all__ = ["forward_piece"]

# Places in the array of int64 after the problem's.
MERGES, LISTS, PIECES, OUTPUT = range(REST, REST + 4)
LSE = OUTPUT + 4
ROW_MAXIMUM = LSE + 3
ROW_SCALE = ROW_MAXIMUM + 3
WEIGHTS = ROW_SCALE + 3
AVERAGES = WEIGHTS + 4
SEEN_PIECES = AVERAGES + 1  # those after them are rows past a sequence's end
FORWARD_INTEGERS = SEEN_PIECES + 1


class Memory(NamedTuple):
    """What one panel needs; per lane the running maximum and sum and the factor for older sums."""

    query: Any  # (E, PANEL)
    output: Any  # (Ev padded, PANEL)
    scores: Any  # (KEY_BLOCK, PANEL)
    maximum: Any  # (PANEL,)
    total: Any  # (PANEL,)
    shrink: Any  # (PANEL,)
    largest: Any  # (PANEL,), of the latest block
    key_copy: Any
    value_copy: Any
    no_slope: Any  # (0, PANEL)
    key_stride: int
    value_stride: int


@inner
def _weigh(problem: Problem, numbers: Any, memory: Memory, count: int) -> None:
    """Scores become ``exp(factor * (score - maximum))``, and the running numbers move on."""
    outlined()
    wide_vectors()
    factor = score_factor(problem, numbers)
    maximum, total, shrink = memory.maximum, memory.total, memory.shrink
    scores, top = memory.scores, memory.largest
    zero, lowest = numbers.dtype.type(0), numbers.dtype.type(-np.inf)
    for lane in range(PANEL):
        before = maximum[lane]
        now = top[lane] if top[lane] > before else before
        # A row that has seen nothing has no maximum to subtract.
        subtracted = zero if now == lowest else now
        shrink[lane] = exponential((before - subtracted) * factor)
        total[lane] *= shrink[lane]
        maximum[lane] = now
        top[lane] = subtracted
    for k in range(count):
        for lane in range(PANEL):
            scores[k, lane] = exponential((scores[k, lane] - top[lane]) * factor)
    # Sums of one block first: what is added to a long sum has more digits then.
    for lane in range(PANEL):
        top[lane] = zero
    for k in range(count):
        for lane in range(PANEL):
            top[lane] += scores[k, lane]
    for lane in range(PANEL):
        total[lane] += top[lane]


@inner
def _drop(scores: Any, keep: Any, row: int, count: int) -> None:
    outlined()
    wide_vectors()
    for k in range(count):
        for lane in range(PANEL):
            if keep[row + k, lane] == 0:
                scores[k, lane] = 0


@inner
def _write_statistics(
    integers: Any, numbers: Any, factor: Any, batch: int, head: int, row: int, top: Any, total: Any
) -> None:
    """A row's log-sum-exp and what backward needs of it."""
    compact()
    rows = rows_at(integers, LSE)
    place = batch * rows.batch + head * rows.head + row
    if total == 0:
        pointer(rows.address, numbers)[place] = -np.inf
    else:
        lse = np.float64(top) * np.float64(factor) + math.log(np.float64(total))
        pointer(rows.address, numbers)[place] = lse
    rows = rows_at(integers, ROW_MAXIMUM)
    if rows.address:
        # A row of NaN has none either.
        pointer(rows.address, numbers)[place] = 0 if top == -np.inf else top
        inverse = 0 if total == 0 else 1 / total
        pointer(integers[ROW_SCALE], numbers)[place] = inverse


@inner
def _weight_scale(numbers: Any, total: Any) -> Any:
    zero = numbers.dtype.type(0)
    return zero if total == zero else numbers[KEPT_SCALE] / total


@inner
def _finish(
    problem: Problem,
    integers: Any,
    numbers: Any,
    panel: Panel,
    span: Span,
    memory: Memory,
    started: int,
) -> None:
    """A panel's rows of the output and their statistics; sinks join the sums."""
    compact()
    factor = score_factor(problem, numbers)
    heads = heads_at(integers, OUTPUT)
    target = pointer(heads.address, numbers)
    one = numbers.dtype.type(1)
    for lane in range(panel.rows):
        head, row = panel.head_of[lane], span.query_start + panel.query_of[lane]
        shrink = one
        if problem.sinks and memory.total[lane] != 0:
            logit = pointer(problem.sinks, numbers)[head] / factor
            top = memory.maximum[lane]
            now = logit if logit > top else top
            shrink = exponential((top - now) * factor)
            joined = memory.total[lane] * shrink + exponential((logit - now) * factor)
            memory.total[lane] = joined
            memory.maximum[lane] = now
        total = memory.total[lane]
        by = _weight_scale(numbers, total) * shrink
        place = panel.batch * heads.batch + head * heads.head + row * heads.row
        for k in range(problem.value_size):
            target[place + k] = memory.output[k, lane] * by if started else 0
        _write_statistics(
            integers, numbers, factor, panel.batch, head, row, memory.maximum[lane], total
        )


@inner
def _zero_unused(integers: Any, numbers: Any, i: int) -> None:
    """Rows past a sequence's length, of head ``i`` of all sequences' heads."""
    compact()
    problem = problem_of(integers)
    batch, head = i // problem.heads, i % problem.heads
    span = span_of(problem, batch)
    heads = heads_at(integers, OUTPUT)
    weights = heads_at(integers, WEIGHTS)
    for query in range(span.queries, problem.queries):
        place = heads.batch * batch + heads.head * head + heads.row * query
        for k in range(problem.value_size):
            pointer(heads.address, numbers)[place + k] = 0
        zero = numbers.dtype.type(0)
        _write_statistics(integers, numbers, zero, batch, head, query, zero, zero)
        if weights.address and (head == 0 or not integers[AVERAGES]):
            place = weights.batch * batch + weights.head * head + weights.row * query
            for k in range(problem.keys):
                pointer(weights.address, numbers)[place + k] = 0


@inner
def _write_weights(
    integers: Any, numbers: Any, panel: Panel, scores: Any, begin: int, count: int
) -> None:
    compact()
    heads, adds = heads_at(integers, WEIGHTS), integers[AVERAGES] != 0
    target = pointer(heads.address, numbers)
    for lane in range(panel.rows):
        row = panel.batch * heads.batch + panel.head_of[lane] * heads.head + begin
        row += panel.query_of[lane] * heads.row
        for k in range(count):
            if adds:
                target[row + k] += scores[k, lane]
            else:
                target[row + k] = scores[k, lane]


@inner
def _prepare_weights(
    problem: Problem, integers: Any, numbers: Any, panel: Panel, memory: Memory
) -> None:
    """Zeros where nobody looks; the sums of a panel's rows become the factors of its weights."""
    compact()
    heads = heads_at(integers, WEIGHTS)
    averages = integers[AVERAGES] != 0
    target = pointer(heads.address, numbers)
    if not averages or panel.head_of[0] == 0:
        for lane in range(panel.rows):
            row = panel.batch * heads.batch + panel.head_of[lane] * heads.head
            row += panel.query_of[lane] * heads.row
            for k in range(problem.keys):
                target[row + k] = 0
    lowest = numbers.dtype.type(-np.inf)
    for lane in range(PANEL):
        if memory.maximum[lane] == lowest:
            memory.maximum[lane] = 0
        by = _weight_scale(numbers, memory.total[lane])
        memory.total[lane] = by / numbers.dtype.type(problem.heads) if averages else by


@inner
def _pack_query(problem: Problem, numbers: Any, panel: Panel, span: Span, packed: Any) -> None:
    """packed[k, lane] = the lane's query."""
    outlined()
    source = pointer(problem.query.address, numbers)
    for lane in range(PANEL):
        place = panel.batch * problem.query.batch + panel.head_of[lane] * problem.query.head
        place += (span.query_start + panel.query_of[lane]) * problem.query.row
        for k in range(problem.size):
            packed[k, lane] = source[place + k]


@inner
def _new_memory(problem: Problem, numbers: Any) -> Memory:
    compact()
    dtype, item = numbers.dtype, numbers.itemsize
    key_stride = copied_stride(problem, problem.key, problem.size, item)
    value_stride = copied_stride(problem, problem.value, problem.value_size, item)
    return Memory(
        np.empty((problem.size, PANEL), dtype),
        np.empty((round_up(problem.value_size, ROWS), PANEL), dtype),
        np.empty((KEY_BLOCK, PANEL), dtype),
        np.full(PANEL, -np.inf, dtype),
        np.zeros(PANEL, dtype),
        np.empty(PANEL, dtype),
        np.empty(PANEL, dtype),
        np.empty(KEY_BLOCK * key_stride, dtype),
        np.empty(KEY_BLOCK * value_stride, dtype),
        np.empty((0, PANEL), dtype),
        key_stride,
        value_stride,
    )


@inner
def _run_block(
    problem: Problem,
    integers: Any,
    numbers: Any,
    panel: Panel,
    span: Span,
    memory: Memory,
    scratch: Scratch,
    begin: int,
    end: int,
    kind: int,
    started: int,
    again: bool,
) -> None:
    """What becomes of a block's scores: a share of the output or, the second time, weights."""
    outlined()
    count, scores = end - begin, memory.scores
    if again:
        final_weights(problem, numbers, scores, count, memory.maximum, memory.total)
    else:
        _weigh(problem, numbers, memory, count)
    if problem.drops:
        row = draw_keep(problem, panel, begin, end, scratch)
        _drop(scores, scratch.keep, row, count)
    if again:
        _write_weights(integers, numbers, panel, scores, begin, count)
        return
    size = problem.value_size
    kv_head = panel.head_of[0] // (problem.heads // problem.kv_heads)
    values, value_row = key_address(
        problem,
        problem.value,
        span,
        panel.batch,
        kv_head,
        begin,
        end,
        size,
        memory.value_copy,
        memory.value_stride,
    )
    weighted_product(
        kind,
        numbers,
        address_of(memory.output),
        values,
        value_row,
        size,
        address_of(scores),
        count,
        address_of(memory.shrink) if started else 0,
    )


@inner
def _run_panel(integers: Any, numbers: Any, batch: int, index: int, first_head: int) -> None:
    """Panel ``index`` of the rows of one head, or of all heads of a group."""
    outlined()
    problem = problem_of(integers)
    span = span_of(problem, batch)
    group = problem.heads // problem.kv_heads
    rows = span.queries * (group if integers[MERGES] else 1)
    row = index * PANEL
    if row >= rows:
        return
    memory, scratch = _new_memory(problem, numbers), new_scratch(problem, numbers)
    panel = make_panel(span, batch, first_head, row, min(PANEL, rows - row))
    _pack_query(problem, numbers, panel, span, memory.query)
    first, last = visible(problem, span, panel.first, panel.last)
    blocks, started = (last - first + KEY_BLOCK - 1) // KEY_BLOCK, np.int64(0)
    for step in range(blocks * (2 if integers[WEIGHTS] else 1) + 1):
        if step == blocks:
            _finish(problem, integers, numbers, panel, span, memory, started)
            if integers[WEIGHTS]:
                _prepare_weights(problem, integers, numbers, panel, memory)
            continue
        # The scores a second time for the weights, now that maximum and sum are known.
        again = step > blocks
        begin = first + (step - blocks - 1 if again else step) * KEY_BLOCK
        end = min(begin + KEY_BLOCK, last)
        keys, key_row = key_address(
            problem,
            problem.key,
            span,
            batch,
            first_head // group,
            begin,
            end,
            problem.size,
            memory.key_copy,
            memory.key_stride,
        )
        kind = score_block(
            problem,
            numbers,
            panel,
            span,
            address_of(memory.query),
            keys,
            key_row,
            begin,
            end,
            memory.scores,
            memory.largest,
            scratch,
            memory.no_slope,
        )
        if kind != HIDDEN:
            _run_block(
                problem,
                integers,
                numbers,
                panel,
                span,
                memory,
                scratch,
                begin,
                end,
                kind,
                started,
                again,
            )
            started = np.int64(1)


@inner
def forward_piece(integers: Any, numbers: Any, i: int) -> None:
    """Piece ``i``: a panel, or the spare rows of one head of a sequence."""
    problem = problem_of(integers)
    if i >= integers[SEEN_PIECES]:
        _zero_unused(integers, numbers, i - integers[SEEN_PIECES])
        return
    pieces, lists = integers[PIECES], integers[LISTS]
    # The last queries of a causal sequence see most keys: they go first.
    index, many = pieces - 1 - i % pieces, i // pieces
    if integers[AVERAGES]:
        for head in range(problem.heads):
            _run_panel(integers, numbers, many, index, head)
        return
    first_head = many % lists
    if integers[MERGES]:
        first_head *= problem.heads // problem.kv_heads
    _run_panel(integers, numbers, many // lists, index, first_head)
