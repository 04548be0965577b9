"""Tier amx: float32 products as sums of bfloat16 products, on the sizes that go that way.

That those sizes are no less exact than others is held by the tests that run on every tier; here is
what is particular to splitting.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels import skip_without_extension
from torch import Tensor

import fastseq
import fastseq.nn as fast_nn
from fastseq import _config
from fastseq.functional import linear

skip_without_extension()

pytestmark = pytest.mark.skipif(
    "amx" not in _config.extension().isa_usable(),
    reason="no AMX unit, or this build or system has no support for it",
)

CELLS: list[Any] = [fast_nn.LSTM, fast_nn.GRU, fast_nn.RNN]


def linear_results(rows: int, inputs: int, outputs: int, **planted: float) -> dict[str, Tensor]:
    """Output and gradients in float64 and on both tiers; ``planted`` goes into x or weight."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator)
    cotangent = torch.randn(rows, outputs, generator=generator)
    for name, value in planted.items():
        {"x": x, "weight": weight}[name][7, 5] = value
    results = {}
    for tier in ("amx", "avx512", "float64"):
        dtype = torch.float64 if tier == "float64" else torch.float32
        leaves = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        with fastseq.isa("avx512" if tier == "float64" else tier):
            output = linear(*leaves)
            grads = torch.autograd.grad(output, leaves, cotangent.to(dtype))
        for name, value in zip(("output", "grad x", "grad weight"), (output, *grads), strict=True):
            results[f"{name} {tier}"] = value.detach()
    return results


@pytest.mark.parametrize("shape", [(12, 32, 32), (33, 70, 47), (64, 40, 200), (150, 1100, 65)])
def test_linear_is_more_exact_than_multiply_adds(shape: tuple[int, int, int]) -> None:
    results = linear_results(*shape)
    for name in ("output", "grad x", "grad weight"):
        truth = results[f"{name} float64"]
        split, plain = (
            (results[f"{name} {tier}"].double() - truth).abs().max() for tier in ("amx", "avx512")
        )
        assert split <= plain + 2**-24 * truth.abs().max()
        # Had the tier not been used, the bits would be the same.
        assert not torch.equal(results[f"{name} amx"], results[f"{name} avx512"])


@pytest.mark.parametrize("where", ["x", "weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(40, 48, 64), (150, 48, 64)])
def test_linear_passes_nan_and_infinity(
    shape: tuple[int, int, int], value: float, where: str
) -> None:
    results = linear_results(*shape, **{where: value})
    for name in ("output", "grad x", "grad weight"):
        actual, expected = results[f"{name} amx"], results[f"{name} float64"]
        finite = expected.isfinite()
        assert not finite.all() or name == f"grad {where}"
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual[expected.isinf()].double(), expected[expected.isinf()])
        torch.testing.assert_close(actual[finite].double(), expected[finite], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [3.4e38, -3.4028e38, 1e-30, 1e-36])
def test_linear_keeps_huge_and_small_values(value: float) -> None:
    # Rounded to bfloat16 the first two would be infinite; the last ones vanish in their sums.
    results = linear_results(40, 48, 64, x=value)
    expected = results["output float64"]
    fits = expected.abs() < 3.4e38
    torch.testing.assert_close(
        results["output amx"][fits].double(), expected[fits], rtol=2e-6, atol=1e-4
    )
    assert results["output amx"][~fits].isinf().all()


def test_linear_of_small_values_loses_no_more_than_documented() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 64, generator=generator)
    weight = torch.randn(48, 64, generator=generator)
    with fastseq.isa("amx"):
        normal, small = linear(x, weight), linear(x * 2.0**-90, weight)
        tiny = linear(x * 2.0**-110, weight)
    assert torch.equal(small, normal * 2.0**-90)
    error = (tiny.double() * 2.0**110 - normal.double()).abs().max()
    assert error <= 2**-9 * normal.abs().max()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("leaf", ["x", "weight_ih_l0", "weight_hh_l0"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_recurrent_layer_passes_nan_and_infinity(cell: Any, leaf: str, value: float) -> None:
    torch.manual_seed(3)
    layer = cell(40, 48)
    x = torch.randn(6, 20, 40)
    with torch.no_grad():
        (x[2] if leaf == "x" else getattr(layer, leaf))[3, 4] = value
    results = {}
    for tier in ("amx", "avx512"):
        x.requires_grad_().grad = None
        layer.zero_grad()
        with fastseq.isa(tier):
            output = layer(x)[0]
            output.sum().backward()
        results[tier] = [output.detach(), x.grad, *(p.grad for p in layer.parameters())]
    for actual, expected in zip(results["amx"], results["avx512"], strict=True):
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.isinf(), expected.isinf())
        finite = expected.isfinite()
        torch.testing.assert_close(actual[finite], expected[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", [(5, 17, 3, 32), (9, 35, 70, 50), (21, 64, 33, 100)])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layer_is_exact_with_one_thread_and_two(
    cell: Any, shape: tuple[int, int, int, int], bidirectional: bool
) -> None:
    steps, batch, inputs, hidden = shape
    torch.manual_seed(5)
    layer = cell(inputs, hidden, bidirectional=bidirectional)
    x = torch.randn(steps, batch, inputs)
    lengths = torch.arange(batch) % steps + 1 if cell is not fast_nn.RNN else None
    cotangent = torch.randn(steps, batch, hidden * (2 if bidirectional else 1))
    results: dict[str, list[Tensor]] = {}
    threads = torch.get_num_threads()
    for name, tier, count in (
        ("one", "amx", 1),
        ("two", "amx", 2),
        ("plain", "avx512", 2),
        ("truth", "avx512", 2),
    ):
        dtype = torch.float64 if name == "truth" else torch.float32
        layer.to(dtype)
        leaf = x.to(dtype).requires_grad_()
        torch.set_num_threads(count)
        try:
            with fastseq.isa(tier):
                output = layer(leaf, lengths=lengths)[0]
                grads = torch.autograd.grad(
                    output, [leaf, *layer.parameters()], cotangent.to(dtype)
                )
        finally:
            torch.set_num_threads(threads)
        results[name] = [output.detach(), *grads]
    for one, two, plain, truth in zip(*results.values(), strict=True):
        assert torch.equal(one, two)
        limit = 1.5 * (plain.double() - truth).abs().max() + 4 * 2**-24 * truth.abs().max()
        assert (two.double() - truth).abs().max() <= limit
    assert not torch.equal(results["two"][0], results["plain"][0])


@pytest.mark.parametrize("threads", [1, 2])
def test_fma_peak_is_the_units(threads: int) -> None:
    with fastseq.isa("amx"):
        assert _config.fma_peak_gflops("float32", threads) > 1
