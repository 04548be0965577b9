"""Recurrent layers: tensors to arguments of the CUDA kernels: layout, allocation, large products.

The kernels know time-major rows only: step after step, never more rows than in the step before.
Padded batches with ``lengths`` are gathered into such rows and scattered back; a rectangle is rows
as it lies. The recurrence is the kernels'; what does not depend on its order, the products with
``W_ih`` and the gradients of weights and input, are products of torch over all rows.

Signatures are those of :mod:`fastseq.backends.cpu`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq import _cuda_library
from fastseq._cells import CELLS, GATES
from fastseq._cuda_library import RnnBackward, RnnForward, RnnShape
from fastseq.profiler.nvtx import marked

__all__ = [
    "launch_mode",
    "rnn_backward",
    "rnn_cell",
    "rnn_forward",
    "rnn_reserve_elements",
    "sum_dtype",
]

_mode = "auto"


@contextlib.contextmanager
def launch_mode(name: str) -> Iterator[None]:
    """Launch recurrent layers of the block in one way: for tests and measurements.

    Args:
        name: ``"auto"``, ``"stepwise"``, ``"persistent"`` or ``"direct"``; see ``fastseq_cuda.h``.

    Raises:
        ValueError: ``name`` is none of these.
    """
    global _mode
    if name not in _cuda_library.MODES:
        raise ValueError(f"launch_mode must be one of {list(_cuda_library.MODES)}, got {name!r}")
    before, _mode = _mode, name
    try:
        yield
    finally:
        _mode = before


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what the kernels add up values of a storage type."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def dtype_name(tensor: Tensor) -> str:
    """``"float32"`` and so on."""
    return str(tensor.dtype).removeprefix("torch.")


def stream_of(tensor: Tensor) -> int:
    """Torch's current stream, as a number; 0 for the emulated device of the tests."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


@contextlib.contextmanager
def device_of(tensor: Tensor) -> Iterator[_cuda_library.Library]:
    """The library, in a block in which the tensor's device is the current one."""
    library = _cuda_library.library()
    if not tensor.is_cuda:  # the emulated device of the tests
        library.use_device(0)
        yield library
        return
    with torch.cuda.device(tensor.device):
        library.use_device(tensor.get_device())
        yield library


def address(tensor: Tensor | None) -> int | None:
    """Where the tensor's memory begins; a null pointer for none."""
    return None if tensor is None else tensor.data_ptr()


def _slots(cell: str) -> int:
    sizes = CELLS[cell]
    return sizes.saved - sizes.has_cell_state


def rnn_reserve_elements(
    cell: str, rows: int, hidden_size: int, directions: int, dtype: torch.dtype
) -> int:
    """Elements of what forward keeps for backward; sizes may be symbolic.

    Slots of all directions, the LSTM's cell states in the sum type, and the output: the caller may
    have changed in place what it was given by the time of backward.
    """
    per_unit = _slots(cell) + 1
    if CELLS[cell].has_cell_state:
        per_unit += sum_dtype(dtype).itemsize // dtype.itemsize
    return rows * directions * hidden_size * per_unit


class _Batch(NamedTuple):
    """Where the rows of a call lie.

    Attributes:
        steps, batch, rows: T, B and how many (sequence, step) pairs there are.
        firsts: first row of each step and one more, ``(T + 1,)`` on the CPU; ``None``: a rectangle.
        places: of each row in the flattened padded batch, on the device; ``None``: rows as given.
        order: batch index of row ``r`` of a step, and its inverse, on the device; ``None``: ``r``.
        alive: sequences of at least one step; the others keep their initial state.
    """

    steps: int
    batch: int
    rows: int
    firsts: Tensor | None
    places: Tensor | None
    order: Tensor | None
    inverse: Tensor | None
    alive: int


def _batch(
    input: Tensor, batch_first: bool, batch_sizes: Tensor | None, lengths: Tensor | None
) -> _Batch:
    if batch_sizes is not None:
        firsts = torch.cat([batch_sizes.new_zeros(1), batch_sizes.cumsum(0)])
        batch = int(batch_sizes[0]) if batch_sizes.numel() else 0
        return _Batch(
            batch_sizes.size(0), batch, input.size(0), firsts, None, None, None, alive=batch
        )
    first, second = input.shape[:2]
    steps, batch = (second, first) if batch_first else (first, second)
    if lengths is None:
        return _Batch(steps, batch, steps * batch, None, None, None, None, batch)
    order = torch.argsort(lengths, descending=True, stable=True)
    inside = torch.arange(steps).unsqueeze(1) < lengths[order]  # (T, B)
    alive = inside.sum(1)
    step, row = inside.nonzero(as_tuple=True)
    places = order[row] * steps + step if batch_first else step * batch + order[row]
    device = input.device
    return _Batch(
        steps,
        batch,
        places.numel(),
        torch.cat([alive.new_zeros(1), alive.cumsum(0)]),
        places.to(device),
        order.to(device),
        torch.argsort(order).to(device),
        int(alive[0]) if steps else 0,
    )


def _to_rows(tensor: Tensor, batch: _Batch, batch_first: bool) -> Tensor:
    """``(rows, features)``, dense, of a tensor in the user's layout."""
    if tensor.dim() == 2:
        return tensor.contiguous()
    if batch.places is not None:
        return tensor.reshape(-1, tensor.size(-1)).index_select(0, batch.places)
    if batch_first:
        tensor = tensor.transpose(0, 1)
    return tensor.reshape(batch.rows, tensor.size(-1)).contiguous()


def _from_rows(rows: Tensor, like: Tensor, batch: _Batch, batch_first: bool) -> Tensor:
    """The rows in the layout of ``like``, dense; zero where a padded batch has no row."""
    if like.dim() == 2:
        return rows
    features = rows.size(-1)
    if batch.places is not None:
        padded = rows.new_zeros(batch.steps * batch.batch, features)
        return padded.index_copy_(0, batch.places, rows).view(*like.shape[:-1], features)
    rectangle = rows.view(batch.steps, batch.batch, features)
    return rectangle.transpose(0, 1).contiguous() if batch_first else rectangle


def _sorted(state: Tensor | None, batch: _Batch) -> Tensor | None:
    if state is None:
        return None
    return state.contiguous() if batch.order is None else state.index_select(1, batch.order)


def _unsorted(state: Tensor, batch: _Batch) -> Tensor:
    return state if batch.inverse is None else state.index_select(1, batch.inverse)


def _keep_unborn(state: Tensor, initial: Tensor | None, batch: _Batch) -> None:
    """Sequences without a step: what comes out is what went in."""
    if batch.alive < batch.batch:
        before = 0.0 if initial is None else initial[:, batch.alive :]
        state[:, batch.alive :] = before


class _Weights(NamedTuple):
    input: Tensor  # (G*H, I)
    hidden: Tensor  # (G*H, H)
    input_bias: Tensor | None
    hidden_bias: Tensor | None


def _per_direction(weights: Sequence[Tensor], has_biases: bool, directions: int) -> list[_Weights]:
    dense = [weight.contiguous() for weight in weights]
    if not has_biases:
        pairs = (dense[2 * d : 2 * d + 2] for d in range(directions))
        return [_Weights(w_ih, w_hh, None, None) for w_ih, w_hh in pairs]
    return [_Weights(*dense[4 * d : 4 * d + 4]) for d in range(directions)]


def _shape(
    batch: _Batch, hidden: int, directions: int, device: torch.device
) -> tuple[RnnShape, Tensor | None]:
    """The struct, and the table that it points to."""
    firsts = None if batch.firsts is None else batch.firsts.to(device)
    shape = RnnShape(batch.steps, batch.batch, hidden, directions, batch.rows, address(firsts))
    return shape, firsts


def _launch(cell: str, like: Tensor, call: RnnForward | RnnBackward) -> None:
    with device_of(like) as library:
        dtype = dtype_name(like)
        plan = library.rnn_plan(cell, dtype, isinstance(call, RnnBackward), _mode, call.shape)
        barriers = None
        if plan.barriers:
            barriers = torch.zeros(plan.barriers, dtype=torch.int32, device=like.device)
        library.run_rnn(cell, dtype, call, plan, address(barriers), stream_of(like))


def _check_projection(proj_size: int) -> None:
    if proj_size:
        raise RuntimeError("proj_size has no CUDA kernels")


@marked
def rnn_forward(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    has_biases: bool,
    proj_size: int,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer, see :func:`fastseq.backends.reference.rnn_layer`.

    Returns ``(output, hy, cy, reserve)``; ``reserve`` is ``None`` unless ``save``.
    """
    _check_projection(proj_size)
    directions = 2 if bidirectional else 1
    hidden = weights[0].size(0) // GATES[cell]
    has_cell = CELLS[cell].has_cell_state
    sizes = _batch(input, batch_first, batch_sizes, lengths)
    layers = _per_direction(weights, has_biases, directions)
    rows = _to_rows(input, sizes, batch_first)
    h_0, c_0 = _sorted(hx, sizes), _sorted(cx, sizes)

    # The op's fake kernel does not know lengths: the size is that without them.
    most_rows = input.shape[:-1].numel()
    elements = rnn_reserve_elements(cell, most_rows, hidden, directions, input.dtype)
    slots, cells, reserve = _working_memory(input, cell, sizes, hidden, directions, save, elements)
    for layer, slot in zip(layers, slots, strict=True):
        gates = slot[:, : GATES[cell] * hidden]
        if layer.input_bias is None:
            torch.mm(rows, layer.input.t(), out=gates)
        else:
            torch.addmm(layer.input_bias, rows, layer.input.t(), out=gates)

    output = input.new_empty((sizes.rows, directions * hidden))
    hy = input.new_empty((directions, sizes.batch, hidden))
    cy = torch.empty_like(hy) if has_cell else None
    shape, firsts = _shape(sizes, hidden, directions, input.device)
    call = RnnForward(
        shape=shape,
        slots=tuple(map(address, slots)),
        cells=tuple(map(address, cells)),
        hidden_weights=tuple(address(layer.hidden) for layer in layers),
        hidden_bias=tuple(address(layer.hidden_bias) for layer in layers),
        initial_hidden=address(h_0),
        initial_cell=address(c_0),
        final_hidden=address(hy),
        final_cell=address(cy),
        output=address(output),
        save=save,
    )
    if sizes.rows and hidden:
        _launch(cell, input, call)
    del firsts  # alive until the launch has been queued, after which the stream's order protects it
    _keep_unborn(hy, h_0, sizes)
    if cy is not None:
        _keep_unborn(cy, c_0, sizes)
        cy = _unsorted(cy, sizes)
    if reserve is not None:
        _saved_output(reserve, output.shape).copy_(output)
    output = _from_rows(output, input, sizes, batch_first)
    return output, _unsorted(hy, sizes), cy, reserve


def _working_memory(
    input: Tensor,
    cell: str,
    sizes: _Batch,
    hidden: int,
    directions: int,
    save: bool,
    elements: int,
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Slots and cell states of each direction, and the reserve that with ``save`` holds them."""
    if save:
        reserve = input.new_empty(elements)
        return *_split_reserve(reserve, cell, sizes.rows, hidden, directions), reserve
    width = _slots(cell) * hidden
    slots = list(input.new_empty((directions, sizes.rows, width)))
    cells = input.new_empty((directions, sizes.batch, hidden), dtype=sum_dtype(input.dtype))
    return slots, list(cells) if CELLS[cell].has_cell_state else [], None


def _split_reserve(
    reserve: Tensor, cell: str, rows: int, hidden: int, directions: int
) -> tuple[list[Tensor], list[Tensor]]:
    width = _slots(cell) * hidden
    split = directions * rows * width
    slots = list(reserve[:split].view(directions, rows, width))
    if not CELLS[cell].has_cell_state:
        return slots, []
    sums, count = sum_dtype(reserve.dtype), directions * rows * hidden
    cells = reserve[split : split + count * (sums.itemsize // reserve.itemsize)].view(sums)
    return slots, list(cells.view(directions, rows, hidden))


def _saved_output(reserve: Tensor, shape: Sequence[int]) -> Tensor:
    """The rows of the output in the reserve, where they come last."""
    rows, width = shape
    return reserve[reserve.numel() - rows * width :].view(rows, width)


@marked
def rnn_cell(
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    has_biases: bool,
) -> tuple[Tensor, Tensor | None]:
    """One step without gradients: ``input`` (B, I), states (B, H); returns ``(hy, cy)``."""
    h_0, c_0 = hx.unsqueeze(0), None if cx is None else cx.unsqueeze(0)
    options = (cell, has_biases, 0, False, False, None, None, False)
    _, hy, cy, _ = rnn_forward(input.unsqueeze(0), h_0, c_0, weights, *options)
    return hy.squeeze(0), None if cy is None else cy.squeeze(0)


class _Run(NamedTuple):
    """Gates whose recurrent products lie side by side in a row of slots."""

    gates: slice  # rows of W_hh
    columns: slice  # of the slots


def _hidden_runs(cell: str, hidden: int) -> list[_Run]:
    columns = _cuda_library.library().hidden_columns(cell, GATES[cell])
    runs: list[_Run] = []
    first = 0
    for gate in range(1, len(columns) + 1):
        if gate == len(columns) or columns[gate] != columns[gate - 1] + 1:
            start = columns[first] * hidden
            length = (gate - first) * hidden
            gates = slice(first * hidden, gate * hidden)
            runs.append(_Run(gates, slice(start, start + length)))
            first = gate
    return runs


def _before(firsts: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Of packed rows: each row's predecessor in its sequence, and each sequence's first row met.

    A row without predecessor has ``rows + r`` for the ``r``-th row of the initial states.
    """
    rows, steps = int(firsts[-1]), firsts.numel() - 1
    counts = firsts.diff()
    step = torch.repeat_interleave(torch.arange(steps), counts)
    place = torch.arange(rows) - firsts[step]
    source = step + 1 if reverse else step - 1
    inside = (source >= 0) & (source < steps)
    source = source.clamp(0, steps - 1)
    inside &= place < counts[source]
    before = torch.where(inside, firsts[source] + place, rows + place)
    begins = torch.empty(int(counts[0]) if steps else 0, dtype=torch.int64)
    begins[place[~inside]] = torch.arange(rows)[~inside]
    return before, begins


@marked
def rnn_backward(
    grad_output: Tensor | None,
    grad_hy: Tensor | None,
    grad_cy: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    reserve: Tensor,
    cell: str,
    has_biases: bool,
    proj_size: int,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of one layer: of ``input``, ``hx``, ``cx`` and each weight.

    ``needs`` says for ``(input, hx, cx, *weights)`` which are asked for; the others are ``None``.
    """
    _check_projection(proj_size)
    directions = 2 if bidirectional else 1
    hidden = weights[0].size(0) // GATES[cell]
    sizes = _batch(input, batch_first, batch_sizes, lengths)
    layers = _per_direction(weights, has_biases, directions)
    rows = _to_rows(input, sizes, batch_first)
    results = _saved_output(reserve, (sizes.rows, directions * hidden))
    grad_rows = None if grad_output is None else _to_rows(grad_output, sizes, batch_first)
    h_0, c_0, grad_h_n, grad_c_n = (_sorted(t, sizes) for t in (hx, cx, grad_hy, grad_cy))
    slots, cells = _split_reserve(reserve, cell, sizes.rows, hidden, directions)
    gradients = list(torch.empty_like(torch.stack(slots)))
    states = (directions, sizes.batch, hidden)
    direct = input.new_zeros(states, dtype=sum_dtype(input.dtype))
    grad_cell = torch.zeros_like(direct) if cells else None
    shape, firsts = _shape(sizes, hidden, directions, input.device)
    transposed = [layer.hidden.t().contiguous() for layer in layers]
    call = RnnBackward(
        shape=shape,
        slots=tuple(map(address, slots)),
        cells=tuple(map(address, cells)),
        transposed_weights=tuple(map(address, transposed)),
        initial_hidden=address(h_0),
        initial_cell=address(c_0),
        output=address(results),
        grad_output=address(grad_rows),
        grad_final_hidden=address(grad_h_n),
        grad_final_cell=address(grad_c_n),
        slot_gradients=tuple(map(address, gradients)),
        direct=address(direct),
        grad_cell=address(grad_cell),
    )
    if sizes.rows and hidden:
        _launch(cell, input, call)
    del firsts, transposed

    runs = _hidden_runs(cell, hidden)
    grad_input = None
    grad_hx = input.new_empty(states) if needs[1] else None
    per_direction = len(weights) // directions
    grad_weights: list[Tensor | None] = []
    for d, layer in enumerate(layers):
        wanted = needs[3 + d * per_direction : 3 + (d + 1) * per_direction]
        gates = gradients[d][:, : GATES[cell] * hidden]
        if needs[0]:
            if grad_input is None:
                grad_input = torch.mm(gates, layer.input)
            else:
                grad_input.addmm_(gates, layer.input)
        neighbours = _Neighbours(sizes, results[:, d * hidden :][:, :hidden], h_0, d)
        grad_weights.append(torch.mm(gates.t(), rows) if wanted[0] else None)
        grad_weights.append(
            neighbours.weight_gradient(gradients[d], runs, layer.hidden) if wanted[1] else None
        )
        if has_biases:
            grad_weights.append(gates.sum(0) if wanted[2] else None)
            grad_weights.append(
                torch.cat([gradients[d][:, run.columns].sum(0) for run in runs])
                if wanted[3]
                else None
            )
        if grad_hx is not None:
            begins = neighbours.beginnings(gradients[d])
            grad_hx[d] = direct[d]
            for run in runs:
                product = torch.mm(begins[:, run.columns], layer.hidden[run.gates])
                grad_hx[d, : begins.size(0)] += product

    if grad_input is not None:
        grad_input = _from_rows(grad_input, input, sizes, batch_first)
    if grad_hx is not None:
        _keep_unborn(grad_hx, grad_h_n, sizes)
        grad_hx = _unsorted(grad_hx, sizes)
    grad_cx = None
    if needs[2] and grad_cell is not None:
        grad_cx = grad_cell.to(input.dtype)
        _keep_unborn(grad_cx, grad_c_n, sizes)
        grad_cx = _unsorted(grad_cx, sizes)
    return grad_input, grad_hx, grad_cx, grad_weights


class _Neighbours:
    """The state before each row of a direction, for the products of its gradients.

    Args:
        sizes: of the call.
        results: ``(rows, H)``, what the direction put out.
        h_0: ``(D, B, H)`` initial states or ``None``.
        direction: 0, or 1 for the one that runs from the end.
    """

    def __init__(self, sizes: _Batch, results: Tensor, h_0: Tensor | None, direction: int) -> None:
        self.sizes, self.results, self.reverse = sizes, results, direction == 1
        self.initial = None if h_0 is None else h_0[direction]
        self.before: Tensor | None = None
        self.begins: Tensor | None = None
        if sizes.firsts is not None:
            before, begins = _before(sizes.firsts, self.reverse)
            self.before, self.begins = before.to(results.device), begins.to(results.device)

    def weight_gradient(self, gradients: Tensor, runs: Sequence[_Run], like: Tensor) -> Tensor:
        """Of ``W_hh``: products of the rows' gradients ``(rows, slots*H)`` and states before."""
        batch, initial = self.sizes.batch, self.initial
        result = torch.empty_like(like)
        if self.before is not None:
            if initial is None:
                initial = self.results.new_zeros(batch, self.results.size(1))
            states = torch.cat([self.results, initial]).index_select(0, self.before)
            for run in runs:
                torch.mm(gradients[:, run.columns].t(), states, out=result[run.gates])
            return result
        later, first = (slice(0, -batch), slice(-batch, None))
        if not self.reverse:
            later, first = slice(batch, None), slice(0, batch)
        states = self.results[batch:] if self.reverse else self.results[:-batch]
        for run in runs:
            part = result[run.gates]
            torch.mm(gradients[later, run.columns].t(), states, out=part)
            if initial is not None:
                part.addmm_(gradients[first, run.columns].t(), initial)
        return result

    def beginnings(self, gradients: Tensor) -> Tensor:
        """The gradients of the rows that follow an initial state, in the order of the states."""
        if self.begins is not None:
            return gradients.index_select(0, self.begins)
        batch = self.sizes.batch
        return gradients[-batch:] if self.reverse else gradients[:batch]
