"""Norms as functions: outputs and every gradient against torch in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels import HAS_EXTENSION, needs_extension
from norm_oracle import Case, arguments, expected, fastseq_outputs, run
from oracle import compare, every_tier, largest
from torch import Tensor

import fastseq
from fastseq import functional
from fastseq.backends.reference_dropout import element_keep

SIZES = (1, 2, 7, 16, 63, 65, 1000)
ROWS = (1, 3, 17, 70)

CASES = [
    *(Case(rms=rms, shape=(5, size)) for size in SIZES for rms in (False, True)),
    *(Case(rms=rms, shape=(rows, 33), residual=True) for rows in ROWS for rms in (False, True)),
    # Longer than one stretch of partial sums; more rows than one block has.
    Case(shape=(3, 5000), residual=True),
    Case(rms=True, shape=(2, 9001)),
    Case(shape=(1100, 40), residual=True, return_sum=True),
    Case(rms=True, shape=(1100, 40)),
    # More than 4 MiB, which are asked for in another cache.
    *(Case(rms=rms, shape=(2100, 513), residual=True) for rms in (False, True)),
    *(
        Case(dtype=dtype, shape=(2, 3, 4, 5), dims=dims, rms=rms, residual=True)
        for dims in (1, 2, 4)
        for rms in (False, True)
        for dtype in ("float32", "float64")
    ),
    *(
        Case(shape=(4, 3, 21), weight=weight, bias=bias, residual=residual)
        for weight, bias, residual in itertools.product((False, True), repeat=3)
    ),
    *(
        Case(shape=(4, 3, 21), rms=True, weight=weight, residual=residual, eps=eps)
        for weight, residual, eps in itertools.product((False, True), (False, True), (None, 0.1))
    ),
    *(
        Case(
            dtype=dtype, shape=(4, 6, 35), strides=strides, rms=rms, residual=True, return_sum=True
        )
        for strides in ("transposed", "expanded", "every_other", "offset", "wide")
        for rms, dtype in ((False, "float32"), (True, "float64"))
    ),
    *(
        Case(dtype=dtype, shape=(9, size), residual=True, dropout=p, return_sum=rms, rms=rms)
        for size in (1, 31, 32, 75)
        for p, rms in ((0.3, False), (0.7, True))
        for dtype in ("float32", "float64")
    ),
    Case(shape=(6, 40), residual=True, dropout=1.0, return_sum=True),
    # The mean is far larger than what is left when it is taken off.
    *(Case(shape=(7, size), mean=mean) for size in (64, 1000) for mean in (100.0, -1e4)),
    Case(dtype="float64", shape=(7, 100), mean=1e6),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case: Case) -> None:
    truth, bounds = expected(case)
    dtype = getattr(torch, case.dtype)
    leaves, _ = drawn = arguments(case, dtype)
    bits: dict[str, dict[str, Tensor]] = {}
    for tier in every_tier():
        results = run(case, "fastseq", dtype, drawn=drawn)
        compare(results, truth, bounds, tier)
        # The number of threads never changes a bit of the kernels'; composites do not promise it.
        before = bits.setdefault(tier.split(",")[0] if HAS_EXTENSION else tier, results)
        assert all(torch.equal(results[name], value) for name, value in before.items()), tier
        with torch.no_grad():
            inferred = fastseq_outputs(case, leaves)
        for name, output in zip(("output", "sum"), inferred, strict=False):
            assert torch.equal(output.double(), results[name]), f"{name} {tier}: no_grad differs"


@needs_extension
@pytest.mark.parametrize("rms", [False, True])
def test_two_threads_and_one(rms: bool) -> None:
    """Rows and features enough for both threads to work, and blocks enough to be shared."""
    case = Case(rms=rms, shape=(700, 130), residual=True, dropout=0.1, return_sum=True)
    truth, bounds = expected(case)
    found: dict[str, dict[str, Tensor]] = {}
    for tier in every_tier():
        results = run(case, "fastseq", torch.float32)
        compare(results, truth, bounds, tier)
        before = found.setdefault(tier.split(",")[0], results)
        assert all(torch.equal(results[name], value) for name, value in before.items()), tier


@needs_extension
def test_a_large_mean_costs_no_digits(isa: str) -> None:
    """Better than torch, whose mean is rounded to float32 before it is subtracted."""
    case = Case(shape=(50, 512), mean=3e3, weight=False, bias=False)
    truth = run(case, "torch", torch.float64)["output"]
    theirs = largest(run(case, "torch", torch.float32)["output"] - truth)
    ours = largest(run(case, "fastseq", torch.float32)["output"] - truth)
    assert ours < 2e-6
    assert ours < theirs / 4


# --- NaN, Inf, huge and denormal numbers


# Beyond 1e19 squares overflow, and torch's variance may be NaN.
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e15", "1e-42"])
@pytest.mark.parametrize("rms", [False, True])
def test_specials_behave_as_in_torch(rms: bool, value: str, isa: str) -> None:
    for features in (7, 64, 75):
        x, grad = torch.randn(6, features), torch.randn(6, features)
        x[2, features - 1] = x[4, 0] = float(value)
        weight = torch.randn(features)
        results = []
        for library in (functional, F):
            leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
            norm = library.rms_norm if rms else library.layer_norm
            output = norm(leaves[0], (features,), leaves[1])
            results.append([output.detach(), *torch.autograd.grad(output, leaves, grad)])
        for ours, theirs in zip(*results, strict=True):
            # Where 1e30 squared has overflown, a zero times a mean of gradients may be either.
            torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_nan_stays_in_its_row(isa: str, threads: int) -> None:
    x = torch.randn(300, 130)
    clean = functional.layer_norm(x, (130,))
    x[77] = float("nan")
    spoiled = functional.layer_norm(x, (130,))
    others = torch.arange(300) != 77
    assert torch.equal(clean[others], spoiled[others])
    assert spoiled[77].isnan().all()


def test_a_constant_row_is_zero(isa: str) -> None:
    x = torch.full((3, 100), 0.1) * torch.tensor([[1.0], [1e4], [-3e-5]])
    leaf = x.clone().requires_grad_()
    output = functional.layer_norm(leaf, (100,))
    assert largest(output.detach()) < 1e-2 * 0.1
    (grad,) = torch.autograd.grad(output.sum(), leaf)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4), (0, 0)])
@pytest.mark.parametrize("rms", [False, True])
def test_nothing(rms: bool, shape: tuple[int, ...]) -> None:
    x, r = (torch.randn(shape, requires_grad=True) for _ in "xr")
    weight = torch.randn(shape[-1:], requires_grad=True)
    norm: Any = functional.add_rms_norm if rms else functional.add_layer_norm
    for p in (0.0, 0.5):
        output = norm(x, r, shape[-1:], weight, dropout_p=p)
        assert output.shape == shape
        grads = torch.autograd.grad(output.sum(), [x, r, weight])
        assert [grad.shape for grad in grads] == [x.shape, r.shape, weight.shape]
        assert not grads[2].any()
    single: Any = functional.rms_norm if rms else functional.layer_norm
    assert single(x.detach(), shape[-1:]).shape == shape


def test_one_dimension() -> None:
    x = torch.randn(9)
    torch.testing.assert_close(functional.layer_norm(x, (9,)), F.layer_norm(x, (9,)))


# --- dropout


def test_dropout_mask_is_the_composites(isa: str, threads: int) -> None:
    for dtype, (rows, columns) in itertools.product(
        (torch.float32, torch.float64), ((5, 31), (40, 512), (33, 1000))
    ):
        x = torch.ones(rows, columns, dtype=dtype, requires_grad=True)
        r = torch.zeros(rows, columns, dtype=dtype)
        torch.manual_seed(7)
        _, total = functional.add_layer_norm(x, r, (columns,), dropout_p=0.25, return_sum=True)
        torch.manual_seed(7)
        seed = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64)
        keep = element_keep(seed, 0.25, rows, columns)
        assert torch.equal(total != 0, keep)
        torch.testing.assert_close(total.detach(), keep.to(dtype) / 0.75)
        # Backward draws the same elements again.
        (grad,) = torch.autograd.grad(total.sum(), x)
        assert torch.equal(grad, total.detach())


def test_dropout_takes_its_share() -> None:
    x, r = torch.ones(1000, 1000), torch.zeros(1000, 1000)
    torch.manual_seed(0)
    for p in (0.01, 0.1, 0.5, 0.9):
        _, total = functional.add_rms_norm(x, r, (1000,), dropout_p=p, return_sum=True)
        dropped = total == 0
        assert abs(dropped.float().mean() - p) < 4 * (p * (1 - p)) ** 0.5 / 1000
        deviation = (p * (1 - p) / 1000) ** 0.5
        for dim in (0, 1):
            assert (dropped.float().mean(dim) - p).abs().max() < 5.5 * deviation
        # Neighbours are independent.
        pairs = (dropped[:, 1:] & dropped[:, :-1]).float().mean()
        assert abs(pairs - p * p) < 5 * p / 1000
    first, second = (
        functional.add_layer_norm(x, r, (1000,), dropout_p=0.5, return_sum=True)[1] for _ in "ab"
    )
    assert not torch.equal(first, second)


def test_without_gradients_dropout_still_applies() -> None:
    x = torch.randn(4, 64)
    with torch.no_grad():
        torch.manual_seed(3)
        a = functional.add_layer_norm(x, x, (64,), dropout_p=0.5)
        torch.manual_seed(3)
        b = functional.add_layer_norm(x, x, (64,), dropout_p=0.5)
    assert torch.equal(a, b)
    assert not torch.equal(a, functional.add_layer_norm(x, x, (64,)))


# --- residual


def test_a_broadcast_residual_has_its_own_gradient() -> None:
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    for shape in ((6,), (4, 1), (1, 1, 1)):
        r = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        ours = functional.add_layer_norm(x, r, (6,))
        theirs = F.layer_norm(x + r, (6,))
        grad = torch.randn_like(ours)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            torch.autograd.grad(ours, [x, r], grad),
            torch.autograd.grad(theirs, [x, r], grad),
            rtol=1e-10,
            atol=1e-11,
        )


def test_input_and_residual_may_be_one_tensor() -> None:
    x = torch.randn(5, 33, requires_grad=True)
    ours, theirs = functional.add_rms_norm(x, x, (33,)), F.rms_norm(x + x, (33,))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.square().sum(), x)[0] + torch.zeros_like(x),
        torch.autograd.grad(theirs.square().sum(), x)[0],
        rtol=1e-4,
        atol=1e-5,
    )


@needs_extension
def test_gradients_of_the_sum_alone() -> None:
    x, r = (torch.randn(4, 6, requires_grad=True) for _ in "xr")
    weight = torch.randn(6, requires_grad=True)
    _, total = functional.add_layer_norm(x, r, (6,), weight, return_sum=True)
    gradient = torch.randn(4, 6)
    grads = torch.autograd.grad(total, [x, r, weight], gradient)
    assert torch.equal(grads[0], gradient)
    assert torch.equal(grads[1], gradient)
    assert not grads[2].any()


def test_accumulated_gradients_do_not_share_memory() -> None:
    x, r = (torch.randn(4, 6, requires_grad=True) for _ in "xr")
    for _ in range(2):
        functional.add_layer_norm(x, r, (6,)).square().sum().backward()
    assert x.grad is not None
    assert r.grad is not None
    torch.testing.assert_close(x.grad, r.grad)
    x.grad.zero_()
    assert r.grad.any()


# --- errors


def bad_calls() -> list[tuple[str, Any, type[Exception], str]]:
    x = torch.randn(2, 3, 5)
    five = torch.randn(5)
    return [
        ("layer_norm", ([1.0], (5,)), TypeError, "input must be a tensor, got list"),
        ("layer_norm", (x, 5), TypeError, "normalized_shape must be a sequence of ints, got 5"),
        ("layer_norm", (x, (5.0,)), TypeError, "normalized_shape"),
        ("layer_norm", (x, "5"), TypeError, "normalized_shape"),
        ("layer_norm", (x, ()), RuntimeError, "normalized_shape must have at least one"),
        ("layer_norm", (x, (4,)), RuntimeError, r"expected \(\*, 4\), got \(2, 3, 5\)"),
        ("layer_norm", (x, (1, 2, 3, 5)), RuntimeError, r"got shape \(2, 3, 5\)"),
        ("layer_norm", (x, (5,), five[:4]), RuntimeError, r"weight .* expected \(5,\), got \(4,\)"),
        ("layer_norm", (x, (5,), None, five[:4]), RuntimeError, "bias .* expected"),
        ("layer_norm", (x, (5,), five.double()), RuntimeError, "weight must have the dtype"),
        ("layer_norm", (x, (5,), [1.0] * 5), TypeError, "weight must be a tensor, got list"),
        ("layer_norm", (x, (5,), five.to("meta")), RuntimeError, "weight must be on the device"),
        ("layer_norm", (x, (5,), None, None, None), TypeError, "eps must be a float, got NoneType"),
        ("layer_norm", (x, (5,), None, None, "a"), TypeError, "eps must be a float, got str"),
        ("layer_norm", (x.int(), (5,)), NotImplementedError, "input must be floating point"),
        ("rms_norm", ([1.0], (5,)), TypeError, "input must be a tensor, got list"),
        ("rms_norm", (x, 5), TypeError, "normalized_shape must be a sequence of ints, got 5"),
        ("rms_norm", (x, ()), RuntimeError, "normalized_shape must have at least one"),
        ("rms_norm", (x, (4,)), RuntimeError, r"expected \(\*, 4\), got \(2, 3, 5\)"),
        ("rms_norm", (x, (1, 2, 3, 5)), ValueError, r"got shape \(2, 3, 5\)"),
        ("rms_norm", (x, (5,), five[:4]), RuntimeError, r"weight .* expected \(5,\), got \(4,\)"),
        ("rms_norm", (x, (5,), None, "a"), TypeError, "eps must be a float, got str"),
        ("rms_norm", (x.int(), (5,)), NotImplementedError, "input must be floating point"),
    ]


@pytest.mark.parametrize("call", bad_calls(), ids=lambda call: f"{call[0]}-{call[3][:30]}")
def test_errors_are_torchs(call: Any) -> None:
    name, given, kind, message = call
    with pytest.raises(kind, match=message):
        getattr(functional, name)(*given)
    with pytest.raises(kind):
        getattr(F, name)(*given)


def test_errors_of_the_addition() -> None:
    x = torch.randn(2, 3, 5)
    with pytest.raises(TypeError, match="residual must be a tensor, got int"):
        functional.add_layer_norm(x, 1, (5,))
    with pytest.raises(RuntimeError, match=r"expected \(2, 3, 5\), got \(4, 5\)"):
        functional.add_layer_norm(x, torch.randn(4, 5), (5,))
    with pytest.raises(RuntimeError, match=r"expected torch.float32, got torch.float64"):
        functional.add_rms_norm(x, x.double(), (5,))
    with pytest.raises(ValueError, match="dropout_p must be a probability between 0 and 1, got 2"):
        functional.add_layer_norm(x, x, (5,), dropout_p=2)
    with pytest.raises(TypeError, match="dropout_p must be a float, got str"):
        functional.add_rms_norm(x, x, (5,), dropout_p="a")


# --- what the kernels do not take


def test_other_dtypes_warn_and_are_torchs() -> None:
    from fastseq import backends

    backends._warned_reasons.clear()
    x = torch.randn(3, 5).bfloat16()
    with pytest.warns(fastseq.FastseqFallbackWarning, match="bfloat16"):
        ours = functional.layer_norm(x, (5,), torch.ones(5))
    assert torch.equal(ours, F.layer_norm(x, (5,), torch.ones(5)))
    torch.testing.assert_close(functional.rms_norm(x, (5,)), F.rms_norm(x, (5,)))
    assert functional.add_layer_norm(x, x, (5,), dropout_p=0.5).dtype is torch.bfloat16


def test_reference_backend() -> None:
    x = torch.randn(3, 5)
    with fastseq.backend("reference"):
        assert torch.equal(functional.layer_norm(x, (5,)), F.layer_norm(x, (5,)))


def test_lazily_negated_input() -> None:
    x = torch.randn(3, 5, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(functional.layer_norm(x, (5,)), F.layer_norm(x, (5,)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors() -> None:
    from fastseq import backends

    backends._warned_reasons.clear()
    nested = torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(3, 5)])
    weight, bias = torch.ones(5), torch.zeros(5)
    with pytest.warns(fastseq.FastseqFallbackWarning, match="nested"):
        ours = functional.layer_norm(nested, (5,), weight, bias)
    theirs = F.layer_norm(nested, (5,), weight, bias)
    for a, b in zip(ours.unbind(), theirs.unbind(), strict=True):
        torch.testing.assert_close(a, b)
