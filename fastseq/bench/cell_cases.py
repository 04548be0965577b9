"""Cases of the cells that ship: layers that torch has not, timed beside loops over torch operators.

Needs neither torch nor the extension.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastseq._work import OwnCell, RecurrentSizes
from fastseq.bench.rnn_cases import DIRECTIONS, Case, CaseOptions, Direction
from fastseq.cells.shipped import SHIPPED

__all__ = ["CELL_LAYERS", "CellCase", "cell_suite", "make_cell_case"]

CELL_LAYERS = tuple(SHIPPED)
_SHAPE = {"T": 100, "B": 32, "H": 256}


def _numbers(cell: str) -> OwnCell:
    plan, known = SHIPPED[cell].plan, SHIPPED[cell]
    gates = len(plan.input_gates), len(plan.hidden_gates)
    return OwnCell(*gates, known.states, len(plan.entries), len(known.parameters))


@dataclass(frozen=True)
class CellCase(Case):
    """A layer of a shipped cell; ``layer`` is the cell's name."""

    @property
    def plain(self) -> bool:
        """No part of the means over torch's own layers."""
        return False

    def _layers(self) -> list[RecurrentSizes]:
        sizes = RecurrentSizes(self.layer, self.rows(), self.B, self.I, self.H)
        return [sizes._replace(own=_numbers(self.layer))]


def make_cell_case(cell: str, direction: Direction, *, T: int, B: int, H: int) -> CellCase:
    """Build a case named after its contents."""
    if cell not in SHIPPED:
        raise ValueError(f"cell must be one of {', '.join(SHIPPED)}, got {cell!r}")
    name = f"{cell}-{direction}-T{T}-B{B}-H{H}"
    return CellCase(name, cell, T, B, H, H, "float32", direction, CaseOptions())


def cell_suite() -> list[CellCase]:
    """Every shipped cell at one shape, in both directions."""
    return [
        make_cell_case(cell, direction, **_SHAPE) for cell in SHIPPED for direction in DIRECTIONS
    ]
