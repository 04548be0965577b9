"""The few operators that modules are written in, so that ``modules.py`` serves every library.

A library implements ``Operators`` with its own graph: what such a graph fuses, and how it lays out
heads, is the library's concern.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

# A value inside a library's graph.
Value = Any


class Operators(Protocol):
    """Builds a graph, one operator at a time. All shapes are known."""

    def input(self, name: str, value: Tensor) -> Value:
        """What is given anew in every call."""
        ...

    def linear(
        self, x: Value, weight: Tensor, bias: Tensor | None, activation: str | None = None
    ) -> Value:
        """``activation(x weight^T + bias)`` over the last dimension; constant weights.

        Args:
            x: (..., in).
            weight: (out, in).
            bias: (out) or None.
            activation: None, "relu", "gelu", "gelu_tanh" or "silu".
        """
        ...

    def add(self, x: Value, y: Value) -> Value:
        """The sum of two values of one shape."""
        ...

    def layer_norm(
        self, x: Value, residual: Value | None, weight: Tensor, bias: Tensor, epsilon: float
    ) -> Value:
        """The norm of ``x + residual`` over the last dimension."""
        ...

    def rms_norm(self, x: Value, residual: Value, weight: Tensor, epsilon: float) -> Value:
        """The norm of ``x + residual`` over the last dimension, without mean and bias."""
        ...

    def attention(
        self,
        query: Value,
        key: Value,
        value: Value,
        heads: int,
        *,
        mask: Value | None = None,
        causal: bool = False,
        weights: bool = False,
    ) -> tuple[Value, Value | None]:
        """Multi-head attention without its projections.

        Args:
            query: (B, Sq, heads * E).
            key: (B, Skv, heads * E).
            value: (B, Skv, heads * E).
            heads: Number of heads.
            mask: An input that is added to the scores, (B, 1, Sq, Skv), or None.
            causal: Query i sees keys up to i; not together with a mask.
            weights: Whether to return the weights' mean over heads, too.

        Returns:
            (B, Sq, heads * E), and (B, Sq, Skv) or None.
        """
        ...
