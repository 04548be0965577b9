"""``Operators`` as ONNX nodes, with onnxruntime's own fused ones where they are faster."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.bench.peers.graph import Graph, model_bytes

MICROSOFT = "com.microsoft"

_ACTIVATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "relu": ("Relu", "", {}),
    "gelu": ("Gelu", MICROSOFT, {}),
    "gelu_tanh": ("FastGelu", MICROSOFT, {}),
    "silu": ("QuickGelu", MICROSOFT, {"alpha": 1.0}),
}


class OnnxOperators:
    """Collects nodes; values are their names.

    Args:
        dtype: Of all values.
        fused_attention: Whether attention is onnxruntime's MultiHeadAttention, or two products
            and a softmax.
    """

    def __init__(self, dtype: torch.dtype, fused_attention: bool) -> None:
        self.dtype = dtype
        self.fused_attention = fused_attention
        self.nodes: list[Any] = []
        self.feeds: dict[str, Tensor] = {}
        self.constants: dict[str, Tensor] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._causal: dict[int, str] = {}

    def input(self, name: str, value: Tensor) -> str:
        """See ``Operators``."""
        self.feeds[name] = value
        self.shapes[name] = tuple(value.shape)
        return name

    def constant(self, value: Tensor) -> str:
        """A tensor inside the model."""
        name = f"constant{len(self.constants)}"
        self.constants[name] = value.contiguous()
        self.shapes[name] = tuple(value.shape)
        return name

    def node(
        self,
        kind: str,
        inputs: list[str],
        shape: tuple[int, ...],
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Append a node; the name of its first output."""
        from onnx import helper

        name = f"value{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], domain=domain, **attributes))
        self.shapes[name] = shape
        return name

    def _reshape(self, x: str, shape: tuple[int, ...]) -> str:
        if self.shapes[x] == shape:
            return x
        return self.node("Reshape", [x, self.constant(torch.tensor(shape))], shape)

    def linear(
        self, x: str, weight: Tensor, bias: Tensor | None, activation: str | None = None
    ) -> str:
        """See ``Operators``."""
        shape = self.shapes[x]
        rows, features = torch.Size(shape[:-1]).numel(), weight.size(0)
        # Two dimensions, because only then a product takes its bias and ReLU along.
        flat = self._reshape(x, (rows, shape[-1]))
        inputs = [flat, self.constant(weight.t())]
        inputs += [] if bias is None else [self.constant(bias)]
        y = self.node("Gemm", inputs, (rows, features))
        if activation is not None:
            kind, domain, attributes = _ACTIVATIONS[activation]
            y = self.node(kind, [y], (rows, features), domain, **attributes)
        return self._reshape(y, (*shape[:-1], features))

    def add(self, x: str, y: str) -> str:
        """See ``Operators``."""
        return self.node("Add", [x, y], self.shapes[x])

    def layer_norm(
        self, x: str, residual: str | None, weight: Tensor, bias: Tensor, epsilon: float
    ) -> str:
        """See ``Operators``."""
        # Not SkipLayerNormalization, which does both: 7.3 ms for 4096 rows of 512 on a 2-core
        # Cascade Lake, where these two take 2.7 ms; an encoder layer 79 and 73 ms.
        if residual is not None:
            x = self.add(x, residual)
        inputs = [x, self.constant(weight), self.constant(bias)]
        return self.node("LayerNormalization", inputs, self.shapes[x], epsilon=epsilon, axis=-1)

    def rms_norm(self, x: str, residual: str, weight: Tensor, epsilon: float) -> str:
        """See ``Operators``."""
        inputs = [x, residual, self.constant(weight)]
        name = "SkipSimplifiedLayerNormalization"
        return self.node(name, inputs, self.shapes[x], MICROSOFT, epsilon=epsilon)

    def attention(
        self,
        query: str,
        key: str,
        value: str,
        heads: int,
        *,
        mask: str | None = None,
        causal: bool = False,
        weights: bool = False,
    ) -> tuple[str, str | None]:
        """See ``Operators``."""
        if weights or not self.fused_attention:
            return self._plain(query, key, value, heads, mask, causal, weights)
        inputs = [query, key, value] + ([] if mask is None else ["", "", mask])
        attributes = {"num_heads": heads, "unidirectional": int(causal)}
        shape = self.shapes[query]
        return self.node("MultiHeadAttention", inputs, shape, MICROSOFT, **attributes), None

    def _plain(
        self,
        query: str,
        key: str,
        value: str,
        heads: int,
        mask: str | None,
        causal: bool,
        weights: bool,
    ) -> tuple[str, str | None]:
        batch, queries, width = self.shapes[query]
        keys, size = self.shapes[key][1], width // heads

        def split(x: str, permutation: tuple[int, ...]) -> str:
            apart = self._reshape(x, (batch, self.shapes[x][1], heads, size))
            shape = tuple(self.shapes[apart][axis] for axis in permutation)
            return self.node("Transpose", [apart], shape, perm=permutation)

        q, k, v = (
            split(x, permutation)
            for x, permutation in (
                (query, (0, 2, 1, 3)),
                (key, (0, 2, 3, 1)),
                (value, (0, 2, 1, 3)),
            )
        )
        shape = (batch, heads, queries, keys)
        scores = self.node("MatMul", [q, k], shape)
        scale = self.constant(torch.tensor(size**-0.5, dtype=self.dtype))
        scores = self.node("Mul", [scores, scale], shape)
        if causal:
            mask = self._causal_mask(keys)
        if mask is not None:
            scores = self.node("Add", [scores, mask], shape)
        probabilities = self.node("Softmax", [scores], shape, axis=-1)
        mixed = self.node("MatMul", [probabilities, v], self.shapes[q])
        turned = self.node("Transpose", [mixed], (batch, queries, heads, size), perm=(0, 2, 1, 3))
        output = self._reshape(turned, (batch, queries, width))
        if not weights:
            return output, None
        mean = (batch, queries, keys)
        return output, self.node("ReduceMean", [probabilities], mean, axes=[1], keepdims=0)

    def _causal_mask(self, rows: int) -> str:
        if rows not in self._causal:
            hidden = torch.full((rows, rows), float("-inf"), dtype=self.dtype).triu(1)
            self._causal[rows] = self.constant(hidden)
        return self._causal[rows]

    def graph(self, name: str, results: dict[str, str]) -> Graph:
        """The finished graph; results by name."""
        outputs = {value: (self.shapes[value], self.dtype) for value in results.values()}
        model = model_bytes(
            name, self.nodes, self.feeds, self.constants, outputs, domains=(MICROSOFT,)
        )
        return Graph(
            model,
            self.feeds,
            outputs,
            lambda found: {name: found[value] for name, value in results.items()},
        )
