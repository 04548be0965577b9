"""Inputs and layers for a case: the same bits on every call."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fastseq.bench.cases import Case
from fastseq.bench.cell_cases import CellCase
from fastseq.cells.shipped import SHIPPED

# A state as layers take it: one tensor, or hidden and cell for the LSTM.
State = Tensor | tuple[Tensor, ...]
LayerInput = Tensor | PackedSequence

# Middle of the float32 denormals' range, scaled to each dtype's own range below.
_DENORMAL_FRACTION = 1e-3


@dataclass
class BuiltCase:
    """A case made concrete.

    Attributes:
        case: What was built.
        input: Time-major input; a ``PackedSequence`` for ragged cases.
        state: Initial state, or None where the case leaves it at torch's default of zeros.
        output_gradient: Gradient that reaches the output in training.
        torch_layer: The peer to compare with.
        fastseq_layer: Ours, holding equal weights.
    """

    case: Case
    input: LayerInput
    state: State | None
    output_gradient: Tensor
    torch_layer: torch.nn.Module
    fastseq_layer: torch.nn.Module


def _layer_arguments(case: Case) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "input_size": case.I,
        "hidden_size": case.H,
        "num_layers": case.options.num_layers,
        "bias": case.options.bias,
        "bidirectional": case.options.bidirectional,
        "dtype": getattr(torch, case.dtype),
    }
    if case.layer == "lstm":
        arguments["proj_size"] = case.options.proj_size
    return arguments


def torch_layer(case: Case, seed: int = 0) -> torch.nn.Module:
    """The layer of torch for a case, initialised from ``seed`` and the case's name.

    One of ``torch.nn``; for a cell that torch has not, a loop over its operators.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + zlib.crc32(case.name.encode()))
        layer: torch.nn.Module
        if isinstance(case, CellCase):
            from fastseq.bench.cell_loop import CellLoop

            layer = CellLoop(SHIPPED[case.layer], case.I, case.H)
        else:
            layer = getattr(torch.nn, case.layer.upper())(**_layer_arguments(case))
    return layer.train(case.direction == "training")


def fastseq_layer(case: Case, like: torch.nn.Module) -> torch.nn.Module:
    """The ``fastseq.nn`` layer of a case with the weights of ``like``."""
    import fastseq.nn

    layer: torch.nn.Module
    if isinstance(case, CellCase):
        layer = fastseq.nn.CellLayer(SHIPPED[case.layer], case.I, case.H)
    else:
        layer = getattr(fastseq.nn, case.layer.upper())(**_layer_arguments(case))
    layer.load_state_dict(like.state_dict())
    return layer.train(like.training)


def _values(case: Case, generator: torch.Generator) -> Callable[..., Tensor]:
    dtype = getattr(torch, case.dtype)

    def sample(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        if case.options.denormal:
            values = values.clamp(-3, 3) * (torch.finfo(dtype).tiny * _DENORMAL_FRACTION)
        return values.to(dtype)

    return sample


def build_inputs(case: Case, seed: int = 0) -> tuple[LayerInput, State | None, Tensor]:
    """Input, initial state and output gradient of a case.

    The state is given where a caller would give it: when streaming one step at a time, and for
    denormal cases, which are about the state's values. Elsewhere layers start from zeros.
    """
    generator = torch.Generator().manual_seed(seed + zlib.crc32(case.name.encode()) + 1)
    sample = _values(case, generator)
    directions = 2 if case.options.bidirectional else 1
    steps = sample(case.T, case.B, case.I)
    state: State | None = None
    if case.streaming or case.options.denormal:
        state = build_state(case, sample)
    output_width = case.output_size * directions
    if case.options.ragged:
        lengths = torch.tensor(case.lengths())
        packed = pack_padded_sequence(steps, lengths, enforce_sorted=False)
        return packed, state, sample(case.rows(), output_width)
    return steps, state, sample(case.T, case.B, output_width)


def build_state(case: Case, sample: Callable[..., Tensor]) -> State:
    """An initial state of the case's shape, filled by ``sample(*shape)``."""
    count = case.options.num_layers * (2 if case.options.bidirectional else 1)
    if isinstance(case, CellCase):
        # Positive, as a normaliser is.
        shape = (count, case.B, case.H)
        states = tuple(sample(*shape).abs() + 0.1 for _ in range(SHIPPED[case.layer].states))
        return states if len(states) > 1 else states[0]
    hidden = sample(count, case.B, case.output_size)
    return (hidden, sample(count, case.B, case.H)) if case.layer == "lstm" else hidden


def build(case: Case, seed: int = 0) -> BuiltCase:
    """Make inputs and both layers of a case."""
    reference = torch_layer(case, seed)
    layer_input, state, output_gradient = build_inputs(case, seed)
    ours = fastseq_layer(case, reference)
    return BuiltCase(case, layer_input, state, output_gradient, reference, ours)


def input_tensor(layer_input: LayerInput) -> Tensor:
    """The tensor that holds the values of an input or output, packed or not."""
    return layer_input.data if isinstance(layer_input, PackedSequence) else layer_input


def with_data(layer_input: LayerInput, data: Tensor) -> LayerInput:
    """The same input around other values."""
    if isinstance(layer_input, PackedSequence):
        return PackedSequence(
            data,
            layer_input.batch_sizes,
            layer_input.sorted_indices,
            layer_input.unsorted_indices,
        )
    return data


def inference_call(layer: torch.nn.Module, built: BuiltCase) -> Callable[[], object]:
    """One forward without gradients; run it under ``torch.no_grad()``."""
    layer_input, state = built.input, built.state
    return lambda: layer(layer_input, state)


def functional_call(built: BuiltCase) -> Callable[[], object]:
    """One forward through ``fastseq.functional``, without a module around it."""
    import fastseq.functional

    case = built.case
    function = getattr(fastseq.functional, case.layer)
    weights = [weight.detach() for weight in built.fastseq_layer.parameters()]
    arguments: dict[str, Any] = {"has_biases": case.options.bias}
    if case.options.num_layers > 1:
        arguments["num_layers"] = case.options.num_layers
    if case.options.bidirectional:
        arguments["bidirectional"] = True
    if case.options.proj_size:
        arguments["proj_size"] = case.options.proj_size
    layer_input, state = input_tensor(built.input), built.state
    if isinstance(built.input, PackedSequence):
        raise NotImplementedError("the functional entry is timed on plain tensors only")
    return lambda: function(layer_input, state, weights, **arguments)


def training_call(layer: torch.nn.Module, built: BuiltCase) -> Callable[[], object]:
    """One forward and backward: gradients for the input and every weight, none accumulated."""
    data = input_tensor(built.input).clone().requires_grad_()
    layer_input, state = with_data(built.input, data), built.state
    wanted = (data, *layer.parameters())
    output_gradient = built.output_gradient

    def call() -> object:
        output, _ = layer(layer_input, state)
        return torch.autograd.grad(input_tensor(output), wanted, output_gradient)

    return call


def layer_call(layer: torch.nn.Module, built: BuiltCase) -> Callable[[], object]:
    """What the case times: forward for inference, forward and backward for training."""
    make = training_call if built.case.direction == "training" else inference_call
    return make(layer, built)


def timed_call(
    built: BuiltCase,
    library: Literal["torch", "fastseq"],
    layer: torch.nn.Module | None = None,
) -> Callable[[], object]:
    """``layer_call`` of a library's layer.

    Args:
        built: The case.
        library: Whose layer.
        layer: What to run in place of it, the same one compiled.
    """
    own = built.torch_layer if library == "torch" else built.fastseq_layer
    return layer_call(own if layer is None else layer, built)
