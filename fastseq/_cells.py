"""The recurrent cells by name, in numbers.

Their maths is in ``csrc/cells`` and ``backends/reference.py``. No torch here: the benchmark's case
registry reads this table too.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "CELLS",
    "COMPILED_CELL_LAYOUT",
    "GATES",
    "NUMBA_CELL_LAYOUT",
    "NUMBA_RESERVE_LAYOUT",
    "RESERVE_LAYOUT",
]

# Goes up whenever the size of what forward keeps for backward changes: it is an argument of the op
# because compilers keep graphs on disk with such sizes in them.
RESERVE_LAYOUT = 2
# The same for the backend "numba"; negative, so that the two can be told apart.
NUMBA_RESERVE_LAYOUT = -1
# And for cells that users define, by which a backward knows what its forward ran on.
COMPILED_CELL_LAYOUT = 2
NUMBA_CELL_LAYOUT = -1


class CellSizes(NamedTuple):
    """What the layers need to know of a cell.

    ``gates``: row blocks of a weight matrix. ``saved``: values per unit and step that backward
    needs, which is what ``csrc/cells`` calls slots, plus one for a cell state.
    """

    gates: int
    saved: int
    has_cell_state: bool = False


CELLS = {
    "rnn_tanh": CellSizes(gates=1, saved=1),
    "rnn_relu": CellSizes(gates=1, saved=1),
    "lstm": CellSizes(gates=4, saved=5, has_cell_state=True),
    "gru": CellSizes(gates=3, saved=4),
}
GATES = {name: sizes.gates for name, sizes in CELLS.items()}
