"""One position through a decoder layer, all of its kernels in one call. For inference: no op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

from fastseq import _config

__all__ = ["plain_decoder_step"]


def plain_decoder_step(*arguments: Any) -> Tensor | None:
    """``fastseq._cpu.plain_decoder_step`` where nobody watches; ``None`` elsewhere.

    The arguments are those of that function without the number of threads.
    """
    if (
        torch.compiler.is_compiling()
        or not _config.fused_everywhere
        or torch._C._len_torch_dispatch_stack() > 0
        or profiler._is_profiler_enabled
        or torch._C._is_any_autocast_enabled()
        or torch._C._get_tracing_state()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _config._backend != "cpu"
    ):
        return None
    # Past the backends' modules, which prepare tensors: there is nothing to prepare.
    kernels = _config.extension()
    result: Tensor | None = kernels.plain_decoder_step(torch.get_num_threads(), *arguments)
    return result
