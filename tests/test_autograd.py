"""What autograd may ask of every function beyond a plain backward.

Inputs computed from one another, batches of gradients, and memory whose sign is turned lazily.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastseq.nn as fnn
from fastseq import cells, functional

Call = Callable[..., Tensor]


def recurrent(layer: torch.nn.Module) -> Call:
    def run(x: Tensor, h: Tensor) -> Tensor:
        states = (h, h.sin()) if isinstance(layer, fnn.LSTM) else h
        output: Tensor = layer(x, states)[0]
        return output

    return run


def cell(module: torch.nn.Module) -> Call:
    def run(x: Tensor, h: Tensor) -> Tensor:
        result = module(x[0], (h[0], h[0].sin()) if isinstance(module, fnn.LSTMCell) else h[0])
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    return run


def users_cell() -> Call:
    layer = fnn.CellLayer(cells.minimal_gated_unit, 8, 8)
    return lambda x, h: layer(x, h)[0]


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 4)).transpose(1, 2)


# Each takes x (5, 3, 8) and h (1, 3, 8).
CALLS: dict[str, Callable[[], Call]] = {
    "RNN": lambda: recurrent(fnn.RNN(8, 8)),
    "GRU": lambda: recurrent(fnn.GRU(8, 8)),
    "LSTM": lambda: recurrent(fnn.LSTM(8, 8)),
    "GRUCell": lambda: cell(fnn.GRUCell(8, 8)),
    "LSTMCell": lambda: cell(fnn.LSTMCell(8, 8)),
    "CellLayer": users_cell,
    "linear": lambda: lambda x, h: functional.linear(x, h[0], h[0, :, 0]),
    "linear_gelu": lambda: lambda x, h: functional.linear(x, h[0], activation="gelu"),
    "layer_norm": lambda: lambda x, h: functional.layer_norm(x, (8,), h[0, 0], h[0, 1]),
    "rms_norm": lambda: lambda x, h: functional.rms_norm(x, (8,), h[0, 0]),
    "add_layer_norm": lambda: (
        lambda x, h: functional.add_layer_norm(x, h.expand_as(x), (8,), h[0, 0])[0]
    ),
    "scaled_dot_product_attention": lambda: (
        lambda x, h: functional.scaled_dot_product_attention(heads(x), heads(x + h), heads(x * h))
    ),
    "attention": lambda: (
        lambda x, h: functional.attention(
            heads(x), heads(x + h), heads(x * h), bias=h[0, :, :3], sinks=h[0, 0, :2], softcap=4.0
        )
    ),
}


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest) -> Call:
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return CALLS[request.param]()
    finally:
        torch.set_default_dtype(default)


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(5, 3, 8, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)


def test_inputs_computed_from_one_another(call: Call) -> None:
    """With ``create_graph`` each share of a gradient counts once, as it does without."""
    x, _ = inputs()
    source = x * 1.0
    loss = call(source, source[:1].cos()).square().sum()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    (found,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    assert found.requires_grad
    assert not expected.requires_grad


def test_batches_of_gradients(call: Call) -> None:
    x, h = inputs()
    output = call(x, h)
    batch = torch.randn(4, *output.shape, dtype=output.dtype)
    found = torch.autograd.grad(output, (x, h), batch, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(batch):
        expected = torch.autograd.grad(output, (x, h), grad, retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one[i], other, rtol=1e-11, atol=1e-12)
    assert not any(grad.requires_grad for grad in found)


def test_vectorized_jacobian(call: Call) -> None:
    both = inputs()
    jacobian = torch.autograd.functional.jacobian
    found = jacobian(call, both, vectorize=True)
    expected = jacobian(call, both)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_memory_that_is_negated_lazily(call: Call) -> None:
    """``tensor.conj().imag`` is a view of memory that holds the other sign."""
    x, h = inputs()
    output = call(x, h)
    grad = torch.randn_like(output)
    expected = torch.autograd.grad(output, (x, h), -grad, retain_graph=True)
    lazy = torch._neg_view(grad)
    assert lazy.is_neg()
    found = torch.autograd.grad(output, (x, h), lazy)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        lazy_x, lazy_h = torch._neg_view(x), torch._neg_view(h)
        torch.testing.assert_close(call(lazy_x, lazy_h), call(-x, -h))
