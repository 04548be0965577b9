"""From products of queries and keys to scores and weights, one panel against one block of keys.

Blocks are ``(KEY_BLOCK, PANEL)``: a row per key, a lane per query, so that maxima and sums over
keys need no sums across a vector.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastseq.backends.numba.attention_problem import (
    CAP,
    KEY_BLOCK,
    PANEL,
    SCALE,
    Problem,
    Scores,
    Span,
    byte_pointer,
    plain_scores,
)
from fastseq.backends.numba.elementary import exponential, hyperbolic_tangent
from fastseq.backends.numba.tiles import (
    address_of,
    compact,
    inner,
    outlined,
    pointer,
    product,
    product_where_weighted,
    wide_vectors,
)

__all__ = [
    "HIDDEN",
    "WHOLE",
    "Panel",
    "Scratch",
    "all_finite",
    "draw_keep",
    "final_weights",
    "make_panel",
    "new_scratch",
    "score_block",
    "score_factor",
    "weighted_product",
]

# What became of a block of pairs: nothing to see, all seen, or some hidden.
HIDDEN, WHOLE, PARTIAL = 0, 1, 2


class Panel(NamedTuple):
    """``PANEL`` query rows: those of one head, or of all heads of a group, one after the other."""

    batch: int
    rows: int  # in use; lanes past them repeat the last
    first: int  # positions of its queries: first ... last
    last: int
    head_of: Any  # (PANEL,) int64
    query_of: Any  # (PANEL,) int64


class Scratch(NamedTuple):
    """Memory that one piece of work needs for a block."""

    addend: Any  # (KEY_BLOCK, PANEL): a bias
    seen: Any  # (KEY_BLOCK, PANEL) bytes: a mask
    keep: Any  # (KEY_BLOCK + 8, PANEL) bytes: what dropout leaves, from a multiple of four keys on
    lanes: Any  # (2, PANEL): slope and position of each lane
    places: Any  # (PANEL,) uint64


@inner
def new_scratch(problem: Problem, numbers: Any) -> Scratch:
    """Of the sizes that the problem's options need."""
    compact()
    some = KEY_BLOCK if problem.bias.address else 0
    hidden = KEY_BLOCK if problem.mask.address else 0
    kept = KEY_BLOCK + 8 if problem.drops else 0
    return Scratch(
        np.empty((some, PANEL), numbers.dtype),
        np.empty((hidden, PANEL), np.uint8),
        np.empty((kept, PANEL), np.uint8),
        np.empty((2, PANEL), numbers.dtype),
        np.empty(PANEL, np.uint64),
    )


@inner
def make_panel(span: Span, batch: int, first_head: int, row: int, rows: int) -> Panel:
    """The rows from ``row`` on of the list of all rows of heads ``first_head`` and following."""
    compact()
    head_of, query_of = np.empty(PANEL, np.int64), np.empty(PANEL, np.int64)
    for lane in range(PANEL):
        at = row + min(lane, rows - 1)
        head_of[lane] = first_head + at // span.queries
        query_of[lane] = at % span.queries
    if head_of[0] == head_of[rows - 1]:
        first, last = query_of[0], query_of[rows - 1]
    else:
        first, last = np.int64(0), span.queries - 1
    return Panel(batch, rows, first + span.shift, last + span.shift, head_of, query_of)


@inner
def score_factor(problem: Problem, numbers: Any) -> Any:
    """Factor from what :func:`score_block` leaves to natural units."""
    return numbers[SCALE] if plain_scores(problem, numbers) else numbers.dtype.type(1)


@inner
def _load_table(
    table: Scores, source: Any, panel: Panel, begin: int, count: int, target: Any
) -> None:
    """target[k, lane] = the table's element for the lane's query and key ``begin + k``."""
    outlined()
    base = panel.batch * table.batch + begin * table.key
    if table.query == 0 and (table.head == 0 or panel.head_of[0] == panel.head_of[PANEL - 1]):
        base += panel.head_of[0] * table.head
        for k in range(count):
            value = source[base + k * table.key]
            for lane in range(PANEL):
                target[k, lane] = value
        return
    for lane in range(PANEL):
        row = base + panel.head_of[lane] * table.head + panel.query_of[lane] * table.query
        if table.key == 1:
            for k in range(count):
                target[k, lane] = source[row + k]
        else:
            for k in range(count):
                target[k, lane] = source[row + k * table.key]


@inner
def _seen(problem: Problem, panel: Panel, begin: int, count: int, scratch: Scratch) -> int:
    """What mask and padding leave of a block; the mask's part is then in the scratch memory."""
    outlined()
    every = True
    if problem.padding:
        padding = byte_pointer(problem.padding)
        base, some = panel.batch * problem.padding_stride + begin, False
        for k in range(count):
            if padding[base + k]:
                every = False
            else:
                some = True
        if not some:
            return HIDDEN
    if problem.mask.address:
        seen = scratch.seen
        _load_table(problem.mask, byte_pointer(problem.mask.address), panel, begin, count, seen)
        any_seen, all_seen = np.uint8(0), np.uint8(1)
        for k in range(count):
            for lane in range(PANEL):
                any_seen |= seen[k, lane]
                all_seen &= seen[k, lane]
        if not any_seen:
            return HIDDEN
        every = every and all_seen != 0
    return WHOLE if every else PARTIAL


@inner
def _transform(
    problem: Problem,
    numbers: Any,
    panel: Panel,
    span: Span,
    begin: int,
    count: int,
    scores: Any,
    scratch: Scratch,
    cap_slope: Any,
) -> bool:
    """Products become scores in natural units; true if the bias hides a pair.

    ``cap_slope``, where it has rows, takes the derivative of the soft-cap.
    """
    outlined()
    wide_vectors()
    scale, cap = numbers[SCALE], numbers[CAP]
    one, hides = numbers.dtype.type(1), False
    if cap != 0:
        inverse, slopes = one / cap, cap_slope.shape[0] > 0
        for k in range(count):
            for lane in range(PANEL):
                bent = hyperbolic_tangent(scores[k, lane] * scale * inverse)
                scores[k, lane] = bent * cap
                if slopes:
                    cap_slope[k, lane] = one - bent * bent
        scale = one
    if problem.bias.address:
        addend = scratch.addend
        source = pointer(problem.bias.address, numbers)
        _load_table(problem.bias, source, panel, begin, count, addend)
        lowest = numbers.dtype.type(-np.inf)
        for k in range(count):
            for lane in range(PANEL):
                value = addend[k, lane]
                hides |= value == lowest
                # A product of NaN or Inf stays hidden as well.
                score = scores[k, lane] * scale + value
                scores[k, lane] = lowest if value == lowest else score
    elif cap == 0:
        for k in range(count):
            for lane in range(PANEL):
                scores[k, lane] *= scale
    if problem.slopes:
        slopes_of = pointer(problem.slopes, numbers)
        slope, position = scratch.lanes[0], scratch.lanes[1]
        for lane in range(PANEL):
            slope[lane] = slopes_of[panel.batch * problem.slopes_stride + panel.head_of[lane]]
            position[lane] = numbers.dtype.type(panel.query_of[lane] + span.shift)
        for k in range(count):
            key = numbers.dtype.type(begin + k)
            for lane in range(PANEL):
                scores[k, lane] -= slope[lane] * abs(position[lane] - key)
    return hides


@inner
def _hide_outside(
    problem: Problem, numbers: Any, panel: Panel, span: Span, begin: int, count: int, scores: Any
) -> None:
    """-Inf outside of the window, which is a band of every lane."""
    compact()
    lowest = numbers.dtype.type(-np.inf)
    for lane in range(PANEL):
        position = panel.query_of[lane] + span.shift - begin
        if problem.window_left >= 0:
            for k in range(min(max(position - problem.window_left, 0), count)):
                scores[k, lane] = lowest
        if problem.window_right >= 0:
            for k in range(min(max(position + problem.window_right + 1, 0), count), count):
                scores[k, lane] = lowest


@inner
def score_block(
    problem: Problem,
    numbers: Any,
    panel: Panel,
    span: Span,
    query: int,
    keys: int,
    key_stride: int,
    begin: int,
    end: int,
    scores: Any,
    largest: Any,
    scratch: Scratch,
    cap_slope: Any,
) -> int:
    """``scores[k, lane]`` for keys ``[begin, end)``, -Inf where a pair is hidden.

    They are unscaled products where the scores are plain, else in natural units; ``largest``
    becomes the maximum per lane. ``query``: address of the panel ``(size, PANEL)``; ``keys``: of
    the first row of the block.
    """
    outlined()
    wide_vectors()
    count = end - begin
    seen = WHOLE
    if problem.padding or problem.mask.address:
        seen = _seen(problem, panel, begin, count, scratch)
        if seen == HIDDEN:
            return HIDDEN
    product(
        numbers,
        address_of(scores),
        PANEL,
        keys,
        key_stride,
        1,
        query,
        PANEL,
        count,
        PANEL,
        problem.size,
        0,
    )
    lowest = numbers.dtype.type(-np.inf)
    hides = False
    if not plain_scores(problem, numbers):
        hides = _transform(problem, numbers, panel, span, begin, count, scores, scratch, cap_slope)
    in_window = (problem.window_left < 0 or begin >= panel.last - problem.window_left) and (
        problem.window_right < 0 or end - 1 <= panel.first + problem.window_right
    )
    if not in_window:
        _hide_outside(problem, numbers, panel, span, begin, count, scores)
    if seen == PARTIAL:
        if problem.mask.address:
            for k in range(count):
                for lane in range(PANEL):
                    if scratch.seen[k, lane] == 0:
                        scores[k, lane] = lowest
        if problem.padding:
            padding = byte_pointer(problem.padding)
            base = panel.batch * problem.padding_stride + begin
            for k in range(count):
                if padding[base + k]:
                    for lane in range(PANEL):
                        scores[k, lane] = lowest
    for lane in range(PANEL):
        largest[lane] = lowest
    for k in range(count):
        for lane in range(PANEL):
            score = scores[k, lane]
            largest[lane] = score if score > largest[lane] else largest[lane]
    return PARTIAL if seen == PARTIAL or hides or not in_window else WHOLE


@inner
def all_finite(like: Any, address: int, stride: int, rows: int, size: int) -> bool:
    """Whether rows hold neither Inf nor NaN. A weight of zero hides a finite value only."""
    outlined()
    wide_vectors()
    source = pointer(address, like)
    zero = like.dtype.type(0)
    finite = True
    for row in range(rows):
        for k in range(size):
            finite &= source[row * stride + k] * zero == zero
    return finite


@inner
def weighted_product(
    kind: int,
    like: Any,
    c: int,
    rows: int,
    stride: int,
    size: int,
    weights: int,
    depth: int,
    factor: int,
) -> None:
    """``c (size, PANEL) = c * factor + rows^T weights``; hidden pairs hide NaN and Inf."""
    if kind != WHOLE and not all_finite(like, rows, stride, depth, size):
        product_where_weighted(
            like, c, PANEL, rows, 1, stride, weights, PANEL, size, PANEL, depth, factor, False
        )
        return
    product(like, c, PANEL, rows, 1, stride, weights, PANEL, size, PANEL, depth, factor)


_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


@inner
def _round(a: Any, b: Any, c: Any, d: Any, key_0: Any, key_1: Any, number: int) -> Any:
    """One round of Philox4x32; every word is in the low half of 64 bits."""
    times = np.uint64(number)
    product_0, product_1 = a * _MULTIPLIER_0, c * _MULTIPLIER_1
    return (
        (product_1 >> _HALF) ^ b ^ ((key_0 + times * _WEYL_0) & _LOW),
        product_1 & _LOW,
        (product_0 >> _HALF) ^ d ^ ((key_1 + times * _WEYL_1) & _LOW),
        product_0 & _LOW,
    )


@inner
def draw_keep(problem: Problem, panel: Panel, begin: int, end: int, scratch: Scratch) -> int:
    """Fill ``scratch.keep`` for keys ``[begin, end)``; the row of the first of them.

    Philox4x32-10 with the counters that ``csrc/attention/philox.h`` describes: the same weights
    are dropped.
    """
    outlined()
    wide_vectors()
    seed = np.uint64(problem.seed)
    offset = np.uint64(problem.offset) & _LOW
    key_0, key_1 = seed & _LOW, seed >> _HALF
    threshold = np.uint64(problem.threshold)
    keep = scratch.keep
    place = scratch.places
    for lane in range(PANEL):
        place[lane] = np.uint64(panel.batch * problem.heads + panel.head_of[lane]) & _LOW
    first = begin // 4
    for group in range(first, (end + 3) // 4):
        row = (group - first) * 4
        for lane in range(PANEL):
            a, b = np.uint64(group) & _LOW, np.uint64(panel.query_of[lane]) & _LOW
            c, d = place[lane], offset
            # No loop: it would be the innermost one, and the vectorizer looks at no other.
            a, b, c, d = _round(a, b, c, d, key_0, key_1, 0)
            a, b, c, d = _round(a, b, c, d, key_0, key_1, 1)
            a, b, c, d = _round(a, b, c, d, key_0, key_1, 2)
            a, b, c, d = _round(a, b, c, d, key_0, key_1, 3)
            a, b, c, d = _round(a, b, c, d, key_0, key_1, 4)
            a, b, c, d = _round(a, b, c, d, key_0, key_1, 5)
            a, b, c, d = _round(a, b, c, d, key_0, key_1, 6)
            a, b, c, d = _round(a, b, c, d, key_0, key_1, 7)
            a, b, c, d = _round(a, b, c, d, key_0, key_1, 8)
            a, b, c, d = _round(a, b, c, d, key_0, key_1, 9)
            keep[row, lane] = a >= threshold
            keep[row + 1, lane] = b >= threshold
            keep[row + 2, lane] = c >= threshold
            keep[row + 3, lane] = d >= threshold
    return begin - first * 4


@inner
def final_weights(
    problem: Problem, numbers: Any, scores: Any, count: int, maximum: Any, by: Any
) -> None:
    """Scores become ``exp(score - maximum) * by`` per lane; a row that saw nothing becomes 0."""
    outlined()
    wide_vectors()
    factor = score_factor(problem, numbers)
    for k in range(count):
        for lane in range(PANEL):
            difference = (scores[k, lane] - maximum[lane]) * factor
            scores[k, lane] = exponential(difference) * by[lane]
