"""RNN, LSTM and GRU on Numba, behind the same calls as ``backends/cpu.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq.backends.numba import recurrent
from fastseq.cells.builtin import BUILTIN

__all__ = ["rnn_backward", "rnn_cell", "rnn_forward", "rnn_reserve_elements"]


def rnn_reserve_elements(
    cell: str, rows: int, hidden_size: int, proj_size: int, directions: int, dtype: torch.dtype
) -> int:
    """Elements of what forward keeps for backward; sizes may be symbolic."""
    plan = BUILTIN[cell].plan
    return recurrent.reserve_elements(plan, rows, hidden_size, directions, dtype.itemsize)


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
    """One layer without a projection, see :func:`fastseq.backends.reference.rnn_layer`.

    Returns ``(output, hy, cy, reserve)``; ``reserve`` is ``None`` unless ``save``.
    """
    states = (hx, cx) if cell == "lstm" else (hx,)
    output, final, reserve = recurrent.forward(
        BUILTIN[cell].plan,
        input,
        states,
        weights,
        None,
        has_biases,
        bidirectional,
        batch_first,
        batch_sizes,
        lengths,
        save,
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


def rnn_backward(
    grad_output: Tensor | None,
    grad_hy: Tensor | None,
    grad_cy: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    output: Tensor,
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
    found = recurrent.backward(
        BUILTIN[cell].plan,
        grad_output,
        (grad_hy, grad_cy) if lstm else (grad_hy,),
        input,
        (hx, cx) if lstm else (hx,),
        weights,
        None,
        reserve,
        has_biases,
        bidirectional,
        batch_first,
        batch_sizes,
        lengths,
        needs if lstm else [*needs[:2], *needs[3:]],
    )
    return found.input, found.states[0], found.states[1] if lstm else None, found.weights
