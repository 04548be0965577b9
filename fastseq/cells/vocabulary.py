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

from fastseq.cells.expression import Expression, make

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
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "sub": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "mul": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "true_divide": lambda a, b: a / b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "negative": lambda a: -a,
}
