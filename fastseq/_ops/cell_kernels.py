"""What the ops of users' cells run on: the C++ driver or Numba's, and which of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fastseq import _recorder
from fastseq.backends.reference_cells import sizes_of
from fastseq.cells.definition import find
from fastseq.cells.plan import Plan

__all__ = ["Options", "of_layout", "plan_of", "run_backward", "run_forward", "runs_compiled"]

# What is not a tensor: (key of the cell, recurrent_dropout, zoneout, has_biases, bidirectional,
# batch_first).
Options = tuple[str, bool, bool, bool, bool, bool]

_backend: Any = None
_compiled_backend: Any = None
_is_chosen: Any = None


def _numba() -> Any:
    """The driver with Numba behind it; imported by the first call."""
    global _backend
    if _backend is None:
        from fastseq.backends.numba import recurrent

        _backend = recurrent
    return _backend


def _compiled() -> Any:
    """The C++ driver for cells that are compiled where they are used."""
    global _compiled_backend
    if _compiled_backend is None:
        from fastseq.backends.compiled_cells import recurrent

        _compiled_backend = recurrent
    return _compiled_backend


def of_layout(reserve_layout: int) -> Any:
    """The driver that reads and writes this layout, whichever would be chosen by now."""
    return _compiled() if reserve_layout > 0 else _numba()


# Compiles and loads a library, which is nothing for a compiler's graph; the answer is.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def runs_compiled(key: str, recurrent_dropout: bool, zoneout: bool, dtype: torch.dtype) -> bool:
    """Whether the cell runs on the C++ driver, compiled by now."""
    global _is_chosen
    if _is_chosen is None:
        from fastseq.backends.compiled_cells.choice import is_chosen

        _is_chosen = is_chosen
    answer: bool = _is_chosen(find(key).regularised(recurrent_dropout, zoneout), dtype)
    return answer


def plan_of(options: Options) -> Plan:
    """The cell's plan, with the masks that the options ask for."""
    key, recurrent_dropout, zoneout, *_ = options
    return find(key).regularised(recurrent_dropout, zoneout)


def _recorded(
    kernel: str,
    input: Tensor,
    weights: Sequence[Tensor],
    options: Options,
    rows: tuple[Tensor | None, Tensor | None],
    more: dict[str, int],
) -> AbstractContextManager[None]:
    """The call as a profile keeps it, with what its model has to know of the cell."""
    from fastseq.backends.numba.recording import recurrent_call

    key, _, _, has_biases, bidirectional, batch_first = options
    cell, plan = find(key), plan_of(options)
    return recurrent_call(
        kernel,
        cell.name,
        input,
        *sizes_of(plan, weights, has_biases, bidirectional),
        has_biases,
        bidirectional,
        batch_first,
        *rows,
        {
            "input_gates": len(plan.input_gates),
            "hidden_gates": len(plan.hidden_gates),
            "states": plan.states,
            "saved": len(plan.entries),
            "parameters": plan.parameters,
            **more,
        },
    )


def run_forward(
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    options: Options,
    save: bool,
    reserve_layout: int,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """One layer forward: output, final states and the reserve."""
    arguments = (input, states, weights, masks, *options[3:], batch_sizes, lengths, save)
    # The C++ driver records itself.
    if _recorder.active is None or reserve_layout > 0:
        return of_layout(reserve_layout).forward(plan_of(options), *arguments)
    rows = (batch_sizes, lengths)
    with _recorded("cell_forward", input, weights, options, rows, {"training": int(save)}):
        return _numba().forward(plan_of(options), *arguments)


def run_backward(
    grad_output: Tensor | None,
    grad_final: Sequence[Tensor | None],
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Tensor | None,
    reserve: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    options: Options,
    needs: Sequence[bool],
    reserve_layout: int,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Gradients of input, states and weights."""
    rows, plan = (batch_sizes, lengths), plan_of(options)
    given = (grad_output, grad_final, input, states, weights, masks)
    arguments = (*given, reserve, *options[3:], *rows, needs)
    if reserve_layout > 0:
        return _compiled().backward(plan, *arguments)
    if _recorder.active is None:
        return _numba().backward(plan, *arguments)
    asked = {"needs_x": int(needs[0]), "needs_w": int(any(needs[1 + len(states) :]))}
    with _recorded("cell_backward", input, weights, options, rows, asked):
        return _numba().backward(plan, *arguments)
