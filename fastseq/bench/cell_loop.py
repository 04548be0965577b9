"""The peer of a user's cell: the same function on tensors, in a Python loop over time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastseq.nn import CellLayer

__all__ = ["CellLoop"]


class _Parameters(SimpleNamespace):
    """Learned values by name and by index, as a cell's function takes them."""

    def __getitem__(self, index: int) -> Tensor:
        return list(vars(self).values())[index]


class CellLoop(CellLayer):
    """One layer, one direction, time first: what one writes without this library.

    The input's product is computed for all steps at once, as a careful author would.
    """

    def forward(self, input: Any, hx: Any = None, **_: Any) -> Any:
        """Output ``(T, B, H)`` and final states ``(1, B, H)``, as :class:`CellLayer`."""
        plan, hidden = self.cell.plan, self.hidden_size
        if hx is None:
            shape = (input.size(1), hidden)
            states = tuple(input.new_zeros(shape) for _ in range(self.cell.states))
        else:
            states = tuple(state[0] for state in self._states(hx))
        learned = {name: getattr(self, f"{name}_l0") for name in self.cell.parameters}
        arguments = (_Parameters(**learned),) if learned else ()
        bias = getattr(self, "bias_ih_l0", None)
        outputs = []
        for step in linear(input, self.weight_ih_l0, bias):  # type: ignore[arg-type]
            x = dict(zip(sorted(plan.input_gates), step.split(hidden, -1), strict=True))
            h: dict[int, Tensor] = {}
            if self.cell.recurrent:
                bias_hh = getattr(self, "bias_hh_l0", None)
                product = linear(states[0], self.weight_hh_l0, bias_hh)  # type: ignore[arg-type]
                h = dict(zip(sorted(plan.hidden_gates), product.split(hidden, -1), strict=True))
            found = self.cell(x, h, states, *arguments)
            states = found if isinstance(found, tuple) else (found,)
            outputs.append(states[0])
        final = tuple(state.unsqueeze(0) for state in states)
        return torch.stack(outputs), final if self.cell.states > 1 else final[0]
