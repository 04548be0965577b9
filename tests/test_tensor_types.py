"""Tensors of types of their own: a wrapper has no memory that a kernel could read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import fastseq
import fastseq.nn as fnn
from fastseq import cells, functional


def wrapped(tensor: Tensor) -> TwoTensor:
    """Torch's own example of a wrapper: two tensors on which every operator runs."""
    tensor = tensor.detach()
    return TwoTensor(tensor, tensor.clone())


def unwrapped(value: Tensor) -> Tensor:
    return value.a if isinstance(value, TwoTensor) else value


Call = Callable[[Tensor, Tensor], Tensor]


def recurrent(layer: nn.Module) -> Call:
    return lambda x, h: layer(x, (h, h) if isinstance(layer, fnn.LSTM) else h)[0]


def cell(module: nn.Module) -> Call:
    def run(x: Tensor, h: Tensor) -> Tensor:
        result = module(x[0], (h[0], h[0]) if isinstance(module, fnn.LSTMCell) else h[0])
        return result[0] if isinstance(result, tuple) else result

    return run


def attend(x: Tensor, h: Tensor) -> Tensor:
    query, key = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (x, h))
    return functional.attention(query, key, key, sinks=h[0, 0, :2])


CALLS: dict[str, Callable[[], Call]] = {
    "RNN": lambda: recurrent(fnn.RNN(8, 8)),
    "GRU": lambda: recurrent(fnn.GRU(8, 8)),
    "LSTM": lambda: recurrent(fnn.LSTM(8, 8)),
    "GRUCell": lambda: cell(fnn.GRUCell(8, 8)),
    "LSTMCell": lambda: cell(fnn.LSTMCell(8, 8)),
    "CellLayer": lambda: recurrent(fnn.CellLayer(cells.minimal_gated_unit, 8, 8)),
    "linear": lambda: lambda x, h: functional.linear(x, h[0], activation="gelu"),
    "layer_norm": lambda: lambda x, h: functional.layer_norm(x, (8,), h[0, 0], h[0, 1]),
    "attention": lambda: lambda x, h: attend(x[:1], h),
}


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest) -> Call:
    torch.manual_seed(0)
    return CALLS[request.param]()


@pytest.mark.parametrize("which", ["x", "h", "both"])
@pytest.mark.parametrize("grad", [False, True])
def test_an_argument(call: Call, which: str, grad: bool) -> None:
    x, h = torch.randn(5, 3, 8), torch.randn(1, 3, 8)
    leaves = [
        (wrapped(t) if which in (name, "both") else t.clone()).requires_grad_(grad)
        for name, t in (("x", x), ("h", h))
    ]
    output = call(*leaves)
    expected = call(x.requires_grad_(grad), h.requires_grad_(grad))
    torch.testing.assert_close(unwrapped(output), expected)
    if grad:
        found = torch.autograd.grad(output.sum(), leaves)
        right = torch.autograd.grad(expected.sum(), (x, h))
        for one, other in zip(found, right, strict=True):
            torch.testing.assert_close(unwrapped(one), other, rtol=1e-4, atol=1e-5)


def test_a_gradient(call: Call) -> None:
    """It comes from operators on the output that involve a wrapper."""
    x, h = torch.randn(5, 3, 8, requires_grad=True), torch.randn(1, 3, 8, requires_grad=True)
    output = call(x, h)
    factor = torch.randn_like(output)
    expected = torch.autograd.grad((output * factor).sum(), (x, h), retain_graph=True)
    found = torch.autograd.grad((output * wrapped(factor)).sum(), (x, h))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(unwrapped(one), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "LSTMCell", "Linear", "LayerNorm"])
def test_a_weight(name: str) -> None:
    """convert leaves such a layer alone; one that is ours already runs on torch's operators."""
    torch.manual_seed(0)
    sizes = (8,) if name == "LayerNorm" else (8, 8)
    theirs, ours = getattr(nn, name)(*sizes), getattr(fnn, name)(*sizes)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 8) if name.endswith("Cell") else torch.randn(4, 3, 8)
    with torch.no_grad():
        expected = ours(x)
        expected = expected[0] if isinstance(expected, tuple) else expected
        for module in (theirs, ours):
            for key, value in list(module.named_parameters()):
                setattr(module, key, nn.Parameter(wrapped(value), requires_grad=False))
        found = ours(x)
        found = found[0] if isinstance(found, tuple) else found
        torch.testing.assert_close(unwrapped(found), expected)
    model = nn.ModuleList([theirs])
    report = fastseq.convert(model, verbose=False)
    assert type(model[0]) is type(theirs)
    assert [(row.status, row.reason) for row in report if row.fqn == "0"] == [
        ("skipped", "no fused kernels for parameters of type TwoTensor")
    ]


def test_a_subclass_with_memory_keeps_its_type_and_the_kernels() -> None:
    class Own(Tensor):
        pass

    x = torch.randn(4, 3, 8)
    layer = fnn.GRU(8, 8)
    output = layer(x.as_subclass(Own))[0]
    assert type(output) is Own
    assert torch.equal(output.as_subclass(Tensor), layer(x)[0])


def test_kernels_refuse_what_has_no_memory() -> None:
    """The last line of defence: to a kernel NULL is an argument that was not given."""
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(RuntimeError, match="memory of its own, got TwoTensor"):
        fastseq._config.extension().norm_forward(
            0, 1, False, 1e-5, 0.0, None, F.normalize(q[0, 0]), None, wrapped(q[0, 0, 0]), None,
            torch.empty(3, 4), None, None,
        )  # fmt: skip
