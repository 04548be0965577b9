"""A cell as the C++ struct that the CPU driver takes, see ``csrc/cells/rnn.h``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fastseq.backends.compiled_cells.saved import saved_values, slot_leaves
from fastseq.cells.expression import Expression, leaf
from fastseq.cells.plan import Plan

__all__ = ["MOST_SLOTS", "struct", "why_not"]

# Each slot has its lines in the first-level cache and its registers in a cell's update.
MOST_SLOTS = 16

# Operations that are functions: those of the built-in cells, and those of csrc/cpu/cell_math.h.
_MATH = frozenset({"sigmoid", "tanh", "exp", "relu"})
_MORE_MATH = frozenset({"log", "softplus", "sqrt", "absolute", "maximum", "minimum"})
_OPERATORS = {
    "add": "{} + {}",
    "subtract": "{} - {}",
    "multiply": "{} * {}",
    "divide": "{} / {}",
    "negate": "-{}",
    "less": "{} < {}",
    "less_equal": "{} <= {}",
    "where": "{} ? {} : {}",
}


def why_not(plan: Plan) -> str | None:
    """Why the driver cannot hold the cell; ``None`` where it can."""
    if plan.masks:
        return "zoneout and recurrent dropout run on Numba"
    if plan.parameters:
        return "it has learned values (parameters)"
    if plan.states > 2:
        return f"it has {plan.states} states, the driver holds 2"
    if not plan.input_gates:
        return "it uses no gate of the input (x)"
    if not plan.hidden_gates:
        return "it uses no gate of the hidden state (h)"
    if len(plan.slots) > MOST_SLOTS:
        return f"it has {len(plan.slots)} values per unit and step, the driver holds {MOST_SLOTS}"
    return None


class _Printer:
    """Statements that compute expressions, every node once."""

    def __init__(self, known: Mapping[Expression, str], outputs: Sequence[Expression]) -> None:
        self._names = dict(known)
        self.lines: list[str] = []
        self._uses: dict[Expression, int] = {}
        # Nodes behind what is known are never met.
        todo, seen = list(dict.fromkeys(outputs)), set(known)
        for output in todo:
            self._uses[output] = 1
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            for argument in node.arguments:
                self._uses[argument] = self._uses.get(argument, 0) + 1
                todo.append(argument)

    def name(self, node: Expression) -> str:
        """What stands for the node's value, after the statements so far."""
        if node not in self._names:
            self._names[node] = self._computed(node)
        return self._names[node]

    def _computed(self, node: Expression) -> str:
        if node.operation == "constant":
            return f"Math::constant({_number(node.value)})"
        value = self._fused(node) or self._plain(node)
        kind = "auto" if node.operation in ("less", "less_equal") else "V"
        name = f"v{len(self.lines)}"
        self.lines.append(f"{kind} {name} = {value};")
        return name

    def _plain(self, node: Expression) -> str:
        arguments = [self.name(argument) for argument in node.arguments]
        if node.operation in _OPERATORS:
            return _OPERATORS[node.operation].format(*arguments)
        assert node.operation in _MATH | _MORE_MATH, node.operation
        library = "Math" if node.operation in _MATH else "CellMath<Math>"
        return f"{library}::{node.operation}({', '.join(arguments)})"

    def _fused(self, node: Expression) -> str | None:
        """A sum with a product that nothing else needs, as one instruction."""
        if node.operation not in ("add", "subtract"):
            return None
        first, second = node.arguments
        if self._is_own_product(second):
            name = "multiply" if node.operation == "add" else "negate_multiply"
            a, b = (self.name(argument) for argument in second.arguments)
            return f"Math::fused_{name}_add({a}, {b}, {self.name(first)})"
        if node.operation == "add" and self._is_own_product(first):
            a, b = (self.name(argument) for argument in first.arguments)
            return f"Math::fused_multiply_add({a}, {b}, {self.name(second)})"
        return None

    def _is_own_product(self, node: Expression) -> bool:
        return (
            node.operation == "multiply" and node not in self._names and self._uses.get(node) == 1
        )


def _number(value: float) -> str:
    if math.isnan(value):
        return '__builtin_nan("")'
    if math.isinf(value):
        return "__builtin_inf()" if value > 0 else "-__builtin_inf()"
    return repr(value)


def _assigned(printer: _Printer, targets: Mapping[str, Expression], indent: str) -> str:
    """The function's body: targets may be read by what is computed, so they are written last."""
    last = [f"{target} = {printer.name(node)};" for target, node in targets.items()]
    return "\n".join(indent + line for line in [*printer.lines, *last])


def _gates(gates: Sequence[int]) -> str:
    """Which row block of a weight matrix each slot has: blocks are in the order of the gates."""
    return ", ".join(str(sorted(gates).index(gate)) for gate in gates)


def struct(plan: Plan) -> str:
    """The text of a header with ``struct UserCell``; the same for the same cell."""
    saved = saved_values(plan)
    slots = len(plan.slots)
    two = plan.states == 2
    incoming = {node: f"slot_{index}" for index, node in enumerate(slot_leaves(plan))}
    incoming[leaf("s", 0)] = "h_previous"
    results = {f"slot[{index}]": node for index, node in enumerate(saved)}
    if two:
        incoming[leaf("s", 1)] = "c_previous"
        results["c"] = plan.new_states[1]
    results["h"] = plan.new_states[0]
    forward = _assigned(_Printer(incoming, list(results.values())), results, " " * 4)

    known = {node: f"slot_{index}" for index, node in enumerate(saved)}
    known |= {leaf("s", 0): "h_previous", leaf("g", 0): "grad_h_next"}
    gradients = {f"slot[{index}]": node for index, node in enumerate(plan.slot_gradients)}
    gradients["grad_h_direct"] = plan.state_gradients[0]
    if two:
        known |= {leaf("s", 1): "c_previous", leaf("g", 1): "grad_c_next"}
        known.setdefault(plan.new_states[1], "c")
        gradients["grad_c"] = plan.state_gradients[1]
    backward = _assigned(_Printer(known, list(gradients.values())), gradients, " " * 4)

    read = "\n".join(f"    V slot_{index} = slot[{index}];" for index in range(slots))
    name = "".join(c if c.isascii() and (c.isalnum() or c in "_<>") else "?" for c in plan.name)
    gates = max(len(plan.input_gates), len(plan.hidden_gates))
    return _STRUCT.format(
        name=name,
        inputs=_listed(slot_leaves(plan)),
        saved=_listed(saved),
        gates=gates,
        slots=slots,
        input_count=len(plan.input_gates),
        hidden_first=plan.hidden_first,
        hidden_count=len(plan.hidden_gates),
        has_cell=str(two).lower(),
        gate_of_input=_gates(plan.input_gates),
        gate_of_hidden=_gates(plan.hidden_gates),
        read=read,
        forward=forward,
        backward=backward,
    )


_STRUCT = """\
// {name}, written by fastseq/backends/compiled_cells/printing.py. Slots: {inputs}.
#pragma once

namespace fastseq::FS_ISA {{
namespace {{

struct UserCell {{
  static constexpr const char* name = "{name}";
  static constexpr int gates = {gates}, slots = {slots};
  static constexpr int input_first = 0, input_count = {input_count};
  static constexpr int hidden_first = {hidden_first}, hidden_count = {hidden_count};
  static constexpr bool has_cell = {has_cell};
  static constexpr int gate_of_input(int i) {{
    constexpr int gate[] = {{{gate_of_input}}};
    return gate[i];
  }}
  static constexpr int gate_of_hidden(int i) {{
    constexpr int gate[] = {{{gate_of_hidden}}};
    return gate[i];
  }}

  // Saved: {saved}.
  template <class Math, class V = typename Math::Value>
  static FS_INLINE void forward(V (&slot)[slots], V h_previous, V& c, V& h) {{
{read}
    V c_previous = c;
{forward}
  }}

  template <class Math, class V = typename Math::Value>
  static FS_INLINE void backward(V (&slot)[slots], V h_previous, V c_previous, V c,
                                 V grad_h_next, V& grad_c, V& grad_h_direct) {{
{read}
    V grad_c_next = grad_c;
{backward}
  }}
}};

}}  // namespace
}}  // namespace fastseq::FS_ISA
"""


def _listed(nodes: Sequence[Expression]) -> str:
    """For a comment: a whole formula may be longer than any line."""
    return ", ".join(text if len(text := repr(node)) < 40 else node.operation for node in nodes)
