"""Argument checks of the recurrent layers and cells.

Every function here lets good arguments through as fast as Python can (reading one attribute of a
tensor costs about 0.1 us, and a streaming step has only a few to spend) and, before any kernel
runs, raises what torch's own layers raise for bad ones, naming the argument, what was expected and
what came.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import ge
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastseq._cells import GATES
from fastseq.backends import fallback_reason


def hidden_size(cell: str, weights: Sequence[Tensor]) -> int:
    """H, which the rows of ``w_hh`` tell also where its columns are the projection's."""
    return weights[1].size(0) // GATES[cell]


def pair(hx: Any, for_cell: bool = False) -> tuple[Tensor, Tensor]:
    """``hx`` of an LSTM as ``(h, c)``."""
    if type(hx) is tuple and len(hx) == 2 and hx[0] is not None and hx[1] is not None:
        return hx
    if isinstance(hx, Tensor) and for_cell:
        raise TypeError("hx must be a pair of tensors (h, c), got one tensor")
    count = len(hx)
    if isinstance(hx, Tensor) and count > 1:
        # torch.nn.LSTM takes a pair of unbatched states in one tensor, and stumbles over others.
        if count == 2 and hx.dim() == 3:
            return hx[0], hx[1]
        raise RuntimeError(
            f"hx must be a pair of tensors (h, c), got one tensor of shape {tuple(hx.shape)}"
        )
    if count != 2:
        # torch.nn.LSTM looks for c at index 1 before it counts, LSTMCell counts at once.
        kind = IndexError if count < 2 and not for_cell else RuntimeError
        raise kind(f"hx must be a pair of tensors (h, c), got {count} of them")
    h, c = hx
    if h is None or c is None:
        raise AttributeError("hx must be a pair of tensors (h, c), or None itself: got None in it")
    return h, c


def unbatched_states(hx: Tensor | None, cx: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Initial states ``(L*D, ·)`` of one sequence, lifted to a batch of one."""
    for name, state in (("hx", hx), ("cx", cx)):
        if state is not None and state.dim() != 2:
            raise RuntimeError(
                f"{name} must be 2-D for unbatched 2-D input, got {state.dim()}-D: "
                f"shape {tuple(state.shape)}"
            )
    return (
        None if hx is None else hx.unsqueeze(1),
        None if cx is None else cx.unsqueeze(1),
    )


def packed(input: Tensor, batch_sizes: Tensor, lengths: object) -> Tensor:
    """The rows of ``input`` that ``batch_sizes`` speak of; torch ignores any after them, too."""
    if lengths is not None:
        raise ValueError("lengths must be None for packed input, which knows its own lengths")
    if batch_sizes.dim() != 1:
        raise TypeError(f"batch_sizes must be 1-D, got {batch_sizes.dim()}-D")
    if batch_sizes.dtype != torch.int64 or not batch_sizes.is_cpu:
        raise RuntimeError(
            "batch_sizes must be an int64 tensor on the CPU, "
            f"got {batch_sizes.dtype} on {batch_sizes.device}"
        )
    if input.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions for packed input, got {input.dim()}")
    if batch_sizes.size(0) == 0:
        raise IndexError("batch_sizes must have at least one time step, got none")
    rows = input.size(0)
    if torch.compiler.is_compiling():
        # Values are unknown while a graph is being recorded; the graph checks them when it runs.
        decreasing = (batch_sizes[1:] <= batch_sizes[:-1]).all() & (batch_sizes[-1] > 0)
        torch._assert_async(
            decreasing & (batch_sizes.sum() == rows),
            "batch_sizes must never increase, be positive and add up to the rows of input",
        )
        return input
    sizes = batch_sizes.tolist()
    if sizes[-1] <= 0 or not all(map(ge, sizes, sizes[1:])):
        raise RuntimeError(f"batch_sizes must be positive and never increase, got {sizes}")
    total = sum(sizes)
    if total > rows:
        raise RuntimeError(f"batch_sizes add up to {total} rows, but input has only {rows}")
    return input if total == rows else input[:total]


def lengths(lengths: Tensor | Sequence[int], input: Tensor, batch_first: bool) -> Tensor:
    """``lengths`` as an int64 CPU tensor ``(B,)``."""
    if not isinstance(lengths, Tensor):
        lengths = _lengths_from_sequence(lengths)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.dim() != 1:
        raise ValueError(f"lengths must be 1-D, got {lengths.dim()}-D")
    if input.dim() != 3:
        raise ValueError(f"lengths need padded input of 3 dimensions, got {input.dim()}")
    batch, steps = input.shape[:2] if batch_first else (input.shape[1], input.shape[0])
    if lengths.size(0) != batch:
        raise ValueError(
            f"lengths must have one entry per sequence: expected {batch}, got {lengths.size(0)}"
        )
    lengths = lengths.to("cpu", torch.int64)
    inside = (lengths >= 0) & (lengths <= steps)
    if torch.compiler.is_compiling():
        torch._assert_async(inside.all(), "lengths must lie between 0 and the time steps of input")
    elif not bool(inside.all()):
        worst = int(lengths[~inside][0])
        raise ValueError(f"lengths must lie between 0 and {steps}, the time steps, got {worst}")
    return lengths


def _lengths_from_sequence(lengths: Sequence[int]) -> Tensor:
    try:
        result = torch.as_tensor(lengths)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"lengths must be a tensor or a sequence of integers: {error}") from error
    # An empty list has no integer dtype of its own.
    return result.to(torch.int64) if result.numel() == 0 else result


def layers(
    cell: str,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    has_biases: bool,
    proj_size: int,
    batch_sizes: Tensor | None,
    fused: bool,
) -> None:
    """Sizes, dtypes and devices of a call of one or more layers."""
    shape = input.shape
    if batch_sizes is not None:
        features = shape[1]
        batch = None
    elif len(shape) != 3:
        raise ValueError(
            f"{_NAMES[cell]}: input must be 2-D or 3-D, got {len(shape)}-D: shape {tuple(shape)}"
        )
    elif batch_first:
        batch, steps, features = shape
    else:
        steps, batch, features = shape

    directions = 2 if bidirectional else 1
    per_direction = 2 + 2 * has_biases + (proj_size > 0)
    if len(weights) != num_layers * directions * per_direction:
        _raise_weight_count(len(weights), num_layers, directions, per_direction)
    hidden = weights[1].shape[0] // GATES[cell]
    gate_rows = hidden * GATES[cell]
    recurrent = proj_size or hidden

    dtype = input.dtype
    if weights[0].dtype is not dtype and not torch._C._is_any_autocast_enabled():
        _raise_input_dtype(cell, input, weights[0], batch_sizes)
    if weights[0].shape[-1] != features:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size: expected {weights[0].shape[-1]}, "
            f"got {features}"
        )
    if hx is not None or cx is not None:
        if batch is None:
            assert batch_sizes is not None
            if torch.compiler.is_compiling():
                # The value is unknown while a graph is recorded; the graph checks it when it runs.
                given = hx if hx is not None else cx
                batch = given.size(1) if given is not None and given.dim() == 3 else -1
                torch._assert_async(
                    batch_sizes[0] == batch, "hx must have a row for each sequence of the batch"
                )
            else:
                batch = int(batch_sizes[0])
        rows = num_layers * directions
        if hx is not None and hx.shape != (rows, batch, recurrent):
            _raise_state_shape("hx", hx, (rows, batch, recurrent))
        if cx is not None and cx.shape != (rows, batch, hidden):
            _raise_state_shape("cx", cx, (rows, batch, hidden))
        if fused:
            _check_states(hx, cx, input)
    if batch_sizes is None and steps == 0:
        raise RuntimeError("input must have at least one time step, got none")
    if not fused:
        return

    on_cpu = input.is_cpu  # as a rule, and the test that takes least
    index = 0
    for layer in range(num_layers):
        if layer:
            features = directions * recurrent
        expected: list[tuple[int, ...]] = [(gate_rows, features), (gate_rows, recurrent)]
        if has_biases:
            expected += ((gate_rows,), (gate_rows,))
        if proj_size:
            expected.append((proj_size, hidden))
        for _ in range(directions):
            for shape_expected in expected:
                weight = weights[index]
                if (
                    weight.shape != shape_expected
                    or weight.dtype is not dtype
                    or (not weight.is_cpu if on_cpu else weight.device != input.device)
                ):
                    _raise_weight(f"weights[{index}]", weight, shape_expected, input)
                index += 1


_NAMES = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}


def _check_states(hx: Tensor | None, cx: Tensor | None, input: Tensor) -> None:
    for name, state in (("hx", hx), ("cx", cx)):
        if state is not None and (state.dtype is not input.dtype or state.device != input.device):
            raise RuntimeError(
                f"{name} must have the dtype and device of input: expected {input.dtype} on "
                f"{input.device}, got {state.dtype} on {state.device}"
            )


def _raise_weight_count(
    count: int, num_layers: int, directions: int, per_direction: int
) -> NoReturn:
    raise RuntimeError(
        f"weights must hold {per_direction} tensors for each of {num_layers} layer(s) in "
        f"{directions} direction(s): expected {num_layers * directions * per_direction}, "
        f"got {count}"
    )


def _raise_input_dtype(
    cell: str, input: Tensor, weight: Tensor, batch_sizes: Tensor | None
) -> NoReturn:
    # torch.nn checks dtypes in Python for every layer except an LSTM over packed input, which
    # goes straight to its kernel and so fails with the kernel's class.
    kind = RuntimeError if cell == "lstm" and batch_sizes is not None else ValueError
    raise kind(
        f"input must have the dtype of the weights: expected {weight.dtype}, got {input.dtype}; "
        f"convert it with input.to({weight.dtype}) or the module with module.to({input.dtype})"
    )


def _raise_state_shape(name: str, state: Tensor, expected: tuple[int, ...]) -> NoReturn:
    raise RuntimeError(f"{name} must have shape {expected}, got {tuple(state.shape)}")


def _raise_weight(name: str, weight: Tensor, expected: tuple[int, ...], input: Tensor) -> NoReturn:
    raise RuntimeError(
        f"{name} must be a tensor of shape {expected}, {input.dtype} on {input.device}, "
        f"got {tuple(weight.shape)}, {weight.dtype} on {weight.device}"
    )


def cell_fits(
    cell: str,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> bool:
    """A quick yes for the most common step: batched, given states, biases.

    True only if the fused kernels apply and everything fits together. False says nothing: the
    full checks decide then, and word the error where there is one.
    """
    if fallback_reason(input) is not None or hx is None or b_ih is None or b_hh is None:
        return False
    shape = input.shape
    if len(shape) != 2:
        return False
    batch, features = shape
    dtype = input.dtype
    bias_shape = b_hh.shape
    rows = bias_shape[-1]
    gates = GATES[cell]
    hidden = rows // gates
    return (
        hidden * gates == rows
        and w_ih.shape == (rows, features)
        and w_hh.shape == (rows, hidden)
        and b_ih.shape == (rows,)
        and bias_shape == (rows,)
        and w_ih.dtype is dtype
        and w_hh.dtype is dtype
        and b_ih.dtype is dtype
        and b_hh.dtype is dtype
        and w_ih.is_cpu
        and w_hh.is_cpu
        and b_ih.is_cpu
        and b_hh.is_cpu
        and hx.shape == (batch, hidden)
        and hx.dtype is dtype
        and hx.is_cpu
        and (
            cell != "lstm"
            if cx is None
            else cx.shape == (batch, hidden) and cx.dtype is dtype and cx.is_cpu
        )
    )


def cell_dims(cell: str, input: Tensor, hx: Tensor | None, cx: Tensor | None) -> None:
    """``input`` and states of a cell are vectors or matrices."""
    for name, tensor in (("input", input), ("hx", hx), ("cx", cx)):
        if tensor is not None and tensor.dim() not in (1, 2):
            raise ValueError(
                f"{_NAMES[cell]}Cell: {name} must be 1-D or 2-D, got {tensor.dim()}-D: "
                f"shape {tuple(tensor.shape)}"
            )


def cell(
    cell: str,
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    fused: bool,
) -> None:
    """Sizes, dtypes and devices of one step; ``input`` is (B, I)."""
    batch, features = input.shape
    hidden = w_hh.shape[0] // GATES[cell]
    gate_rows = hidden * GATES[cell]
    if w_ih.shape[-1] != features:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size: expected {w_ih.shape[-1]}, got {features}"
        )
    if hx.shape != (batch, hidden):
        _raise_state_shape("hx", hx, (batch, hidden))
    if cx is not None and cx.shape != (batch, hidden):
        _raise_state_shape("cx", cx, (batch, hidden))
    if not fused:
        return
    _check_states(hx, cx, input)
    dtype = input.dtype
    for name, weight, expected in (
        ("w_ih", w_ih, (gate_rows, features)),
        ("w_hh", w_hh, (gate_rows, hidden)),
        ("b_ih", b_ih, (gate_rows,)),
        ("b_hh", b_hh, (gate_rows,)),
    ):
        if weight is not None and (
            weight.shape != expected or weight.dtype is not dtype or weight.device != input.device
        ):
            _raise_weight(name, weight, expected, input)
