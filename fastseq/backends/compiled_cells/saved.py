"""What a cell keeps for backward when it runs on the C++ driver, which has room for its slots.

Backward sees, per unit and step, as many saved values as there are slots, the states before the
step, and the second state after it. Slots themselves are always enough: everything else is computed
from them and the states. Better ones spare backward its dear functions: of ``sigmoid(x)`` backward
needs the value, and not x.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from fastseq.cells.expression import Expression, leaf, topological
from fastseq.cells.plan import Plan

__all__ = ["saved_values", "slot_leaves"]

# About what an operation costs in instructions; other ones are single instructions.
_COSTS = {"sigmoid": 20, "tanh": 20, "exp": 16, "log": 20, "softplus": 30, "sqrt": 8, "divide": 6}


def slot_leaves(plan: Plan) -> list[Expression]:
    """The leaves that stand for the slots in the plan's formulas."""
    return [leaf(slot.kind, slot.gate) for slot in plan.slots]


def known_in_backward(plan: Plan) -> set[Expression]:
    """What backward has without anything saved."""
    states = range(plan.states)
    known = {leaf("s", index) for index in states} | {leaf("g", index) for index in states}
    # The driver keeps the second state after each step; of the first only what was before it.
    return known | set(plan.new_states[1:])


def gradient_formulas(plan: Plan) -> tuple[Expression, ...]:
    """Everything that backward computes for a unit."""
    return plan.slot_gradients + plan.state_gradients


def saved_values(plan: Plan) -> list[Expression]:
    """What forward leaves in each slot for backward.

    Beginning with the slots as they are, one of them is exchanged for a value of forward's as long
    as that makes backward cheaper. A slot that backward does not read stays what it is.
    """
    wanted, known = gradient_formulas(plan), known_in_backward(plan)
    forward = topological(plan.new_states)
    used = set(topological(wanted))
    candidates = [node for node in forward if node.operation in _COSTS and node in used]
    saved: list[Expression] = slot_leaves(plan)
    cost = _cost(wanted, known, saved)
    assert cost is not None
    while True:
        best = None
        others = [candidate for candidate in candidates if candidate not in set(saved)]
        for index in range(len(saved)):
            for candidate in others:
                changed = [*saved[:index], candidate, *saved[index + 1 :]]
                found = _cost(wanted, known, changed)
                if found is not None and found < cost:
                    best, cost = changed, found
        if best is None:
            return saved
        saved = best


def _cost(
    wanted: Sequence[Expression], known: Collection[Expression], saved: Iterable[Expression]
) -> int | None:
    """What it costs to compute ``wanted``; ``None`` if something would be missing."""
    have, cost = {*known, *saved}, 0
    todo = list(wanted)
    while todo:
        node = todo.pop()
        if node in have or node.operation == "constant":
            continue
        if node.operation == "leaf":
            return None
        have.add(node)
        cost += _COSTS.get(node.operation, 1)
        todo += node.arguments
    return cost
