"""The recurrences written out with differentiable torch operators.

This file is the readable definition of what every kernel must compute. It runs for any dtype and
device, and under autocast, ``torch.func`` transforms and double backward, so it is also what the
other backends hand over to when their kernels do not apply.

Formulas: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html (and ``GRU``, ``RNN``);
the projection is that of https://arxiv.org/abs/1402.1128.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["rnn_cell", "rnn_layer"]


class State(NamedTuple):
    """What a cell carries from one step to the next; ``cell`` is the LSTM's cell state."""

    hidden: Tensor
    cell: Tensor | None = None


class Recurrent(NamedTuple):
    """The weights on the recurrent side of a cell, ``project`` being the LSTM's ``w_hr``."""

    weight: Tensor
    bias: Tensor | None = None
    project: Tensor | None = None


# A step takes W_ih x + b_ih, which does not depend on the state and is computed for all steps at
# once, the state before the step and the recurrent weights; it returns the state after the step.
Step = Callable[[Tensor, State, Recurrent], State]


def _rnn_tanh_step(from_input: Tensor, state: State, recurrent: Recurrent) -> State:
    return State(torch.tanh(from_input + linear(state.hidden, recurrent.weight, recurrent.bias)))


def _rnn_relu_step(from_input: Tensor, state: State, recurrent: Recurrent) -> State:
    return State(torch.relu(from_input + linear(state.hidden, recurrent.weight, recurrent.bias)))


def _lstm_step(from_input: Tensor, state: State, recurrent: Recurrent) -> State:
    assert state.cell is not None
    gates = from_input + linear(state.hidden, recurrent.weight, recurrent.bias)
    i, f, g, o = gates.chunk(4, dim=-1)
    cell = torch.sigmoid(f) * state.cell + torch.sigmoid(i) * torch.tanh(g)
    hidden = torch.sigmoid(o) * torch.tanh(cell)
    if recurrent.project is not None:
        hidden = linear(hidden, recurrent.project)
    return State(hidden, cell)


def _gru_step(from_input: Tensor, state: State, recurrent: Recurrent) -> State:
    # The reset gate multiplies the new gate's recurrent product after its bias was added
    # ("linear before reset"), which is why that bias cannot be merged with the input's.
    from_hidden = linear(state.hidden, recurrent.weight, recurrent.bias)
    r_input, z_input, n_input = from_input.chunk(3, dim=-1)
    r_hidden, z_hidden, n_hidden = from_hidden.chunk(3, dim=-1)
    r = torch.sigmoid(r_input + r_hidden)
    z = torch.sigmoid(z_input + z_hidden)
    n = torch.tanh(n_input + r * n_hidden)
    return State((1 - z) * n + z * state.hidden)


STEPS: dict[str, Step] = {
    "rnn_tanh": _rnn_tanh_step,
    "rnn_relu": _rnn_relu_step,
    "lstm": _lstm_step,
    "gru": _gru_step,
}


def _update_rows(new: State, old: State, rows: int) -> State:
    """The first ``rows`` sequences take a step, the others (packed input) keep their state."""
    if rows == old.hidden.size(0):
        return new

    def join(after: Tensor, before: Tensor) -> Tensor:
        return torch.cat([after, before[rows:]])

    if new.cell is None or old.cell is None:
        return State(join(new.hidden, old.hidden))
    return State(join(new.hidden, old.hidden), join(new.cell, old.cell))


def _update_where(new: State, old: State, inside: Tensor) -> State:
    """Sequences for which ``inside`` (B, 1) is true take a step, the others keep their state."""
    hidden = torch.where(inside, new.hidden, old.hidden)
    if new.cell is None or old.cell is None:
        return State(hidden)
    return State(hidden, torch.where(inside, new.cell, old.cell))


def _run_direction(
    steps: Sequence[Tensor],
    state: State,
    recurrent: Recurrent,
    step: Step,
    reverse: bool,
    inside: Sequence[Tensor] | None,
) -> tuple[list[Tensor], State]:
    """Outputs of every step, in time order, and the final state.

    ``steps``: per time step W_ih x + b_ih, (rows at that step, gates * H). ``inside``: per time
    step which sequences have not ended, (B, 1) bool; a reverse direction meets the padding first
    and so leaves its initial state alone until it comes to a sequence's last element.
    """
    outputs: list[Tensor] = []
    order = range(len(steps) - 1, -1, -1) if reverse else range(len(steps))
    for t in order:
        rows = steps[t].size(0)
        if rows == state.hidden.size(0):
            before = state
        else:
            cell = None if state.cell is None else state.cell[:rows]
            before = State(state.hidden[:rows], cell)
        after = step(steps[t], before, recurrent)
        if inside is None:
            outputs.append(after.hidden)
            state = _update_rows(after, state, rows)
        else:
            outputs.append(torch.where(inside[t], after.hidden, 0.0))
            state = _update_where(after, state, inside[t])
    if reverse:
        outputs.reverse()
    return outputs, state


def rnn_layer(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    has_biases: bool,
    proj_size: int,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One recurrent layer in one or both directions.

    Args:
        input: ``(T, B, I)``; ``(B, T, I)`` with ``batch_first``; ``(rows, I)`` with
            ``batch_sizes``. Any strides.
        hx: initial hidden state ``(D, B, R)`` with ``R = proj_size or H``; ``None`` is zeros.
        cx: initial cell state ``(D, B, H)``, LSTM only; ``None`` is zeros.
        weights: for each direction ``w_ih (G*H, I)``, ``w_hh (G*H, R)``, then with
            ``has_biases`` ``b_ih (G*H)``, ``b_hh (G*H)``, then with ``proj_size``
            ``w_hr (P, H)``.
        cell: ``"lstm"``, ``"gru"``, ``"rnn_tanh"`` or ``"rnn_relu"``.
        has_biases: whether ``weights`` holds biases.
        proj_size: size P of the projected hidden state, LSTM only; 0 for none.
        bidirectional: whether there is a second direction, D = 2, that runs from the end.
        batch_first: whether padded ``input`` and ``output`` have the batch first.
        batch_sizes: int64 CPU tensor ``(T,)``, never increasing: ``input`` holds the rows of a
            :class:`~torch.nn.utils.rnn.PackedSequence`.
        lengths: int64 CPU tensor ``(B,)`` with values from 0 to T, for padded input: outputs
            past a sequence's length are zero and its final state is that at its length.

    Returns:
        ``output`` ``(T, B, D*R)``, ``(B, T, D*R)`` or ``(rows, D*R)`` as the input,
        ``hy`` ``(D, B, R)`` and ``cy`` ``(D, B, H)``, which is ``None`` for other cells.
    """
    directions = 2 if bidirectional else 1
    per_direction = len(weights) // directions
    hidden_size = weights[-1].size(1) if proj_size else weights[1].size(1)
    time_dim = 1 if batch_first else 0
    if batch_sizes is not None:
        rows_per_step = batch_sizes.tolist()
        batch = rows_per_step[0]
    else:
        batch = input.size(0 if batch_first else 1)

    inside: list[Tensor] | None = None
    if lengths is not None:
        lengths = lengths.to(input.device).unsqueeze(-1)
        inside = [t < lengths for t in range(input.size(time_dim))]

    outputs: list[Tensor] = []
    hidden_states: list[Tensor] = []
    cell_states: list[Tensor] = []
    for direction in range(directions):
        w_ih, w_hh, *rest = weights[direction * per_direction : (direction + 1) * per_direction]
        b_ih, b_hh = rest[:2] if has_biases else (None, None)
        recurrent = Recurrent(w_hh, b_hh, rest[-1] if proj_size else None)

        from_input = linear(input, w_ih, b_ih)
        if batch_sizes is not None:
            steps = from_input.split(rows_per_step)
        else:
            steps = from_input.unbind(time_dim)

        hidden = input.new_zeros(batch, proj_size or hidden_size) if hx is None else hx[direction]
        state = State(hidden)
        if cell == "lstm":
            state = State(
                hidden, input.new_zeros(batch, hidden_size) if cx is None else cx[direction]
            )

        rows, state = _run_direction(steps, state, recurrent, STEPS[cell], direction == 1, inside)
        if batch_sizes is not None:
            outputs.append(torch.cat(rows))
        else:
            outputs.append(torch.stack(rows, dim=time_dim))
        hidden_states.append(state.hidden)
        if state.cell is not None:
            cell_states.append(state.cell)

    output = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
    # Under autocast a state that was carried past a length is still in the input's dtype.
    hy = torch.stack(hidden_states).to(output.dtype)
    cy = torch.stack(cell_states) if cell_states else None
    return output, hy, cy


def rnn_cell(
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    cell: str,
) -> tuple[Tensor, Tensor | None]:
    """One step of a cell: ``input`` (B, I), ``hx`` and ``cx`` (B, H), returns ``(hy, cy)``."""
    from_input = linear(input, w_ih, b_ih)
    state = STEPS[cell](from_input, State(hx, cx), Recurrent(w_hh, b_hh))
    return state.hidden, state.cell
