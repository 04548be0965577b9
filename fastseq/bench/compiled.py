"""``torch.compile`` as a peer: compiled before timing, or given up with the reason."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastseq.bench.deadline import deadline

# Longer than this and the case goes without the compiled peer.
COMPILE_LIMIT_SECONDS = 60.0


class CompileSkippedError(Exception):
    """There is no compiled peer; the message says why."""


# How far compiled results may be from torch's, relative and on the whole. Gradients through ReLU
# jump where rounding moves a value across zero; other dropout draws other numbers, but as many.
_INFERENCE_TOLERANCE = 1e-4
_TRAINING_TOLERANCE = 1e-2
_RANDOM_TOLERANCE = 0.2


def agrees(found: object, expected: object, *, training: bool, random: bool) -> bool:
    """Whether the tensors of two results are the same but for rounding.

    Args:
        found: Result of the compiled call.
        expected: Result of the call as torch runs it.
        training: The results are gradients.
        random: Dropout took part: only sizes of values are compared, not the values.
    """
    ours, theirs = tree_leaves(found), tree_leaves(expected)
    if len(ours) != len(theirs):
        return False
    for one, other in zip(ours, theirs, strict=True):
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            if one is not other and one != other:
                return False
            continue
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        size = other.double().norm()
        if random:
            difference, tolerance = one.double().norm() - size, _RANDOM_TOLERANCE
        else:
            difference = (one.double() - other.double()).norm()
            tolerance = _TRAINING_TOLERANCE if training else _INFERENCE_TOLERANCE
        # Written so that a NaN does not pass.
        if not bool(difference.abs() <= tolerance * size + 1e-30):
            return False
    return True


def compiled_call(
    callee: Callable[..., Any],
    make_call: Callable[[Callable[..., Any]], Callable[[], object]],
    *,
    dynamic: bool | None = None,
    on_first_call: Callable[[], object] | None = None,
    limit_seconds: float = COMPILE_LIMIT_SECONDS,
) -> Callable[[], object]:
    """Compile something and return a call of it that has run twice.

    Args:
        callee: What to compile, with torch's default backend and mode.
        make_call: Makes the call that is timed from the compiled callee.
        dynamic: As ``torch.compile``'s: whether one compilation serves all shapes.
        on_first_call: Called after the first of the two calls, which is when torch compiles.
        limit_seconds: When to give up.

    Raises:
        CompileSkippedError: Compilation failed or took too long.
    """
    import torch._inductor.config as inductor

    # Worker processes would go on to take cores from the peers.
    inductor.compile_threads = 1
    # What earlier cases have left counts against dynamo's limit of recompilations.
    torch.compiler.reset()
    start = time.perf_counter()
    try:
        with deadline(limit_seconds):
            call = make_call(torch.compile(callee, dynamic=dynamic))
            call()
            if on_first_call is not None:
                on_first_call()
            call()
    except Exception as error:  # the compiler's own errors are of many types, a deadline within
        torch.compiler.reset()
        if time.perf_counter() - start >= limit_seconds:
            raise CompileSkippedError(f"compiling takes more than {limit_seconds:g} s") from error
        reason = str(error).strip().splitlines() or [""]
        raise CompileSkippedError(f"{type(error).__name__}: {reason[0][:120]}") from error
    return call
