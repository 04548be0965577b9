"""One position through a decoder layer, all of its kernels in one call. For inference: no op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq import _config
from fastseq._ops.shared import is_observed

__all__ = ["plain_decoder_step"]


def plain_decoder_step(*arguments: Any) -> Tensor | None:
    """``fastseq._cpu.plain_decoder_step`` where nobody watches; ``None`` elsewhere.

    The arguments are those of that function.
    """
    if (
        torch.compiler.is_compiling()
        or not _config.fused_everywhere
        or _config._backend != "cpu"
        or is_observed()
    ):
        return None
    # Past the backends' modules, which prepare tensors: there is nothing to prepare.
    kernels = _config.extension()
    result: Tensor | None = kernels.plain_decoder_step(*arguments)
    return result
