"""What the ops share: the library they are registered in and the choice of the way to a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

from fastseq import _config

PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})

_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_get_tracing_state = torch._C._get_tracing_state
_are_transforms_active = torch._C._are_functorch_transforms_active
# Whether a tensor stands for many in torch.autograd.grad(..., is_grads_batched=True).
_is_batched = torch._C._functorch.is_legacy_batchedtensor

library = torch.library.Library("fastseq", "DEF")

# Dynamo cannot trace the loading of the extension, so that it must not be left to the first call,
# which may be a compiled one. What goes wrong here is raised by that call.
with suppress(ImportError, ValueError):
    _config.backend_name()


def is_observed() -> bool:
    """Anything at all wants to see or change operators that run now, but for a compiler.

    A dispatch mode, torch's profiler, autocast, a trace, a transform, forward mode AD: the ways
    past the operators are not for them.
    """
    return (
        _dispatch_modes() > 0
        or profiler._is_profiler_enabled
        or _is_any_autocast_enabled()
        or _get_tracing_state() is not None
        or _are_transforms_active()
        or forward_ad._current_level >= 0
    )


# Short calls ask this each time: the compiled twin answers in a third of the time.
with suppress(ImportError, ValueError):
    _kernels = _config.extension()
    _kernels.connect_observers(
        _dispatch_modes,
        profiler,
        _is_any_autocast_enabled,
        _get_tracing_state,
        _are_transforms_active,
        forward_ad,
    )
    is_observed = _kernels.is_observed


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """An op returns tensors only: one without elements stands for "none"."""
    return like.new_empty(0) if tensor is None else tensor


def needs_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """Autograd is recording and one of the tensors takes part."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_traced() -> bool:
    """A compiler or a dispatch mode sees the ops: shapes may stand for values."""
    return _is_compiling() or _dispatch_modes() > 0


def is_watched() -> bool:
    """The ops have to pass the dispatcher: they are traced, or torch's profiler records them."""
    # The flag is torch's own short cut; to ask the profiler itself takes three times as long.
    return _is_compiling() or _dispatch_modes() > 0 or profiler._is_profiler_enabled


def has_lazy_negation(*tensors: Tensor | None) -> bool:
    """Memory holds the negated values (``z.conj().imag``); the dispatcher resolves that."""
    for tensor in tensors:  # noqa: SIM110  any() over a generator takes three times as long
        if tensor is not None and tensor.is_neg():
            return True
    return False


def overrides_dispatch(*tensors: Tensor | None) -> bool:
    """One is of a type that runs torch's operators in its own way.

    Weights quantized by a wrapper, say: they have no memory of their own, and know torch's
    operators, not ours.
    """
    for tensor in tensors:
        if tensor is None or type(tensor) in PLAIN_TYPES:
            continue
        if type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
            return True
    return False


def are_plain(*tensors: Tensor | None) -> bool:
    """All are tensors of exactly torch's own types."""
    for tensor in tensors:  # noqa: SIM110  any() over a generator takes three times as long
        if tensor is not None and type(tensor) not in PLAIN_TYPES:
            return False
    return True


def are_direct(*tensors: Tensor | None) -> bool:
    """All are of torch's own types, and their memory holds their values."""
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in PLAIN_TYPES or tensor.is_neg()):
            return False
    return True


def runs_directly(*tensors: Tensor | None) -> bool:
    """The kernels may be called without the dispatcher in between. The input comes first."""
    return type(tensors[0]) in PLAIN_TYPES and not is_watched() and not has_lazy_negation(*tensors)


def wants_composite(kernels: frozenset[str] = frozenset({"cpu"})) -> bool:
    """A transform needs differentiable operators, or the chosen backend has no such kernels."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _config.backend_name() not in kernels
    )


def needs_differentiable_gradient(*grads: Tensor | None) -> bool:
    """The gradient from ``grads`` is to be made of differentiable operators.

    For a second derivative, because a transform or ``is_grads_batched`` batches what comes in, or
    because that is of a type of its own.
    """
    if _is_compiling():
        return False
    if torch.is_grad_enabled() or _are_transforms_active():
        return True
    for grad in grads:
        if grad is not None and _is_batched(grad):
            return True
    return overrides_dispatch(*grads) and not is_traced()


def differentiable_gradients(
    function: Callable[..., Sequence[Tensor | None]],
    sources: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of those ``sources`` that need one, by way of the operators of ``function``.

    Args:
        function: takes the sources and returns as many outputs as there are ``grads``.
        sources: tensors, or None.
        needs: which of the sources need a gradient.
        grads: of the outputs, None for zero.

    Returns:
        One entry per source; a differentiable graph where autograd is recording.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        fresh: list[Tensor | None] = []
        for source, need in zip(sources, needs, strict=True):
            if source is None:
                fresh.append(None)
            elif create_graph:
                # One source may have been computed from another. What it passes on to that one is
                # the business of whoever computed it: seen from here they are independent.
                fresh.append(source.view_as(source))
            else:
                fresh.append(source.detach().requires_grad_(need))
        pairs = [
            (output, grad)
            for output, grad in zip(function(*fresh), grads, strict=True)
            if output is not None and grad is not None
        ]
        wanted = [t for t, need in zip(fresh, needs, strict=True) if need and t is not None]
        if not pairs or not wanted:
            return [None] * len(needs)
        found = iter(
            torch.autograd.grad(
                [output for output, _ in pairs],
                wanted,
                [grad for _, grad in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    return [
        next(found) if need and source is not None else None
        for source, need in zip(sources, needs, strict=True)
    ]


def lacks_kernels(kernels: frozenset[str] = frozenset({"cpu"})) -> bool:
    """As :func:`wants_composite`, of what a compiler can tell.

    There is no choice of a backend for it but the present one, and no forward mode.
    """
    return _config.backend_name() not in kernels or _are_transforms_active()
