"""fastseq's attention inside models that call torch's function themselves."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from fastseq import functional

__all__ = ["patch_sdpa"]

_NAME = "scaled_dot_product_attention"

# Where the function itself lives, and the code that falls back on it.
_UNTOUCHED = ("torch._C", "fastseq.")

_lock = threading.Lock()
_depth = 0
_fastpath_before = True
_causal_bias_before: Any = CausalBias.__dict__["__torch_function__"]
# What stood where before the outermost block, so that it can be put back.
_replaced: list[tuple[ModuleType, Any]] = []


@contextmanager
def patch_sdpa() -> Iterator[None]:
    """Run :func:`torch.nn.functional.scaled_dot_product_attention` on fastseq while a block lasts.

    ::

        with fastseq.patch_sdpa():
            loss = model(batch).sum()
            loss.backward()

    Takes effect for code that calls ``F.scaled_dot_product_attention``, for modules that imported
    the function under its own name, and in ``torch.nn.MultiheadAttention`` and the
    ``torch.nn.Transformer`` layers; their fused inference path, which does not call the function,
    is turned off meanwhile. ``torch.nn.MultiheadAttention`` computes without the function where
    attention weights are asked for (``need_weights=True``, its default); for such layers there is
    :func:`fastseq.convert`.

    The replacement is that of a name in a module and so holds in every thread. Blocks may be nested
    and may overlap between threads: the last one to end puts everything back, also when an
    exception ends it. A function compiled by ``torch.compile`` keeps what it was compiled with:
    compile inside the block. Also usable as a decorator.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _depth, _fastpath_before
    with _lock:
        _depth += 1
        if _depth > 1:
            return
        original = getattr(torch.nn.functional, _NAME)
        for module in list(sys.modules.values()):
            if _holds(module, original):
                _replaced.append((module, original))
                setattr(module, _NAME, _attention)
        CausalBias.__torch_function__ = classmethod(_causal_bias_function)  # type: ignore[method-assign,assignment]
        _fastpath_before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)


def _holds(module: Any, original: Any) -> bool:
    """Whether ``module`` is someone's, not torch's core or ours, that imported the function."""
    if not isinstance(module, ModuleType) or module.__name__.startswith(_UNTOUCHED):
        return False
    # Not by getattr, which makes lazy modules import things.
    return module.__dict__.get(_NAME) is original


def _leave() -> None:
    global _depth
    with _lock:
        _depth -= 1
        if _depth:
            return
        for module, original in _replaced:
            # Someone else may have replaced it since, and will put back what they found.
            if module.__dict__.get(_NAME) is _attention:
                setattr(module, _NAME, original)
        _replaced.clear()
        CausalBias.__torch_function__ = _causal_bias_before  # type: ignore[method-assign]
        torch.backends.mha.set_fastpath_enabled(_fastpath_before)


def _causal_bias_function(
    cls: Any, function: Any, types: Any, args: Any = (), kwargs: Any = None
) -> Any:
    """Stands in for ``CausalBias.__torch_function__``, which knows the function by its name only.

    Code that kept torch's function from before the block still calls that one.
    """
    if function is torch._C._nn.scaled_dot_product_attention:
        return cls._dispatch(*args, **(kwargs or {}))
    return _causal_bias_before.__get__(None, cls)(function, types, args, kwargs)


def _attention(
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
    """Stands in for torch's function; same arguments."""
    if not _depth:
        # Kept by someone beyond the end of the block.
        return torch._C._nn.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    if isinstance(attn_mask, CausalBias):
        # A tensor subclass that recognises torch's function by identity.
        lower_right = attn_mask.variant is CausalVariant.LOWER_RIGHT
        if is_causal:
            raise ValueError("is_causal must be False where attn_mask is a CausalBias, got True")
        if lower_right and query.size(-2) != key.size(-2):
            attn_mask = attn_mask._materialize(query.device)
        else:
            attn_mask, is_causal = None, True
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
