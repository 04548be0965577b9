"""fastseq.nn.LayerNorm and RMSNorm against torch's: results, gradients, state, conversion."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
import fastseq.nn as fast_nn

NAMES = ("LayerNorm", "RMSNorm")
each_name = pytest.mark.parametrize("name", NAMES)


def build_pair(name: str, *args: Any, **kwargs: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same module from both libraries, with weights that are not ones and zeros."""
    theirs, ours = getattr(torch.nn, name)(*args, **kwargs), getattr(fast_nn, name)(*args, **kwargs)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def results(module: torch.nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    output = module(leaf)
    return [output, *torch.autograd.grad(output.sin().sum(), [leaf, *module.parameters()])]


@each_name
def test_results(name: str, isa: str, threads: int) -> None:
    for args, keywords, shape in (
        ((7,), {}, (3, 4, 7)),
        (([4, 7],), {"eps": 0.1}, (3, 4, 7)),
        ((torch.Size([65]),), {"elementwise_affine": False}, (400, 65)),
        ((130,), {"dtype": torch.float64}, (300, 130)),
    ):
        theirs, ours = build_pair(name, *args, **keywords)
        x = torch.randn(shape, dtype=keywords.get("dtype"))
        tolerance = 1e-11 if x.dtype is torch.float64 else 1e-4
        actual, expected = results(ours, x), results(theirs, x)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        with torch.no_grad():
            assert torch.equal(ours(x), actual[0])


def test_without_bias() -> None:
    theirs, ours = build_pair("LayerNorm", 6, bias=False)
    x = torch.randn(5, 6)
    torch.testing.assert_close(results(ours, x), results(theirs, x), rtol=1e-5, atol=1e-5)


@each_name
def test_state_text_and_copies(name: str) -> None:
    for args, keywords in (((6,), {}), (((2, 6),), {"elementwise_affine": False})):
        theirs, ours = build_pair(name, *args, **keywords)
        assert repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(3, 2, 6)
        for twin in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
            assert type(twin) is type(ours)
            assert torch.equal(twin(x), ours(x))


@each_name
def test_errors_are_torchs(name: str) -> None:
    theirs, ours = build_pair(name, 6)
    for bad in (torch.randn(3, 5), torch.randn(()), torch.randn(3, 6).int(), [1.0] * 6):
        raised = []
        for module in (theirs, ours):
            with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)) as info:
                module(bad)
            raised.append(info.type)
        assert raised[0] is raised[1], bad


@each_name
def test_hooks_and_parametrizations(name: str) -> None:
    _, ours = build_pair(name, 6)
    seen = []
    ours.register_forward_hook(lambda module, given, output: seen.append(output))
    x = torch.randn(3, 6)
    assert torch.equal(ours(x), seen[0])

    class Double(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    plain = ours(x)
    if name == "LayerNorm":
        plain = plain - ours.bias
    torch.nn.utils.parametrize.register_parametrization(ours, "weight", Double())
    doubled = ours(x)
    if name == "LayerNorm":
        doubled = doubled - ours.bias
    torch.testing.assert_close(doubled, 2 * plain)


@each_name
def test_compile_and_export(name: str) -> None:
    torch._dynamo.reset()
    _, ours = build_pair(name, 6)
    x = torch.randn(3, 4, 6)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, x), results(ours, x), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        program = torch.export.export(ours, (x,))
        assert torch.equal(program.module()(x), ours(x))
    torch._dynamo.reset()


@each_name
def test_compile_with_symbolic_sizes(name: str) -> None:
    """Dynamic from the first call; and eps, which a compiler makes symbolic at its second value."""
    torch._dynamo.reset()
    x = torch.randn(3, 4, 6)
    for eps in (1e-5, 1e-6, 1e-3):
        _, ours = build_pair(name, 6, eps=eps)  # in one cache of compiled code
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
        torch.testing.assert_close(results(compiled, x), results(ours, x), rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


@each_name
def test_the_arguments_name(name: str) -> None:
    theirs, ours = build_pair(name, 6)
    x = torch.randn(3, 6)
    given = {"RMSNorm": "x", "LayerNorm": "input"}[name]
    torch.testing.assert_close(ours(**{given: x}), theirs(**{given: x}))


@each_name
def test_script(name: str) -> None:
    theirs, ours = build_pair(name, 6)
    x = torch.randn(3, 6)
    torch.testing.assert_close(torch.jit.script(ours)(x), theirs(x))


@each_name
def test_convert_and_revert(name: str) -> None:
    kind, fast = getattr(torch.nn, name), getattr(fast_nn, name)

    class Special(kind):  # type: ignore[misc, valid-type]
        pass

    model = torch.nn.Sequential(kind(6), kind((2, 6), elementwise_affine=False), Special(6))
    model.append(kind(6).half())
    x = torch.randn(3, 2, 6)
    parameters = list(model.parameters())
    before = model[1](model[0](x))
    report = fastseq.convert(model, verbose=False)
    assert [row.status for row in report] == ["converted", "converted", "skipped", "skipped"]
    assert "subclass of torch.nn." + name in report.rows[2].reason
    assert "float16" in report.rows[3].reason
    assert type(model[0]) is fast
    assert type(model[1]) is fast
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model[1](model[0](x)), before)
    fastseq.revert(model)
    assert [type(module) for module in model] == [kind, kind, Special, kind]


def test_a_parametrized_norm_is_left() -> None:
    module = torch.nn.LayerNorm(6)
    torch.nn.utils.parametrizations.weight_norm(module, "weight")
    model = torch.nn.Sequential(module)
    (row,) = fastseq.convert(model, verbose=False)
    assert row.status == "skipped"
    assert "parametrized" in row.reason
