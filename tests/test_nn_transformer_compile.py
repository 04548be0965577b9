"""torch.compile, torch.export and torch.func over the Transformer modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers_pair import EMBED, FEED, HEADS, Case, arguments, build, pair, sequence, train

import fastseq.nn as fast_nn
from fastseq.nn import DecoderCache

KINDS = ("TransformerEncoderLayer", "TransformerDecoderLayer", "TransformerEncoder", "Transformer")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("kind", "masked"),
    # Stacks are these layers again.
    [*((kind, False) for kind in KINDS[:2]), *((kind, True) for kind in KINDS)],
)
def test_compile(kind: str, masked: bool) -> None:
    masks = {"mask": "causal", "padding": "end", "memory_padding": "end"} if masked else {}
    case = Case(kind, activation="gelu", **masks)
    ours = build(fast_nn, case)
    inputs, options = arguments(case)
    compiled: Any = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected = train(ours, inputs, options)
    leaves = [one.clone().requires_grad_() for one in inputs]
    output = compiled(*leaves, **options)
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)
    grads = torch.autograd.grad((output * weights).sum(), [*leaves, *ours.parameters()])
    torch.testing.assert_close([output, *grads], expected, **CLOSE)
    ours.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs, **options), expected[0], **CLOSE)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_compile_with_symbolic_sizes(kind: str) -> None:
    case = Case(kind, training=False)
    ours = build(fast_nn, case)
    inputs, options = arguments(case)
    compiled: Any = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs, **options), ours(*inputs, **options), **CLOSE)


def test_compile_inductor() -> None:
    case = Case("TransformerEncoder", padding="end", training=False)
    ours = build(fast_nn, case)
    inputs, options = arguments(case)
    compiled: Any = torch.compile(ours, fullgraph=True)
    hidden = options["src_key_padding_mask"]
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(*inputs, **options)[~hidden], ours(*inputs, **options)[~hidden], **CLOSE
        )


def test_compile_with_dropout() -> None:
    layer = fast_nn.TransformerEncoderLayer(EMBED, HEADS, FEED, 0.5, batch_first=True)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, EMBED)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    first.sum().backward()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", KINDS[1:3])
def test_export(kind: str, strict: bool) -> None:
    case = Case(kind, mask="causal", training=False)
    ours = build(fast_nn, case)
    inputs, options = arguments(case)
    exported = torch.export.export(ours, tuple(inputs), options, strict=strict)
    expected = ours(*inputs, **options)
    torch.testing.assert_close(exported.module()(*inputs, **options), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_trace(kind: str) -> None:
    case = Case(kind, training=False)
    ours = build(fast_nn, case)
    inputs, _ = arguments(case)
    traced = torch.jit.trace(ours, tuple(inputs))
    torch.testing.assert_close(traced(*inputs), ours(*inputs), **CLOSE)


def test_gradients_per_sample() -> None:
    _, ours = pair("TransformerEncoderLayer", norm_first=True, activation="gelu")
    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    x = sequence(3, 4)

    def loss(weights: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(ours, weights, (one,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for index in range(3):
        single = torch.func.grad(loss)(parameters, x[index])
        for name, gradient in single.items():
            torch.testing.assert_close(each[name][index], gradient, **CLOSE)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_gradgradcheck(kind: str) -> None:
    case = Case(kind, activation="gelu")
    ours = build(fast_nn, case)
    torch.manual_seed(1)
    x = torch.randn(1, 2, EMBED, dtype=torch.float64, requires_grad=True)
    rest = [sequence(1, 2, seed=1)] if "Decoder" in kind else []
    assert torch.autograd.gradcheck(lambda one: ours(one, *rest), (x,))
    assert torch.autograd.gradgradcheck(lambda one: ours(one, *rest), (x,), atol=1e-4)


def test_compiled_decoding_with_a_cache() -> None:
    """Not one graph, but right."""
    case = Case("TransformerDecoder", training=False)
    ours = build(fast_nn, case)
    ours.layers = ours.layers[:1]
    target, memory = sequence(2, 3), sequence(2, 4, seed=1)
    compiled: Any = torch.compile(ours, backend="aot_eager")
    results = []
    with torch.no_grad():
        for call in (ours, compiled):
            cache = DecoderCache(1, 4)
            results.append([call(one, memory, cache=cache) for one in target.split(1, 1)])
    torch.testing.assert_close(results[1], results[0], **CLOSE)
