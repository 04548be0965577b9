"""The norms' ops: opcheck, gradcheck, compilers, transforms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels import needs_extension
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastseq
from fastseq import functional
from fastseq._norm import NormOptions

VARIANTS: dict[str, dict[str, Any]] = {
    "layer": {},
    "rms": {"rms": True},
    "bare": {"affine": False},
    "rms_bare": {"rms": True, "affine": False},
    "residual": {"residual": True},
    "rms_residual": {"rms": True, "residual": True},
    "dropout": {"residual": True, "dropout": 0.4},
    "rms_dropout": {"rms": True, "residual": True, "dropout": 0.4},
    "two_dims": {"dims": 2, "residual": True},
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def call_and_leaves(options: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """A function of float64 leaves that returns every result."""
    rms, dims = options.get("rms", False), options.get("dims", 1)
    shape = (2, 3, 5)
    normalized = shape[3 - dims :]
    names = ["input"]
    names += ["residual"] if options.get("residual") else []
    names += ["weight"] if options.get("affine", True) else []
    names += ["bias"] if options.get("affine", True) and not rms else []
    leaves = [
        torch.randn(
            shape if name in ("input", "residual") else normalized,
            dtype=torch.float64,
            requires_grad=True,
        )
        for name in names
    ]

    def call(*tensors: Tensor) -> Any:
        named = dict(zip(names, tensors, strict=True))
        affine = [named.get("weight")] + ([] if rms else [named.get("bias")])
        if "residual" not in named:
            norm: Any = functional.rms_norm if rms else functional.layer_norm
            return norm(named["input"], normalized, *affine)
        norm = functional.add_rms_norm if rms else functional.add_layer_norm
        return norm(
            named["input"],
            named["residual"],
            normalized,
            *affine,
            dropout_p=options.get("dropout", 0.0),
            return_sum=True,
        )

    return call, leaves


def seeded(call: Any) -> Any:
    def wrapped(*tensors: Tensor) -> Any:
        torch.manual_seed(3)
        return call(*tensors)

    return wrapped


def op_arguments(options: dict[str, Any], save: bool, want_sum: bool) -> tuple[Any, ...]:
    _, leaves = call_and_leaves(options)
    rest = leaves[1:]
    residual = rest.pop(0) if options.get("residual") else None
    weight, bias = [*rest, None, None][:2]
    dropout = options.get("dropout", 0.0)
    seed = torch.tensor([5, -6]) if dropout else None
    numbers = NormOptions(options.get("dims", 1), options.get("rms", False), 1e-3, dropout)
    return (leaves[0], residual, weight, bias, seed, *numbers, save, want_sum)


def detached(given: Any) -> list[Any]:
    return [value.detach() if isinstance(value, Tensor) else value for value in given]


@needs_extension
@each_variant
def test_opcheck_forward(options: dict[str, Any]) -> None:
    op = torch.ops.fastseq.norm_forward.default
    torch.library.opcheck(op, op_arguments(options, True, True))
    for save, want_sum in ((False, False), (False, True), (True, False)):
        torch.library.opcheck(op, detached(op_arguments(options, save, want_sum)))


@needs_extension
@each_variant
def test_opcheck_backward(options: dict[str, Any]) -> None:
    given = detached(op_arguments(options, True, True))
    input, residual, weight, bias, seed, dims, rms, eps, p, *_ = given
    output, total, statistics = torch.ops.fastseq.norm_forward(*given)
    x = input if residual is None else total
    everything = [True, p > 0, weight is not None, bias is not None]
    for grad_sum, needs in (
        (torch.randn_like(x), everything),
        (None, everything),
        (None, [True, False, False, False]),
        (None, [False, False, weight is not None, False]),
    ):
        numbers = (dims, rms, eps, p, needs)
        torch.library.opcheck(
            torch.ops.fastseq.norm_backward.default,
            (torch.randn_like(output), grad_sum, x, weight, seed, statistics, *numbers),
            # There is no formula for its own gradient: double backward goes another way.
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@each_variant
def test_gradcheck(options: dict[str, Any], isa: str) -> None:
    call, leaves = call_and_leaves(options)
    assert torch.autograd.gradcheck(seeded(call), leaves)


@each_variant
def test_gradgradcheck(options: dict[str, Any]) -> None:
    call, leaves = call_and_leaves(options)
    assert torch.autograd.gradgradcheck(seeded(call), leaves)


@each_variant
def test_gradients_that_nobody_asked_for(options: dict[str, Any], monkeypatch: Any) -> None:
    """Any one leaf alone has the gradient that it has together with the others."""
    call, leaves = call_and_leaves(options)

    def gradients(wanted: list[Tensor]) -> tuple[Tensor, ...]:
        outputs = seeded(call)(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum(output.sin().sum() for output in outputs)
        return torch.autograd.grad(loss, wanted)

    together = gradients(leaves)
    for index, leaf in enumerate(leaves):
        for other in leaves:
            other.requires_grad_(other is leaf)
        (alone,) = gradients([leaf])
        assert torch.equal(alone, together[index])


def test_in_place_change_of_a_saved_tensor_is_an_error() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y = x * 1
    output = functional.layer_norm(y, (4,))
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_sum_belongs_to_the_caller() -> None:
    """It is kept for backward as well, so that a change must be seen."""
    x, r = (torch.randn(3, 4, requires_grad=True) for _ in "xr")
    output, total = functional.add_layer_norm(x, r, (4,), return_sum=True)
    with torch.no_grad():
        total.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# --- compilers


@each_variant
def test_compile(options: dict[str, Any]) -> None:
    call, leaves = call_and_leaves(options)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for function in (seeded(compiled), seeded(call)):
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum(output.square().sum() for output in outputs)
        results.append((*outputs, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(
            seeded(compiled)(*leaves), seeded(call)(*leaves), rtol=1e-11, atol=1e-12
        )


def test_sizes_do_not_recompile_forever() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def call(x: Tensor, r: Tensor) -> Tensor:
        return functional.add_layer_norm(x, r, (6,))

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for batch, length in ((2, 5), (3, 6), (4, 7), (9, 20), (5, 11)):
        x, r = (torch.randn(batch, length, 6, requires_grad=True) for _ in "xr")
        torch.testing.assert_close(compiled(x, r), call(x, r))
    assert counter.frame_count <= 2


@needs_extension
def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            return functional.add_layer_norm(x, r, (6,))

    dims = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2)}
    with torch.no_grad():
        given = (torch.randn(3, 5, 6), torch.randn(3, 5, 6))
        program = torch.export.export(Model(), given, dynamic_shapes={"x": dims, "r": dims})
        targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert "fastseq.norm_forward.default" in targets
        x, r = torch.randn(7, 33, 6), torch.randn(7, 33, 6)
        torch.testing.assert_close(program.module()(x, r), Model()(x, r), rtol=0, atol=0)


def test_meta_device() -> None:
    x = torch.empty(2, 3, 5, device="meta")
    assert functional.layer_norm(x, (5,)).shape == x.shape
    assert functional.add_rms_norm(x, x, (3, 5), dropout_p=0.1).shape == x.shape


# --- transforms


@pytest.mark.parametrize("rms", [False, True])
def test_vmap_and_func_grad(rms: bool) -> None:
    x, r = (torch.randn(4, 2, 3, 5, dtype=torch.float64) for _ in "xr")
    norm: Any = functional.add_rms_norm if rms else functional.add_layer_norm

    def call(x: Tensor, r: Tensor) -> Tensor:
        return norm(x, r, (5,))

    mapped = torch.func.vmap(call)(x, r)
    for index in range(4):
        torch.testing.assert_close(mapped[index], call(x[index], r[index]))
    per_sample = torch.func.vmap(torch.func.grad(lambda *t: call(*t).sin().sum()))(x, r)
    leaf = x[1].clone().requires_grad_()
    (expected,) = torch.autograd.grad(call(leaf, r[1]).sin().sum(), leaf)
    torch.testing.assert_close(per_sample[1], expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("rms", [False, True])
def test_forward_mode(rms: bool) -> None:
    x, tangent = (torch.randn(3, 5, dtype=torch.float64) for _ in "xt")
    results = []
    for library in (functional, F):

        def call(x: Tensor, library: Any = library) -> Tensor:
            return library.rms_norm(x, (5,)) if rms else library.layer_norm(x, (5,))

        results.append(torch.func.jvp(call, (x,), (tangent,)))
    torch.testing.assert_close(*results)


def test_reference_backend_is_the_same_function(isa: str) -> None:
    for options in VARIANTS.values():
        call, leaves = call_and_leaves(options)
        ours = seeded(call)(*leaves)
        with fastseq.backend("reference"):
            theirs = seeded(call)(*leaves)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
