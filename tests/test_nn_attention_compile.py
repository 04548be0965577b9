"""torch.compile and torch.export over multi-head attention: one graph, the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastseq.nn import MultiheadAttention, RotaryEmbedding

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def train(call: Any, module: torch.nn.Module, *args: Tensor, **options: Any) -> list[Tensor]:
    """Outputs, and the gradients of inputs and parameters."""
    leaves = [arg.detach().clone().requires_grad_() for arg in args]
    outputs = [one for one in call(*leaves, **options) if one is not None]
    loss = sum(output.square().sum() for output in outputs)
    return [*outputs, *torch.autograd.grad(loss, [*leaves, *module.parameters()])]


def masks(kind: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if "padding" in kind:
        options["key_padding_mask"] = torch.arange(7) >= torch.tensor([7, 3, 5])[:, None]
    if "causal" in kind:
        options["attn_mask"] = torch.ones(5, 7, dtype=torch.bool).triu(1)
        options["is_causal"] = True
    if "float" in kind:
        options["attn_mask"] = torch.randn(6, 5, 7, dtype=torch.float64)
        zeros = torch.zeros(3, 7, dtype=torch.float64)
        options["key_padding_mask"] = zeros.masked_fill(torch.rand(3, 7) < 0.2, -torch.inf)
    return options


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("plain", False),
        ("causal", False),
        ("padding+causal", False),
        ("padding", True),
        ("float", True),
    ],
)
def test_compile(kind: str, weights: bool) -> None:
    module = MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    q, k = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(3, 7, 8, dtype=torch.float64)
    options = {"need_weights": weights, **masks(kind)}
    expected = train(module, module, q, k, k.clone(), **options)
    found = train(compiled, module, q, k, k.clone(), **options)
    torch.testing.assert_close(found, expected, **CLOSE)
    with torch.no_grad():
        expected, found = module(q, k, k, **options), compiled(q, k, k, **options)
        torch.testing.assert_close(found, expected, **CLOSE)


CONSTRUCTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False, "add_bias_kv": True, "add_zero_attn": True},
    {"num_kv_heads": 2, "rope": RotaryEmbedding(2)},
    {"add_zero_attn": True, "batch_first": True},
]


@pytest.mark.parametrize("options", CONSTRUCTIONS, ids=str)
def test_compile_self_attention(options: dict[str, Any]) -> None:
    module = MultiheadAttention(8, 4, dtype=torch.float64, **options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 3, 8, dtype=torch.float64)

    def call(layer: Any) -> Any:
        return lambda one: layer(one, one, one, need_weights=False)

    torch.testing.assert_close(
        train(call(compiled), module, x), train(call(module), module, x), **CLOSE
    )


def test_compile_with_dropout() -> None:
    module = MultiheadAttention(8, 2, dropout=0.5, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(40, 3, 8, dtype=torch.float64)
    _, weights = compiled(x, x, x, average_attn_weights=False)
    assert 0.4 < float((weights == 0).double().mean()) < 0.6


def test_one_graph_for_every_size() -> None:
    module = MultiheadAttention(8, 2, dtype=torch.float64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for steps, batch in ((5, 3), (9, 4), (13, 7)):
        x = torch.randn(steps, batch, 8, dtype=torch.float64)
        with torch.no_grad():
            found = compiled(x, x, x, need_weights=False)[0]
            torch.testing.assert_close(found, module(x, x, x)[0], **CLOSE)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    module = MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64).eval()
    q, k = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(3, 7, 8, dtype=torch.float64)
    options = masks("padding")
    batch, steps = torch.export.Dim("batch", min=2), torch.export.Dim("steps", min=2)
    keys = {0: batch}
    exported = torch.export.export(
        module,
        (q, k, k.clone()),
        options,
        dynamic_shapes={
            "query": {0: batch, 1: steps},
            "key": keys,
            "value": keys,
            "key_padding_mask": keys,
        },
        strict=strict,
    )
    torch.testing.assert_close(exported.module()(q, k, k, **options), module(q, k, k, **options))
    q, k = torch.randn(2, 9, 8, dtype=torch.float64), torch.randn(2, 7, 8, dtype=torch.float64)
    options = {"key_padding_mask": options["key_padding_mask"][:2]}
    torch.testing.assert_close(exported.module()(q, k, k, **options), module(q, k, k, **options))


def test_functional_transforms() -> None:
    """Per-sample gradients by torch.func, also where a mask would be looked at."""
    module = MultiheadAttention(8, 2, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(4, 5, 8, dtype=torch.float64)
    hidden = torch.zeros(4, 5, dtype=torch.float64)
    hidden[1, 3:] = -torch.inf

    def loss(weights: dict[str, Tensor], one: Tensor, mask: Tensor) -> Tensor:
        output, _ = torch.func.functional_call(module, weights, (one, one, one, mask))
        return output.square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, hidden)
    for index in range(4):
        single = torch.func.grad(loss)(parameters, x[index], hidden[index])
        for name, gradient in single.items():
            torch.testing.assert_close(each[name][index], gradient, **CLOSE)


def test_gradgradcheck() -> None:
    module = MultiheadAttention(4, 2, dtype=torch.float64)
    x = torch.randn(3, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda one: module(one, one, one), (x,))
    assert torch.autograd.gradgradcheck(
        lambda one: module(one, one, one, need_weights=False)[0], (x,)
    )
