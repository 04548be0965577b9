"""Argument checks of layers made of users' cells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq.cells.definition import Cell

__all__ = ["layers", "probability", "projection", "weight_shapes"]


def projection(
    cell: Cell,
    hidden_size: int,
    proj_size: int,
    recurrent_dropout: float,
    zoneout: float | Sequence[float],
) -> int:
    """``proj_size``, 0 for none, of a cell and options that can have one."""
    if isinstance(proj_size, bool) or not isinstance(proj_size, int):
        raise TypeError(f"proj_size must be an int, got {type(proj_size).__name__}")
    if proj_size == 0:
        return 0
    if not 0 < proj_size < hidden_size:
        raise ValueError(
            f"proj_size must be at least 0 and smaller than hidden_size, {hidden_size}, "
            f"got {proj_size}"
        )
    if not cell.recurrent or cell.reads_hidden_state:
        why = "reads s[0] itself" if cell.recurrent else "has no recurrent matrix"
        raise ValueError(
            f"proj_size must be 0 for cell {cell.name!r}, which {why}, got {proj_size}: only the "
            "recurrent product may read a hidden state that is projected"
        )
    zones = [zoneout] if isinstance(zoneout, (int, float)) else zoneout
    if recurrent_dropout or any(zones):
        raise ValueError(f"proj_size must be 0 with recurrent_dropout or zoneout, got {proj_size}")
    return proj_size


def weight_shapes(
    cell: Cell, features: int, hidden_size: int, has_biases: bool, proj_size: int = 0
) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of each weight of one layer and direction, in order."""
    input_rows = len(cell.plan.input_gates) * hidden_size
    hidden_rows = len(cell.plan.hidden_gates) * hidden_size
    shapes: list[tuple[str, tuple[int, ...]]] = []
    if input_rows:
        shapes.append(("weight_ih", (input_rows, features)))
    if hidden_rows:
        shapes.append(("weight_hh", (hidden_rows, proj_size or hidden_size)))
    if has_biases and input_rows:
        shapes.append(("bias_ih", (input_rows,)))
    if has_biases and hidden_rows:
        shapes.append(("bias_hh", (hidden_rows,)))
    shapes += [(name, (hidden_size,)) for name in cell.parameters]
    if proj_size:
        shapes.append(("weight_hr", (proj_size, hidden_size)))
    return shapes


def probability(name: str, value: float) -> float:
    """A number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a probability, a number from 0 to 1, got {value!r}")
    return float(value)


def layers(
    cell: Cell,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    hidden_size: int,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    has_biases: bool,
    proj_size: int,
    batch_sizes: Tensor | None,
) -> None:
    """Sizes, dtypes and devices of a call."""
    if batch_sizes is None and input.dim() != 3:
        raise ValueError(
            f"{cell.name}: input must be 2-D or 3-D, got {input.dim()}-D: "
            f"shape {tuple(input.shape)}"
        )
    directions = 2 if bidirectional else 1
    expected: list[tuple[str, tuple[int, ...]]] = []
    features = input.shape[-1]
    for layer in range(num_layers):
        for _ in range(directions):
            named = weight_shapes(cell, features, hidden_size, has_biases, proj_size)
            expected += [(f"{name} of layer {layer}", shape) for name, shape in named]
        features = directions * (proj_size or hidden_size)
    if len(weights) != len(expected):
        raise RuntimeError(
            f"weights must hold the tensors of {num_layers} layer(s) in {directions} "
            f"direction(s): expected {len(expected)}, got {len(weights)}"
        )
    if weights[0].dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
        raise ValueError(
            f"input must have the dtype of the weights: expected {weights[0].dtype}, "
            f"got {input.dtype}; convert it with input.to({weights[0].dtype}) or the module with "
            f"module.to({input.dtype})"
        )
    for (name, shape), weight in zip(expected, weights, strict=True):
        narrow = weight.dim() == 2 and weight.shape[0] == shape[0]
        if narrow and name.startswith("weight_ih") and weight.shape[1] != shape[1]:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size: expected "
                f"{weight.shape[-1]}, got {shape[-1]}"
            )
        if weight.shape != shape or weight.dtype != weights[0].dtype:
            raise RuntimeError(
                f"{name} must be a tensor of shape {shape} and {weights[0].dtype}, got "
                f"{tuple(weight.shape)} and {weight.dtype}"
            )
        if weight.device != input.device:
            raise RuntimeError(
                f"{name} must be on the input's device: expected {input.device}, "
                f"got {weight.device}"
            )
    if batch_sizes is None:
        batch, steps = input.shape[:2] if batch_first else (input.shape[1], input.shape[0])
        if steps == 0:
            raise RuntimeError("input must have at least one time step, got none")
    if states:
        if batch_sizes is not None:
            batch = int(batch_sizes[0])
        for index, state in enumerate(states):
            width = hidden_size if index else proj_size or hidden_size
            shape = (num_layers * directions, batch, width)
            if state.shape != shape:
                raise RuntimeError(
                    f"state {index} must have shape {shape}, got {tuple(state.shape)}"
                )
            if state.dtype != input.dtype or state.device != input.device:
                raise RuntimeError(
                    f"state {index} must have the dtype and device of input: expected "
                    f"{input.dtype} on {input.device}, got {state.dtype} on {state.device}"
                )
