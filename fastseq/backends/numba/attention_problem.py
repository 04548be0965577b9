"""What forward and backward of attention share: the call's numbers, and which keys a query sees.

A call arrives as two arrays: int64 (sizes, addresses, strides) and numbers of the tensors' dtype.
Compiled functions read named tuples out of them, so that one signature per dtype serves every
combination of options, layouts and absent tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastseq.backends.numba.tiles import address_of, compact, inner, outlined, pointer

__all__ = [
    "KEY_BLOCK",
    "PANEL",
    "Heads",
    "Problem",
    "Rows",
    "Scores",
    "Span",
    "copied_stride",
    "heads_at",
    "key_address",
    "plain_scores",
    "problem_of",
    "rows_at",
    "scores_at",
    "seen_from",
    "span_of",
    "visible",
]

_BYTES, _INTEGERS = np.zeros(1, np.uint8), np.zeros(1, np.int64)

# Query rows side by side in the lanes of a vector, and keys worked on at a time: the scores of one
# panel against one block (16 KiB in float32) stay in the first cache.
PANEL = 32
KEY_BLOCK = 128


class Heads(NamedTuple):
    """A tensor ``(B, heads, S, size)`` with unit last stride; strides in values."""

    address: int
    batch: int
    head: int
    row: int


class Rows(NamedTuple):
    """A tensor ``(B, heads, S)`` with unit last stride."""

    address: int
    batch: int
    head: int


class Scores(NamedTuple):
    """A table broadcast to ``(B, Hq, Sq, Skv)``, with strides of 0; address 0 for none."""

    address: int
    batch: int
    head: int
    query: int
    key: int


class Problem(NamedTuple):
    """The sizes of a call and the tensors besides query, key and value."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    size: int
    value_size: int
    window_left: int
    window_right: int
    bottom_right: int
    block_size: int
    blocks_per_sequence: int
    query_lengths: int  # addresses of int64, or 0
    key_lengths: int
    query_starts: int
    key_starts: int
    block_table: int
    padding: int  # of bytes
    padding_stride: int
    slopes: int
    slopes_stride: int
    sinks: int
    drops: int
    threshold: int
    seed: int
    offset: int
    bias: Scores
    mask: Scores
    query: Heads
    key: Heads
    value: Heads


class Span(NamedTuple):
    """One sequence of the batch."""

    queries: int
    keys: int
    query_start: int  # first row in the tensors
    key_start: int
    shift: int  # position of query i is i + shift
    first_key: int  # keys before and after are padding
    last_key: int


# Places in the array of int64. [0:3] belong to fastseq.backends.numba.threads.
COUNTER, COUNT, NUMBERS_ADDRESS, _FIRST = 3, 4, 5, 6
_SCALARS = 26
_BIAS = _FIRST + _SCALARS
_MASK = _BIAS + 5
_QUERY = _MASK + 5
_KEY = _QUERY + 4
_VALUE = _KEY + 4
REST = _VALUE + 4  # what forward and backward add

# Places in the array of numbers. The cap is 0 for none.
SCALE, CAP, KEPT_SCALE, NUMBERS = 0, 1, 2, 3


@inner
def heads_at(integers: Any, at: int) -> Heads:
    """The four numbers of a tensor of heads."""
    return Heads(integers[at], integers[at + 1], integers[at + 2], integers[at + 3])


@inner
def rows_at(integers: Any, at: int) -> Rows:
    """The three numbers of a tensor of rows."""
    return Rows(integers[at], integers[at + 1], integers[at + 2])


@inner
def scores_at(integers: Any, at: int) -> Scores:
    """The five numbers of a table of scores."""
    return Scores(
        integers[at], integers[at + 1], integers[at + 2], integers[at + 3], integers[at + 4]
    )


@inner
def problem_of(i: Any) -> Problem:
    """The problem that the array of int64 describes."""
    return Problem(
        i[_FIRST],
        i[_FIRST + 1],
        i[_FIRST + 2],
        i[_FIRST + 3],
        i[_FIRST + 4],
        i[_FIRST + 5],
        i[_FIRST + 6],
        i[_FIRST + 7],
        i[_FIRST + 8],
        i[_FIRST + 9],
        i[_FIRST + 10],
        i[_FIRST + 11],
        i[_FIRST + 12],
        i[_FIRST + 13],
        i[_FIRST + 14],
        i[_FIRST + 15],
        i[_FIRST + 16],
        i[_FIRST + 17],
        i[_FIRST + 18],
        i[_FIRST + 19],
        i[_FIRST + 20],
        i[_FIRST + 21],
        i[_FIRST + 22],
        i[_FIRST + 23],
        i[_FIRST + 24],
        i[_FIRST + 25],
        scores_at(i, _BIAS),
        scores_at(i, _MASK),
        heads_at(i, _QUERY),
        heads_at(i, _KEY),
        heads_at(i, _VALUE),
    )


@inner
def span_of(problem: Problem, b: int) -> Span:
    """The sequence ``b``."""
    compact()
    queries, keys = problem.queries, problem.keys
    query_start, key_start = np.int64(0), np.int64(0)
    if problem.query_starts:
        starts = pointer(problem.query_starts, _INTEGERS)
        query_start, queries = starts[b], starts[b + 1] - starts[b]
    if problem.key_starts:
        starts = pointer(problem.key_starts, _INTEGERS)
        key_start, keys = starts[b], starts[b + 1] - starts[b]
    if problem.query_lengths:
        queries = min(queries, pointer(problem.query_lengths, _INTEGERS)[b])
    if problem.key_lengths:
        keys = min(keys, pointer(problem.key_lengths, _INTEGERS)[b])
    first, last = np.int64(0), keys
    if problem.padding:
        padding = byte_pointer(problem.padding)
        row = b * problem.padding_stride
        while last > 0 and padding[row + last - 1]:
            last -= 1
        while first < last and padding[row + first]:
            first += 1
    shift = keys - queries if problem.bottom_right else np.int64(0)
    return Span(queries, keys, query_start, key_start, shift, first, last)


@inner
def byte_pointer(address: int) -> Any:
    """The address as a pointer to bytes."""
    return pointer(address, _BYTES)


@inner
def visible(problem: Problem, span: Span, first: int, last: int) -> Any:
    """Keys ``[begin, end)`` that some query at positions ``first ... last`` may see."""
    begin, end = span.first_key, span.last_key
    if problem.window_left >= 0:
        begin = max(begin, first - problem.window_left)
    if problem.window_right >= 0:
        end = min(end, last + problem.window_right + 1)
    return begin, max(begin, end)


@inner
def seen_from(problem: Problem, span: Span, first: int, last: int) -> Any:
    """Queries ``[begin, end)`` that may see a key of ``first ... last``."""
    begin, end = np.int64(0), span.queries
    if problem.window_right >= 0:
        begin = max(begin, first - problem.window_right - span.shift)
    if problem.window_left >= 0:
        end = min(end, last + problem.window_left - span.shift + 1)
    return begin, max(begin, end)


@inner
def plain_scores(problem: Problem, numbers: Any) -> bool:
    """The score is a positive multiple of the product of query and key."""
    return (
        numbers[CAP] == 0 and not problem.bias.address and not problem.slopes and numbers[SCALE] > 0
    )


@inner
def _key_row(
    problem: Problem, tensor: Heads, span: Span, batch: int, head: int, key: int, size: int
) -> int:
    """Address of a row of keys or values; ``size`` is that of a value in bytes."""
    if problem.block_table:
        table = pointer(problem.block_table, _INTEGERS)
        block = table[batch * problem.blocks_per_sequence + key // problem.block_size]
        row = block * tensor.batch + (key % problem.block_size) * tensor.row
    else:
        row = batch * tensor.batch + (span.key_start + key) * tensor.row
    return tensor.address + (row + head * tensor.head) * size


@inner
def copied_stride(problem: Problem, tensor: Heads, size: int, item_bytes: int) -> int:
    """Values from row to row of a copy of a block; 0 where the rows serve as they lie.

    Pages are copied, and rows that lie so far apart that a block of them would share a few cache
    sets.
    """
    if not problem.block_table and tensor.row <= size + 256 // item_bytes:
        return 0
    line = 64 // item_bytes
    return (size + line - 1) // line * line + line


@inner
def key_address(
    problem: Problem,
    tensor: Heads,
    span: Span,
    batch: int,
    head: int,
    begin: int,
    end: int,
    size: int,
    copy: Any,
    stride: int,
) -> Any:
    """Address and row stride of rows ``[begin, end)`` of keys or values.

    With a ``stride`` of :func:`copied_stride` they are copied into the array ``copy`` first.
    """
    outlined()
    item = copy.itemsize
    if stride == 0:
        return _key_row(problem, tensor, span, batch, head, begin, item), tensor.row
    for key in range(begin, end):
        source = pointer(_key_row(problem, tensor, span, batch, head, key, item), copy)
        place = (key - begin) * stride
        for k in range(size):
            copy[place + k] = source[k]
    return address_of(copy), stride
