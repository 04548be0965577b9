"""Argument checks of attention: torch's exception classes, with the argument, expected and actual.

Tensors that do not fit together raise :class:`RuntimeError` as in torch, options out of range
:class:`ValueError`, arguments of a wrong type :class:`TypeError`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq._checks.scalars import number


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def same_kind(query: Tensor, key: Tensor, value: Tensor) -> None:
    """One dtype and one device."""
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype is not query.dtype:
            raise RuntimeError(
                f"{name} must have the dtype of query: expected {query.dtype}, got {tensor.dtype}"
            )
        if tensor.device != query.device:
            raise RuntimeError(
                f"{name} must be on the device of query: expected {query.device}, "
                f"got {tensor.device}"
            )


def tensors(**named: Any) -> None:
    """Every argument is a tensor."""
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def dimensions(expected: Sequence[int], **named: Tensor) -> None:
    """All arguments have the same number of dimensions, one of ``expected``."""
    count = next(iter(named.values())).dim()
    words = " or ".join(f"{number}-D" for number in expected)
    for name, tensor in named.items():
        if tensor.dim() not in expected:
            raise RuntimeError(
                f"{name} must be {words}, got {tensor.dim()}-D: shape {_shape(tensor)}"
            )
        if tensor.dim() != count:
            raise RuntimeError(
                f"{name} must have as many dimensions as query: expected {count}, "
                f"got {tensor.dim()}: shape {_shape(tensor)}"
            )


def heads(query: Tensor, key: Tensor, value: Tensor, kv_rows: str = "keys") -> None:
    """Sizes of ``(B, Hq, Sq, E)``, ``(B, Hkv, Skv, E)`` and ``(B, Hkv, Skv, Ev)``.

    Also of rows ``(total, heads, size)``, which are passed as views with the batch and rows of
    size one in front. ``kv_rows`` names dimension 2 of keys and values.
    """
    q, k, v = query.shape, key.shape, value.shape
    if k[0] != q[0]:
        raise RuntimeError(f"key must have the batch size of query: expected {q[0]}, got {k[0]}")
    if v[0] != k[0] or v[1] != k[1] or v[2] != k[2]:
        raise RuntimeError(
            f"value must have the batch size, heads and {kv_rows} of key: "
            f"expected {tuple(k[:3])}, got {tuple(v[:3])}"
        )
    head_sizes(query, key)


def head_sizes(query: Tensor, key: Tensor) -> None:
    """Head size and group count; heads are in dimension 1 and sizes in the last."""
    if key.shape[-1] != query.shape[-1]:
        raise RuntimeError(
            f"key must have the head size of query: expected {query.shape[-1]}, got {key.shape[-1]}"
        )
    query_heads, kv_heads = query.shape[1], key.shape[1]
    if kv_heads == 0 and query_heads == 0:
        return
    if kv_heads == 0 or query_heads % kv_heads:
        raise RuntimeError(
            "heads of key and value must divide the heads of query: expected a divisor of "
            f"{query_heads}, got {kv_heads}"
        )


def window(value: Any, causal: bool) -> tuple[int, int]:
    """``(left, right)`` with -1 for unbounded; causal limits the right side to 0."""
    left = right = -1
    if value is not None:
        try:
            left, right = value
        except (TypeError, ValueError):
            raise TypeError(f"window must be a pair (left, right), got {value!r}") from None
        left, right = _window_side("left", left), _window_side("right", right)
    return left, 0 if causal else right


def _window_side(side: str, size: Any) -> int:
    try:
        if isinstance(size, bool):
            raise TypeError
        if not isinstance(size, int):
            size = operator.index(size)
    except TypeError:
        raise TypeError(f"window {side} must be an int, got {type(size).__name__}") from None
    if size < -1:
        raise ValueError(f"window {side} must be at least 0, or -1 for unbounded, got {size}")
    # More than any tensor has, and positions can still be added to it.
    return min(size, 1 << 62)


def probability(dropout_p: float) -> float:
    """A dropout probability; torch raises ``RuntimeError`` for one that is none."""
    probability = number("dropout_p", dropout_p)
    if not 0.0 <= probability <= 1.0:
        raise RuntimeError(f"dropout_p must be a probability between 0 and 1, got {dropout_p}")
    return probability


def softcap(value: float | None) -> float:
    """A positive cap, 0 for none."""
    if value is None:
        return 0.0
    cap = number("softcap", value)
    if not 0 < cap < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None, got {value}")
    # Beyond, a cap or what is divided by it has no place in float32. Scores do not come near the
    # upper bound, and below the lower one all weights are equal.
    return min(max(cap, 1e-30), 1e30)


def scores(name: str, tensor: Any, target: tuple[int, ...], query: Tensor) -> Tensor:
    """A mask or bias that broadcasts to ``target``, as a 4-D view; bool for a mask."""
    tensors(**{name: tensor})
    if name == "mask":
        if tensor.dtype is not torch.bool:
            raise RuntimeError(f"mask must have dtype torch.bool, got {tensor.dtype}")
    elif not tensor.is_floating_point():
        raise RuntimeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")
    if tensor.device != query.device:
        raise RuntimeError(
            f"{name} must be on the device of query: expected {query.device}, got {tensor.device}"
        )
    fits = tensor.dim() <= 4 and all(
        size in (1, wanted)
        for size, wanted in zip(reversed(tensor.shape), reversed(target), strict=False)
    )
    if not fits:
        raise RuntimeError(
            f"{name} must be broadcastable to (batch, heads, queries, keys): "
            f"expected {tuple(target)}, got {_shape(tensor)}"
        )
    while tensor.dim() < 4:
        tensor = tensor.unsqueeze(0)
    return tensor


def key_padding_mask(mask: Any, batch: int, keys: int, query: Tensor) -> Tensor:
    """``(B, Skv)`` bool."""
    tensors(key_padding_mask=mask)
    if mask.dtype is not torch.bool:
        raise RuntimeError(f"key_padding_mask must have dtype torch.bool, got {mask.dtype}")
    if mask.shape != (batch, keys):
        raise RuntimeError(f"key_padding_mask must have shape {(batch, keys)}, got {_shape(mask)}")
    if mask.device != query.device:
        raise RuntimeError(
            f"key_padding_mask must be on the device of query: expected {query.device}, "
            f"got {mask.device}"
        )
    return mask


def _integers(name: str, value: Any, count: int, what: str) -> Tensor:
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value) if len(value) else torch.zeros(0, dtype=torch.int64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{name} must be a tensor or a sequence of integers: {error}"
            ) from error
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {value.dtype}")
    if value.dim() != 1 or value.shape[0] != count:
        raise ValueError(f"{name} must have {what}: expected shape ({count},), got {_shape(value)}")
    return value.to(torch.int64)


def _may_look(tensor: Tensor) -> bool:
    """Whether the values can be read; a graph being recorded asserts when it runs instead."""
    return not (tensor.is_meta or torch._C._are_functorch_transforms_active())


def lengths(name: str, value: Any, batch: int, most: int) -> Tensor | None:
    """``(B,)`` integers from 0 to ``most`` as int64."""
    if value is None:
        return None
    result = _integers(name, value, batch, "one entry per sequence")
    if not _may_look(result):
        return result
    inside = (result >= 0) & (result <= most)
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        torch._assert_async(inside.all(), f"{name} must lie between 0 and the rows of the tensor")
    elif not bool(inside.all()):
        worst = int(result[~inside][0])
        raise ValueError(f"{name} must lie between 0 and {most}, got {worst}")
    return result


def starts(name: str, value: Any, rows: int) -> Tensor:
    """``(B + 1,)`` cumulative lengths from 0 to ``rows`` as int64."""
    try:
        count = value.numel() if isinstance(value, Tensor) else len(value)
    except TypeError:
        raise TypeError(
            f"{name} must be a tensor or a sequence of integers, got {type(value).__name__}"
        ) from None
    if count < 1:
        raise ValueError(f"{name} must have one entry more than there are sequences, got none")
    result = _integers(name, value, count, "one dimension")
    if not _may_look(result):
        return result
    fits = (result.diff() >= 0).all() & (result[0] == 0) & (result[-1] == rows)
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        torch._assert_async(fits, f"{name} must grow from 0 to the rows of the tensor")
    elif not bool(fits):
        raise ValueError(
            f"{name} must grow from 0 to {rows}, the rows of the tensor, got {result.tolist()}"
        )
    return result


def slopes(value: Any, batch: int, query_heads: int, query: Tensor) -> Tensor | None:
    """ALiBi slopes ``(Hq,)`` or ``(B, Hq)`` in query's dtype."""
    if value is None:
        return None
    tensors(alibi_slopes=value)
    if value.shape != (query_heads,) and value.shape != (batch, query_heads):
        raise RuntimeError(
            f"alibi_slopes must have shape {(query_heads,)} or {(batch, query_heads)}, "
            f"got {_shape(value)}"
        )
    return _like_query("alibi_slopes", value, query)


def sinks(value: Any, query_heads: int, query: Tensor) -> Tensor | None:
    """One logit per head, in query's dtype."""
    if value is None:
        return None
    tensors(sinks=value)
    if value.shape != (query_heads,):
        raise RuntimeError(f"sinks must have shape {(query_heads,)}, got {_shape(value)}")
    return _like_query("sinks", value, query)


def _like_query(name: str, value: Tensor, query: Tensor) -> Tensor:
    if not value.is_floating_point():
        raise RuntimeError(f"{name} must have a floating-point dtype, got {value.dtype}")
    if value.device != query.device:
        raise RuntimeError(
            f"{name} must be on the device of query: expected {query.device}, got {value.device}"
        )
    return value.to(query.dtype)


def table_shape(value: Any, batch: int) -> None:
    """A block table ``(B, blocks)`` of integers."""
    tensors(block_table=value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"block_table must be integers, got {value.dtype}")
    if value.dim() != 2 or value.shape[0] != batch:
        raise RuntimeError(
            "block_table must have one row per sequence: "
            f"expected shape ({batch}, blocks), got {_shape(value)}"
        )


def block_table(value: Tensor, lengths: Tensor, cache: Tensor) -> Tensor:
    """The table as int64; its entries name blocks of the cache where a sequence has keys."""
    table = value.to(torch.int64)
    blocks, block_size = cache.shape[0], cache.shape[2]
    if not _may_look(table):
        return table
    first_key = torch.arange(table.shape[1], device=table.device) * block_size
    used = first_key < lengths.unsqueeze(-1)
    inside = ((table >= 0) & (table < blocks)) | ~used
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        torch._assert_async(inside.all(), "block_table must name blocks of the cache")
    elif not bool(inside.all()):
        worst = int(table[~inside][0])
        raise ValueError(
            f"block_table must name blocks of the cache, 0 to {blocks - 1}, got {worst}"
        )
    return table
