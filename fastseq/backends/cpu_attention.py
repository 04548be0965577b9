"""Attention: tensors to arguments of the compiled CPU kernels. No maths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq import _config
from fastseq._attention import WEIGHTS_MEAN, WEIGHTS_NONE, Options, Terms, empty_heads
from fastseq.backends import cpu as _cpu  # connects the kernels to torch's exchange table
from fastseq.backends import reference_attention
from fastseq.backends.layout import unit_stride as _unit_stride

__all__ = [
    "attention_backward",
    "attention_forward",
    "dropout_keep",
    "empty_heads",
    "plain_attention",
]

Forward = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

_kernels = _config.extension()
_forward = _kernels.attention_forward
_backward = _kernels.attention_backward
plain_attention = _kernels.plain_attention
_threads = torch.get_num_threads
assert _cpu is not None


def dropout_keep(
    seed: Tensor, probability: float, batch: int, heads: int, queries: int, keys: int
) -> Tensor:
    """Which weights the kernels' dropout keeps, ``(B, Hq, Sq, Skv)`` bool."""
    keep = torch.empty((batch, heads, queries, keys), dtype=torch.uint8)
    _kernels.dropout_mask((batch, heads, heads, queries, keys, 1, 1), probability, seed, keep)
    return keep.view(torch.bool)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _arguments(terms: Terms) -> Terms:
    """The terms as the kernels read them; tables of scores may have any strides."""
    if not any(term is not None for term in terms):
        return terms
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


def _sizes(
    query: Tensor, key: Tensor, value: Tensor, terms: Terms
) -> tuple[int, int, int, int, int, int, int]:
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
    rows = (batch, heads, queries) if query.dim() == 4 else (heads, queries)
    lse = query.new_empty(rows)
    row_maximum = query.new_empty(rows) if save else None
    row_scale = query.new_empty(rows) if save else None
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
    _forward(
        1 if query.dtype is torch.float64 else 0,
        _threads(),
        sizes,
        _unit_stride(query),
        _unit_stride(key),
        _unit_stride(value),
        _arguments(terms),
        options,
        output,
        lse,
        row_maximum,
        row_scale,
        probabilities,
        weights == WEIGHTS_MEAN,
    )
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
    _backward(
        1 if query.dtype is torch.float64 else 0,
        _threads(),
        sizes,
        torch.zeros_like(output) if grad_output is None else _unit_stride(grad_output),
        _dense(grad_lse),
        _unit_stride(query),
        _unit_stride(key),
        _unit_stride(value),
        _arguments(terms),
        options,
        output,
        row_maximum,
        row_scale,
        *grads,
    )
    return grads
