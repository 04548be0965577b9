"""The seed of every dropout inside a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_seed"]


def draw_seed(dropout_p: float) -> Tensor | None:
    """Key and offset of the dropout's generator, from torch's default one; none for none."""
    if not dropout_p > 0:
        return None
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device="cpu")
