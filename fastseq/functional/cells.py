"""Layers of users' cells as a function: argument checks, layout and masks, no maths."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import dropout as _dropout

from fastseq import _config, _ops
from fastseq._checks import cells as _checks
from fastseq._checks import recurrent as _recurrent_checks
from fastseq.backends import fallback_reason, reference_cells, warn_fallback
from fastseq.cells import Cell

__all__ = ["cell_layers"]

Lengths: TypeAlias = Tensor | Sequence[int]


def cell_layers(
    cell: Cell,
    input: Tensor,
    states: Sequence[Tensor] = (),
    weights: Sequence[Tensor] = (),
    *,
    hidden_size: int,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    has_biases: bool = True,
    dropout: float = 0.0,
    recurrent_dropout: float = 0.0,
    zoneout: float | Sequence[float] = 0.0,
    weight_dropout: float = 0.0,
    proj_size: int = 0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Lengths | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Layers of a cell made by :func:`fastseq.cell`.

    Args:
        cell: the cell.
        input: ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, ``(T, I)`` for one sequence, or
            ``(rows, I)`` with ``batch_sizes``. float32 and float64 on the CPU run on kernels that
            are compiled for the cell, by a C++ compiler or by Numba; anything else on torch
            operators, with a warning.
        states: initial states, as many as the cell has, each ``(L*D, B, H)``, without ``B`` for
            one sequence. Default: zeros.
        weights: for each layer and direction the parameters of
            :class:`fastseq.nn.CellLayer`, in the order in which it registers them.
        hidden_size: H.
        num_layers: stacked layers.
        bidirectional: add a second direction that runs from the end.
        batch_first: ``input`` and ``output`` are ``(B, T, ...)``.
        has_biases: whether ``weights`` holds biases.
        dropout: probability of zeroing an element between two layers, when ``training``.
        recurrent_dropout: see :class:`fastseq.nn.CellLayer`.
        zoneout: likewise.
        weight_dropout: likewise.
        proj_size: P, what the hidden state is projected to; 0 for none. See
            :class:`fastseq.nn.CellLayer`.
        training: whether dropouts and zoneout are random; without it dropouts do nothing and
            zoneout mixes old and new states by its expectation.
        batch_sizes: int64 CPU tensor ``(T,)``, the ``batch_sizes`` of a
            :class:`~torch.nn.utils.rnn.PackedSequence` whose data is ``input``.
        lengths: ``(B,)`` integers from 0 to T in any order, for padded input.

    Returns:
        ``output``, shaped as ``input`` with ``D*H`` (or ``D*P``) features, and the final states,
        shaped as ``states``.

    Raises:
        ValueError: a probability is not between 0 and 1, there can be no projection, ``input`` is
            not 2-D or 3-D or has another dtype than the weights, or ``lengths`` or
            ``batch_sizes`` are malformed.
        RuntimeError: sizes, dtypes or devices do not fit together, or there are no time steps.
        TypeError: ``states`` is not as many tensors as the cell has states.
    """
    if states and len(states) != cell.states:
        raise TypeError(f"{cell.name} has {cell.states} state(s), got {len(states)}")
    for name, value in (
        ("dropout", dropout),
        ("recurrent_dropout", recurrent_dropout),
        ("weight_dropout", weight_dropout),
    ):
        _checks.probability(name, value)
    rates = _zoneout_rates(cell, zoneout)
    _checks.projection(cell, hidden_size, proj_size, recurrent_dropout, rates)
    reason = _reason(input)
    unbatched = batch_sizes is None and input.dim() == 2
    if unbatched:
        input = input.unsqueeze(1)
        for index, state in enumerate(states):
            if state.dim() != 2:
                raise RuntimeError(
                    f"state {index} must be 2-D for unbatched 2-D input, got {state.dim()}-D: "
                    f"shape {tuple(state.shape)}"
                )
        states = [state.unsqueeze(1) for state in states]
        batch_first = False
    if batch_sizes is not None:
        input = _recurrent_checks.packed(input, batch_sizes, lengths)
    if lengths is not None:
        lengths = _recurrent_checks.lengths(lengths, input, batch_first)
    _checks.layers(
        cell,
        input,
        states,
        weights,
        hidden_size,
        num_layers,
        bidirectional,
        batch_first,
        has_biases,
        proj_size,
        batch_sizes,
    )
    drops_states = training and recurrent_dropout > 0 and cell.recurrent
    zones = any(rates)
    if (
        reason is None
        and _NO_NUMBA is not None
        and _config.backend_name() != "reference"
        and not _ops.runs_compiled(cell.key, drops_states, zones, input.dtype)
    ):
        reason = _NO_NUMBA
    if reason is not None:
        warn_fallback(reason)

    options = (drops_states, zones, has_biases, bidirectional, batch_first)
    directions = 2 if bidirectional else 1
    per_layer = len(weights) // num_layers
    output, finals = input, []
    for layer in range(num_layers):
        of_layer = list(weights[layer * per_layer : (layer + 1) * per_layer])
        if training and weight_dropout > 0 and cell.recurrent:
            index = 1 if cell.plan.input_gates else 0
            for first in range(0, per_layer, per_layer // directions):
                w_hh = of_layer[first + index]
                of_layer[first + index] = _dropout(w_hh, weight_dropout, True)
        masks = None
        if drops_states or zones:
            batch = output.size(0 if batch_first else 1)
            steps = output.size(1 if batch_first else 0)
            if batch_sizes is not None:
                batch, steps = int(batch_sizes[0]), batch_sizes.size(0)
            sizes = (directions, steps, batch, hidden_size)
            masks = _masks(
                output, sizes, rates if zones else (), recurrent_dropout * drops_states, training
            )
        of_states = [s[layer * directions : (layer + 1) * directions] for s in states]
        if reason is None:
            output, final = _ops.cell_layer(
                output, of_states, of_layer, masks, (cell.key, *options), batch_sizes, lengths
            )
        else:
            plan = cell.regularised(drops_states, zones)
            output, final = reference_cells.cell_layer(
                plan, output, of_states, of_layer, masks, *options[2:], batch_sizes, lengths
            )
        finals.append(final)
        if training and dropout > 0 and layer + 1 < num_layers:
            output = _dropout(output, dropout, True)
    result = [
        torch.cat(parts) if num_layers > 1 else parts[0] for parts in zip(*finals, strict=True)
    ]
    if unbatched:
        return output.squeeze(1), tuple(state.squeeze(1) for state in result)
    return output, tuple(result)


_NO_NUMBA = (
    "the cell is not compiled as C++, and Numba is not installed: pip install 'fastseq[numba]'"
    if importlib.util.find_spec("numba") is None
    else None
)


def _reason(input: Tensor) -> str | None:
    """Why the kernels cannot take the input; the reference backend needs none."""
    return None if _config.backend_name() == "reference" else fallback_reason(input)


def _zoneout_rates(cell: Cell, zoneout: float | Sequence[float]) -> tuple[float, ...]:
    """One probability per state."""
    if isinstance(zoneout, (int, float)):
        return (_checks.probability("zoneout", zoneout),) * cell.states
    rates = tuple(_checks.probability("zoneout", rate) for rate in zoneout)
    if len(rates) != cell.states:
        raise ValueError(
            f"zoneout must be a number or one for each of {cell.states} state(s), got {len(rates)}"
        )
    return rates


def _masks(
    like: Tensor,
    sizes: tuple[int, int, int, int],
    zoneout: Sequence[float],
    recurrent_dropout: float,
    training: bool,
) -> Tensor:
    """Factors ``(D, T or 1, B or 1, masks, H)``, zoneout's first, see ``cells/plan.py``."""
    directions, steps, batch, hidden = sizes
    parts = []
    if zoneout and training:
        for rate in zoneout:
            moves = like.new_full((), 1 - rate).expand(directions, steps, batch, hidden)
            parts.append(torch.bernoulli(moves))
    elif zoneout:
        for rate in zoneout:
            parts.append(like.new_full((directions, 1, 1, hidden), 1 - rate))
    if recurrent_dropout:
        once = _dropout(like.new_ones(directions, 1, batch, hidden), recurrent_dropout, True)
        parts.append(once.expand(-1, steps, -1, -1) if zoneout else once)
    return torch.stack(parts, dim=3)
