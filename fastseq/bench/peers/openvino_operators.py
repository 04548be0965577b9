"""``Operators`` as openvino's own, which needs no converter and no ONNX."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class OpenvinoOperators:
    """Builds nodes of openvino's graph; values are its outputs.

    Args:
        fused_attention: Whether attention is openvino's operator for it, or two products and a
            softmax.
    """

    def __init__(self, fused_attention: bool) -> None:
        import openvino
        from openvino import opset13

        self._library: Any = openvino
        self.operators: Any = opset13
        self.fused_attention = fused_attention
        self.parameters: list[Any] = []
        self.feeds: list[Tensor] = []
        self._causal: dict[int, Any] = {}

    def input(self, name: str, value: Tensor) -> Any:
        """See ``Operators``."""
        types = self._library.Type
        kinds = {torch.float32: types.f32, torch.int32: types.i32, torch.bool: types.boolean}
        parameter = self.operators.parameter(list(value.shape), kinds[value.dtype], name=name)
        self.parameters.append(parameter)
        self.feeds.append(value)
        return parameter.output(0)

    def constant(self, value: Tensor) -> Any:
        """A tensor inside the model."""
        return self.operators.constant(value.detach().contiguous().numpy()).output(0)

    def integers(self, *values: int) -> Any:
        """Axes or a shape."""
        return self.constant(torch.tensor(values))

    def number(self, value: float) -> Any:
        """A scalar inside the model."""
        return self.constant(torch.tensor(value))

    def linear(
        self, x: Any, weight: Tensor, bias: Tensor | None, activation: str | None = None
    ) -> Any:
        """See ``Operators``."""
        y = self.operators.matmul(x, self.constant(weight), False, True)
        if bias is not None:
            # All of its dimensions, because only then the product takes it along.
            rank = len(x.get_shape())
            shaped = bias.reshape([1] * (rank - 1) + [-1])
            y = self.operators.add(y, self.constant(shaped))
        if activation == "relu":
            y = self.operators.relu(y)
        elif activation in ("gelu", "gelu_tanh"):
            y = self.operators.gelu(y, "tanh" if activation == "gelu_tanh" else "erf")
        elif activation == "silu":
            y = self.operators.swish(y)
        return y.output(0)

    def add(self, x: Any, y: Any) -> Any:
        """See ``Operators``."""
        return self.operators.add(x, y).output(0)

    def layer_norm(
        self, x: Any, residual: Any | None, weight: Tensor, bias: Tensor, epsilon: float
    ) -> Any:
        """See ``Operators``."""
        make = self.operators
        if residual is not None:
            x = make.add(x, residual)
        y = make.mvn(x, self.integers(-1), True, epsilon, "inside_sqrt")
        y = make.multiply(y, self.constant(weight))
        return make.add(y, self.constant(bias)).output(0)

    def rms_norm(self, x: Any, residual: Any, weight: Tensor, epsilon: float) -> Any:
        """See ``Operators``."""
        make = self.operators
        x = make.add(x, residual)
        # Written as openvino looks for it, to put its own operator in the place.
        square = make.power(x, self.number(2.0))
        mean = make.reduce_mean(square, self.integers(-1), True)
        root = make.sqrt(make.add(mean, self.number(epsilon)))
        scaled = make.multiply(x, make.divide(self.number(1.0), root))
        return make.multiply(scaled, self.constant(weight)).output(0)

    def attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        heads: int,
        *,
        mask: Any | None = None,
        causal: bool = False,
        weights: bool = False,
    ) -> tuple[Any, Any | None]:
        """See ``Operators``."""
        make = self.operators
        batch, queries, width = query.get_shape()
        keys = key.get_shape()[1]
        size = width // heads

        def split(x: Any, rows: int) -> Any:
            apart = make.reshape(x, self.integers(batch, rows, heads, size), False)
            return make.transpose(apart, self.integers(0, 2, 1, 3))

        q, k, v = split(query, queries), split(key, keys), split(value, keys)
        averages = None
        if self.fused_attention and not weights:
            extra = [] if mask is None else [mask]
            mixed = make.scaled_dot_product_attention(q, k, v, *extra, causal=causal)
        else:
            scale = self.number(size**-0.5)
            scores = make.multiply(make.matmul(q, k, False, True), scale)
            if causal:
                mask = self._causal_mask(keys)
            if mask is not None:
                scores = make.add(scores, mask)
            probabilities = make.softmax(scores, 3)
            mixed = make.matmul(probabilities, v, False, False)
            if weights:
                averages = make.reduce_mean(probabilities, self.integers(1), False).output(0)
        turned = make.transpose(mixed, self.integers(0, 2, 1, 3))
        output = make.reshape(turned, self.integers(batch, queries, width), False)
        return output.output(0), averages

    def _causal_mask(self, rows: int) -> Any:
        if rows not in self._causal:
            hidden = torch.full((1, 1, rows, rows), float("-inf")).triu(1)
            self._causal[rows] = self.constant(hidden)
        return self._causal[rows]
