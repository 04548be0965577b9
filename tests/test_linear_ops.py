"""The linear ops: opcheck, gradcheck, compilers, transforms, flop counts, dropout."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels import skip_without_extension
from oracle import every_tier
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastseq
from fastseq import functional
from fastseq._linear import ACTIVATIONS
from fastseq.backends.reference_dropout import element_keep

skip_without_extension()

from fastseq.backends import cpu_linear  # noqa: E402

VARIANTS = list(itertools.product(ACTIVATIONS, (0.0, 0.4), (False, True), (True, False)))
# Half of them, in which any two values of two options still meet.
HALF = [
    variant
    for index, variant in enumerate(VARIANTS)
    if (index // 8 + sum(map(bool, variant[1:]))) % 2
]
every_two = pytest.mark.parametrize(("activation", "dropout", "residual", "bias"), HALF)
each_variant = pytest.mark.parametrize(("activation", "dropout", "residual", "bias"), VARIANTS)


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with fastseq.linear_product("fused"):
        yield
    torch._dynamo.reset()


def leaves(*batch: int, residual: bool = False, bias: bool = True) -> list[Tensor | None]:
    """Input, weight, bias, residual."""
    drawn = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((*batch, 4), (5, 4), (5,), (*batch, 5))
    ]
    return [drawn[0], drawn[1], drawn[2] if bias else None, drawn[3] if residual else None]


def detached(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.detach() for tensor in tensors]


def seeded(activation: str | None, dropout: float) -> Any:
    """The layer as a function of tensors only, the same mask in every call."""

    def call(x: Tensor, weight: Tensor, *rest: Tensor, bias: bool, residual: bool) -> Tensor:
        torch.manual_seed(3)
        others = list(rest)
        b = others.pop(0) if bias else None
        r = others.pop(0) if residual else None
        return functional.linear(x, weight, b, activation, r, dropout_p=dropout)

    return call


def checked(activation: str | None, dropout: float, residual: bool, bias: bool) -> Any:
    function = seeded(activation, dropout)
    given = [t for t in leaves(2, 3, residual=residual, bias=bias) if t is not None]
    return lambda *tensors: function(*tensors, bias=bias, residual=residual), given


@every_two
def test_opcheck_forward(
    activation: str | None, dropout: float, residual: bool, bias: bool
) -> None:
    seed = torch.tensor([5, 6]) if dropout else None
    given = leaves(2, 3, residual=residual, bias=bias)
    torch.library.opcheck(
        torch.ops.fastseq.linear_forward.default,
        (*given, seed, ACTIVATIONS[activation], dropout, True),
    )


@pytest.mark.parametrize("needs", [[True] * 3, [True, False, False], [False, True, False]], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck_backward(activation: str | None, needs: list[bool]) -> None:
    x, weight, *_ = detached(leaves(2, 3))
    saved = torch.randn(6, 5, dtype=torch.float64) if activation else None
    torch.library.opcheck(
        torch.ops.fastseq.linear_backward.default,
        (
            torch.randn(2, 3, 5, dtype=torch.float64),
            x if needs[1] else None,
            weight if needs[0] else None,
            torch.tensor([5, 6]),
            saved,
            ACTIVATIONS[activation],
            0.3,
            needs,
        ),
        # There is no formula for its own gradient: double backward goes another way.
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@every_two
def test_gradcheck(activation: str | None, dropout: float, residual: bool, bias: bool) -> None:
    function, given = checked(activation, dropout, residual, bias)
    assert torch.autograd.gradcheck(function, given)


@each_variant
def test_gradgradcheck(activation: str | None, dropout: float, residual: bool, bias: bool) -> None:
    function, given = checked(activation, dropout, residual, bias)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_some_gradients_only(activation: str | None, wanted: tuple[int, ...]) -> None:
    """Each alone, to the bits of all together, and twice differentiable."""
    given = leaves(2, 3, residual=True)
    output = functional.linear(*given[:3], activation, given[3])  # type: ignore[arg-type]
    everything = torch.autograd.grad(output.square().sum(), given)  # type: ignore[arg-type]
    some = detached(given)
    for index in wanted:
        some[index].requires_grad_()  # type: ignore[union-attr]
    chosen = [some[index] for index in wanted]
    loss = functional.linear(*some[:3], activation, some[3]).square().sum()  # type: ignore[arg-type]
    found = torch.autograd.grad(loss, chosen, create_graph=True)  # type: ignore[arg-type]
    for index, grad in zip(wanted, found, strict=True):
        torch.testing.assert_close(grad, everything[index], rtol=1e-12, atol=1e-12)
        assert grad.requires_grad


def test_gradients_that_nobody_asked_for_are_not_computed(monkeypatch: Any) -> None:
    asked: list[Any] = []
    inner = cpu_linear.linear_backward

    def spy(*arguments: Any) -> Any:
        asked.append(list(arguments[-1]))
        return inner(*arguments)

    monkeypatch.setattr(cpu_linear, "linear_backward", spy)
    x, weight, bias, residual = leaves(2, 3, residual=True)
    functional.linear(x.detach(), weight, bias.detach()).sum().backward()
    functional.linear(x.detach(), weight.detach(), bias.detach(), "gelu", residual).sum().backward()
    assert asked == [[False, True, False]]


def saved_by(output: Tensor) -> list[Tensor]:
    return [tensor for tensor in output.grad_fn.saved_tensors if tensor is not None]


def test_what_is_kept_for_backward() -> None:
    x, weight, bias, residual = leaves(2, 3, residual=True)
    plain = functional.linear(x, weight, bias)
    assert {t.data_ptr() for t in saved_by(plain)} == {x.data_ptr(), weight.data_ptr()}
    frozen = functional.linear(x, weight.detach(), bias)
    assert {t.data_ptr() for t in saved_by(frozen)} == {weight.data_ptr()}
    rectified = functional.linear(x, weight, bias, "relu", dropout_p=0.5)
    assert rectified.data_ptr() in {t.data_ptr() for t in saved_by(rectified)}, "no second tensor"
    curved = functional.linear(x, weight, bias, "gelu", residual)
    (z,) = [t for t in saved_by(curved) if t.shape == (6, 5)]
    torch.testing.assert_close(z.view(2, 3, 5), plain)
    assert not saved_by(functional.linear(x.detach(), weight.detach(), None, "gelu", residual))


def test_in_place_change_of_a_saved_tensor_is_an_error() -> None:
    x, weight = torch.randn(2, 3), torch.randn(4, 3, requires_grad=True)
    output = functional.linear(x, weight)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# --- compilers


def call_of(activation: str | None, residual: bool = False, dropout_p: float = 0.0) -> Any:
    def call(x: Tensor, weight: Tensor, bias: Tensor, other: Tensor) -> Tensor:
        added = other if residual else None
        return functional.linear(x * 2, weight, bias, activation, added, dropout_p=dropout_p) + 1

    return call


def compiled_and_eager(function: Any, given: list[Any], backend: str = "aot_eager") -> None:
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    results = []
    for call in (compiled, function):
        output = call(*given)
        grads = torch.autograd.grad(output.square().sum(), given, allow_unused=True)
        results.append((output, *grads))
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*given), function(*given), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compile(activation: str | None, residual: bool) -> None:
    compiled_and_eager(call_of(activation, residual), leaves(2, 3, residual=True))


def test_compile_inductor() -> None:
    compiled_and_eager(call_of("gelu", True), leaves(2, 3, residual=True), backend="inductor")


def test_compiled_graphs_hold_the_ops() -> None:
    seen: list[str] = []

    def collect(graph: Any, _inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=collect, bw_compiler=collect)
    compiled = torch.compile(call_of("silu"), fullgraph=True, backend=backend)
    compiled(*leaves(2, 3, residual=True)).sum().backward()
    assert "fastseq.linear_forward.default" in seen
    assert "fastseq.linear_backward.default" in seen


def test_compile_dropout() -> None:
    """A new mask in every call, and the gradients of that very mask."""
    compiled = torch.compile(call_of(None, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    x, weight, bias, other = leaves(2, 3, residual=True)
    first, second = compiled(x, weight, bias, other), compiled(x, weight, bias, other)
    assert not torch.equal(first, second)
    (grad,) = torch.autograd.grad(first.sum(), bias)
    assert torch.equal(grad, 2 * (first != 1).double().sum((0, 1)))


def test_sizes_do_not_recompile_forever() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    function = call_of("gelu", True)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for batch in ((2, 5), (3, 6), (4, 7), (9, 20), (5, 11)):
        given = leaves(*batch, residual=True)
        torch.testing.assert_close(compiled(*given), function(*given), rtol=1e-12, atol=1e-13)
    assert counter.frame_count <= 2


def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return functional.linear(x, weight, bias, "gelu", x[..., :1])

    given = tuple(leaves(3, 2)[:3])
    rows = torch.export.Dim("rows", min=2)
    with torch.no_grad():
        program = torch.export.export(
            Model(), given, dynamic_shapes={"x": {0: rows}, "weight": None, "bias": None}
        )
        targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert "fastseq.linear_forward.default" in targets
        x = torch.randn(7, 2, 4, dtype=torch.float64)
        torch.testing.assert_close(program.module()(x, *given[1:]), Model()(x, *given[1:]))


@pytest.mark.parametrize("product", ["fused", "torch"])
def test_fake_tensors_have_the_kernels_layout(product: str) -> None:
    for transposed, activation, save in itertools.product((False, True), range(5), (False, True)):
        x, weight, bias, residual = detached(leaves(3, 2, residual=True))
        if transposed:
            x, residual = x.transpose(0, 1), residual.transpose(0, 1)
        rest = (None, activation, 0.0, save)
        with fastseq.linear_product(product):
            expected = torch.ops.fastseq.linear_forward(x, weight, bias, residual, *rest)
        mode = FakeTensorMode()
        with mode:
            fakes = [mode.from_tensor(t) for t in (x, weight, bias, residual)]
            found = torch.ops.fastseq.linear_forward(*fakes, *rest)
        for a, b in zip(found, expected, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_meta_device() -> None:
    x, weight = torch.empty(2, 3, 4, device="meta"), torch.empty(5, 4, device="meta")
    assert functional.linear(x, weight, None, "gelu").shape == (2, 3, 5)


# --- transforms


def test_vmap_and_func_grad() -> None:
    x, weight, bias, other = detached(leaves(4, 3, residual=True))
    call = call_of("gelu", True)
    mapped = torch.func.vmap(call, in_dims=(0, None, None, 0))(x, weight, bias, other)
    torch.testing.assert_close(mapped, call(x, weight, bias, other))
    per_sample = torch.func.vmap(
        torch.func.grad(lambda w, one, added: call(one, w, bias, added).square().sum()),
        in_dims=(None, 0, 0),
    )(weight, x, other)
    leaf = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(call(x[1], leaf, bias, other[1]).square().sum(), leaf)
    torch.testing.assert_close(per_sample[1], expected, rtol=1e-11, atol=1e-12)


def test_forward_mode() -> None:
    x, weight, bias, other = detached(leaves(2, 3, residual=True))
    tangent, step = torch.randn_like(x), 1e-6

    def call(x: Tensor) -> Tensor:
        return call_of("silu", True)(x, weight, bias, other)

    _, found = torch.func.jvp(call, (x,), (tangent,))
    numeric = (call(x + step * tangent) - call(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(found, numeric, rtol=1e-7, atol=1e-8)


# --- work


def test_flops_are_torchs() -> None:
    counts = []
    for function in (functional.linear, F.linear):
        x, weight, bias, _ = leaves(2, 3)
        with FlopCounterMode(display=False) as forward:
            output = function(x, weight, bias)
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1] == (2 * 6 * 4 * 5, 4 * 6 * 4 * 5)


# --- dropout


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("sizes", [(1, 1), (3, 31), (17, 33), (5, 200)], ids=str)
def test_the_kernels_draw_the_references_mask(sizes: tuple[int, int], p: float) -> None:
    for seed in ([1, 2], [-(2**63), -1], [2**62 + 17, 2**33 + 5]):
        expected = element_keep(torch.tensor(seed), p, *sizes)
        for tier in every_tier():
            assert torch.equal(cpu_linear.dropout_keep(torch.tensor(seed), p, *sizes), expected), (
                tier
            )


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_how_many_are_dropped(p: float) -> None:
    """Overall, in each row, each column and between neighbours, within five deviations."""
    size = 512
    keep = cpu_linear.dropout_keep(torch.tensor([7, 0]), p, size, size).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(keep.mean() - (1 - p)) < 5 * deviation / size
    for dim in (0, 1):
        assert (keep.mean(dim) - (1 - p)).abs().max() < 5 * deviation / size**0.5
    centred = keep - (1 - p)
    for shift, dim in ((1, 1), (2, 1), (8, 1), (32, 1), (1, 0), (8, 0)):
        together = (centred * centred.roll(shift, dim)).mean() / deviation**2
        assert together.abs() < 5 / size


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_one_mask_forward_and_backward(p: float) -> None:
    """Dropout follows the activation and spares the residual; both directions drop the same."""
    x, weight, bias, residual = (t.float() for t in detached(leaves(40, residual=True)))
    for tier, product in itertools.product(every_tier(), ("fused", "torch")):
        b = bias.clone().requires_grad_()
        r = residual.clone().requires_grad_()
        with fastseq.linear_product(product):
            torch.manual_seed(5)
            output = functional.linear(x, weight, b, None, r, dropout_p=p)
            kept = (output - r) != 0
            grads = torch.autograd.grad(output.sum(), (b, r))
        plain = functional.linear(x, weight, bias) / (1 - p if p < 1 else 1)
        torch.testing.assert_close(output, torch.where(kept, plain, 0) + residual, msg=tier)
        scale = 1 / (1 - p) if p < 1 else 0.0
        torch.testing.assert_close(grads[0], kept.sum(0) * scale, msg=tier)
        assert torch.equal(grads[1], torch.ones_like(r))
        with fastseq.backend("reference"):
            torch.manual_seed(5)
            expected = functional.linear(x, weight, b, None, r, dropout_p=p)
        torch.testing.assert_close(output, expected, msg=tier)


def test_the_seed_is_torchs() -> None:
    x, weight = torch.randn(20, 8), torch.randn(9, 8)
    torch.manual_seed(1)
    first, second = (functional.linear(x, weight, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(functional.linear(x, weight, dropout_p=0.5), first)
    before = torch.get_rng_state()
    functional.linear(x, weight)
    assert torch.equal(torch.get_rng_state(), before), "without dropout nothing is drawn"
