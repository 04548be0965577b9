"""Attention as functions: argument checks and layout, no maths.

Shapes use ``B`` batch, ``Hq`` and ``Hkv`` heads of queries and of keys and values, ``Sq`` queries,
``Skv`` keys, ``E`` size of a query or key, ``Ev`` of a value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastseq import _ops
from fastseq._attention import (
    WEIGHTS_MEAN,
    WEIGHTS_NONE,
    WEIGHTS_PER_HEAD,
    Options,
    Terms,
)
from fastseq._checks import attention as _checks
from fastseq._checks.scalars import number
from fastseq._dropout import draw_seed
from fastseq.backends import fallback_reason, reference_attention, warn_fallback

__all__ = [
    "attention",
    "attention_paged",
    "attention_varlen",
]

Integers: TypeAlias = Tensor | Sequence[int]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    bottom_right: bool = False,
    window: tuple[int, int] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    query_lengths: Integers | None = None,
    key_lengths: Integers | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
    average_weights: bool = False,
) -> Any:
    """Scaled dot-product attention (https://arxiv.org/abs/1706.03762) with every option at once.

    The score of query ``i`` and key ``j`` is ``cap(scale * q_i . k_j) + bias_ij - slope * |d|``
    with ``cap(s) = softcap * tanh(s / softcap)`` (https://arxiv.org/abs/2408.00118), ALiBi slopes
    (https://arxiv.org/abs/2108.12409) and ``d = j - (i + shift)``, where ``shift`` is 0 or, with
    ``bottom_right``, the keys of the sequence minus its queries. A softmax over the visible keys,
    dropout and the product with the values follow.

    Args:
        query: ``(B, Hq, Sq, E)``, or ``(Hq, Sq, E)`` for one sequence. The fused CPU kernels take
            float32 and float64; other dtypes and devices are answered by torch operators. Any
            strides; with a unit last stride there is no copy.
        key: ``(B, Hkv, Skv, E)``, ``Hq`` a multiple of ``Hkv``: query head ``h`` attends to key
            head ``h // (Hq / Hkv)``.
        value: ``(B, Hkv, Skv, Ev)``.
        causal: query ``i`` sees the keys with ``d <= 0``.
        bottom_right: align the last query with the last key instead of the first with the first.
        window: ``(left, right)``, query ``i`` sees the keys with ``-left <= d <= right``; -1 is
            unbounded.
        mask: bool, broadcastable to ``(B, Hq, Sq, Skv)``; true takes part.
        bias: floating point, broadcastable likewise, added to the scores. -Inf masks. May require a
            gradient.
        key_padding_mask: ``(B, Skv)`` bool, true is ignored, as in
            :class:`torch.nn.MultiheadAttention`.
        query_lengths: ``(B,)`` integers, queries in use of each sequence; results of the others
            are zero.
        key_lengths: ``(B,)`` integers, keys in use of each sequence.
        alibi_slopes: ``(Hq,)`` or ``(B, Hq)``. Slopes that require a gradient are turned into an
            explicit bias first, which takes memory for all the scores.
        softcap: bound on the scores before bias and slopes.
        sinks: ``(Hq,)`` logits that take part in the softmax's denominator only. May require a
            gradient.
        dropout_p: probability of zeroing a weight, the others being divided by ``1 - dropout_p``.
            Applied whenever it is positive, as in torch's function. The seed comes from torch's
            default generator; a mask is a function of the seed, independent of threads.
        scale: default ``1 / sqrt(E)``.
        return_lse: also return the log-sum-exp of the scores, ``(B, Hq, Sq)``, -Inf for a row that
            sees no key.
        return_weights: also return the weights after dropout, ``(B, Hq, Sq, Skv)``.
        average_weights: return their mean over heads instead, ``(B, Sq, Skv)``.

    Returns:
        The output ``(B, Hq, Sq, Ev)``, or a tuple ``(output[, lse][, weights])``. Rows that see no
        key are zero, as are their gradients. NaN and Inf in keys or values reach those rows only
        that see them.

    Raises:
        RuntimeError: shapes, dtypes, devices or head counts do not fit together, or ``dropout_p``
            is no probability.
        ValueError: ``window``, ``softcap`` or lengths out of range.
        TypeError: an argument has the wrong type.
    """
    if (
        mask is None
        and bias is None
        and key_padding_mask is None
        and window is None
        and query_lengths is None
        and key_lengths is None
        and alibi_slopes is None
        and softcap is None
        and sinks is None
        and not (dropout_p or return_lse or return_weights or bottom_right)
    ):
        result = _ops.plain_attention(query, key, value, causal, True, scale)
        if result is not None:
            return result
    _checks.tensors(query=query, key=key, value=value)
    _checks.dimensions((4, 3), query=query, key=key, value=value)
    _checks.same_kind(query, key, value)
    unbatched = query.dim() == 3
    if unbatched:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    _checks.heads(query, key, value)
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    options = _options(query, causal, bottom_right, window, softcap, dropout_p, scale)
    scores_shape = (batch, heads, queries, keys)
    if mask is not None:
        mask = _checks.scores("mask", mask, scores_shape, query)
    if bias is not None:
        bias = bias_like(_checks.scores("bias", bias, scores_shape, query), query)
    if key_padding_mask is not None:
        if unbatched and key_padding_mask.dim() == 1:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        key_padding_mask = _checks.key_padding_mask(key_padding_mask, batch, keys, query)
    terms = Terms(
        bias=bias,
        mask=mask,
        key_padding_mask=key_padding_mask,
        query_lengths=_checks.lengths("query_lengths", query_lengths, batch, queries),
        key_lengths=_checks.lengths("key_lengths", key_lengths, batch, keys),
        alibi_slopes=_checks.slopes(alibi_slopes, batch, heads, query),
        sinks=_checks.sinks(sinks, heads, query),
        seed=draw_seed(dropout_p),
    )
    terms = _explicit_slopes(terms, options, queries, keys)
    weights = WEIGHTS_NONE
    if return_weights:
        weights = WEIGHTS_MEAN if average_weights else WEIGHTS_PER_HEAD
    output, lse, probabilities = run_attention(query, key, value, terms, options, weights)
    if not return_lse and not return_weights:
        return output.squeeze(0) if unbatched else output
    results = [output]
    if return_lse:
        assert lse is not None
        results.append(lse)
    if return_weights:
        assert probabilities is not None
        results.append(probabilities)
    return tuple(result.squeeze(0) for result in results) if unbatched else tuple(results)


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Integers,
    key_starts: Integers,
    *,
    causal: bool = False,
    bottom_right: bool = False,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention within sequences of different lengths that lie one after the other, no padding.

    Args:
        query: ``(total_q, Hq, E)``, the queries of all sequences.
        key: ``(total_k, Hkv, E)``.
        value: ``(total_k, Hkv, Ev)``.
        query_starts: ``(B + 1,)`` integers, where each sequence begins in ``query`` and the last
            one ends: 0, ..., ``total_q``.
        key_starts: likewise for ``key`` and ``value``.
        causal: see :func:`attention`, as for the other options.
        bottom_right: with the shift of each sequence.
        window: ``(left, right)``.
        alibi_slopes: ``(Hq,)`` or ``(B, Hq)``.
        softcap: bound on the scores.
        sinks: ``(Hq,)``.
        dropout_p: probability of zeroing a weight.
        scale: default ``1 / sqrt(E)``.
        return_lse: also return the log-sum-exp of the scores, ``(Hq, total_q)``.

    Returns:
        The output ``(total_q, Hq, Ev)``, or ``(output, lse)``.

    Raises:
        RuntimeError, ValueError, TypeError: as :func:`attention` does; ``ValueError`` if the
            starts do not grow from 0 to the number of rows.
    """
    _checks.tensors(query=query, key=key, value=value)
    _checks.dimensions((3,), query=query, key=key, value=value)
    _checks.same_kind(query, key, value)
    if value.shape[:2] != key.shape[:2]:
        raise RuntimeError(
            "value must have the rows and heads of key: "
            f"expected {tuple(key.shape[:2])}, got {tuple(value.shape[:2])}"
        )
    _checks.head_sizes(query, key)
    heads = query.shape[1]
    starts_q = _checks.starts("query_starts", query_starts, query.shape[0])
    starts_k = _checks.starts("key_starts", key_starts, key.shape[0])
    if starts_q.shape != starts_k.shape:
        raise ValueError(
            "key_starts must be for as many sequences as query_starts: "
            f"expected {starts_q.shape[0]} entries, got {starts_k.shape[0]}"
        )
    batch = starts_q.shape[0] - 1
    options = _options(query, causal, bottom_right, window, softcap, dropout_p, scale)
    terms = Terms(
        query_starts=starts_q,
        key_starts=starts_k,
        alibi_slopes=_checks.slopes(alibi_slopes, batch, heads, query),
        sinks=_checks.sinks(sinks, heads, query),
        seed=draw_seed(dropout_p),
    )
    slopes = terms.alibi_slopes
    if slopes is not None and slopes.requires_grad and batch:
        lengths = Terms(query_lengths=starts_q.diff(), key_lengths=starts_k.diff())
        assert lengths.query_lengths is not None
        assert lengths.key_lengths is not None
        longest = int(lengths.query_lengths.max()), int(lengths.key_lengths.max())
        bias = reference_attention.alibi_bias(slopes, *longest, lengths, bottom_right)
        terms = terms._replace(alibi_slopes=None, bias=bias)
    output, lse, _ = run_attention(query, key, value, terms, options, WEIGHTS_NONE)
    return (output, lse) if return_lse else output


def attention_paged(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    key_lengths: Integers,
    *,
    causal: bool = True,
    bottom_right: bool = True,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention to keys and values in a paged cache (https://arxiv.org/abs/2309.06180).

    For inference: no gradients are recorded.

    Args:
        query: ``(B, Hq, Sq, E)``; by default its last row is aligned with the last key.
        key_cache: ``(blocks, Hkv, block_size, E)``, any strides.
        value_cache: ``(blocks, Hkv, block_size, Ev)``.
        block_table: ``(B, blocks_per_sequence)`` integers: key ``j`` of sequence ``b`` lies in
            block ``block_table[b, j // block_size]``, at row ``j % block_size``. Entries past a
            sequence's last key may hold anything.
        key_lengths: ``(B,)`` integers, keys of each sequence.
        causal: see :func:`attention`, as for the other options.
        bottom_right: align the last query with the last key.
        window: ``(left, right)``.
        alibi_slopes: ``(Hq,)`` or ``(B, Hq)``.
        softcap: bound on the scores.
        sinks: ``(Hq,)``.
        scale: default ``1 / sqrt(E)``.
        return_lse: also return the log-sum-exp of the scores, ``(B, Hq, Sq)``.

    Returns:
        The output ``(B, Hq, Sq, Ev)``, or ``(output, lse)``.

    Raises:
        RuntimeError, ValueError, TypeError: as :func:`attention` does; ``ValueError`` if the table
            names a block that the cache has not.
    """
    _checks.tensors(query=query, key_cache=key_cache, value_cache=value_cache)
    _checks.dimensions((4,), query=query, key_cache=key_cache, value_cache=value_cache)
    _checks.same_kind(query, key_cache, value_cache)
    if value_cache.shape[:3] != key_cache.shape[:3]:
        raise RuntimeError(
            "value_cache must have the blocks, heads and block size of key_cache: "
            f"expected {tuple(key_cache.shape[:3])}, got {tuple(value_cache.shape[:3])}"
        )
    _checks.head_sizes(query, key_cache)
    batch, heads = query.shape[:2]
    _checks.table_shape(block_table, batch)
    capacity = key_cache.shape[2] * block_table.shape[1]
    lengths = _checks.lengths("key_lengths", key_lengths, batch, capacity)
    if lengths is None:
        raise TypeError("key_lengths must be a tensor or a sequence of integers, got None")
    options = _options(query, causal, bottom_right, window, softcap, 0.0, scale)
    terms = Terms(
        key_lengths=lengths,
        block_table=_checks.block_table(block_table, lengths, key_cache),
        alibi_slopes=_checks.slopes(alibi_slopes, batch, heads, query),
        sinks=_checks.sinks(sinks, heads, query),
    )
    with torch.no_grad():
        output, lse, _ = run_attention(query, key_cache, value_cache, terms, options, WEIGHTS_NONE)
    return (output, lse) if return_lse else output


def _options(
    query: Tensor,
    causal: bool,
    bottom_right: bool,
    window: tuple[int, int] | None,
    softcap: float | None,
    dropout_p: float,
    scale: float | None,
) -> Options:
    left, right = (-1, 0 if causal else -1) if window is None else _checks.window(window, causal)
    return Options(
        left,
        right,
        bool(bottom_right),
        _checks.softcap(softcap),
        _checks.probability(dropout_p),
        default_scale(query, scale),
    )


def default_scale(query: Tensor, scale: float | None) -> float:
    """``1 / sqrt(E)`` unless given."""
    if scale is not None:
        return number("scale", scale)
    size = query.shape[-1]
    return 1 / math.sqrt(size) if size else 1.0


def bias_like(bias: Tensor, query: Tensor) -> Tensor:
    """The bias in query's dtype; an expanded one is converted before it is expanded."""
    if bias.dtype is query.dtype:
        return bias
    if not bias.requires_grad and not torch.compiler.is_compiling():
        for dim, stride in enumerate(bias.stride()):
            if stride == 0 and bias.shape[dim] > 1:
                bias = bias.narrow(dim, 0, 1)
    return bias.to(query.dtype)


def _explicit_slopes(terms: Terms, options: Options, queries: int, keys: int) -> Terms:
    """Slopes that require a gradient as part of the bias, which has one."""
    slopes = terms.alibi_slopes
    if slopes is None or not (slopes.requires_grad and torch.is_grad_enabled()):
        return terms
    bias = reference_attention.alibi_bias(slopes, queries, keys, terms, options.bottom_right)
    if terms.bias is not None:
        bias = bias + terms.bias
    return terms._replace(alibi_slopes=None, bias=bias)


def run_attention(
    query: Tensor, key: Tensor, value: Tensor, terms: Terms, options: Options, weights: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The kernels where they apply, torch operators elsewhere."""
    reason = fallback_reason(query, has_cuda_kernels=True)
    if reason is None and query.shape[-1] and value.shape[-1]:
        return _ops.attention(query, key, value, terms, options, weights)
    if reason is not None:
        warn_fallback(reason)
    return reference_attention.attention(query, key, value, terms, options, weights)
