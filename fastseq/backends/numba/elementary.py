"""exp and tanh for compiled loops: no branches, no calls, so that the loops become vectors.

``math.exp`` in a compiled loop is a call per element. Here exp(x) = 2^n exp(r) with n the nearest
integer to x / ln 2 and |r| <= ln 2 / 2, where a Taylor polynomial reaches a unit in the last place.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from fastseq.backends.numba.tiles import OPTIONS, inner

__all__ = ["exponential", "hyperbolic_tangent"]


@intrinsic  # type: ignore[untyped-decorator]
def _power_of_two(typingctx: Any, shifted: Any) -> Any:
    """2^n from ``n + 1.5 * 2^digits``, whose last bits are the integer n."""
    digits, bias = (23, 127) if shifted == types.float32 else (52, 1023)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integer = ir.IntType(shifted.bitwidth)
        bits = builder.bitcast(args[0], integer)
        bits = builder.shl(bits, integer(digits))
        bits = builder.add(bits, integer(bias << digits))
        return builder.bitcast(bits, context.get_value_type(shifted))

    return shifted(shifted), codegen


def _constants(dtype: Any, digits: int, terms: int, high: float) -> tuple[Any, ...]:
    """Of one dtype: 1 / ln 2, the rounding constant, ln 2 in two parts, 1 / 2! ... 1 / terms!."""
    low = dtype(_LN_2_TAIL + (_LN_2 - high)) if dtype is np.float32 else dtype(_LN_2_LOW_64)
    return (
        dtype(1 / _LN_2),
        dtype(1.5 * 2**digits),
        dtype(high),
        low,
        tuple(dtype(1 / math.factorial(i)) for i in range(terms, 1, -1)),
    )


_LN_2 = math.log(2)
_LN_2_TAIL = 2.3190468138462996e-17  # ln 2 less its nearest double
# Parts of few digits, so that n times them is exact.
_LN_2_HIGH_32 = 0.693359375
_LN_2_HIGH_64 = float.fromhex("0x1.62e42fee00000p-1")
_LN_2_LOW_64 = float.fromhex("0x1.a39ef35793c76p-33")

_INVERSE_32, _ROUNDING_32, _HIGH_32, _LOW_32, _TERMS_32 = _constants(
    np.float32, 23, 7, _LN_2_HIGH_32
)
_INVERSE_64, _ROUNDING_64, _HIGH_64, _LOW_64, _TERMS_64 = _constants(
    np.float64, 52, 13, _LN_2_HIGH_64
)
# Below these the power of two is no normal number, and the result 0.
_SMALLEST_32, _SMALLEST_64 = np.float32(-87.0), np.float64(-708.0)
_ONE_32, _TWO_32, _ZERO_32 = np.float32(1), np.float32(2), np.float32(0)
# tanh is 1 to the last digit from half of these on.
_LARGEST_32, _LARGEST_64 = np.float32(20.0), np.float64(40.0)


@inner
def _split_32(x: Any) -> Any:
    """(2^n, exp(r) - 1) for exp(x) = 2^n exp(r)."""
    shifted = x * _INVERSE_32 + _ROUNDING_32
    n = shifted - _ROUNDING_32
    r = (x - n * _HIGH_32) - n * _LOW_32
    c = _TERMS_32
    p = ((((c[0] * r + c[1]) * r + c[2]) * r + c[3]) * r + c[4]) * r + c[5]
    return _power_of_two(shifted), p * (r * r) + r


@inner
def _split_64(x: Any) -> Any:
    shifted = x * _INVERSE_64 + _ROUNDING_64
    n = shifted - _ROUNDING_64
    r = (x - n * _HIGH_64) - n * _LOW_64
    c = _TERMS_64
    p = ((((c[0] * r + c[1]) * r + c[2]) * r + c[3]) * r + c[4]) * r + c[5]
    p = (((((p * r + c[6]) * r + c[7]) * r + c[8]) * r + c[9]) * r + c[10]) * r + c[11]
    return _power_of_two(shifted), p * (r * r) + r


def exponential(x: Any) -> Any:
    """exp(x) for x <= 0, to 2 units; 0 where it is no normal number. NaN stays NaN."""
    raise NotImplementedError("for compiled functions")


@overload(exponential, jit_options=OPTIONS)  # type: ignore[untyped-decorator]
def _exponential(x: Any) -> Any:
    if x == types.float32:

        def single(x: Any) -> Any:
            power, rest = _split_32(_SMALLEST_32 if x < _SMALLEST_32 else x)
            return _ZERO_32 if x < _SMALLEST_32 else power * rest + power

        return single

    def double(x: Any) -> Any:
        power, rest = _split_64(_SMALLEST_64 if x < _SMALLEST_64 else x)
        return 0.0 if x < _SMALLEST_64 else power * rest + power

    return double


def hyperbolic_tangent(x: Any) -> Any:
    """tanh(x) to a few units: m / (m + 2) with m = exp(2 |x|) - 1, which keeps small x exact."""
    raise NotImplementedError("for compiled functions")


@overload(hyperbolic_tangent, jit_options=OPTIONS)  # type: ignore[untyped-decorator]
def _hyperbolic_tangent(x: Any) -> Any:
    if x == types.float32:

        def single(x: Any) -> Any:
            twice = abs(x) * _TWO_32
            power, rest = _split_32(_LARGEST_32 if twice > _LARGEST_32 else twice)
            m = power * rest + (power - _ONE_32)
            result = m / (m + _TWO_32)
            return -result if x < _ZERO_32 else result

        return single

    def double(x: Any) -> Any:
        twice = abs(x) * 2.0
        power, rest = _split_64(_LARGEST_64 if twice > _LARGEST_64 else twice)
        m = power * rest + (power - 1.0)
        result = m / (m + 2.0)
        return -result if x < 0.0 else result

    return double
