"""Step by step with states carried by the caller, and weights that change under the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastseq.nn as fast_nn

INPUT, H = 17, 45
LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
# One step's sums have INPUT + H terms of size about 1/sqrt(H); steps of the same sums in another
# order differ by their rounding, (INPUT + H) units at the very most, and the recurrence of a random
# layer at its initialisation does not amplify.
STEP_TOLERANCE = {
    torch.float32: (INPUT + H) * torch.finfo(torch.float32).eps,
    torch.float64: (INPUT + H) * torch.finfo(torch.float64).eps,
}


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors(part)]


def largest_difference(first: Any, second: Any) -> float:
    pairs = zip(tensors(first), tensors(second), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_steps_make_the_sequence(
    name: str, batch: int, num_layers: int, dtype: torch.dtype, isa: str, threads: int
) -> None:
    torch.manual_seed(0)
    layer = getattr(fast_nn, name)(INPUT, H, num_layers, dtype=dtype)
    x = torch.randn(40, batch, INPUT, dtype=dtype)
    with torch.no_grad():
        output, final = layer(x)
        state, outputs = None, []
        for t in range(len(x)):
            step_output, state = layer(x[t : t + 1], state)
            outputs.append(step_output)
    assert largest_difference(torch.cat(outputs), output) <= STEP_TOLERANCE[dtype]
    # A cell state is a running sum and may be larger than 1.
    assert largest_difference(state, final) <= 4 * STEP_TOLERANCE[dtype]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_cell_steps_make_the_sequence(name: str, batch: int, isa: str, threads: int) -> None:
    torch.manual_seed(0)
    layer = getattr(fast_nn, name)(INPUT, H)
    cell = getattr(fast_nn, f"{name}Cell")(INPUT, H)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = torch.randn(40, batch, INPUT)
    state: Any = torch.zeros(batch, H)
    state = (state, state) if name == "LSTM" else state
    with torch.no_grad():
        output, _ = layer(x)
        for t in range(len(x)):
            state = cell(x[t], state)
            hidden = state[0] if name == "LSTM" else state
            assert largest_difference(hidden, output[t]) <= STEP_TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", LAYERS)
def test_states_of_a_step_are_its_own_memory(name: str) -> None:
    """The caller may keep old states: a later step must not write into them."""
    layer = getattr(fast_nn, name)(INPUT, H)
    x = torch.randn(1, 1, INPUT)
    with torch.no_grad():
        _, state = layer(x)
        kept = [tensor.clone() for tensor in tensors(state)]
        layer(x, state)
        layer(2 * x, state)
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), kept, strict=True))


# --- weights that change


def optimizer_step(module: nn.Module) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def load_state_dict(module: nn.Module) -> None:
    module.load_state_dict({k: v + 0.25 for k, v in module.state_dict().items()})


def load_state_dict_assign(module: nn.Module) -> None:
    module.load_state_dict({k: v + 0.25 for k, v in module.state_dict().items()}, assign=True)


def copy_under_no_grad(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter * 0.5 + 0.125)


def multiply_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(-1.5)


def replace_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.flip(0).contiguous()


def one_element(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.view(-1)[-1] += 3.0


def through_numpy(module: nn.Module) -> None:
    """Past torch altogether: not even the version counter moves."""
    for parameter in module.parameters():
        parameter.detach().numpy()[...] += 0.25


def initialise(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.4, 0.4)


def reset_parameters(module: Any) -> None:
    module.reset_parameters()


def new_parameters(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(parameter.detach() + 0.25))


def through_double_and_back(module: nn.Module) -> None:
    module.double()
    for parameter in module.parameters():
        parameter.data.add_(0.25)
    module.float()


CHANGES: list[Callable[[nn.Module], None]] = [
    optimizer_step,
    load_state_dict,
    load_state_dict_assign,
    copy_under_no_grad,
    multiply_data,
    replace_data,
    one_element,
    through_numpy,
    initialise,
    reset_parameters,
    new_parameters,
    through_double_and_back,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_a_changed_weight_is_never_missed(name: str, change: Callable[[nn.Module], None]) -> None:
    torch.manual_seed(0)
    module = getattr(fast_nn, name)(INPUT, H)
    x = torch.randn(1, INPUT) if name.endswith("Cell") else torch.randn(1, 1, INPUT)
    with torch.no_grad():
        for _ in range(3):
            before = tensors(module(x))
    change(module)
    with torch.no_grad():
        after = tensors(module(x))
        # torch.nn's module over the very same parameters as they are now.
        theirs = getattr(torch.nn, name)(INPUT, H)
        theirs.load_state_dict(module.state_dict())
        expected = tensors(theirs(x))
    assert largest_difference(before, after) > 1e-3
    # Weights grow to a few units here, sums with them.
    assert largest_difference(after, expected) <= 8 * STEP_TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", LAYERS)
def test_training_between_inference_calls(name: str) -> None:
    """Twenty updates, an evaluation after each, as torch's layer from the same start."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(INPUT, H, dtype=torch.float64)
    ours = getattr(fast_nn, name)(INPUT, H, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(6, 4, INPUT, dtype=torch.float64)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (theirs, ours)]
    for _ in range(20):
        for module, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            module(x)[0].square().sum().backward()
            optimizer.step()
        with torch.no_grad():
            # Adam divides by the gradient's size: an error of 1e-15 relative to the largest
            # gradient is 1e-10 of the smallest ones that matter, times twenty updates.
            assert largest_difference(theirs(x)[0], ours(x)[0]) < 1e-9
