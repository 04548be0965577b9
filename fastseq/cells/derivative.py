"""Gradients of traced expressions, by going through the graph backwards once.

For an output with gradient ``g``, every node passes on ``g`` times its derivative, written where
possible in terms of the node's own value (``sigmoid' = y (1 - y)``), which forward has at hand.
Since equal nodes are one object, the result has no expression twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastseq.cells.expression import Expression, constant, make, topological

__all__ = ["gradients"]


def gradients(
    outputs: Mapping[Expression, Expression], wanted: Sequence[Expression]
) -> list[Expression]:
    """The gradient of ``sum(output * gradient)`` with respect to each node of ``wanted``.

    Args:
        outputs: the gradient that arrives at each output.
        wanted: leaves of the graph; one that no output depends on gets the constant 0.
    """
    found: dict[Expression, Expression] = {}

    def add(node: Expression, gradient: Expression) -> None:
        found[node] = found[node] + gradient if node in found else gradient

    for output, gradient in outputs.items():
        add(output, gradient)
    for node in reversed(topological(outputs)):
        if node in found and node.arguments:
            for argument, passed in zip(node.arguments, _passed_on(node, found[node]), strict=True):
                if passed is not None:
                    add(argument, passed)
    return [found.get(node, constant(0.0)) for node in wanted]


def _passed_on(node: Expression, g: Expression) -> tuple[Expression | None, ...]:
    """What reaches each argument of ``node``, of whose value ``g`` is the gradient."""
    y, operation = node, node.operation
    zero = constant(0.0)
    if operation in ("less", "less_equal"):
        return None, None
    if operation == "where":
        condition = node.arguments[0]
        return None, make("where", condition, g, zero), make("where", condition, zero, g)
    if len(node.arguments) == 1:
        (a,) = node.arguments
        return (_unary(operation, a, y, g),)
    a, b = node.arguments
    if operation == "add":
        return g, g
    if operation == "subtract":
        return g, -g
    if operation == "multiply":
        return g * b, g * a
    if operation == "divide":
        return g / b, -(g * y / b)
    assert operation in ("maximum", "minimum")
    # What an argument gets if it is the larger, and if it is the smaller one; half at a tie.
    larger = make("where", b < a, g, make("where", a < b, zero, 0.5 * g))
    smaller = make("where", a < b, g, make("where", b < a, zero, 0.5 * g))
    return (larger, smaller) if operation == "maximum" else (smaller, larger)


def _unary(operation: str, a: Expression, y: Expression, g: Expression) -> Expression:
    zero = constant(0.0)
    if operation == "negate":
        return -g
    if operation == "sigmoid":
        return g * (y * (1.0 - y))
    if operation == "tanh":
        return g * (1.0 - y * y)
    if operation == "exp":
        return g * y
    if operation == "log":
        return g / a
    if operation == "sqrt":
        return 0.5 * g / y
    if operation == "softplus":
        return g * make("sigmoid", a)
    if operation == "relu":
        # As in torch a NaN lets the gradient pass.
        return make("where", y <= 0.0, zero, g)
    assert operation == "absolute"
    return make("where", zero < a, g, make("where", a < zero, -g, zero))
