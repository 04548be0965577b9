"""The functions a cell may use; each also takes tensors, so that a cell runs on them as it stands.

A cell's function finds these names without importing them. Type checkers and linters do not know
that: ``from fastseq.cells import sigmoid, tanh`` satisfies them.

At ties and kinks the derivatives are torch's: that of ``relu`` and ``absolute`` is 0 at 0,
``maximum`` and ``minimum`` give half to each of two equal arguments, ``where`` gives all to the
side that was chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastseq.cells.expression import COMPARISONS, Expression, make, refuse

__all__ = [
    "absolute",
    "exp",
    "log",
    "maximum",
    "minimum",
    "relu",
    "sigmoid",
    "softplus",
    "sqrt",
    "tanh",
    "where",
]


def _apply(operation: str, *operands: Any) -> Any:
    if any(isinstance(operand, Expression) for operand in operands):
        return make(operation, *operands)
    if all(isinstance(operand, (int, float)) for operand in operands):
        folded = make(operation, *operands)
        if folded.operation == "constant":  # and not one that only a kernel can tell: sqrt(-1)
            return folded.value
    from fastseq.cells.evaluate import OPERATORS

    return OPERATORS[operation](*operands)


def sigmoid(a: Any) -> Any:
    """``1 / (1 + exp(-a))``."""
    return _apply("sigmoid", a)


def tanh(a: Any) -> Any:
    """Hyperbolic tangent."""
    return _apply("tanh", a)


def exp(a: Any) -> Any:
    """Exponential."""
    return _apply("exp", a)


def log(a: Any) -> Any:
    """Natural logarithm."""
    return _apply("log", a)


def relu(a: Any) -> Any:
    """``a`` where it is positive, else 0."""
    return _apply("relu", a)


def softplus(a: Any) -> Any:
    """``log(1 + exp(a))``; ``-softplus(-a)`` is ``log(sigmoid(a))`` without overflow."""
    return _apply("softplus", a)


def sqrt(a: Any) -> Any:
    """Square root."""
    return _apply("sqrt", a)


def absolute(a: Any) -> Any:
    """``|a|``; ``abs(a)`` is the same."""
    return _apply("absolute", a)


def maximum(a: Any, b: Any) -> Any:
    """The larger of two."""
    return _apply("maximum", a, b)


def minimum(a: Any, b: Any) -> Any:
    """The smaller of two."""
    return _apply("minimum", a, b)


def where(condition: Any, a: Any, b: Any) -> Any:
    """``a`` where ``condition``, a comparison, holds, else ``b``."""
    if isinstance(condition, bool):
        return a if condition else b
    if isinstance(condition, Expression) and condition.operation not in COMPARISONS:
        refuse("where without a comparison cannot be traced:", "Write where(x[0] > 0, a, b).")
    return _apply("where", condition, a, b)


# Names of torch's and NumPy's functions that mean the same.
FOREIGN: dict[str, Callable[..., Any]] = {
    "sigmoid": sigmoid,
    "expit": sigmoid,
    "tanh": tanh,
    "exp": exp,
    "log": log,
    "relu": relu,
    "softplus": softplus,
    "sqrt": sqrt,
    "abs": absolute,
    "absolute": absolute,
    "maximum": maximum,
    "minimum": minimum,
    "where": where,
    # Not by the operators: a tensor or NumPy number on the left would ask for its function again.
    "add": lambda a, b: make("add", a, b),
    "subtract": lambda a, b: make("subtract", a, b),
    "sub": lambda a, b: make("subtract", a, b),
    "multiply": lambda a, b: make("multiply", a, b),
    "mul": lambda a, b: make("multiply", a, b),
    "divide": lambda a, b: make("divide", a, b),
    "true_divide": lambda a, b: make("divide", a, b),
    "div": lambda a, b: make("divide", a, b),
    "less": lambda a, b: make("less", a, b),
    "lt": lambda a, b: make("less", a, b),
    "less_equal": lambda a, b: make("less_equal", a, b),
    "le": lambda a, b: make("less_equal", a, b),
    "greater": lambda a, b: make("less", b, a),
    "gt": lambda a, b: make("less", b, a),
    "greater_equal": lambda a, b: make("less_equal", b, a),
    "ge": lambda a, b: make("less_equal", b, a),
    "neg": lambda a: -a,
    "negative": lambda a: -a,
}
