"""One layer of any cell on the Numba drivers: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq.backends.numba.backward_pass import Gradients, backward_rows
from fastseq.backends.numba.forward_pass import forward_rows
from fastseq.backends.numba.layout import Ragged, ragged
from fastseq.backends.numba.weights import padded_units
from fastseq.cells.plan import Plan

__all__ = ["Gradients", "backward", "forward", "reserve_elements"]


def reserve_elements(
    plan: Plan, rows: int, hidden_size: int, directions: int, item_bytes: int, proj_size: int = 0
) -> int:
    """Elements of what forward keeps for backward; sizes may be symbolic."""
    of_row = plan.columns * padded_units(hidden_size, item_bytes)
    if proj_size:
        of_row += padded_units(proj_size, item_bytes)
    return rows * directions * of_row


def forward(
    plan: Plan,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    masks: Tensor | None,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    save: bool,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """One layer of a cell in one or both directions.

    Args:
        plan: the cell.
        input: ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, ``(rows, I)`` with
            ``batch_sizes``; any strides.
        states: the initial states, ``(D, B, H)`` each, the first ``(D, B, P)`` with a projection;
            ``None`` is zeros.
        weights: for each direction ``w_ih``, ``w_hh`` (where the cell has such gates), their
            biases with ``has_biases``, the cell's learned values ``(H)``, and ``w_hr`` ``(P, H)``
            where the hidden state is projected (P < H, and no formula reads ``s[0]``).
        masks: ``(D, T or 1, B or 1, masks, H)`` for a plan with masks.
        has_biases: whether there are biases.
        bidirectional: whether a second direction runs from the end.
        batch_first: layout of a padded input and output.
        batch_sizes: int64 ``(T,)``, for packed input.
        lengths: int64 ``(B,)``, for padded input.
        save: keep what :func:`backward` needs.

    Returns:
        The output, the final states as ``states``, and the reserve or ``None``.
    """
    with torch.no_grad():
        if lengths is None:
            return forward_rows(
                plan, input, states, weights, masks, has_biases, bidirectional, batch_first,
                batch_sizes, save,
            )  # fmt: skip
        steps = input.size(1 if batch_first else 0)
        how = ragged(lengths, steps, batch_first)
        packed, final, reserve = forward_rows(
            plan,
            _gathered(input, how),
            _ordered(states, how.order, input),
            weights,
            _ordered_masks(masks, how.order),
            has_biases,
            bidirectional,
            False,
            how.batch_sizes,
            save,
            batch=lengths.numel(),
            # The reserve's size must not depend on values: graphs are recorded without them.
            capacity=steps * lengths.numel(),
        )
        output = _scattered(packed, how, (*input.shape[:-1], packed.size(1)))
        back = torch.argsort(how.order)
        return output, [state.index_select(1, back) for state in final], reserve


def _gathered(padded: Tensor, how: Ragged) -> Tensor:
    return padded.reshape(-1, padded.size(-1)).index_select(0, how.places)


def _scattered(packed: Tensor, how: Ragged, shape: Sequence[int]) -> Tensor:
    padded = packed.new_zeros(tuple(shape))
    padded.view(-1, shape[-1]).index_copy_(0, how.places, packed)
    return padded


def _ordered(states: Sequence[Tensor | None], order: Tensor, like: Tensor) -> list[Tensor | None]:
    return [None if state is None else state.index_select(1, order) for state in states]


def _ordered_masks(masks: Tensor | None, order: Tensor) -> Tensor | None:
    return masks if masks is None or masks.size(2) == 1 else masks.index_select(2, order)


def backward(
    plan: Plan,
    grad_output: Tensor | None,
    grad_states: Sequence[Tensor | None],
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    masks: Tensor | None,
    reserve: Tensor,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of one layer; ``needs`` says which of ``(input, *states, *weights)`` are wanted.

    ``grad_states`` are those of the final states. The other arguments are :func:`forward`'s.
    """
    with torch.no_grad():
        if lengths is None:
            return backward_rows(
                plan, grad_output, grad_states, input, states, weights, masks, reserve, has_biases,
                bidirectional, batch_first, batch_sizes, needs,
            )  # fmt: skip
        steps = input.size(1 if batch_first else 0)
        how = ragged(lengths, steps, batch_first)
        found = backward_rows(
            plan,
            None if grad_output is None else _gathered(grad_output, how),
            _ordered(grad_states, how.order, input),
            _gathered(input, how),
            _ordered(states, how.order, input),
            weights,
            _ordered_masks(masks, how.order),
            reserve,
            has_biases,
            bidirectional,
            False,
            how.batch_sizes,
            needs,
            batch=lengths.numel(),
        )
        grad_input = found.input
        if grad_input is not None:
            grad_input = _scattered(grad_input, how, input.shape)
        return Gradients(
            grad_input, _ordered(found.states, torch.argsort(how.order), input), found.weights
        )
