"""torch's own attention function on the fused kernels: its broadcasting and its errors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq import _ops
from fastseq._attention import WEIGHTS_NONE, Options, Terms
from fastseq._checks import attention as _checks
from fastseq._dropout import draw_seed
from fastseq.backends import fallback_reason, warn_fallback
from fastseq.functional.attention import bias_like, default_scale, run_attention

__all__ = ["scaled_dot_product_attention"]

# The function itself, whatever torch.nn.functional's attribute is replaced by later.
_torch_attention = torch._C._nn.scaled_dot_product_attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention` on the fused kernels.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html

    Args:
        query: ``(..., Hq, Sq, E)``, 2-D or more. The fused CPU kernels take float32 and float64;
            torch's own function answers for every other dtype and device, under autocast and while
            ``torch.jit.trace`` records.
        key: ``(..., Hkv, Skv, E)``; leading dimensions broadcast.
        value: ``(..., Hkv, Skv, Ev)``.
        attn_mask: bool (true takes part), float32 or query's dtype (added to the scores),
            broadcastable to ``(..., Hq, Sq, Skv)``, 2-D or more.
        dropout_p: probability of zeroing a weight, applied whenever it is positive. The same seed
            gives other masks than torch's function does.
        is_causal: query ``i`` sees keys ``0 .. i``.
        scale: default ``1 / sqrt(E)``.
        enable_gqa: allow ``Hq`` to be a multiple of ``Hkv``.

    Returns:
        ``(..., Hq, Sq, Ev)``. Rows that see no key are zero.

    Raises:
        RuntimeError: tensors do not fit together, ``attn_mask`` along with ``is_causal``, or
            ``dropout_p`` above 1.
        IndexError: ``attn_mask`` has fewer than 2 dimensions.
        TypeError: an argument has the wrong type.
    """
    if attn_mask is None and dropout_p == 0.0:
        result = _ops.plain_attention(query, key, value, is_causal, enable_gqa, scale)
        if result is not None:
            return result
    numbers = (dropout_p, is_causal, scale, enable_gqa)
    reason = _sdpa_fallback_reason(query, key, value, attn_mask, *numbers)
    if reason is not None:
        if reason:
            warn_fallback(reason)
        return _torch_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    leading, query, key, value = _lift(query, key, value, enable_gqa)
    mask = bias = None
    if attn_mask is not None:
        if is_causal:
            raise RuntimeError(
                "attn_mask must be None when is_causal is true, got both a mask and is_causal=True"
            )
        attn_mask = _lift_mask(attn_mask, leading, query, key)
        if attn_mask.dtype is torch.bool:
            mask = attn_mask
        else:
            bias = bias_like(attn_mask, query)
    dropout_p = _checks.probability(max(dropout_p, 0.0))
    options = Options(
        window_right=0 if is_causal else -1,
        dropout_p=dropout_p,
        scale=default_scale(query, scale),
    )
    terms = Terms(bias=bias, mask=mask, seed=draw_seed(dropout_p))
    output, _, _ = run_attention(query, key, value, terms, options, WEIGHTS_NONE)
    if len(leading) == 2:
        return output
    return output.reshape(*leading, *output.shape[-2:])


def _sdpa_fallback_reason(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: Any,
    is_causal: Any,
    scale: Any,
    enable_gqa: Any,
) -> str | None:
    """Why torch's own function answers; "" where it raises or needs no warning."""
    given = [query, key, value] if attn_mask is None else [query, key, value, attn_mask]
    for tensor in given:
        if not isinstance(tensor, Tensor):
            return ""
        if tensor.is_nested:
            return "nested tensors have no fused kernels"
        if type(tensor).__torch_function__ not in (
            Tensor.__torch_function__,
            torch._C._disabled_torch_function_impl,
        ):
            return f"{type(tensor).__name__} overrides torch's functions"
    if not isinstance(dropout_p, (int, float)) or not isinstance(scale, (int, float, type(None))):
        return ""
    if not isinstance(is_causal, bool) or not isinstance(enable_gqa, bool):
        return ""
    return fallback_reason(query, has_cuda_kernels=True)


def _lift(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
    """The output's leading dimensions, and the arguments broadcast to 4-D."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 2:
            raise RuntimeError(
                f"{name} must be at least 2-D, got {tensor.dim()}-D: shape {tuple(tensor.shape)}"
            )
    _checks.same_kind(query, key, value)
    if key.shape[-1] != query.shape[-1]:
        raise RuntimeError(
            f"key must have the head size of query: expected {query.shape[-1]}, got {key.shape[-1]}"
        )
    if value.shape[-2] != key.shape[-2]:
        raise RuntimeError(
            f"value must have the rows of key: expected {key.shape[-2]}, got {value.shape[-2]}"
        )
    shapes = [tuple(t.shape[:-2]) for t in (query, key, value)]
    if enable_gqa:
        if min(map(len, shapes)) == 0:
            raise IndexError(
                "query, key and value must be at least 3-D with enable_gqa, got "
                f"{query.dim()}-D, {key.dim()}-D and {value.dim()}-D"
            )
        key, value = _groups(query, key, value)
        heads: list[tuple[int, ...]] = [
            (shape[-1],) for shape in (query.shape[:-2], key.shape[:-2], value.shape[:-2])
        ]
        shapes = [shape[:-1] for shape in shapes]
    else:
        heads = [(), (), ()]
    leading = shapes[0]
    if shapes[1] != leading or shapes[2] != leading:
        try:
            leading = tuple(torch.broadcast_shapes(*shapes))
        except RuntimeError:
            raise RuntimeError(
                "leading dimensions of query, key and value must be broadcastable, got shapes "
                f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
            ) from None
    lifted = []
    for tensor, head in zip((query, key, value), heads, strict=True):
        target = (*leading, *head)
        if tensor.shape[:-2] != target:
            tensor = tensor.expand(*target, *tensor.shape[-2:])
        while tensor.dim() < 4:
            tensor = tensor.unsqueeze(0)
        lifted.append(tensor.flatten(0, -4) if tensor.dim() > 4 else tensor)
    return (*leading, *heads[0]), lifted[0], lifted[1], lifted[2]


def _groups(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with one number of heads, which divides that of the queries."""
    query_heads, key_heads, value_heads = (t.shape[-3] for t in (query, key, value))
    for name, count in (("key", key_heads), ("value", value_heads)):
        if count != query_heads and (count == 0 or query_heads % count):
            raise RuntimeError(
                f"heads of {name} must divide the heads of query: expected a divisor of "
                f"{query_heads}, got {count}"
            )
    if key_heads != value_heads:
        # torch repeats each of them on its own.
        key = key.repeat_interleave(query_heads // key_heads, -3)
        value = value.repeat_interleave(query_heads // value_heads, -3)
    return key, value


def _lift_mask(mask: Tensor, leading: tuple[int, ...], query: Tensor, key: Tensor) -> Tensor:
    """``attn_mask`` broadcastable to the 4-D scores."""
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        floats = " or ".join(dict.fromkeys((str(torch.float32), str(query.dtype))))
        raise RuntimeError(f"attn_mask must have dtype torch.bool or {floats}, got {mask.dtype}")
    if mask.dim() < 2:
        raise IndexError(
            f"attn_mask must be at least 2-D, got {mask.dim()}-D: shape {tuple(mask.shape)}"
        )
    if mask.device != query.device:
        raise RuntimeError(
            f"attn_mask must be on the device of query: expected {query.device}, got {mask.device}"
        )
    target = (*leading, query.shape[2], key.shape[2])
    fits = mask.dim() <= len(target) and all(
        size in (1, wanted)
        for size, wanted in zip(reversed(mask.shape), reversed(target), strict=False)
    )
    if not fits:
        raise RuntimeError(
            f"attn_mask must be broadcastable to {target}, got shape {tuple(mask.shape)}"
        )
    if len(leading) > 2 and mask.dim() > 3:
        # Several batch dimensions became one; so do the mask's.
        while mask.dim() < len(target):
            mask = mask.unsqueeze(0)
        if all(size == 1 for size in mask.shape[:-3]):
            return mask.flatten(0, -4)
        return mask.expand(*leading[:-1], *mask.shape[-3:]).flatten(0, -4)
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    return mask
