"""What the backends of all processors ask of a tensor's memory."""

from __future__ import annotations

from torch import Tensor

__all__ = ["empty_heads", "unit_stride"]


def empty_heads(like: Tensor, size: int) -> Tensor:
    """Memory for ``(B, heads, S, size)`` laid out as ``like`` is: heads or rows outside.

    torch.nn.MultiheadAttention and most models hold ``(B, S, heads, size)`` and pass it transposed;
    an output in the same layout spares the copy when the heads are put together again.
    """
    shape = like.shape
    if len(shape) == 4 and like.stride(1) < like.stride(2):
        return like.new_empty((shape[0], shape[2], shape[1], size)).transpose(1, 2)
    return like.new_empty((*shape[:-1], size))


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied if elements of its last dimension do not lie side by side."""
    return tensor if tensor.stride(-1) == 1 or tensor.size(-1) == 1 else tensor.contiguous()
