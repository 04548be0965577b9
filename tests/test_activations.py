"""GELU, its tanh approximation and SiLU against wider arithmetic, tier by tier, and derivatives.

The kernels' functions are called over arrays of values, their derivatives through a linear layer
of one feature whose weight is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath  # comes with torch
import numpy as np
import pytest
import torch
from kernels import skip_without_extension
from linear_oracle import TORCH
from test_math import kernel, patterns, units
from torch import Tensor

import fastseq
from fastseq import _config, functional

skip_without_extension()

# The project promises this many units in the last place.
LARGEST_UNITS = 4
# Where cubes still are finite.
FARTHEST = 1e12
STRIDE = 9973  # prime: every exponent meets many mantissas


def gelu(x: Tensor) -> Tensor:
    # By the complement: 1 + erf(x) loses the digits of the left tail.
    return 0.5 * x * torch.special.erfc(-x / math.sqrt(2))


def gelu_tanh(x: Tensor) -> Tensor:
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


# The same to 30 digits.
EXACT: dict[str, Callable[[Any], Any]] = {
    "gelu": lambda x: x * mpmath.erfc(-x / mpmath.sqrt(2)) / 2,
    "gelu_tanh": lambda x: x / (1 + mpmath.exp(-mpmath.sqrt(8 / mpmath.pi) * (x + CUBIC * x**3))),
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
}
CUBIC = mpmath.mpf("0.044715")
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
}


def allowed(function: str, x: np.ndarray, isa: str) -> np.ndarray:
    """Units in the last place that a value may be off.

    The rounding error of an exponential's argument is magnified by the argument. GELU makes up for
    it; its approximation does not.
    """
    x = x.astype(np.float64)
    free = np.full(x.shape, float(LARGEST_UNITS))
    if isa == "base":
        free += 1  # a product and a sum are rounded twice
    if function == "gelu_tanh":
        free += 2 * np.abs(1.6 * x + 0.0714 * x**3)
    return free


def check(function: str, x: np.ndarray, isa: str) -> None:
    """Within the units allowed; results near and below the smallest normal number may be zero."""
    info = np.finfo(x.dtype)
    if x.dtype == np.float32:
        truth = FUNCTIONS[function](torch.from_numpy(x).double()).numpy()
    else:
        with mpmath.workdps(30):
            truth = np.array([float(EXACT[function](mpmath.mpf(v))) for v in x.tolist()])
    actual = kernel(function, x)
    assert np.isfinite(actual).all(), f"{function} {isa}"
    # The factor of x may be flushed to zero although the product would not have to be.
    small = np.abs(truth) < info.tiny * (1 if function == "gelu" else np.maximum(np.abs(x), 1))
    assert (np.abs(actual[small]) <= np.abs(truth[small]) * (1 + 1e-4) + info.tiny).all()
    x, actual, truth = x[~small], actual[~small], truth[~small]
    excess = units(actual, truth) - allowed(function, x, isa)
    worst = excess.argmax()
    assert excess[worst] <= 0, f"{excess[worst]:.2f} units too many at {x[worst]!r}, {isa}"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_float32(function: str, isa: str) -> None:
    for block in patterns(STRIDE):
        check(function, block[np.abs(block) < FARTHEST], isa)


@pytest.mark.exhaustive
@pytest.mark.parametrize("function", FUNCTIONS)
def test_float32_exhaustive(function: str) -> None:
    for block in patterns(1):
        for name in _config.extension().isa_usable():
            with fastseq.isa(name):
                check(function, block[np.abs(block) < FARTHEST], name)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_float64(function: str, isa: str) -> None:
    random = np.random.default_rng(0)
    for values in (random.standard_normal(1000), random.uniform(-20, 20, 1000)):
        check(function, values, isa)


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
    expected = torch.from_numpy(kernel(function, x.numpy()))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def derivative(function: str, x: Tensor) -> Tensor:
    """In the arithmetic of ``x``, without differences of numbers near one."""
    if function == "gelu":
        density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return torch.special.erfc(-x / math.sqrt(2)) / 2 + x * density
    argument, slope = x, torch.ones_like(x)
    if function == "gelu_tanh":
        argument = math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)
        slope = math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * x**2)
    return torch.sigmoid(argument) * (1 + x * slope * torch.sigmoid(-argument))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_derivatives(function: str, dtype: torch.dtype, isa: str) -> None:
    """In units of 1, as a derivative crosses zero between the terms it is the sum of.

    As the oracle has it, the errors may be half as large again as torch's, plus four units; in the
    approximation of GELU, which squares its argument, twice as large.
    """
    values = torch.cat([torch.linspace(-30, 30, 100_001), torch.logspace(-30, 1, 1000)]).to(dtype)
    truth = derivative(function, values.double())
    x = values.unsqueeze(1).requires_grad_()
    ones = torch.ones(1, 1, dtype=dtype)
    (found,) = torch.autograd.grad(functional.linear(x, ones, None, function).sum(), x)
    (theirs,) = torch.autograd.grad(TORCH[function](x).sum(), x)
    worst = [
        float(((grad.squeeze(1).double() - truth).abs() / truth.abs().clamp(min=1)).max())
        / torch.finfo(dtype).eps
        for grad in (found, theirs)
    ]
    if function == "gelu" and dtype is torch.float32:
        assert worst[0] <= LARGEST_UNITS
    else:
        ratio = 2 if function == "gelu_tanh" else 1.5
        assert worst[0] <= ratio * worst[1] + LARGEST_UNITS
