"""LLVM instructions on whole vectors, and exp, tanh and the like made of them.

Numba's own way to vector code is to write scalar loops and hope; LLVM gives up on loops with more
than a few arrays, and exp or tanh in a loop become calls, one per element. The functions here write
the instructions of one vector instead. They are what the intrinsics of the modules beside this one
are made of.

exp, tanh and sigmoid are those of ``csrc/cpu/math.h``, which describes the method and its error.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import llvmlite.binding
from llvmlite import ir

__all__ = ["Vectors", "lanes", "register_bytes", "tile_rows"]

_EXP = {
    4: {
        "q": (
            0.5000000014276589,
            0.16666666682523657,
            0.041666456904062641,
            0.0083333100347067069,
            0.0013934531655088020,
            0.00019891969905683137,
        ),
        "ln2": (float.fromhex("0x1.62e4p-1"), float.fromhex("0x1.7f7d1cp-20")),
        "magic": float.fromhex("0x1.8p23"),
        "mantissa": 23,
        "overflow": 88.722839,
        "underflow": -87.3365402,
    },
    8: {
        "q": (
            0.5,
            0.16666666666666666667,
            0.04166666666666667780798,
            0.008333333333333334075955,
            0.001388888888887827849893,
            0.0001984126984126276891421,
            0.0000248015873385404143966,
            0.000002755731924861720845224,
            2.75572610555081036412e-7,
            2.505206961223467670407e-8,
            2.091895234599852527658e-9,
            1.608717090794062639622e-10,
        ),
        "ln2": (float.fromhex("0x1.62e42fefa3800p-1"), float.fromhex("0x1.ef35793c76730p-45")),
        "magic": float.fromhex("0x1.8p52"),
        "mantissa": 52,
        "overflow": 709.782712893384,
        "underflow": -708.39641853226408,
    },
}
_INVERSE_LN2 = 1.44269504088896340735992468100189214
# log(2) in two parts for log: n * high is exact.
_LOG_LN2 = {
    4: (0.693359375, -2.12194440e-4),
    8: (6.93147180369123816490e-1, 1.90821492927058770002e-10),
}


@functools.cache
def _features() -> dict[str, bool]:
    return dict(llvmlite.binding.get_host_cpu_features())


@functools.cache
def register_bytes() -> int:
    """Bytes of this processor's widest vector register that LLVM may use."""
    features = _features()
    if features.get("avx512f"):
        return 64
    return 32 if features.get("avx2") else 16


def lanes(item_bytes: int) -> int:
    """Elements of a vector."""
    return register_bytes() // item_bytes


def tile_rows() -> int:
    """Rows of a tile of two vectors of which all sums fit the registers."""
    return 12 if register_bytes() == 64 else 6


class Vectors:
    """Writes instructions on vectors of ``count`` floats of ``item_bytes`` bytes."""

    def __init__(self, builder: ir.IRBuilder, item_bytes: int, count: int | None = None) -> None:
        self.builder = builder
        self.item_bytes = item_bytes
        self.count = lanes(item_bytes) if count is None else count
        self.scalar = ir.FloatType() if item_bytes == 4 else ir.DoubleType()
        self.integer = ir.IntType(item_bytes * 8)
        self.type = ir.VectorType(self.scalar, self.count)
        self.integers = ir.VectorType(self.integer, self.count)

    # --- memory: addresses are 64-bit integers, offsets are in elements

    def pointer(self, address: Any, offset: Any = None, kind: ir.Type | None = None) -> Any:
        """``address + offset`` as a pointer to a vector (or ``kind``)."""
        builder = self.builder
        if offset is not None:
            if isinstance(offset, int):
                offset = ir.Constant(ir.IntType(64), offset)
            scaled = builder.mul(offset, ir.Constant(ir.IntType(64), self.item_bytes))
            address = builder.add(address, scaled)
        return builder.inttoptr(address, ir.PointerType(kind or self.type))

    def load(self, address: Any, offset: Any = None) -> Any:
        """A vector from memory of any alignment."""
        found = self.builder.load(self.pointer(address, offset))
        found.align = self.item_bytes
        return found

    def store(self, value: Any, address: Any, offset: Any = None) -> None:
        """A vector to memory of any alignment."""
        stored = self.builder.store(value, self.pointer(address, offset))
        stored.align = self.item_bytes

    def load_broadcast(self, address: Any, offset: Any = None) -> Any:
        """One element from memory in every lane."""
        pointer = self.pointer(address, offset, self.scalar)
        return self.broadcast(self.builder.load(pointer))

    # --- values

    def broadcast(self, scalar: Any) -> Any:
        """A scalar in every lane."""
        builder, zero = self.builder, ir.Constant(ir.IntType(32), 0)
        one = builder.insert_element(ir.Constant(self.type, ir.Undefined), scalar, zero)
        mask = ir.Constant(ir.VectorType(ir.IntType(32), self.count), [0] * self.count)
        return builder.shuffle_vector(one, ir.Constant(self.type, ir.Undefined), mask)

    def constant(self, value: float) -> Any:
        """A number in every lane."""
        return ir.Constant(self.type, [ir.Constant(self.scalar, value)] * self.count)

    def integer_constant(self, value: int) -> Any:
        """An integer in every lane."""
        return ir.Constant(self.integers, [ir.Constant(self.integer, value)] * self.count)

    # 'contract' lets LLVM fuse a product with a sum; nothing else about IEEE arithmetic changes.
    def add(self, a: Any, b: Any) -> Any:
        """``a + b``."""
        return self.builder.fadd(a, b, flags=("contract",))

    def subtract(self, a: Any, b: Any) -> Any:
        """``a - b``."""
        return self.builder.fsub(a, b, flags=("contract",))

    def multiply(self, a: Any, b: Any) -> Any:
        """``a * b``."""
        return self.builder.fmul(a, b, flags=("contract",))

    def divide(self, a: Any, b: Any) -> Any:
        """``a / b``."""
        return self.builder.fdiv(a, b)

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """``a * b + c``, fused where the processor can."""
        return self.add(self.multiply(a, b), c)

    def negate(self, a: Any) -> Any:
        """``-a``."""
        return self.builder.fneg(a)

    def less(self, a: Any, b: Any) -> Any:
        """``a < b``, false for NaN."""
        return self.builder.fcmp_ordered("<", a, b)

    def less_equal(self, a: Any, b: Any) -> Any:
        """``a <= b``, false for NaN."""
        return self.builder.fcmp_ordered("<=", a, b)

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        """``a`` in lanes where ``condition`` holds, else ``b``."""
        return self.builder.select(condition, a, b)

    def maximum(self, a: Any, b: Any) -> Any:
        """The larger; NaN if either is."""
        larger = self.where(self.less(b, a), a, b)
        return self.where(self.builder.fcmp_unordered("uno", a, a), a, larger)

    def minimum(self, a: Any, b: Any) -> Any:
        """The smaller; NaN if either is."""
        smaller = self.where(self.less(a, b), a, b)
        return self.where(self.builder.fcmp_unordered("uno", a, a), a, smaller)

    def relu(self, a: Any) -> Any:
        """``max(a, 0)``; NaN stays."""
        return self.where(self.less(a, self.constant(0.0)), self.constant(0.0), a)

    def bits(self, a: Any) -> Any:
        """The same bits as integers."""
        return self.builder.bitcast(a, self.integers)

    def floats(self, a: Any) -> Any:
        """The same bits as floats."""
        return self.builder.bitcast(a, self.type)

    @property
    def _sign(self) -> Any:
        return self.integer_constant(-(1 << (self.item_bytes * 8 - 1)))

    def absolute(self, a: Any) -> Any:
        """``|a|``."""
        mask = self.integer_constant((1 << (self.item_bytes * 8 - 1)) - 1)
        return self.floats(self.builder.and_(self.bits(a), mask))

    def _with_sign_of(self, magnitude: Any, a: Any) -> Any:
        sign = self.builder.and_(self.bits(a), self._sign)
        return self.floats(self.builder.or_(self.bits(self.absolute(magnitude)), sign))

    def minus_magnitude(self, a: Any) -> Any:
        """``-|a|``."""
        return self.floats(self.builder.or_(self.bits(a), self._sign))

    def sqrt(self, a: Any) -> Any:
        """Square root, by the processor's instruction."""
        name = f"llvm.sqrt.v{self.count}f{self.item_bytes * 8}"
        function_type = ir.FunctionType(self.type, [self.type])
        module = self.builder.module
        declared = module.globals.get(name) or ir.Function(module, function_type, name)
        return self.builder.call(declared, [a])

    # --- series

    def _at_least(self, a: Any, bound: float) -> Any:
        """``max(a, bound)``; NaN stays."""
        return self.where(self.less(a, self.constant(bound)), self.constant(bound), a)

    def polynomial(self, x: Any, coefficients: tuple[float, ...]) -> Any:
        """``c[0] + c[1] x + ...``, in pairs: half as long a chain as one by one."""
        terms = list(coefficients)
        if len(terms) % 2:
            terms.append(0.0)
        square = self.multiply(x, x)
        result = None
        for index in range(len(terms) - 2, -1, -2):
            pair = self.multiply_add(
                self.constant(terms[index + 1]), x, self.constant(terms[index])
            )
            result = pair if result is None else self.multiply_add(result, square, pair)
        return result

    def _reduced_exp(self, x: Any) -> tuple[Any, Any]:
        """``(2^n, p)`` with ``exp(x) = 2^n (1 + p)``; x must not leave exp's range."""
        known = _EXP[self.item_bytes]
        magic = self.constant(known["magic"])  # type: ignore[arg-type]
        shifted = self.multiply_add(x, self.constant(_INVERSE_LN2), magic)
        n = self.negate(self.builder.fsub(shifted, magic))
        high, low = cast(tuple[float, float], known["ln2"])
        r = self.multiply_add(n, self.constant(high), x)
        r = self.multiply_add(n, self.constant(low), r)
        q = self.polynomial(r, known["q"])  # type: ignore[arg-type]
        p = self.multiply_add(self.multiply(r, r), q, r)
        # The low mantissa bits of `shifted` hold n; moved up into the exponent they make 2^n.
        moved = self.builder.shl(
            self.bits(shifted),
            self.integer_constant(known["mantissa"]),  # type: ignore[arg-type]
        )
        return self.floats(self.builder.add(moved, self.bits(self.constant(1.0)))), p

    def exp(self, x: Any) -> Any:
        """Exponential; results below the smallest normal number are 0."""
        known = _EXP[self.item_bytes]
        overflow, underflow = known["overflow"], known["underflow"]
        clamped = self._at_least(x, underflow)  # type: ignore[arg-type]
        above = self.less(self.constant(overflow), x)  # type: ignore[arg-type]
        clamped = self.where(above, self.constant(overflow), clamped)  # type: ignore[arg-type]
        scale, p = self._reduced_exp(clamped)
        # 2^128 itself is no float: above zero take half of the scale and double at the end.
        positive = self.less(self.constant(0.0), x)
        step = self.integer_constant(1 << known["mantissa"])  # type: ignore[operator]
        halved = self.floats(self.builder.sub(self.bits(scale), step))
        scale = self.where(positive, halved, scale)
        result = self.multiply_add(scale, p, scale)
        result = self.where(positive, self.add(result, result), result)
        result = self.where(above, self.constant(float("inf")), result)
        below = self.less(x, self.constant(underflow))  # type: ignore[arg-type]
        return self.where(below, self.constant(0.0), result)

    def exp_minus_magnitude(self, x: Any) -> Any:
        """``exp(-|x|)``, which never overflows."""
        underflow: float = _EXP[self.item_bytes]["underflow"]  # type: ignore[assignment]
        negative = self.minus_magnitude(x)
        scale, p = self._reduced_exp(self._at_least(negative, underflow))
        result = self.multiply_add(scale, p, scale)
        below = self.less(negative, self.constant(underflow))
        return self.where(below, self.constant(0.0), result)

    def sigmoid(self, x: Any) -> Any:
        """``1 / (1 + exp(-x))``, both sides to the last digits."""
        e, one = self.exp_minus_magnitude(x), self.constant(1.0)
        numerator = self.where(self.less(x, self.constant(0.0)), e, one)
        return self.divide(numerator, self.add(one, e))

    def tanh(self, x: Any) -> Any:
        """Hyperbolic tangent: ``-expm1(-2|x|) / (2 + expm1(-2|x|))`` with the sign of x."""
        doubled = self.minus_magnitude(self.add(x, x))
        scale, p = self._reduced_exp(self._at_least(doubled, -64.0))
        less_one = self.subtract(scale, self.constant(1.0))
        expm1 = self.multiply_add(scale, p, less_one)
        magnitude = self.divide(expm1, self.add(expm1, self.constant(2.0)))
        return self._with_sign_of(magnitude, x)

    def _twice_atanh(self, s: Any, terms: int) -> Any:
        """``2 atanh(s) = 2s (1 + s^2/3 + s^4/5 + ...)``."""
        square = self.multiply(s, s)
        series = self.polynomial(square, tuple(1 / (2 * i + 3) for i in range(terms)))
        twice = self.add(s, s)
        return self.multiply_add(self.multiply(twice, square), series, twice)

    def softplus(self, x: Any) -> Any:
        """``log(1 + exp(x)) = max(x, 0) + log1p(u)``, ``u = exp(-|x|)``.

        ``log1p(u) = 2 atanh(u / (2 + u))``, and u / (2 + u) is at most 1/3.
        """
        u = self.exp_minus_magnitude(x)
        s = self.divide(u, self.add(u, self.constant(2.0)))
        logarithm = self._twice_atanh(s, 7 if self.item_bytes == 4 else 16)
        return self.add(self.relu(x), logarithm)

    def log(self, x: Any) -> Any:
        """Natural logarithm: ``n ln 2 + 2 atanh((m - 1) / (m + 1))``, ``x = 2^n m``.

        ``m`` lies between sqrt(1/2) and sqrt(2). Denormal numbers count as 0.
        """
        mantissa: int = _EXP[self.item_bytes]["mantissa"]  # type: ignore[assignment]
        builder, bits = self.builder, self.bits(x)
        root_half = self.bits(self.constant(0.7071067811865476))
        # The exponent after moving the mantissa's wrap-around from 1 down to sqrt(1/2).
        n = builder.ashr(builder.sub(bits, root_half), self.integer_constant(mantissa))
        m = self.floats(builder.sub(bits, builder.shl(n, self.integer_constant(mantissa))))
        n = builder.sitofp(n, self.type)
        less_one = self.subtract(m, self.constant(1.0))
        s = self.divide(less_one, self.add(m, self.constant(1.0)))
        high, low = _LOG_LN2[self.item_bytes]
        logarithm = self._twice_atanh(s, 5 if self.item_bytes == 4 else 10)
        result = self.multiply_add(n, self.constant(low), logarithm)
        result = self.multiply_add(n, self.constant(high), result)
        infinity = self.constant(float("inf"))
        result = self.where(self.less(x, infinity), result, x)  # Inf and NaN stay
        smallest = self.constant(2.0**-126 if self.item_bytes == 4 else 2.0**-1022)
        result = self.where(self.less(x, smallest), self.constant(float("-inf")), result)
        return self.where(self.less(x, self.constant(0.0)), self.constant(float("nan")), result)
