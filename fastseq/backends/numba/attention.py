"""Attention: tensors to arguments of the functions that Numba compiles. No maths.

The same calls as ``backends/cpu_attention.py``. What forward keeps of each row means the same, too,
so that a graph recorded on one of the two backends may run backward on the other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq import _recorder
from fastseq._attention import WEIGHTS_MEAN, WEIGHTS_NONE, Options, Terms, empty_heads
from fastseq.backends import reference_attention
from fastseq.backends.numba import threads as _threads
from fastseq.backends.numba.attention_bodies import body
from fastseq.backends.numba.attention_problem import COUNT, KEY_BLOCK, PANEL
from fastseq.backends.numba.recording import NOTHING, attention_call

__all__ = ["attention_backward", "attention_forward", "empty_heads", "plain_attention"]

Forward = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

# Fewer multiplications than this are not worth a second thread.
_SINGLE_THREAD_FLOPS = 1 << 20
# What a profile calls the time in each of the functions.
_PHASES = {"forward": "fused forward", "backward": "fused backward", "sinks": "fused backward"}
_WANTED_PIECES, _MOST_SPLITS = 16, 4


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    enable_gqa: bool,
    scale: float | None,
) -> Tensor | None:
    """There is no short way here: every call goes through the checks."""
    return None


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.size(-1) == 1 else tensor.contiguous()


def _dense(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _dense_terms(terms: Terms) -> Terms:
    """The terms as the functions read them; tables of scores may have any strides."""
    padding = terms.key_padding_mask
    return terms._replace(
        key_padding_mask=None if padding is None else _unit_stride(padding),
        query_lengths=_dense(terms.query_lengths),
        key_lengths=_dense(terms.key_lengths),
        query_starts=_dense(terms.query_starts),
        key_starts=_dense(terms.key_starts),
        block_table=_dense(terms.block_table),
        alibi_slopes=_dense(terms.alibi_slopes),
        sinks=_dense(terms.sinks),
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _heads(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """Address and strides of batch, head and row of ``(B, heads, S, size)`` or rows of heads."""
    if tensor is None:
        return 0, 0, 0, 0
    strides = tensor.stride()
    if len(strides) == 3:
        return tensor.data_ptr(), 0, strides[1], strides[0]
    return tensor.data_ptr(), strides[0], strides[1], strides[2]


def _rows(tensor: Tensor | None) -> tuple[int, int, int]:
    """Address and strides of batch and head of ``(B, heads, S)`` or ``(heads, rows)``."""
    if tensor is None:
        return 0, 0, 0
    strides = tensor.stride()
    if len(strides) == 2:
        return tensor.data_ptr(), 0, strides[0]
    return tensor.data_ptr(), strides[0], strides[1]


def _scores(tensor: Tensor | None) -> tuple[int, ...]:
    """Address and strides of a 4-D table; 0 in dimensions of one element, which are broadcast."""
    if tensor is None:
        return 0, 0, 0, 0, 0
    strides = zip(tensor.stride(), tensor.shape, strict=True)
    return tensor.data_ptr(), *(stride if size > 1 else 0 for stride, size in strides)


def _sizes(query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> tuple[int, ...]:
    """``(B, Hq, Hkv, Sq, Skv, E, Ev)``; with starts, rows in all instead of rows per sequence."""
    if terms.query_starts is not None:
        rows, heads, size = query.shape
        keys, kv_heads, value_size = value.shape
        return terms.query_starts.size(0) - 1, heads, kv_heads, rows, keys, size, value_size
    batch, heads, queries, size = query.shape
    _, kv_heads, keys, value_size = value.shape
    if terms.block_table is not None:
        keys *= terms.block_table.size(1)
    return batch, heads, kv_heads, queries, keys, size, value_size


def _problem(
    sizes: tuple[int, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
    options: Options,
) -> list[int]:
    """The integers in the order of ``attention_problem.Problem``."""
    padding, slopes, table = terms.key_padding_mask, terms.alibi_slopes, terms.block_table
    drops = options.dropout_p > 0
    seed, offset = (0, 0) if terms.seed is None else terms.seed.tolist()
    return [
        *sizes,
        options.window_left,
        options.window_right,
        int(options.bottom_right),
        key.shape[2] if table is not None else 1,
        table.shape[1] if table is not None else 0,
        _address(terms.query_lengths),
        _address(terms.key_lengths),
        _address(terms.query_starts),
        _address(terms.key_starts),
        _address(table),
        _address(padding),
        padding.stride(0) if padding is not None else 0,
        _address(slopes),
        slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        _address(terms.sinks),
        int(drops),
        int(options.dropout_p * 2**32 + 0.5),
        seed,
        offset,
        *_scores(terms.bias),
        *_scores(terms.mask),
        *_heads(query),
        *_heads(key),
        *_heads(value),
    ]


def _run(
    names_and_counts: dict[str, int],
    sizes: tuple[int, ...],
    terms: Terms,
    options: Options,
    item_bytes: int,
    integers: list[int],
) -> None:
    """Run compiled bodies one after another, each for so many pieces of work."""
    batch, heads, _, queries, keys, size, value_size = sizes
    sequences = 1 if terms.query_starts is not None else batch
    flops = 2 * sequences * heads * queries * keys * (size + value_size)
    threads = 1 if flops < _SINGLE_THREAD_FLOPS else torch.get_num_threads()
    kept = 0.0 if options.dropout_p >= 1 else 1 / (1 - options.dropout_p)
    floats = ctypes.c_float if item_bytes == 4 else ctypes.c_double
    numbers = (floats * 3)(options.scale, options.softcap, kept)
    counter = ctypes.c_int64()
    places = (0, 0, 0, ctypes.addressof(counter), 0, ctypes.addressof(numbers))
    arguments = (ctypes.c_int64 * (len(places) + len(integers)))(*places, *integers)
    for name, count in names_and_counts.items():
        _recorder.enter(_PHASES[name])
        counter.value, arguments[COUNT] = 0, count
        _threads.run(body(name, item_bytes), arguments, max(1, min(threads, count)))


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
    options: Options,
    save: bool,
    weights: int = WEIGHTS_NONE,
) -> Forward:
    """Output, log-sum-exp, with ``save`` each row's maximum and scale, the weights asked for.

    Arguments as for :func:`fastseq.backends.reference_attention.attention`.
    """
    sizes = _sizes(query, key, value, terms)
    recording = NOTHING
    if _recorder.active is not None:
        recording = attention_call("attention_forward", query, sizes, terms, options)
    with recording:
        return _forward(sizes, query, key, value, terms, options, save, weights)


def _forward(
    sizes: tuple[int, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
    options: Options,
    save: bool,
    weights: int,
) -> Forward:
    batch, heads, kv_heads, queries, keys, _, value_size = sizes
    output = empty_heads(query, value_size)
    rows = (batch, heads, queries) if query.dim() == 4 else (heads, queries)
    lse = query.new_empty(rows)
    row_maximum = query.new_empty(rows) if save else None
    row_scale = query.new_empty(rows) if save else None
    probabilities, weight_strides = None, (0, 0, 0, 0)
    if weights == WEIGHTS_MEAN:
        probabilities = query.new_empty((batch, queries, keys))
        weight_strides = (probabilities.data_ptr(), queries * keys, 0, keys)
    elif weights != WEIGHTS_NONE:
        probabilities = query.new_empty((batch, heads, queries, keys))
        weight_strides = _heads(probabilities)
    if 0 in sizes:
        results = reference_attention.attention(query, key, value, terms, options, weights)
        for target, result in zip((output, lse, probabilities), results, strict=True):
            if target is not None and result is not None:
                target.copy_(result)
        return output, lse, row_maximum, row_scale, probabilities
    # Kept in variables: their addresses are all that the compiled function gets.
    query, key, value = _unit_stride(query), _unit_stride(key), _unit_stride(value)
    terms = _dense_terms(terms)
    integers = _problem(sizes, query, key, value, terms, options)
    longest = queries
    if terms.query_starts is not None:
        longest = int(terms.query_starts.diff().max())
    # Where queries are few, the rows of all heads that share keys make one list.
    merges = heads > kv_heads and longest < PANEL and probabilities is None
    lists = kv_heads if merges else heads
    panels = -(-longest * (heads // kv_heads if merges else 1) // PANEL)
    averages = weights == WEIGHTS_MEAN
    count = batch * (1 if averages else lists) * panels
    integers += [
        int(merges),
        lists,
        panels,
        *_heads(output),
        *_rows(lse),
        *_rows(row_maximum),
        *_rows(row_scale),
        *weight_strides,
        int(averages),
        count,
    ]
    spare = batch * heads if terms.query_lengths is not None else 0
    _run({"forward": count + spare}, sizes, terms, options, query.element_size(), integers)
    return output, lse, row_maximum, row_scale, probabilities


def attention_backward(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
    output: Tensor,
    row_maximum: Tensor,
    row_scale: Tensor,
    options: Options,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of query, key, value, bias and sinks; ``None`` where not asked for."""
    sizes = _sizes(query, key, value, terms)
    recording = NOTHING
    if _recorder.active is not None:
        named = zip(("query", "key", "value", "bias"), needs, strict=False)
        asked = {f"needs_{name}": int(needed) for name, needed in named}
        recording = attention_call("attention_backward", query, sizes, terms, options, **asked)
    with recording:
        return _backward(
            sizes, grad_output, grad_lse, query, key, value, terms, output, row_maximum, row_scale,
            options, needs,
        )  # fmt: skip


def _backward(
    sizes: tuple[int, ...],
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
    output: Tensor,
    row_maximum: Tensor,
    row_scale: Tensor,
    options: Options,
    needs: Sequence[bool],
) -> Gradients:
    batch, heads, kv_heads, _, keys, size, _ = sizes
    bias, sinks = terms.bias, terms.sinks
    grad_query = empty_heads(query, size) if needs[0] else None
    grad_key = empty_heads(key, key.size(-1)) if needs[1] else None
    grad_value = empty_heads(value, value.size(-1)) if needs[2] else None
    grad_bias = bias.new_empty(bias.shape) if bias is not None and needs[3] else None
    grad_sinks = sinks.new_empty(sinks.shape) if sinks is not None and needs[4] else None
    grads = (grad_query, grad_key, grad_value, grad_bias, grad_sinks)
    if 0 in sizes:
        # No pair, no dependence.
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return grads
    if grad_bias is not None:
        grad_bias.zero_()
    grad_output = torch.zeros_like(output) if grad_output is None else _unit_stride(grad_output)
    grad_lse = _dense(grad_lse)
    query, key, value = _unit_stride(query), _unit_stride(key), _unit_stride(value)
    terms = _dense_terms(terms)
    integers = _problem(sizes, query, key, value, terms, options)
    table = _scores(grad_bias)
    unit_batches = batch if grad_bias is not None and table[1] == 0 else 1
    unit_heads = kv_heads if grad_bias is not None and table[2] == 0 else 1
    units = (batch // unit_batches) * (kv_heads // unit_heads)
    splits = min(-(-_WANTED_PIECES // units), _MOST_SPLITS, -(-keys // KEY_BLOCK))
    if grad_bias is not None and table[4] == 0:
        splits = 1  # every block of keys adds to the same elements
    parts = grad_query
    if grad_query is not None and splits > 1:
        parts = query.new_empty((splits, *grad_query.shape))
    delta = torch.empty_like(row_maximum)
    integers += [
        unit_batches,
        unit_heads,
        splits,
        *_heads(grad_output),
        *_heads(output),
        *_rows(grad_lse),
        *_rows(row_maximum),
        *_rows(row_scale),
        *_rows(delta),
        *_heads(parts if parts is None or splits == 1 else parts[0]),
        parts.stride(0) if parts is not None and splits > 1 else 0,
        *_heads(grad_key),
        *_heads(grad_value),
        *table,
        _address(grad_sinks),
    ]
    bodies = {"backward": units * splits}
    if grad_sinks is not None:
        bodies["sinks"] = heads
    _run(bodies, sizes, terms, options, query.element_size(), integers)
    if grad_query is not None and parts is not None and splits > 1:
        _recorder.enter("join")
        torch.sum(parts, 0, out=grad_query)
    return grads
