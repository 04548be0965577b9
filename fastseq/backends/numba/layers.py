"""RNN, LSTM and GRU on Numba, behind the same calls as ``backends/cpu.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq import _recorder
from fastseq._cells import GATES
from fastseq.backends.numba import recurrent, step
from fastseq.backends.numba.recording import NOTHING, recurrent_call
from fastseq.cells.builtin import BUILTIN

__all__ = ["plain_layer", "rnn_backward", "rnn_cell", "rnn_forward", "rnn_reserve_elements"]

_DTYPES = (torch.float32, torch.float64)


def rnn_reserve_elements(
    cell: str, rows: int, hidden_size: int, proj_size: int, directions: int, dtype: torch.dtype
) -> int:
    """Elements of what forward keeps for backward; sizes may be symbolic."""
    plan = BUILTIN[cell].plan
    return recurrent.reserve_elements(
        plan, rows, hidden_size, directions, dtype.itemsize, proj_size
    )


def rnn_forward(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    has_biases: bool,
    proj_size: int,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer, see :func:`fastseq.backends.reference.rnn_layer`.

    Returns ``(output, hy, cy, reserve)``; ``reserve`` is ``None`` unless ``save``.
    """
    states = (hx, cx) if cell == "lstm" else (hx,)
    layout = (has_biases, bidirectional, batch_first, batch_sizes, lengths)
    recording = NOTHING
    if _recorder.active is not None:
        hidden = weights[0].size(0) // GATES[cell]
        recording = recurrent_call(
            "rnn_forward", cell, input, hidden, proj_size, *layout, {"training": int(save)}
        )
    with recording:
        output, final, reserve = recurrent.forward(
            BUILTIN[cell].plan, input, states, weights, None, *layout, save
        )
    return output, final[0], final[1] if cell == "lstm" else None, reserve


def rnn_cell(
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    has_biases: bool,
) -> tuple[Tensor, Tensor | None]:
    """One step without gradients: ``input`` (B, I), states (B, H); returns ``(hy, cy)``."""
    if step.is_small(input.size(0), weights) and _are_dense(input.dtype, input, hx, cx, *weights):
        before = [hx] if cx is None else [hx, cx]
        after = [torch.empty_like(state) for state in before]
        # A cell's output is its state: both go to the same place.
        _single_step(cell, input, before, weights, [after[0], *after])
        return after[0], None if cx is None else after[1]
    _, hy, cy, _ = rnn_forward(
        input.unsqueeze(0),
        hx.unsqueeze(0),
        None if cx is None else cx.unsqueeze(0),
        weights,
        cell,
        has_biases,
        0,
        False,
        False,
        None,
        None,
        False,
    )
    return hy.squeeze(0), None if cy is None else cy.squeeze(0)


def _single_step(
    cell: str,
    input: Tensor,
    before: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    outputs: Sequence[Tensor],
) -> None:
    """:func:`fastseq.backends.numba.step.run_alone`, recorded where somebody records."""
    if _recorder.active is None:
        step.run_alone(BUILTIN[cell].plan, input, before, weights, outputs)
        return
    hidden, biases = weights[1].size(1), len(weights) == 4
    one = input.reshape(1, -1, input.size(-1))
    with recurrent_call(
        "rnn_forward", cell, one, hidden, 0, biases, False, False, None, None, {"training": 0}
    ):
        _recorder.enter("single step")
        step.run_alone(BUILTIN[cell].plan, input, before, weights, outputs)


def _are_dense(dtype: torch.dtype, *tensors: Tensor | None) -> bool:
    for tensor in tensors:
        if tensor is not None and not (
            tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous()
        ):
            return False
    return True


def plain_layer(
    cell: str,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """A single step of one direction with biases, checked and run in one go; else ``None``.

    ``None`` as well where something does not fit: the general way words the error.
    """
    shape = input.shape
    if (
        len(shape) != 3
        or shape[1 if batch_first else 0] != 1
        or len(weights) != 4
        or input.dtype not in _DTYPES
    ):
        return None
    batch, features = shape[0 if batch_first else 1], shape[2]
    w_ih, w_hh, b_ih, b_hh = weights
    hidden = w_hh.size(-1)
    rows = GATES[cell] * hidden
    state = (1, batch, hidden)
    if (
        not batch
        or not hidden
        or w_ih.shape != (rows, features)
        or w_hh.shape != (rows, hidden)
        or b_ih.shape != (rows,)
        or b_hh.shape != (rows,)
        or (hx is not None and hx.shape != state)
        or (cx is not None and (cell != "lstm" or cx.shape != state))
        or not step.is_small(batch, weights)
        or not _are_dense(input.dtype, input, hx, cx, *weights)
    ):
        return None
    output, hy = input.new_empty((*shape[:2], hidden)), input.new_empty(state)
    if cell == "lstm":
        cy = input.new_empty(state)
        _single_step(cell, input, (hx, cx), weights, (output, hy, cy))
        return output, hy, cy
    _single_step(cell, input, (hx,), weights, (output, hy))
    return output, hy, None


def rnn_backward(
    grad_output: Tensor | None,
    grad_hy: Tensor | None,
    grad_cy: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    reserve: Tensor,
    cell: str,
    has_biases: bool,
    proj_size: int,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of one layer: of ``input``, ``hx``, ``cx`` and each weight.

    ``needs`` says for ``(input, hx, cx, *weights)`` which are asked for; the others are ``None``.
    """
    lstm = cell == "lstm"
    layout = (has_biases, bidirectional, batch_first, batch_sizes, lengths)
    recording = NOTHING
    if _recorder.active is not None:
        hidden = weights[0].size(0) // GATES[cell]
        asked = {"needs_x": int(needs[0]), "needs_w": int(any(needs[3:]))}
        recording = recurrent_call("rnn_backward", cell, input, hidden, proj_size, *layout, asked)
    with recording:
        found = recurrent.backward(
            BUILTIN[cell].plan,
            grad_output,
            (grad_hy, grad_cy) if lstm else (grad_hy,),
            input,
            (hx, cx) if lstm else (hx,),
            weights,
            None,
            reserve,
            *layout,
            needs if lstm else [*needs[:2], *needs[3:]],
        )
    return found.input, found.states[0], found.states[1] if lstm else None, found.weights
