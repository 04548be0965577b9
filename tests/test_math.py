"""exp, tanh and sigmoid of the kernels against results in wider arithmetic, tier by tier."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from kernels import skip_without_extension

import fastseq
from fastseq import _config

skip_without_extension()

DTYPES = {"float32": 0, "float64": 1}
# Measured over every 97th float32 pattern: 0.99, 2.49, 2.33 units. The project promises 4.
LARGEST_UNITS = 3
# 2^32 / 977 is 4.4 million patterns; 977 is prime, so that every exponent meets many mantissas.
STRIDE = 977
BLOCK = 1 << 22


def kernel(function: str, values: np.ndarray) -> np.ndarray:
    """``function`` of the active tier over a contiguous array."""
    extension = _config.extension()
    source = torch.from_numpy(values)
    target = torch.empty_like(source)
    extension.unary(extension.UNARY[function], DTYPES[values.dtype.name], source, target)
    return target.numpy()


def wide_sigmoid(x: np.ndarray) -> np.ndarray:
    # From exp(-|x|), which cannot overflow.
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


TRUTHS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exp": np.exp,
    "tanh": np.tanh,
    "sigmoid": wide_sigmoid,
}


def truth_of(function: str, x: np.ndarray) -> np.ndarray:
    """``function`` in wider arithmetic.

    float64 holds every float32 result with 29 bits to spare, and torch computes it on vectors;
    x87 arithmetic has 11 bits more than float64.
    """
    if x.dtype == np.float32:
        operator = getattr(torch, function)
        return operator(torch.from_numpy(x).double()).numpy()
    with np.errstate(all="ignore"):
        return TRUTHS[function](x.astype(np.longdouble))


def units(actual: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Distance in units in the last place of ``truth`` rounded to the dtype of ``actual``."""
    info = np.finfo(actual.dtype)
    exponent = np.frexp(np.maximum(np.abs(truth), info.tiny))[1]
    spacing = np.ldexp(truth.dtype.type(1), exponent - 1 - info.nmant)
    return np.abs(actual.astype(truth.dtype) - truth) / spacing


def check(function: str, x: np.ndarray, truth: np.ndarray | None = None) -> None:
    """``function`` over ``x``: special values exactly, all others within the bound."""
    info = np.finfo(x.dtype)
    actual = kernel(function, x)
    truth = truth_of(function, x) if truth is None else truth
    assert np.array_equal(np.isnan(actual), np.isnan(x))
    known = ~np.isnan(x)
    x, actual, truth = x[known], actual[known], truth[known]
    # Overflow, to the last float that does not, is Inf as in the rounded truth.
    with np.errstate(over="ignore"):
        infinite = np.isinf(truth.astype(x.dtype))
    assert np.array_equal(np.isinf(actual), infinite)
    tiny = np.abs(truth) < info.tiny
    if function == "tanh":
        # Denormal x: flushed to zero or passed through, in either case with its sign.
        assert np.array_equal(np.signbit(actual), np.signbit(x))
        assert (np.abs(actual[tiny]) <= np.abs(x[tiny])).all()
    else:
        # Zero below the smallest normal number. Within the bound of that number either is right.
        clearly = np.abs(truth) < info.tiny * (1 - LARGEST_UNITS * info.eps)
        assert not actual[clearly].any()
    rest = ~(infinite | tiny)
    x, actual, truth = x[rest], actual[rest], truth[rest]
    # A unit is at least |truth| eps / 2: only what is further off than that needs the exact count.
    far = np.abs(actual - truth) > LARGEST_UNITS * 0.5 * info.eps * np.abs(truth)
    if far.any():
        worst = units(actual[far], truth[far])
        where = worst.argmax()
        assert worst[where] <= LARGEST_UNITS, f"{worst[where]:.2f} units at {x[far][where]!r}"


def patterns(stride: int) -> Iterator[np.ndarray]:
    """Every ``stride``-th float32 bit pattern, in blocks."""
    for first in range(0, 1 << 32, BLOCK * stride):
        last = min(first + BLOCK * stride, 1 << 32)
        yield np.arange(first, last, stride, dtype=np.uint32).view(np.float32)


EDGES = [
    0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 0.5, -0.5,
    88.72283, 88.722839, 88.72284, 88.8, -87.3365, -87.33655, -87.34, -103.9, -104.0,
    709.78271289338397, 709.782712893385, -708.39641853226408, -708.3964185322642, -745.2,
    1e-3, -1e-3, 1e-8, -1e-8, 1e-30, -1e-30, 9.01, -9.02, 19.0, -19.1, 1e4, -1e4, 3e38, -3e38,
]  # fmt: skip


@pytest.mark.parametrize("function", TRUTHS)
def test_float32_strided(function: str, isa: str) -> None:
    for block in patterns(STRIDE):
        check(function, block)


@pytest.mark.exhaustive
@pytest.mark.parametrize("function", TRUTHS)
def test_float32_exhaustive(function: str) -> None:
    for block in patterns(1):
        truth = truth_of(function, block)
        for name in _config.extension().isa_usable():
            with fastseq.isa(name):
                check(function, block, truth)


@pytest.mark.parametrize("function", TRUTHS)
def test_float64(function: str, isa: str) -> None:
    random = np.random.default_rng(0)
    check(function, random.standard_normal(200_000) * 4)
    check(function, random.uniform(-750, 750, 200_000))
    check(function, np.ldexp(random.uniform(-1, 1, 200_000), random.integers(-300, 5, 200_000)))
    check(function, random.integers(0, 1 << 63, 200_000).view(np.float64))
    check(function, -random.integers(0, 1 << 63, 200_000).view(np.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", TRUTHS)
def test_edges(function: str, dtype: str, isa: str) -> None:
    edges = np.array(EDGES, dtype)
    neighbours = [np.nextafter(edges, np.array(side, dtype)) for side in (-np.inf, np.inf)]
    check(function, np.concatenate([edges, *neighbours]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_values(dtype: str, isa: str) -> None:
    x = np.array([-np.inf, -0.0, 0.0, np.inf], dtype)
    assert kernel("exp", x).tolist() == [0.0, 1.0, 1.0, np.inf]
    assert kernel("sigmoid", x).tolist() == [0.0, 0.5, 0.5, 1.0]
    result = kernel("tanh", x)
    assert result.tolist() == [-1.0, 0.0, 0.0, 1.0]
    assert np.signbit(result).tolist() == [True, True, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", TRUTHS)
def test_a_value_does_not_depend_on_its_lane(function: str, dtype: str, isa: str) -> None:
    """Also the last vector, of any length, and nothing behind it is written."""
    extension = _config.extension()
    values = np.linspace(-5, 5, 67).astype(dtype)
    whole = kernel(function, values)
    for length in range(1, len(values)):
        source = torch.from_numpy(values[-length:].copy())
        target = torch.full((length + 64,), 123.0, dtype=source.dtype)
        extension.unary(extension.UNARY[function], DTYPES[dtype], source, target)
        assert np.array_equal(target.numpy()[:length], whole[-length:])
        assert bool((target[length:] == 123.0).all())
