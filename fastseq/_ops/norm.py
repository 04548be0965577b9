"""The ops ``fastseq::norm_forward`` and ``fastseq::norm_backward``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastseq._norm import NormOptions
from fastseq.backends import reference_norm

__all__ = ["norm", "plain_norm"]


def plain_norm(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    rms: bool,
    want_sum: bool,
) -> Any:
    return None


def norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    options: NormOptions,
    want_sum: bool,
) -> tuple[Tensor, Tensor]:
    return reference_norm.norm(input, residual, weight, bias, seed, options)
