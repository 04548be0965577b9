"""What the backends of all processors ask of a tensor's memory."""

from __future__ import annotations

from torch import Tensor

__all__ = ["unit_stride"]


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied if elements of its last dimension do not lie side by side."""
    return tensor if tensor.stride(-1) == 1 or tensor.size(-1) == 1 else tensor.contiguous()
