"""Tensors to kernel arguments, one module per kind of hardware, and the choice between them."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fastseq import _cuda_library

__all__ = ["FastseqFallbackWarning", "fallback_reason", "warn_fallback"]

# The dtypes for which the fused CPU kernels exist.
FUSED_DTYPES = frozenset({torch.float32, torch.float64})
CUDA_DTYPES = frozenset({*FUSED_DTYPES, torch.bfloat16, torch.float16})

_warned_reasons: set[str] = set()
_cuda_library.decide_early()


class FastseqFallbackWarning(UserWarning):
    """A request was outside the fused kernels and torch's own implementation answered it."""


def fallback_reason(input: Tensor, has_cuda_kernels: bool = False) -> str | None:
    """Why the fused kernels cannot take ``input`` as things stand, ``None`` where they can.

    ``has_cuda_kernels``: the caller's operation has such kernels for CUDA, too.

    This is the only place that decides it. Every call of every layer comes here, so the usual
    answer takes four cheap tests; the sentence is put together only when one of them fails.
    """
    if (
        input.is_cpu
        and input.dtype in FUSED_DTYPES
        and not torch._C._is_any_autocast_enabled()
        and not torch._C._get_tracing_state()
    ):
        return None
    return _describe(input, has_cuda_kernels)


def _describe(input: Tensor, has_cuda_kernels: bool) -> str | None:
    if torch._C._get_tracing_state():
        return "torch.jit.trace is recording: a trace must hold torch's own operators"
    if input.is_cuda and has_cuda_kernels:
        return _describe_cuda(input)
    if not input.is_cpu:
        return f"device {input.device.type} has no fused kernels"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is enabled for the CPU"
    if input.dtype not in FUSED_DTYPES:
        return f"dtype {input.dtype} has no fused CPU kernels (float32 and float64 have)"
    return None  # autocast is on, but for another device than the input's


def _describe_cuda(input: Tensor) -> str | None:
    reason = _cuda_library.off_reason()
    if reason is not None:
        return f"the CUDA kernels are off: {reason}"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is enabled for CUDA"
    if input.dtype not in CUDA_DTYPES:
        return f"dtype {input.dtype} has no fused CUDA kernels"
    return None


def warn_fallback(reason: str) -> None:
    """Warn that torch's own layer runs instead, once per reason in a process."""
    if reason in _warned_reasons or torch.compiler.is_compiling():
        return
    _warned_reasons.add(reason)
    warnings.warn(
        f"fastseq runs torch's own implementation here: {reason}",
        FastseqFallbackWarning,
        stacklevel=3,
    )
