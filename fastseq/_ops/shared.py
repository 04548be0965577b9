"""What the ops share: the library they are registered in and the choice of the way to a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastseq import _config

PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})

library = torch.library.Library("fastseq", "DEF")


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """An op returns tensors only: one without elements stands for "none"."""
    return like.new_empty(0) if tensor is None else tensor


def needs_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """Autograd is recording and one of the tensors takes part."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_watched() -> bool:
    """A compiler or a dispatch mode wants to see the ops."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def has_lazy_negation(*tensors: Tensor | None) -> bool:
    """Memory holds the negated values (``z.conj().imag``); the dispatcher resolves that."""
    for tensor in tensors:  # noqa: SIM110  any() over a generator takes three times as long
        if tensor is not None and tensor.is_neg():
            return True
    return False


def wants_composite() -> bool:
    """A transform needs differentiable operators, or the user chose the reference backend."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _config.backend_name() == "reference"
    )
