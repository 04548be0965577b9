"""fastseq.nn.Linear as a drop-in for torch.nn.Linear."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastseq
from fastseq import _ops
from fastseq.nn import Linear

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _kernels_product() -> Any:
    torch.manual_seed(0)
    with fastseq.linear_product("fused"):
        yield


def pair(*sizes: int, **options: Any) -> tuple[nn.Linear, Linear]:
    """The same layer from both libraries, from the same seed."""
    layers = []
    for kind in (nn.Linear, Linear):
        torch.manual_seed(1)
        layers.append(kind(*sizes, **{"dtype": torch.float64, **options}))
    return layers[0], layers[1]  # type: ignore[return-value]


def test_constructor_and_text_are_torchs() -> None:
    assert inspect.signature(Linear.__init__) == inspect.signature(nn.Linear.__init__)
    theirs, ours = pair(3, 5, bias=False)
    assert repr(ours) == repr(theirs)
    assert issubclass(Linear, nn.Linear)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Linear(3, 5, device="meta").weight.is_meta


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7), (1, 2, 3, 7), (0, 7)], ids=str)
def test_results_and_gradients_are_torchs(shape: tuple[int, ...], bias: bool, isa: str) -> None:
    theirs, ours = pair(7, 5, bias=bias)
    x = torch.randn(shape, dtype=torch.float64)
    results = []
    for layer in (theirs, ours):
        leaf = x.clone().requires_grad_()
        output = layer(leaf)
        grads = torch.autograd.grad(output.square().sum(), (leaf, *layer.parameters()))
        with torch.no_grad():
            results.append((output, layer(x), *grads))
    torch.testing.assert_close(results[1], results[0], **CLOSE)


def test_state_goes_both_ways() -> None:
    theirs, ours = nn.Linear(4, 3), Linear(4, 3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    theirs.load_state_dict(Linear(4, 3).state_dict())


def test_copies() -> None:
    _, ours = pair(4, 3)
    x = torch.randn(2, 4, dtype=torch.float64)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is Linear
        assert torch.equal(twin(x), ours(x))


def test_in_place_changes_of_the_weight_are_seen() -> None:
    """There is no cache of packed weights to go stale."""
    _, ours = pair(4, 3)
    x = torch.randn(2, 4, dtype=torch.float64)
    with torch.no_grad():
        before = ours(x)
        ours.weight.mul_(2)
        ours.bias.mul_(2)
        torch.testing.assert_close(ours(x), 2 * before, **CLOSE)
        ours.weight.data = ours.weight.data.neg()
        ours.bias = None
        torch.testing.assert_close(ours(x), x @ ours.weight.t(), **CLOSE)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_are_computed() -> None:
    x = torch.randn(2, 4, dtype=torch.float64)
    for change in (
        parametrizations.weight_norm,
        nn.utils.weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ):
        theirs, ours = (change(layer) for layer in pair(4, 3))
        torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


def test_hooks_and_functional_call() -> None:
    _, ours = pair(4, 3)
    x, seen = torch.randn(2, 4, dtype=torch.float64), []
    handle = ours.register_forward_hook(lambda *_: seen.append(1))
    ours(x)
    handle.remove()
    assert seen == [1]
    swapped = {"weight": torch.zeros(3, 4, dtype=torch.float64)}
    found = torch.func.functional_call(ours, swapped, (x,))
    torch.testing.assert_close(found, ours.bias.expand(2, 3), **CLOSE)


def test_per_sample_gradients() -> None:
    _, ours = pair(4, 3)
    parameters = {name: value.detach() for name, value in ours.named_parameters()}
    x = torch.randn(5, 4, dtype=torch.float64)

    def loss(parameters: dict[str, torch.Tensor], one: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(ours, parameters, (one,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for index in range(5):
        ours.zero_grad()
        ours(x[index]).square().sum().backward()
        torch.testing.assert_close(found["weight"][index], ours.weight.grad, **CLOSE)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile(training: bool) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(pair(4, 8)[1], nn.GELU(), pair(8, 3)[1]).train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(x), model(x), **CLOSE)
    torch._dynamo.reset()


def test_export_and_trace_and_script() -> None:
    _, ours = pair(4, 3)
    x = torch.randn(2, 4, dtype=torch.float64)
    exported = torch.export.export(ours, (x,)).module()
    torch.testing.assert_close(exported(x), ours(x), **CLOSE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced, scripted = torch.jit.trace(ours, x), torch.jit.script(ours)
    torch.testing.assert_close(traced(x), ours(x), **CLOSE)
    torch.testing.assert_close(scripted(x), ours(x), **CLOSE)
    assert "aten::linear" in str(traced.graph)


def test_plain_calls_go_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Straight to the kernels' own checks, except where something else has to be asked first."""
    _, ours = pair(4, 3)
    x = torch.randn(2, 4, dtype=torch.float64)
    ours(x)  # finds out whose product it is
    general: list[Any] = []
    inner = _ops.linear
    monkeypatch.setattr(_ops, "linear", lambda *a: general.append(a) or inner(*a))
    with torch.no_grad():
        wide = torch.randn(2, 8, dtype=torch.float64)
        for one in (x, x[0], x.view(2, 1, 4), x[:1].expand(3, 4), wide[:, :4]):
            ours(one)
        assert not general
        ours(torch.randn(4, 2, dtype=torch.float64).t())
        assert len(general) == 1, "strides that need a copy"
        ours(x.expand(3, 2, 4))
        assert len(general) == 2, "rows at no one distance"
    ours(x).sum().backward()
    ours(wide[:, :4].requires_grad_()).sum().backward()
    assert len(general) == 2, "gradients are no obstacle"
    fastseq.functional.linear(x, ours.weight, ours.bias, dropout_p=0.5)
    assert len(general) == 3, "dropout"


def test_errors_are_torchs() -> None:
    theirs, ours = pair(4, 3)
    for wrong in (torch.randn(2, 5).double(), torch.randn(2, 4), torch.randn(()).double()):
        for layer in (theirs, ours):
            with pytest.raises(RuntimeError):
                layer(wrong)
    with pytest.raises(RuntimeError, match=r"input must have the features of weight: expected 4"):
        ours(torch.randn(2, 5).double())
    for layer in (theirs, ours):
        with pytest.raises(TypeError):
            layer([1.0] * 4)
