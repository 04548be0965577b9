"""What to add to the scores of an attention case, made beforehand as torch's masks are."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq.bench.attention import BuiltAttention

# Above this, only operators that never hold all scores at once are tried.
_SCORES_BYTES = 2**30


def bias(built: BuiltAttention) -> Tensor | None:
    """Window, lengths and bias as values to add, (1 or B, 1 or Hq, 1 or Sq, Skv); None for none.

    Causality is not in it: libraries have a word for it.
    """
    if "bias" in built.leaves:
        return built.leaves["bias"].detach()
    visible = built.mask
    if built.padding is not None:
        visible = ~built.padding[:, None, None, :]
    if visible is None:
        return None
    while visible.dim() < 4:
        visible = visible.unsqueeze(0)
    return _added(visible, getattr(torch, built.case.dtype))


def causal_bias(built: BuiltAttention) -> Tensor:
    """Causality as values to add, (1, 1, Sq, Skv)."""
    rows, keys = built.case.Sq, built.case.Skv
    visible = torch.ones(1, 1, rows, keys, dtype=torch.bool).tril()
    return _added(visible, getattr(torch, built.case.dtype))


def _added(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))


def causal(built: BuiltAttention) -> bool:
    """Whether keys are hidden by causality; one query sees all."""
    return built.case.options.causal and built.case.Sq > 1


def scores_fit(built: BuiltAttention) -> bool:
    """Whether all scores may be in memory at once."""
    case = built.case
    return case.B * case.Hq * case.Sq * case.Skv * 4 < _SCORES_BYTES
