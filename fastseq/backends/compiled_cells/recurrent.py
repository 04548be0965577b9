"""One layer of a user's cell on the C++ driver: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastseq._cells import CellSizes
from fastseq.backends import cpu
from fastseq.backends.compiled_cells.choice import kernels
from fastseq.backends.reference_cells import sizes_of
from fastseq.cells.plan import Plan

__all__ = ["backward", "forward", "reserve_elements"]


def _sizes(plan: Plan) -> CellSizes:
    two = plan.states == 2
    return CellSizes(len(plan.input_gates), len(plan.slots) + two, two)


def reserve_elements(
    plan: Plan, rows: int, hidden_size: int, directions: int, item_bytes: int, proj_size: int = 0
) -> int:
    """Elements of what forward keeps for backward; sizes may be symbolic."""
    return cpu.layer_reserve_elements(_sizes(plan), rows, hidden_size, proj_size, directions)


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
    """One layer, see :func:`fastseq.backends.numba.recurrent.forward`."""
    assert masks is None, "a plan with masks is not compiled"
    hx, cx = _pair(states)
    _, proj_size = sizes_of(plan, weights, has_biases, bidirectional)
    output, hy, cy, reserve = cpu.layer_forward(
        kernels(plan, input.dtype),
        _sizes(plan),
        input,
        hx,
        cx,
        weights,
        has_biases,
        proj_size,
        bidirectional,
        batch_first,
        batch_sizes,
        lengths,
        save,
    )
    return output, [hy] if cy is None else [hy, cy], reserve


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
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Gradients of input, states and weights, see ``fastseq.backends.numba.recurrent.backward``."""
    assert masks is None, "a plan with masks is not compiled"
    hx, cx = _pair(states)
    grad_hy, grad_cy = _pair(grad_states)
    count = len(states)
    needs_states = (*needs[1 : 1 + count], False, False)[:2]
    _, proj_size = sizes_of(plan, weights, has_biases, bidirectional)
    grad_input, grad_hx, grad_cx, grad_weights = cpu.layer_backward(
        kernels(plan, input.dtype),
        _sizes(plan),
        grad_output,
        grad_hy,
        grad_cy,
        input,
        hx,
        cx,
        weights,
        reserve,
        has_biases,
        proj_size,
        bidirectional,
        batch_first,
        batch_sizes,
        lengths,
        (needs[0], *needs_states, *needs[1 + count :]),
    )
    return grad_input, [grad_hx, grad_cx][:count], grad_weights


def _pair(states: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """Hidden and second state; an empty list is zeros."""
    hidden, second = [*states, None, None][:2]
    return hidden, second
