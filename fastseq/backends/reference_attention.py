"""Attention written out with differentiable torch operators.

The readable definition of what the kernels must compute, as ``reference.py`` is for the recurrent
layers: any dtype and device, autocast, ``torch.func`` transforms, double backward.

Formulas: scaled dot-product attention https://arxiv.org/abs/1706.03762, ALiBi
https://arxiv.org/abs/2108.12409, soft-capped logits https://arxiv.org/abs/2408.00118, attention
sinks https://arxiv.org/abs/2309.17453 (as a learned logit), Philox4x32-10 random numbers
https://doi.org/10.1145/2063384.2063405.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastseq._attention import WEIGHTS_MEAN, WEIGHTS_NONE, Options, Terms

__all__ = ["alibi_bias", "attention", "dropout_keep", "philox", "visible_pairs"]

_LOW_32 = 0xFFFFFFFF


def philox(key_low: Tensor, key_high: Tensor, counter: list[Tensor]) -> list[Tensor]:
    """Ten rounds of Philox4x32; every word is an int64 tensor holding 32 bits."""

    def product(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
        # 64 bits of product in signed 64-bit arithmetic: halves of 16 bits for the upper word.
        upper, lower = constant * (word >> 16), constant * (word & 0xFFFF)
        return (upper + (lower >> 16)) >> 16, ((upper << 16) + lower) & _LOW_32

    a, b, c, d = counter
    for _ in range(10):
        high_a, low_a = product(0xD2511F53, a)
        high_c, low_c = product(0xCD9E8D57, c)
        a, b, c, d = high_c ^ b ^ key_low, low_c, high_a ^ d ^ key_high, low_a
        key_low = (key_low + 0x9E3779B9) & _LOW_32
        key_high = (key_high + 0xBB67AE85) & _LOW_32
    return [a, b, c, d]


def dropout_keep(
    seed: Tensor, probability: float, batch: int, heads: int, queries: int, keys: int
) -> Tensor:
    """Which weights dropout keeps, ``(B, Hq, Sq, Skv)`` bool: the kernels' own decision.

    One run of the generator decides for four neighbouring keys: its key is the seed, its counter
    ``(key / 4, query, b * Hq + h, offset)``, and a weight is dropped when the key's word is less
    than ``probability * 2^32``.
    """
    device = seed.device
    blocks = (keys + 3) // 4
    zero = torch.zeros((), dtype=torch.int64, device=device)
    counter = [
        torch.arange(blocks, device=device).view(1, 1, blocks),
        torch.arange(queries, device=device).view(1, queries, 1),
        torch.arange(batch * heads, device=device).view(batch * heads, 1, 1),
        (seed[1] & _LOW_32) + zero,
    ]
    words = philox(seed[0] & _LOW_32, (seed[0] >> 32) & _LOW_32, counter)
    shape = (batch * heads, queries, blocks)
    drawn = torch.stack([word.expand(shape) for word in words], dim=-1)
    keep = drawn >= math.floor(probability * 2**32 + 0.5)
    return keep.reshape(batch, heads, queries, blocks * 4)[..., :keys]


def _positions(
    queries: int, keys: int, terms: Terms, bottom_right: bool, device: torch.device
) -> Tensor:
    """``j - (i + shift)`` for every pair: how far to the right of the query the key lies.

    ``(Sq, Skv)``, or ``(B, 1, Sq, Skv)`` where every sequence has its own shift.
    """
    i = torch.arange(queries, device=device).unsqueeze(-1)
    j = torch.arange(keys, device=device)
    if not bottom_right:
        return j - i
    key_count = keys if terms.key_lengths is None else terms.key_lengths.view(-1, 1, 1, 1)
    query_count = queries if terms.query_lengths is None else terms.query_lengths.view(-1, 1, 1, 1)
    return j - (i + (key_count - query_count))


def visible_pairs(
    queries: int, keys: int, terms: Terms, options: Options, device: torch.device
) -> Tensor | None:
    """Which pairs take part, broadcastable to ``(B, Hq, Sq, Skv)``; ``None``: all of them."""
    conditions = []
    left, right = options.window_left, options.window_right
    if left >= 0 or right >= 0:
        distance = _positions(queries, keys, terms, options.bottom_right, device)
        if left >= 0:
            conditions.append(distance >= -left)
        if right >= 0:
            conditions.append(distance <= right)
    if terms.key_lengths is not None:
        conditions.append(
            torch.arange(keys, device=device) < terms.key_lengths.view(-1, 1, 1, 1).to(device)
        )
    if terms.query_lengths is not None:
        rows = torch.arange(queries, device=device).unsqueeze(-1)
        conditions.append(rows < terms.query_lengths.view(-1, 1, 1, 1).to(device))
    if terms.mask is not None:
        conditions.append(terms.mask)
    if terms.key_padding_mask is not None:
        conditions.append(~terms.key_padding_mask[:, None, None, :])
    if terms.bias is not None:
        conditions.append(terms.bias.detach() != -math.inf)
    if not conditions:
        return None
    visible = conditions[0]
    for condition in conditions[1:]:
        visible = visible & condition
    return visible


def alibi_bias(slopes: Tensor, queries: int, keys: int, terms: Terms, bottom_right: bool) -> Tensor:
    """``-slope * |i + shift - j|`` as a bias ``(1 or B, Hq, Sq, Skv)``."""
    distance = _positions(queries, keys, terms, bottom_right, slopes.device)
    per_head = slopes.unsqueeze(-1).unsqueeze(-1)
    result = -per_head * distance.abs().to(slopes.dtype)
    return result if result.dim() == 4 else result.unsqueeze(0)


def _values_are_known(tensor: Tensor) -> bool:
    """Whether a decision may depend on what a tensor holds."""
    return not (
        tensor.is_meta
        or torch._C._are_functorch_transforms_active()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _all_finite(*tensors: Tensor) -> bool:
    return all(_values_are_known(tensor) and bool(tensor.isfinite().all()) for tensor in tensors)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left (B, Hq, M, K) @ right (B, Hkv, K, N)``: a group's heads share one right factor."""
    batch, heads, rows, inner = left.shape
    kv_heads, columns = right.shape[1], right.shape[3]
    if heads == kv_heads:
        return left @ right
    grouped = left.reshape(batch, kv_heads, heads // kv_heads * rows, inner)
    return (grouped @ right).reshape(batch, heads, rows, columns)


def _finite(tensor: Tensor) -> Tensor:
    return torch.where(tensor.isfinite(), tensor, 0.0)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """``query @ key^T`` in which NaN and Inf stay with their own row and column.

    A masked pair's score is thrown away, but in the backward products a zero times an Inf from a
    key that somebody else does not see would be NaN.
    """
    if _all_finite(query, key):
        return _product(query, key.transpose(-2, -1))
    clean = _product(_finite(query), _finite(key).transpose(-2, -1))
    raw = _product(query.detach(), key.detach().transpose(-2, -1))
    groups = query.size(1) // max(key.size(1), 1)
    bad_query = ~query.detach().isfinite().all(-1)
    bad_key = (~key.detach().isfinite().all(-1)).repeat_interleave(groups, dim=1)
    return torch.where(bad_query.unsqueeze(-1) | bad_key.unsqueeze(-2), raw, clean)


def _weighted_sum(weights: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """``weights @ value`` in which NaN and Inf reach those rows only that see them."""
    if visible is None or _all_finite(value):
        return _product(weights, value)
    seen = visible.expand(weights.shape).to(weights.dtype)
    output = _product(weights, _finite(value))
    above = _product(seen, (value == math.inf).to(weights.dtype)) > 0
    below = _product(seen, (value == -math.inf).to(weights.dtype)) > 0
    nan = _product(seen, value.isnan().to(weights.dtype)) > 0
    undefined = nan | (above & below) | output.detach().isnan()
    output = torch.where(above, math.inf, output)
    output = torch.where(below, -math.inf, output)
    return torch.where(undefined, math.nan, output)


def _padded(
    query: Tensor, key: Tensor, value: Tensor, terms: Terms, options: Options, weights: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention over ``(B, heads, S, size)``."""
    batch, heads, queries, _ = query.shape
    keys = key.size(2)
    device, dtype = query.device, query.dtype
    scores = _scores(query, key) * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if terms.bias is not None:
        scores = scores + terms.bias.to(dtype)
    if terms.alibi_slopes is not None:
        scores = scores + alibi_bias(
            terms.alibi_slopes.to(dtype), queries, keys, terms, options.bottom_right
        )
    visible = visible_pairs(queries, keys, terms, options, device)
    if visible is not None:
        scores = torch.where(visible, scores, -math.inf)

    # The result does not depend on what is subtracted, so neither does any derivative.
    if keys:
        maximum = scores.detach().amax(-1, keepdim=True)
    else:
        maximum = scores.new_full((batch, heads, queries, 1), -math.inf)
    sees_something = maximum != -math.inf
    if terms.sinks is not None:
        sinks = terms.sinks.to(dtype).view(1, -1, 1, 1)
        maximum = torch.where(sees_something, torch.maximum(maximum, sinks.detach()), 0.0)
    else:
        maximum = torch.where(sees_something, maximum, 0.0)
    exponentials = torch.exp(scores - maximum)
    total = exponentials.sum(-1, keepdim=True)
    if terms.sinks is not None:
        total = total + torch.where(sees_something, torch.exp(sinks - maximum), 0.0)
    total = torch.where(sees_something, total, 1.0)
    lse = torch.where(sees_something, maximum + torch.log(total), -math.inf).squeeze(-1)
    probabilities = exponentials / total
    if visible is not None:
        probabilities = torch.where(visible, probabilities, 0.0)
    if options.dropout_p >= 1:
        probabilities = probabilities * 0.0
    elif options.dropout_p > 0:
        assert terms.seed is not None
        seed = terms.seed.to(device)
        keep = dropout_keep(seed, options.dropout_p, batch, heads, queries, keys)
        probabilities = torch.where(keep, probabilities / (1 - options.dropout_p), 0.0)
    output = _weighted_sum(probabilities, value, visible)
    if weights == WEIGHTS_NONE:
        return output, lse, None
    return output, lse, probabilities.mean(1) if weights == WEIGHTS_MEAN else probabilities


def _rows_of(starts: Tensor, length: int, rows: int) -> Tensor:
    """Row of element ``s`` of sequence ``b``, ``(B, length)``; past the end some row or other."""
    index = starts[:-1].unsqueeze(-1) + torch.arange(length, device=starts.device)
    return index.clamp(max=max(rows - 1, 0))


def _spread(tensor: Tensor, starts: Tensor, length: int) -> Tensor:
    """Rows ``(total, heads, size)`` as a padded batch ``(B, heads, length, size)``."""
    if tensor.size(0) == 0:
        shape = (starts.size(0) - 1, tensor.size(1), length, tensor.size(2))
        return tensor.new_zeros(shape)
    return tensor[_rows_of(starts, length, tensor.size(0))].transpose(1, 2)


def _variable_length(
    query: Tensor, key: Tensor, value: Tensor, terms: Terms, options: Options
) -> tuple[Tensor, Tensor, None]:
    assert terms.query_starts is not None
    assert terms.key_starts is not None
    device = query.device
    query_starts, key_starts = terms.query_starts.to(device), terms.key_starts.to(device)
    query_lengths, key_lengths = query_starts.diff(), key_starts.diff()
    queries = int(query_lengths.max()) if query_lengths.numel() else 0
    keys = int(key_lengths.max()) if key_lengths.numel() else 0
    inner = terms._replace(
        query_starts=None,
        key_starts=None,
        query_lengths=query_lengths,
        key_lengths=key_lengths,
    )
    output, lse, _ = _padded(
        _spread(query, query_starts, queries),
        _spread(key, key_starts, keys),
        _spread(value, key_starts, keys),
        inner,
        options,
        WEIGHTS_NONE,
    )
    # Back to rows: (B, length) -> the sequence and the place in it of every row.
    sequence = torch.repeat_interleave(
        torch.arange(query_lengths.numel(), device=device), query_lengths
    )
    place = torch.arange(query.size(0), device=device) - query_starts[:-1][sequence]
    return output[sequence, :, place], lse[sequence, :, place].transpose(0, 1), None


def _paged(cache: Tensor, block_table: Tensor) -> Tensor:
    """A cache's blocks ``(blocks, Hkv, block_size, size)`` as ``(B, Hkv, keys, size)``."""
    blocks, heads, block_size, size = cache.shape
    batch, per_sequence = block_table.shape
    # Entries past a sequence's end may hold anything.
    chosen = cache[block_table.to(cache.device).clamp(0, max(blocks - 1, 0))]
    return chosen.transpose(1, 2).reshape(batch, heads, per_sequence * block_size, size)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
    options: Options,
    weights: int = WEIGHTS_NONE,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention with every option.

    Args:
        query: ``(B, Hq, Sq, E)``; ``(rows, Hq, E)`` with ``terms.query_starts``.
        key: ``(B, Hkv, Skv, E)``; ``(rows, Hkv, E)`` with ``terms.key_starts``;
            ``(blocks, Hkv, block_size, E)`` with ``terms.block_table``.
        value: as ``key`` with ``Ev``.
        terms: the other tensors.
        options: everything else.
        weights: ``WEIGHTS_NONE``, ``WEIGHTS_PER_HEAD`` or ``WEIGHTS_MEAN``.

    Returns:
        ``output`` shaped as ``query`` with ``Ev``; ``lse (B, Hq, Sq)`` or ``(Hq, rows)``, the
        log-sum-exp of a row's scores, -Inf for a row that sees no key; the weights after dropout,
        ``(B, Hq, Sq, Skv)``, their mean over heads ``(B, Sq, Skv)``, or ``None``.
    """
    device = query.device.type
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device):
        # As torch's function: inputs in lower precision, and so the output.
        lower = torch.get_autocast_dtype(device)
        query, key, value = (
            tensor.to(lower) if tensor.dtype is torch.float32 else tensor
            for tensor in (query, key, value)
        )
        with torch.autocast(device, enabled=False):
            return attention(query, key, value, terms, options, weights)
    dtype = query.dtype
    if dtype in (torch.bfloat16, torch.float16):
        query, key, value = query.float(), key.float(), value.float()
    if terms.block_table is not None:
        key, value = _paged(key, terms.block_table), _paged(value, terms.block_table)
    results: tuple[Any, ...]
    if terms.query_starts is not None:
        results = _variable_length(query, key, value, terms, options)
    else:
        results = _padded(query, key, value, terms, options, weights)
    output, lse, probabilities = results
    if output.dtype is not dtype:
        # The log-sum-exp stays in float32: half precision has not the range for it.
        output = output.to(dtype)
        probabilities = None if probabilities is None else probabilities.to(dtype)
    return output, lse, probabilities
