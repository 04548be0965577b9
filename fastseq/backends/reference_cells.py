"""Layers of any traced cell, written out with differentiable torch operators.

What the kernels must compute, and what answers where they do not apply: other devices and dtypes,
autocast, ``torch.func`` transforms, double backward, or no Numba.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastseq.cells.evaluate import evaluate
from fastseq.cells.plan import Plan

__all__ = [
    "CellWeights",
    "cell_layer",
    "direction_weights",
    "sizes_of",
    "weights_per_direction",
]


class CellWeights(NamedTuple):
    """The weights of one direction; ``None`` where a cell has no such gates or biases."""

    input: Tensor | None
    hidden: Tensor | None
    input_bias: Tensor | None
    hidden_bias: Tensor | None
    parameters: Sequence[Tensor]
    projection: Tensor | None = None


def weights_per_direction(plan: Plan, has_biases: bool) -> int:
    """How many tensors a layer holds for one direction; one more where it has a projection."""
    matrices = bool(plan.input_gates) + bool(plan.hidden_gates)
    return matrices * (2 if has_biases else 1) + plan.parameters


def direction_weights(
    plan: Plan, weights: Sequence[Tensor], has_biases: bool, directions: int
) -> list[CellWeights]:
    """A layer's list of weights, taken apart for each direction."""
    count = len(weights) // directions
    found = []
    for direction in range(directions):
        rest = list(weights[direction * count : (direction + 1) * count])
        w_ih = rest.pop(0) if plan.input_gates else None
        w_hh = rest.pop(0) if plan.hidden_gates else None
        b_ih = rest.pop(0) if plan.input_gates and has_biases else None
        b_hh = rest.pop(0) if plan.hidden_gates and has_biases else None
        w_hr = rest.pop() if count > weights_per_direction(plan, has_biases) else None
        found.append(CellWeights(w_ih, w_hh, b_ih, b_hh, rest, w_hr))
    return found


def sizes_of(
    plan: Plan, weights: Sequence[Tensor], has_biases: bool, bidirectional: bool
) -> tuple[int, int]:
    """H, and P of a projection, or 0 where there is none."""
    hidden = weights[0].shape[0] // (len(plan.input_gates) or len(plan.hidden_gates))
    per_direction = len(weights) // (2 if bidirectional else 1)
    if per_direction > weights_per_direction(plan, has_biases):
        return hidden, weights[per_direction - 1].shape[0]
    return hidden, 0


def _blocks(product: Tensor | None, gates: Sequence[int]) -> dict[int, Tensor]:
    if product is None:
        return {}
    return dict(zip(sorted(gates), product.chunk(len(gates), dim=-1), strict=True))


def _step(
    plan: Plan,
    from_input: Tensor | None,
    states: Sequence[Tensor],
    w: CellWeights,
    masks: Tensor | None,
) -> list[Tensor]:
    """States after a step: ``from_input`` (B, G*H), states (B, H), masks (B or 1, masks, H)."""
    x = _blocks(from_input, plan.input_gates)
    from_hidden = None
    if w.hidden is not None:
        from_hidden = linear(states[plan.recurrent_state], w.hidden, w.hidden_bias)
    h = _blocks(from_hidden, plan.hidden_gates)
    leaves: dict[tuple[str, int], Tensor] = {}
    for kind, gate in plan.slots:
        leaves[kind, gate] = x[gate] + h[gate] if kind == "b" else (x if kind == "x" else h)[gate]
    leaves.update((("s", index), state) for index, state in enumerate(states))
    leaves.update((("p", index), value) for index, value in enumerate(w.parameters))
    if masks is not None:
        leaves.update((("m", index), mask) for index, mask in enumerate(masks.unbind(-2)))
    # A formula without a state or gate in it is a number or one row for all sequences.
    like = states[-1].new_empty(states[0].size(0), _hidden_size(plan, w))
    after = [
        torch.as_tensor(value, dtype=like.dtype, device=like.device).expand_as(like)
        for value in evaluate(plan.new_states, leaves)
    ]
    if w.projection is not None:
        after[0] = linear(after[0], w.projection)
    return after


def _hidden_size(plan: Plan, w: CellWeights) -> int:
    some = w.input if w.input is not None else w.hidden
    assert some is not None
    return some.size(0) // (len(plan.input_gates) or len(plan.hidden_gates))


def cell_layer(
    plan: Plan,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Tensor | None,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """One layer of a cell in one or both directions.

    Args:
        plan: the cell.
        input: ``(T, B, I)``; ``(B, T, I)`` with ``batch_first``; ``(rows, I)`` with
            ``batch_sizes``.
        states: initial states ``(D, B, H)``, with a projection the first one ``(D, B, P)``; an
            empty list is zeros.
        weights: for each direction ``w_ih``, ``w_hh`` where the cell has such gates, then with
            ``has_biases`` their biases, then the cell's learned values ``(H)``, then, if the
            hidden state is projected, ``w_hr`` ``(P, H)``.
        masks: ``(D, T or 1, B or 1, masks, H)`` for a plan with masks.
        has_biases: whether ``weights`` holds biases.
        bidirectional: whether there is a second direction, D = 2, that runs from the end.
        batch_first: whether padded ``input`` and ``output`` have the batch first.
        batch_sizes: int64 ``(T,)``, for packed input.
        lengths: int64 ``(B,)``, for padded input.

    Returns:
        The output ``(..., D*H)``, or ``D*P`` features, and the final states as ``states``.
    """
    directions = 2 if bidirectional else 1
    time_dim = 1 if batch_first else 0
    if batch_sizes is not None:
        counts: list[int] = batch_sizes.tolist()
        batch = counts[0]
    else:
        batch = input.size(0 if batch_first else 1)
        counts = [batch] * input.size(time_dim)
    inside: list[Tensor] | None = None
    if lengths is not None:
        limit = lengths.to(input.device).unsqueeze(-1)
        inside = [t < limit for t in range(len(counts))]
    kept = plan.states - (plan.recurrent_state > 0)

    outputs, finals = [], []
    for direction, w in enumerate(direction_weights(plan, weights, has_biases, directions)):
        hidden = _hidden_size(plan, w)
        rows: Sequence[Tensor | None] = [None] * len(counts)
        if w.input is not None:
            product = linear(input, w.input, w.input_bias)
            rows = product.split(counts) if batch_sizes is not None else product.unbind(time_dim)
        carried = [state[direction] for state in states]
        if not states:
            carried = [input.new_zeros(batch, hidden) for _ in range(kept)]
            if w.projection is not None:
                carried[0] = input.new_zeros(batch, w.projection.size(0))
        if plan.recurrent_state:
            assert masks is not None
            carried.append(carried[0] * masks[direction, 0, :, -1])
        found: list[Tensor] = [input] * len(counts)
        order = range(len(counts))
        for t in reversed(order) if direction else order:
            count = counts[t]
            factors = None
            if masks is not None:
                factors = masks[direction, t if masks.size(1) > 1 else 0][:count]
            before = [state[:count] for state in carried]
            after = _step(plan, rows[t], before, w, factors)
            found[t] = after[0]
            if inside is not None:
                found[t] = torch.where(inside[t], after[0], 0.0)
                after = [
                    torch.where(inside[t], new, old) for new, old in zip(after, before, strict=True)
                ]
            if count < batch:
                after = [
                    torch.cat([new, old[count:]]) for new, old in zip(after, carried, strict=True)
                ]
            carried = after
        outputs.append(
            torch.cat(found) if batch_sizes is not None else torch.stack(found, dim=time_dim)
        )
        finals.append(carried[:kept])
    output = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
    return output, [torch.stack(states_of) for states_of in zip(*finals, strict=True)]
