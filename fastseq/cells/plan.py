"""What the drivers need to know of a cell: slots, what forward saves, and both sets of formulas.

A *slot* is a value per unit that the matrix products fill: slot ``x`` of gate g by the input
product, slot ``h`` by the recurrent one, slot ``b`` (both) by the sum of the two, which is enough
where a formula uses ``x[g]`` and ``h[g]`` only as ``x[g] + h[g]``. Their order is x, b, h, so that
what each product fills is one range.

Forward keeps for backward one *entry* per unit and step: the value of each sigmoid, tanh and the
like, slots and states that backward's formulas need; cheaper arithmetic is done again.

Regularisation is a change of formulas (:func:`regularised`), not of drivers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastseq.cells.derivative import gradients
from fastseq.cells.expression import FUNCTIONS, Expression, leaf, topological

__all__ = ["Plan", "Slot", "make_plan", "regularised", "serialise"]


class Slot(NamedTuple):
    """``kind`` is ``"x"``, ``"b"`` or ``"h"``; ``gate`` the number of the gate."""

    kind: str
    gate: int


@dataclass(frozen=True)
class Plan:
    """A cell, ready to be turned into code.

    Attributes:
        key: identifies the formulas: equal for equal cells in any process.
        name: what the cell is called.
        slots: in the order x, b, h.
        parameters: number of learned values per unit.
        masks: number of rows of random or constant factors that formulas read, not learned.
        recurrent_state: which state the recurrent matrix multiplies.
        new_states: formulas of the states after a step, over leaves of the kinds of slots,
            ``s`` (states before it), ``p`` (parameters) and ``m`` (masks).
        entries: what forward keeps.
        slot_gradients, state_gradients, parameter_gradients: formulas over the entries and the
            leaves ``g`` (gradients of the states after the step).
    """

    key: str
    name: str
    slots: tuple[Slot, ...]
    parameters: int
    masks: int
    recurrent_state: int
    new_states: tuple[Expression, ...]
    entries: tuple[Expression, ...]
    slot_gradients: tuple[Expression, ...]
    state_gradients: tuple[Expression, ...]
    parameter_gradients: tuple[Expression, ...]
    input_gates: tuple[int, ...] = field(init=False)
    hidden_gates: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_gates", tuple(s.gate for s in self.slots if s.kind != "h"))
        object.__setattr__(self, "hidden_gates", tuple(s.gate for s in self.slots if s.kind != "x"))

    @property
    def states(self) -> int:
        """States that are carried, those of a regularisation included."""
        return len(self.new_states)

    @property
    def hidden_first(self) -> int:
        """The first slot that the recurrent product fills."""
        return len(self.slots) - len(self.hidden_gates)

    @property
    def hidden_only(self) -> int:
        """The first slot that nothing but the recurrent product fills."""
        return len(self.input_gates)

    @property
    def columns(self) -> int:
        """Values per unit in a row of what forward keeps."""
        return max(len(self.slots), len(self.entries))

    @property
    def gradient_columns(self) -> int:
        """Values per unit in a row of what backward computes."""
        return len(self.slots) + self.parameters

    @property
    def recurrent_entry(self) -> int:
        """The entry that holds the state which the recurrent matrix multiplied."""
        return self.entries.index(leaf("s", self.recurrent_state))


def serialise(outputs: Sequence[Expression]) -> str:
    """The graph as text, the same for the same formulas in any process."""
    numbers: dict[Expression, int] = {}
    lines = []
    for node in topological(outputs):
        numbers[node] = len(numbers)
        arguments = " ".join(str(numbers[argument]) for argument in node.arguments)
        lines.append(f"{node.operation} {arguments} {node.value!r}")
    return "\n".join([*lines, " ".join(str(numbers[output]) for output in outputs)])


def _replaced(outputs: Sequence[Expression], by: dict[Expression, Expression]) -> list[Expression]:
    """The graph with some nodes exchanged for others."""
    from fastseq.cells.expression import _rebuild

    values: dict[Expression, Expression] = {}
    for node in topological(outputs):
        if node in by:
            values[node] = by[node]
        else:
            values[node] = _rebuild(
                node.operation, tuple(values[a] for a in node.arguments), node.value
            )
    return [values[output] for output in outputs]


def _slots(outputs: Sequence[Expression], gates: int) -> tuple[list[Slot], dict[Expression, Slot]]:
    """The slots of a traced cell, and which nodes stand for them."""
    users: dict[Expression, set[Expression]] = {}
    for node in topological(outputs):
        for argument in node.arguments:
            users.setdefault(argument, set()).add(node)
    results = set(outputs)
    by_kind: dict[str, list[tuple[Slot, Expression]]] = {"x": [], "b": [], "h": []}
    for gate in range(gates):
        x, h = leaf("x", gate), leaf("h", gate)
        both = x + h
        alone = {both}
        if users.get(x) == alone and users.get(h) == alone and not {x, h} & results:
            by_kind["b"].append((Slot("b", gate), both))
            continue
        for kind, node in (("x", x), ("h", h)):
            if node in users or node in results:
                by_kind[kind].append((Slot(kind, gate), node))
    found = [*by_kind["x"], *by_kind["b"], *by_kind["h"]]
    return [slot for slot, _ in found], {node: slot for slot, node in found}


def make_plan(
    outputs: Sequence[Expression],
    gates: int,
    parameters: int = 0,
    masks: int = 0,
    recurrent_state: int = 0,
    name: str = "",
) -> Plan:
    """Slots, derivative and saved entries of formulas over the leaves x, h, s, p and m."""
    slots, nodes = _slots(outputs, gates)
    outputs = _replaced(outputs, {n: leaf(s.kind, s.gate) for n, s in nodes.items()})
    states = [leaf("s", index) for index in range(len(outputs))]
    slot_leaves = [leaf(slot.kind, slot.gate) for slot in slots]
    learned = [leaf("p", index) for index in range(parameters)]
    arriving: dict[Expression, Expression] = {}
    for index, output in enumerate(outputs):
        # Two states may have the same formula.
        known = arriving.get(output)
        arriving[output] = leaf("g", index) if known is None else known + leaf("g", index)
    found = gradients(arriving, [*slot_leaves, *states, *learned])

    entries: dict[Expression, None] = {}
    if any(slot.kind != "x" for slot in slots):
        entries[leaf("s", recurrent_state)] = None
    _collect_entries(found, set(topological(outputs)), entries)
    first, second = len(slots), len(slots) + len(states)
    kept = serialise(list(entries))
    text = f"{serialise(outputs)}\n{serialise(found)}\n{kept}\n{slots} {masks} {recurrent_state}"
    return Plan(
        key=hashlib.sha256(text.encode()).hexdigest()[:20],
        name=name,
        slots=tuple(slots),
        parameters=parameters,
        masks=masks,
        recurrent_state=recurrent_state,
        new_states=tuple(outputs),
        entries=tuple(entries),
        slot_gradients=tuple(found[:first]),
        state_gradients=tuple(found[first:second]),
        parameter_gradients=tuple(found[second:]),
    )


def _collect_entries(
    backward: Sequence[Expression], forward: set[Expression], entries: dict[Expression, None]
) -> None:
    """Which of forward's values backward starts from."""
    seen: set[Expression] = set()

    def visit(node: Expression) -> None:
        if node in seen:
            return
        seen.add(node)
        if node.operation == "leaf":
            if node.value[0] in ("x", "b", "h", "s"):
                entries[node] = None
        elif node.operation in FUNCTIONS and node in forward:
            entries[node] = None
        else:
            for argument in node.arguments:
                visit(argument)

    for node in backward:
        visit(node)


def regularised(
    outputs: Sequence[Expression], recurrent_dropout: bool, zoneout: bool
) -> tuple[list[Expression], int, int]:
    """Formulas with masks in them: new outputs, the number of masks and the recurrent state.

    With ``zoneout`` state i after the step is ``m[i] * new + (1 - m[i]) * old``. With
    ``recurrent_dropout`` one more state is carried, ``m[last] * s[0]``, and that is what the
    recurrent matrix multiplies.
    """
    masks, recurrent_state, result = 0, 0, list(outputs)
    if zoneout:
        for index, output in enumerate(outputs):
            old = leaf("s", index)
            result[index] = old + leaf("m", masks) * (output - old)
            masks += 1
    if recurrent_dropout:
        recurrent_state = len(result)
        result.append(leaf("m", masks) * result[0])
        masks += 1
    return result, masks, recurrent_state
