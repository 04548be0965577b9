"""GELU, its tanh approximation and SiLU against wider arithmetic, tier by tier, and derivatives.

The kernels' functions are called over arrays of values, their derivatives through a linear layer
of one feature whose weight is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_math import kernel, patterns, units
from torch import Tensor

import fastseq
from fastseq import _config, functional

# The project promises this many units in the last place.
LARGEST_UNITS = 4
STRIDE = 9973  # prime: every exponent meets many mantissas


def gelu(x: Tensor) -> Tensor:
    # By the complement: 1 + erf(x) loses the digits of the left tail.
    return 0.5 * x * torch.special.erfc(-x / math.sqrt(2))


def gelu_tanh(x: Tensor) -> Tensor:
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
}


def check(function: str, x: np.ndarray, allowed: float, isa: str) -> None:
    """Within ``allowed`` units of the truth; results below the normal numbers may be zero."""
    info = np.finfo(x.dtype)
    truth = FUNCTIONS[function](torch.from_numpy(x).double()).numpy()
    actual = kernel(function, x)
    assert np.isfinite(actual).all(), f"{function} {isa}"
    small = np.abs(truth) < info.tiny
    assert (np.abs(actual[small]) <= info.tiny * (1 + allowed * info.eps)).all()
    # What is zero is zero at once, not digit by digit.
    found = units(actual[~small], truth[~small])
    worst = found.argmax()
    assert found[worst] <= allowed, f"{found[worst]:.2f} units at {x[~small][worst]!r}, {isa}"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_float32(function: str, isa: str) -> None:
    for block in patterns(STRIDE):
        check(function, block[np.abs(block) < 1e18], LARGEST_UNITS, isa)


@pytest.mark.exhaustive
@pytest.mark.parametrize("function", FUNCTIONS)
def test_float32_exhaustive(function: str) -> None:
    for block in patterns(1):
        for name in _config.extension().isa_usable():
            with fastseq.isa(name):
                check(function, block[np.abs(block) < 1e18], LARGEST_UNITS, name)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_float64(function: str, isa: str) -> None:
    """The truth is float64 itself, whose argument of the exponential errs by half a unit."""
    random = np.random.default_rng(0)
    for values in (random.standard_normal(100_000), random.uniform(-8, 8, 100_000)):
        exponent = {"gelu": values**2 / 2, "gelu_tanh": 0.08 * np.abs(values) ** 3, "silu": values}
        allowed = 2 * LARGEST_UNITS + float(np.abs(exponent[function]).max())
        check(function, values, allowed, isa)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_limits(function: str, dtype: str, isa: str) -> None:
    x = np.array([0.0, -0.0, np.inf, np.nan, 300.0, -1e4], dtype)
    found = kernel(function, x)
    assert found[0] == found[1] == 0
    assert np.signbit(found[:2]).tolist() == [False, True]
    assert found[2] == np.inf
    assert np.isnan(found[3])
    assert found[4] == 300
    assert found[5] == 0


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_layer_computes_the_same(function: str, isa: str) -> None:
    x = torch.linspace(-12, 12, 1001)
    found = functional.linear(x.unsqueeze(1), torch.ones(1, 1), None, function).squeeze(1)
    assert np.array_equal(found.numpy(), kernel(function, x.numpy()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_derivatives(function: str, dtype: torch.dtype, isa: str) -> None:
    """In units of 1, as a derivative crosses zero between the terms it is the sum of."""
    values = torch.cat([torch.linspace(-30, 30, 100_001), torch.logspace(-30, 1, 1000)]).to(dtype)
    exact = values.double().requires_grad_()
    (truth,) = torch.autograd.grad(FUNCTIONS[function](exact).sum(), exact)
    x = values.unsqueeze(1).requires_grad_()
    ones = torch.ones(1, 1, dtype=dtype)
    (found,) = torch.autograd.grad(functional.linear(x, ones, None, function).sum(), x)
    error = (found.squeeze(1).double() - truth).abs() / truth.abs().clamp(min=1)
    units_of_one = float(error.max()) / torch.finfo(dtype).eps
    assert units_of_one <= (LARGEST_UNITS if dtype is torch.float32 else 2 * LARGEST_UNITS)
