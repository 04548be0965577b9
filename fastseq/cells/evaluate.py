"""A traced expression on tensors: the differentiable definition of what kernels compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastseq.cells.expression import Expression, topological

__all__ = ["OPERATORS", "evaluate"]


def _like(value: Any, *others: Any) -> Tensor:
    """A number as a tensor of the others' dtype, where torch's operator takes no numbers."""
    if isinstance(value, Tensor):
        return value
    other = next((o for o in others if isinstance(o, Tensor)), None)
    return torch.as_tensor(value) if other is None else other.new_full((), value)


OPERATORS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "negate": lambda a: -a,
    "absolute": lambda a: torch.abs(_like(a)),
    "sigmoid": lambda a: torch.sigmoid(_like(a)),
    "tanh": lambda a: torch.tanh(_like(a)),
    "exp": lambda a: torch.exp(_like(a)),
    "log": lambda a: torch.log(_like(a)),
    "sqrt": lambda a: torch.sqrt(_like(a)),
    "softplus": lambda a: -functional.logsigmoid(-_like(a)),
    "relu": lambda a: torch.relu(_like(a)),
    "maximum": lambda a, b: torch.maximum(_like(a, b), _like(b, a)),
    "minimum": lambda a, b: torch.minimum(_like(a, b), _like(b, a)),
    "less": lambda a, b: a < b,
    "less_equal": lambda a, b: a <= b,
    "where": lambda c, a, b: torch.where(c, _like(a, b), _like(b, a)),
}


def evaluate(
    outputs: Sequence[Expression], leaves: Mapping[tuple[str, int], Any]
) -> tuple[Any, ...]:
    """The values of ``outputs``, given those of the leaves by name, ``("x", 0)`` and so on."""
    values: dict[Expression, Any] = {}
    for node in topological(outputs):
        if node.operation == "leaf":
            values[node] = leaves[node.value]
        elif node.operation == "constant":
            values[node] = node.value
        else:
            operands = (values[argument] for argument in node.arguments)
            values[node] = OPERATORS[node.operation](*operands)
    return tuple(values[output] for output in outputs)
