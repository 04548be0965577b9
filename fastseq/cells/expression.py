"""Values that stand for numbers while a cell is traced: a graph where equal nodes are one object.

A node is an operation on other nodes, a constant, or a leaf: a value that a driver brings in, such
as gate ``x[0]`` or state ``s[1]``. Since equal expressions are the same object, a graph holds every
common subexpression once, and comparing expressions is comparing identities.

Only what changes no bit of a result is simplified: constants are folded, zeros are not added and
ones not multiplied.
"""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

__all__ = [
    "FUNCTIONS",
    "CellTraceError",
    "Expression",
    "constant",
    "leaf",
    "make",
    "topological",
]

# Operations of one argument that cost a series or a division: worth keeping for backward.
FUNCTIONS = frozenset({"sigmoid", "tanh", "exp", "log", "softplus", "sqrt"})
COMPARISONS = frozenset({"less", "less_equal"})

_PACKAGE = str(Path(__file__).resolve().parents[1])


class CellTraceError(TypeError):
    """A cell's function does something that cannot be turned into a kernel."""


def refuse(what: str, remedy: str) -> NoReturn:
    """Raise the error for the line of the user's function that is running now.

    Raises:
        CellTraceError: always.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    raise CellTraceError(f"{what}{_location(frame)}\n{remedy}")


def _location(frame: Any) -> str:
    if frame is None:
        return ""
    summary = traceback.extract_stack(frame, limit=1)[0]
    source = f"\n    {summary.line}" if summary.line else ""
    return f"\n  File {summary.filename!r}, line {summary.lineno}, in {summary.name}{source}"


class Expression:
    """A node of the graph; made by :func:`make`, :func:`leaf` and :func:`constant` only.

    Attributes:
        operation: what is computed; ``"leaf"`` and ``"constant"`` compute nothing.
        arguments: the nodes it is computed from.
        value: a constant's number, a leaf's name such as ``("x", 0)``, a power's exponent.
    """

    __slots__ = ("arguments", "operation", "value")

    operation: str
    arguments: tuple[Expression, ...]
    value: Any

    def __add__(self, other: Any) -> Expression:
        return make("add", self, other)

    def __radd__(self, other: Any) -> Expression:
        return make("add", other, self)

    def __sub__(self, other: Any) -> Expression:
        return make("subtract", self, other)

    def __rsub__(self, other: Any) -> Expression:
        return make("subtract", other, self)

    def __mul__(self, other: Any) -> Expression:
        return make("multiply", self, other)

    def __rmul__(self, other: Any) -> Expression:
        return make("multiply", other, self)

    def __truediv__(self, other: Any) -> Expression:
        return make("divide", self, other)

    def __rtruediv__(self, other: Any) -> Expression:
        return make("divide", other, self)

    def __neg__(self) -> Expression:
        return make("negate", self)

    def __pos__(self) -> Expression:
        return self

    def __abs__(self) -> Expression:
        return make("absolute", self)

    def __pow__(self, exponent: Any) -> Expression:
        if isinstance(exponent, Expression) and exponent.operation != "constant":
            refuse(
                "a power with a variable exponent cannot be traced:",
                "Write exp(b * log(a)) for a ** b.",
            )
        return _power(self, exponent.value if isinstance(exponent, Expression) else exponent)

    def __rpow__(self, base: Any) -> Expression:
        refuse(
            f"{base!r} to the power of a traced value cannot be traced:",
            f"Write exp({math.log(base):.17g} * b) for it." if base > 0 else "Write it with exp.",
        )

    # A comparison is a value for where(); it cannot decide which Python line runs next.
    def __lt__(self, other: Any) -> Expression:
        return make("less", self, other)

    def __le__(self, other: Any) -> Expression:
        return make("less_equal", self, other)

    def __gt__(self, other: Any) -> Expression:
        return make("less", other, self)

    def __ge__(self, other: Any) -> Expression:
        return make("less_equal", other, self)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if isinstance(other, (Expression, int, float)):
            refuse(
                "a traced value has no number yet that could be equal to another",
                "Compare with < or <= inside where(condition, a, b).",
            )
        return NotImplemented

    # Nodes are the same or different objects; distinct ones never have the same hash.
    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        refuse(
            "a cell cannot branch on a value: units and sequences would need different lines",
            "Compute both sides and choose with where(condition, a, b), maximum or minimum.",
        )

    def __float__(self) -> float:
        refuse(
            "a traced value has no number yet, as float(), math.* and int() ask for one",
            f"Use the functions of fastseq.cells: {vocabulary_names()}.",
        )

    __int__ = __index__ = __float__

    def __iter__(self) -> NoReturn:
        refuse(
            "a traced value is the value of one unit: it cannot be indexed or iterated over",
            "A cell computes unit by unit; values of other units come in through the gates.",
        )

    def __getitem__(self, index: object) -> NoReturn:
        self.__iter__()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        refuse(
            f"a traced value has no method or attribute {name!r}:",
            f"Use the functions of fastseq.cells: {vocabulary_names()}.",
        )

    def __array_ufunc__(self, function: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return _foreign(getattr(function, "__name__", str(function)), inputs, options)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _foreign(getattr(function, "__name__", str(function)), args, kwargs or {})

    def __repr__(self) -> str:
        if self.operation == "leaf":
            return f"{self.value[0]}[{self.value[1]}]"
        if self.operation == "constant":
            return repr(self.value)
        inner = ", ".join(map(repr, self.arguments))
        return f"{self.operation}({inner}{'' if self.value is None else f', {self.value}'})"

    def __deepcopy__(self, memo: Any) -> Expression:
        return self

    def __copy__(self) -> Expression:
        return self

    def __reduce__(self) -> Any:
        return _rebuild, (self.operation, self.arguments, self.value)


_known: dict[tuple[Any, ...], Expression] = {}


def _rebuild(operation: str, arguments: tuple[Expression, ...], value: Any) -> Expression:
    # A number's text tells 0.0 from -0.0 and NaN from NaN, which equality does not.
    key = (operation, tuple(map(id, arguments)), repr(value))
    node = _known.get(key)
    if node is None:
        node = object.__new__(Expression)
        node.operation, node.arguments, node.value = operation, arguments, value
        _known[key] = node
    return node


def leaf(kind: str, index: int) -> Expression:
    """A value that comes from outside: ``leaf("x", 0)`` is gate 0 of the input product."""
    return _rebuild("leaf", (), (kind, index))


def constant(value: float) -> Expression:
    """A number."""
    return _rebuild("constant", (), float(value))


def _as_expression(value: Any) -> Expression:
    if isinstance(value, Expression):
        return value
    if isinstance(value, (int, float)) or (
        hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0
    ):
        return constant(float(value))
    if isinstance(value, (tuple, list)):
        refuse(
            f"arithmetic on a whole {type(value).__name__} of gates or states cannot be traced:",
            "Take one of them: x[0], h[0], s[0].",
        )
    refuse(
        f"a {type(value).__name__} cannot take part in a cell's formula:",
        "Use numbers, gates, states and parameters. A learned value per unit is one of "
        "parameters=(...).",
    )


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


_FOLD: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "negate": lambda a: -a,
    "absolute": abs,
    "sigmoid": _sigmoid,
    "tanh": math.tanh,
    "exp": math.exp,
    "log": math.log,
    "sqrt": math.sqrt,
    "softplus": lambda a: max(a, 0.0) + math.log1p(math.exp(-abs(a))),
    "relu": lambda a: max(a, 0.0),
    "maximum": max,
    "minimum": min,
}


def make(operation: str, *operands: Any) -> Expression:
    """The node for ``operation`` on expressions and numbers."""
    arguments = tuple(map(_as_expression, operands))
    for argument in arguments[1 if operation == "where" else 0 :]:
        if argument.operation in COMPARISONS:
            refuse(
                "a comparison is no number:",
                "Use it as the condition of where(condition, a, b).",
            )
    if operation in _FOLD and all(a.operation == "constant" for a in arguments):
        try:
            return constant(_FOLD[operation](*(a.value for a in arguments)))
        except (ArithmeticError, ValueError):
            pass  # left to the kernel, which knows Inf and NaN
    if operation in ("add", "subtract", "multiply", "divide"):
        first, second = arguments
        neutral = 0.0 if operation in ("add", "subtract") else 1.0
        if second.operation == "constant" and second.value == neutral:
            return first
        if operation in ("add", "multiply"):
            if first.operation == "constant" and first.value == neutral:
                return second
            # One node for both orders: IEEE addition and multiplication commute.
            if _order(first) > _order(second):
                arguments = (second, first)
    return _rebuild(operation, arguments, None)


def _order(node: Expression) -> tuple[bool, str]:
    """Leaves before the rest; otherwise as written."""
    return (node.operation != "leaf", repr(node.value) if node.operation == "leaf" else "")


def _power(base: Expression, exponent: float) -> Expression:
    if not isinstance(exponent, (int, float)) or 2 * exponent != int(2 * exponent):
        refuse(
            f"the power {exponent!r} cannot be traced: only whole and half numbers can",
            "Write exp(b * log(a)) for a ** b.",
        )
    if exponent < 0:
        return make("divide", 1.0, _power(base, -exponent))
    result = constant(1.0)
    whole = int(exponent)
    square = base
    while whole:
        if whole & 1:
            result = make("multiply", result, square)
        whole >>= 1
        if whole:
            square = make("multiply", square, square)
    if exponent != int(exponent):
        result = make("multiply", result, make("sqrt", base))
    return result


def _foreign(name: str, operands: Sequence[Any], options: dict[str, Any]) -> Any:
    """A function of torch or NumPy, on traced values: ours of the same name."""
    from fastseq.cells import vocabulary

    ours = vocabulary.FOREIGN.get(name)
    if ours is None or options:
        refuse(
            f"{name}{f' with {sorted(options)}' if options else ''} cannot be traced:",
            f"Use the functions of fastseq.cells: {vocabulary_names()}.",
        )
    return ours(*operands)


def vocabulary_names() -> str:
    """The functions a cell may call, for messages."""
    from fastseq.cells import vocabulary

    return ", ".join(vocabulary.__all__)


def topological(outputs: Iterable[Expression]) -> list[Expression]:
    """Every node that ``outputs`` are computed from, arguments before what uses them."""
    order: list[Expression] = []
    seen: set[int] = set()

    def visit(node: Expression) -> None:
        if id(node) not in seen:
            seen.add(id(node))
            for argument in node.arguments:
                visit(argument)
            order.append(node)

    for output in outputs:
        visit(output)
    return order
