"""torch.compile and torch.export over the layers: one graph, the same numbers, any size."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastseq.nn as fast_nn

LAYERS = ("RNN", "LSTM", "GRU")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for part in result for tensor in flat(part)]


def train(layer: Any, module: torch.nn.Module, x: Any, **options: Any) -> list[Tensor]:
    outputs = flat(layer(x, **options))
    grads = torch.autograd.grad(
        sum(output.square().sum() for output in outputs), list(module.parameters())
    )
    return [*outputs, *grads]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """The compiled graph calls the very kernels; only sums of the loss may be fused otherwise."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    return True


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=["1", "2x2"]
)
@pytest.mark.parametrize("name", LAYERS)
def test_compile(name: str, options: dict[str, Any]) -> None:
    module = getattr(fast_nn, name)(3, 4, dtype=torch.float64, **options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    assert same(train(compiled, module, x), train(module, module, x))
    with torch.no_grad():
        assert same(flat(compiled(x)), flat(module(x)))


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_compile_cells(name: str) -> None:
    module = getattr(fast_nn, name)(3, 4, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, dtype=torch.float64)
    assert same(train(compiled, module, x), train(module, module, x))
    with torch.no_grad():
        assert same(flat(compiled(x)), flat(module(x)))


def test_compile_states_projection_and_lengths() -> None:
    module = fast_nn.LSTM(3, 6, proj_size=2, bidirectional=True, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    states = (
        torch.randn(2, 3, 2, dtype=torch.float64),
        torch.randn(2, 3, 6, dtype=torch.float64),
    )
    for options in ({"hx": states}, {"lengths": torch.tensor([2, 5, 0])}):
        assert same(train(compiled, module, x, **options), train(module, module, x, **options))


def test_compile_packed() -> None:
    module = fast_nn.GRU(3, 4, dtype=torch.float64)
    packed = pack_padded_sequence(
        torch.randn(5, 3, 3, dtype=torch.float64), torch.tensor([2, 5, 1]), enforce_sorted=False
    )
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert same(train(compiled, module, packed), train(module, module, packed))


def test_sizes_do_not_recompile_forever() -> None:
    """The second size makes a graph with symbolic sizes; later ones find it."""
    module = fast_nn.LSTM(3, 4, 2, dtype=torch.float64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for steps, batch in ((5, 2), (6, 3), (7, 4), (20, 9), (11, 5), (33, 17)):
        x = torch.randn(steps, batch, 3, dtype=torch.float64)
        assert same(train(compiled, module, x), train(module, module, x))
    assert counter.frame_count <= 2


def test_weight_updates_do_not_recompile() -> None:
    module = fast_nn.GRU(3, 4, dtype=torch.float64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    for _ in range(4):
        optimizer.zero_grad()
        compiled(x)[0].square().sum().backward()
        optimizer.step()
        assert same(train(compiled, module, x), train(module, module, x))
    assert counter.frame_count == 1


def test_compile_training_loop_inside_a_model() -> None:
    """Embedding, layer and head in one graph."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(10, 3, dtype=torch.float64)
            self.layer = fast_nn.LSTM(3, 4, batch_first=True, dtype=torch.float64)
            self.head = torch.nn.Linear(4, 10, dtype=torch.float64)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.layer(self.embedding(tokens))[0])

    module = Model()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    tokens = torch.randint(10, (2, 6))
    assert same(train(compiled, module, tokens), train(module, module, tokens))


def test_compile_inductor() -> None:
    """The default backend, which lays out buffers itself: once, for its compiler takes seconds."""
    module = fast_nn.LSTM(3, 4, bidirectional=True, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    # The cache on disk is keyed by the graph alone: it would answer with the sizes that another
    # build of the kernels had for the same ops.
    with torch._inductor.config.patch(force_disable_caches=True):
        assert same(train(compiled, module, x), train(module, module, x))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_export(name: str, batch_first: bool) -> None:
    module = getattr(fast_nn, name)(
        3, 4, 2, bidirectional=True, batch_first=batch_first, dtype=torch.float64
    ).eval()
    time, batch = torch.export.Dim("time", min=2), torch.export.Dim("batch", min=2)
    dims = (batch, time) if batch_first else (time, batch)
    program = torch.export.export(
        module,
        (torch.randn(5, 3, 3, dtype=torch.float64),),
        dynamic_shapes={"input": dict(enumerate(dims))},
    )
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "fastseq.rnn_forward.default" in targets
    exported = program.module()
    for shape in ((5, 3), (9, 2), (2, 40), (31, 7)):
        x = torch.randn(*shape, 3, dtype=torch.float64)
        with torch.no_grad():
            assert same(flat(exported(x)), flat(module(x)))


def test_the_first_call_of_a_process_may_be_a_compiled_one() -> None:
    """Nothing is loaded while Dynamo traces: it could not follow."""
    code = (
        "import torch, fastseq.nn as nn\n"
        "x = torch.randn(2, 3, 4)\n"
        "for layer in (nn.LSTM(4, 5), nn.Linear(4, 5), nn.LayerNorm(4),\n"
        "              nn.TransformerEncoderLayer(4, 2, 8)):\n"
        "    torch.compile(layer, fullgraph=True, backend='eager')(x)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
