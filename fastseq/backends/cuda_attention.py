"""Attention: tensors to arguments of the CUDA kernels. No maths.

Signatures are those of :mod:`fastseq.backends.cpu_attention`; log-sum-exp and what forward keeps of
each row are in float32 also for half precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq._attention import WEIGHTS_MEAN, WEIGHTS_NONE, Options, Terms, empty_heads
from fastseq._cuda_library import (
    AttentionBackward,
    AttentionForward,
    AttentionShape,
    Heads,
    Rows,
    Scores,
)
from fastseq.backends import reference_attention
from fastseq.backends.cuda import address, device_of, dtype_name, stream_of, sum_dtype
from fastseq.backends.layout import unit_stride
from fastseq.profiler.nvtx import marked

__all__ = ["attention_backward", "attention_forward", "empty_heads"]

Forward = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _heads(tensor: Tensor | None) -> Heads:
    """``(B, heads, rows, size)``, or ``(rows, heads, size)`` of all sequences."""
    if tensor is None:
        return Heads()
    strides = tensor.stride()
    if len(strides) == 4:
        return Heads(address(tensor), *strides[:3])
    return Heads(address(tensor), 0, strides[1], strides[0])


def _rows(tensor: Tensor | None) -> Rows:
    """``(B, heads, rows)`` or ``(heads, rows)``, dense."""
    if tensor is None:
        return Rows()
    strides = tensor.stride()
    return Rows(address(tensor), *(strides[:2] if len(strides) == 3 else (0, strides[0])))


def _scores(tensor: Tensor | None) -> Scores:
    """``(B or 1, heads or 1, Sq or 1, Skv or 1)``."""
    if tensor is None:
        return Scores()
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return Scores(address(tensor), *(0 if size == 1 else stride for size, stride in sizes))


def _on_device(terms: Terms, like: Tensor) -> Terms:
    """The terms as the kernels read them, except for the seed, which is read here.

    Lengths, starts and tables may come from the CPU; they are few integers.
    """
    device = like.device

    def integers(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device).contiguous()

    padding = terms.key_padding_mask
    return terms._replace(
        key_padding_mask=None if padding is None else unit_stride(padding),
        query_lengths=integers(terms.query_lengths),
        key_lengths=integers(terms.key_lengths),
        query_starts=integers(terms.query_starts),
        key_starts=integers(terms.key_starts),
        block_table=integers(terms.block_table),
        alibi_slopes=None if terms.alibi_slopes is None else terms.alibi_slopes.contiguous(),
        sinks=None if terms.sinks is None else terms.sinks.contiguous(),
    )


def _longest(starts: Tensor) -> int:
    return int(starts.diff().max()) if starts.numel() > 1 else 0


def _sizes(
    query: Tensor, key: Tensor, value: Tensor, terms: Terms
) -> tuple[int, int, int, int, int, int, int]:
    """``(B, Hq, Hkv, Sq, Skv, E, Ev)``; with starts, rows of the longest sequence."""
    if terms.query_starts is not None:
        assert terms.key_starts is not None
        batch = terms.query_starts.size(0) - 1
        longest = _longest(terms.query_starts), _longest(terms.key_starts)
        return batch, query.size(1), key.size(1), *longest, query.size(2), value.size(2)
    batch, heads, queries, size = query.shape
    _, kv_heads, keys, value_size = value.shape
    if terms.block_table is not None:
        keys *= terms.block_table.size(1)
    return batch, heads, kv_heads, queries, keys, size, value_size


def _shape(sizes: tuple[int, ...], terms: Terms, options: Options) -> AttentionShape:
    shape = AttentionShape(*sizes)
    shape.query_starts, shape.key_starts = address(terms.query_starts), address(terms.key_starts)
    shape.query_lengths = address(terms.query_lengths)
    shape.key_lengths = address(terms.key_lengths)
    table = terms.block_table
    if table is not None:
        shape.block_table, shape.blocks_per_sequence = address(table), table.size(1)
        shape.block_size = sizes[4] // table.size(1)
    shape.window_left, shape.window_right = options.window_left, options.window_right
    shape.bottom_right = options.bottom_right
    shape.scale, shape.softcap, shape.dropout = options.scale, options.softcap, options.dropout_p
    if terms.seed is not None and options.dropout_p > 0:
        # The seed lives on the CPU, so reading it waits for nothing.
        seed, offset = terms.seed.tolist()
        shape.dropout_seed, shape.dropout_offset = seed % 2**64, offset % 2**64
    shape.bias, shape.mask = _scores(terms.bias), _scores(terms.mask)
    padding = terms.key_padding_mask
    if padding is not None:
        shape.key_padding, shape.key_padding_stride = address(padding), padding.stride(0)
    if terms.alibi_slopes is not None:
        shape.alibi_slopes = address(terms.alibi_slopes)
        shape.alibi_batch_stride = sizes[1] if terms.alibi_slopes.dim() == 2 else 0
    shape.sinks = address(terms.sinks)
    return shape


@marked
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
    batch, heads, _, queries, keys, _, value_size = sizes
    output = empty_heads(query, value_size)
    rows = (batch, heads, queries) if query.dim() == 4 else (heads, query.size(0))
    sums = sum_dtype(query.dtype)
    lse = query.new_empty(rows, dtype=sums)
    keep = save or weights != WEIGHTS_NONE
    row_maximum = query.new_empty(rows, dtype=sums) if keep else None
    row_scale = query.new_empty(rows, dtype=sums) if keep else None
    probabilities = None
    if weights == WEIGHTS_MEAN:
        probabilities = query.new_empty((batch, queries, keys))
    elif weights != WEIGHTS_NONE:
        probabilities = query.new_empty((batch, heads, queries, keys))
    if 0 in sizes:
        results = reference_attention.attention(query, key, value, terms, options, weights)
        for target, result in zip((output, lse, probabilities), results, strict=True):
            if target is not None and result is not None:
                target.copy_(result)
        return output, lse, row_maximum, row_scale, probabilities
    query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
    given = _on_device(terms, query)
    table = Scores()
    if probabilities is not None:
        strides = probabilities.stride()
        table = _scores(probabilities)
        if weights == WEIGHTS_MEAN:
            table = Scores(address(probabilities), strides[0], 0, *strides[1:])
        else:
            table = Scores(address(probabilities), *strides)
    call = AttentionForward(
        shape=_shape(sizes, given, options),
        query=_heads(query),
        key=_heads(key),
        value=_heads(value),
        output=_heads(output),
        lse=_rows(lse),
        row_maximum=_rows(row_maximum),
        row_scale=_rows(row_scale),
        weights=table,
        average_weights=weights == WEIGHTS_MEAN,
    )
    with device_of(query) as library:
        library.run_attention_forward(dtype_name(query), call, stream_of(query))
    if not save:
        row_maximum = row_scale = None
    return output, lse, row_maximum, row_scale, probabilities


@marked
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
    bias, sinks = terms.bias, terms.sinks
    grad_query = empty_heads(query, query.size(-1)) if needs[0] else None
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
    query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
    grad_output = torch.zeros_like(output) if grad_output is None else unit_stride(grad_output)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    given = _on_device(terms, query)
    delta = torch.empty_like(row_maximum)
    call = AttentionBackward(
        shape=_shape(sizes, given, options),
        query=_heads(query),
        key=_heads(key),
        value=_heads(value),
        output=_heads(output),
        row_maximum=_rows(row_maximum),
        row_scale=_rows(row_scale),
        grad_output=_heads(grad_output),
        grad_lse=_rows(grad_lse),
        grad_query=_heads(grad_query),
        grad_key=_heads(grad_key),
        grad_value=_heads(grad_value),
        grad_bias=_scores(grad_bias),
        grad_bias_elements=0 if grad_bias is None else grad_bias.numel(),
        grad_sinks=address(grad_sinks),
    )
    with device_of(query) as library:
        library.run_attention_backward(dtype_name(query), call, _rows(delta), stream_of(query))
    return grads
