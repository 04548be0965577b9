"""torch.profiler sees every op with its shapes, although fast paths pass the dispatcher by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels import COMPOSITES
from torch import Tensor
from torch.profiler import profile, schedule

import fastseq
import fastseq.nn as fnn
from fastseq import functional as ff

Shapes = list[list[int]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def recorded(call: Callable[[], Any]) -> dict[str, list[Shapes]]:
    """The input shapes of each call of each of our ops, by the op's name."""
    with profile(record_shapes=True) as profiler:
        call()
    found: dict[str, list[Shapes]] = {}
    for event in profiler.events():
        if event.name.startswith("fastseq::"):
            found.setdefault(event.name.removeprefix("fastseq::"), []).append(event.input_shapes)
    return found


def weights_of(cell: str, inputs: int, hidden: int) -> list[Tensor]:
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[cell]
    rows = gates * hidden
    return [torch.randn(*shape) for shape in ((rows, inputs), (rows, hidden), (rows,), (rows,))]


def heads(queries: int, keys: int, grouped: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    kv = torch.randn(2, 2 if grouped else 4, keys, 8)
    return torch.randn(2, 4, queries, 8), kv, torch.randn_like(kv)


Q, K, V = heads(5, 7)
CALLS: dict[str, tuple[Callable[[], Any], str, Shapes]] = {
    "lstm": (
        lambda: ff.lstm(torch.randn(5, 3, 7), None, weights_of("lstm", 7, 9)),
        "rnn_forward",
        [[5, 3, 7]],
    ),
    "lstm one step": (
        lambda: ff.lstm(
            torch.randn(1, 1, 7),
            (torch.zeros(1, 1, 9), torch.zeros(1, 1, 9)),
            weights_of("lstm", 7, 9),
        ),
        "rnn_forward",
        [[1, 1, 7], [1, 1, 9], [1, 1, 9]],
    ),
    "gru": (
        lambda: ff.gru(torch.randn(5, 3, 7), torch.zeros(1, 3, 9), weights_of("gru", 7, 9)),
        "rnn_forward",
        [[5, 3, 7], [1, 3, 9]],
    ),
    "cell": (
        lambda: ff.gru_cell(torch.randn(3, 7), torch.zeros(3, 9), *weights_of("gru", 7, 9)),
        "rnn_forward",
        [[1, 3, 7], [1, 3, 9]],
    ),
    "attention": (
        lambda: ff.attention(Q, K, V),
        "attention_forward",
        [[2, 4, 5, 8], [2, 4, 7, 8], [2, 4, 7, 8]],
    ),
    "decode": (
        lambda: ff.attention(*heads(1, 64, grouped=True)),
        "attention_forward",
        [[2, 4, 1, 8], [2, 2, 64, 8], [2, 2, 64, 8]],
    ),
    "masked attention": (
        lambda: ff.attention(Q, K, V, mask=torch.zeros(5, 7, dtype=torch.bool)),
        "attention_forward",
        [[2, 4, 5, 8], [2, 4, 7, 8], [2, 4, 7, 8]],
    ),
    "varlen": (
        lambda: ff.attention_varlen(*[torch.randn(7, 3, 8)] * 3, [0, 2, 7], [0, 4, 7]),
        "attention_forward",
        [[7, 3, 8], [7, 3, 8], [7, 3, 8]],
    ),
    "scaled dot product": (
        lambda: ff.scaled_dot_product_attention(Q, K, V),
        "attention_forward",
        [[2, 4, 5, 8], [2, 4, 7, 8], [2, 4, 7, 8]],
    ),
    "linear": (
        lambda: ff.linear(torch.randn(2, 3, 7), torch.randn(9, 7), torch.randn(9), "gelu"),
        "linear_forward",
        [[2, 3, 7], [9, 7], [9]],
    ),
    "layer norm": (
        lambda: ff.layer_norm(torch.randn(5, 9), (9,), torch.randn(9), torch.randn(9)),
        "norm_forward",
        [[5, 9], [], [9], [9]],
    ),
    "rms norm": (
        lambda: ff.rms_norm(torch.randn(5, 9), (9,), torch.randn(9)),
        "norm_forward",
        [[5, 9], [], [9]],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_inference(name: str) -> None:
    call, op, shapes = CALLS[name]
    with torch.no_grad():
        found = recorded(call)
    if op.removesuffix("_forward") in COMPOSITES:
        assert not found, "torch's operators"
        return
    assert list(found) == [op]
    assert len(found[op]) == 1
    assert found[op][0][: len(shapes)] == shapes


MODULES: dict[str, tuple[Callable[[], Any], Callable[[], tuple[Tensor, ...]], dict[str, int]]] = {
    "lstm": (lambda: fnn.LSTM(7, 9, 2), lambda: (torch.randn(5, 3, 7),), {"rnn": 2}),
    "gru": (
        lambda: fnn.GRU(7, 9, bidirectional=True),
        lambda: (torch.randn(5, 3, 7),),
        {"rnn": 1},
    ),
    "cell": (lambda: fnn.LSTMCell(7, 9), lambda: (torch.randn(3, 7),), {"rnn": 1}),
    "linear": (lambda: fnn.Linear(7, 9), lambda: (torch.randn(3, 7),), {"linear": 1}),
    "layer norm": (lambda: fnn.LayerNorm(7), lambda: (torch.randn(3, 7),), {"norm": 1}),
    "attention": (
        lambda: fnn.MultiheadAttention(16, 4, batch_first=True),
        lambda: (torch.randn(2, 5, 16),) * 3,
        # Queries, keys and values in one product.
        {"linear": 2, "attention": 1},
    ),
    "encoder layer": (
        lambda: fnn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True),
        lambda: (torch.randn(2, 5, 16),),
        {"linear": 4, "attention": 1, "norm": 2},
    ),
    "decoder layer": (
        lambda: fnn.TransformerDecoderLayer(16, 4, 32, 0.0, batch_first=True),
        lambda: (torch.randn(2, 5, 16), torch.randn(2, 6, 16)),
        {"linear": 7, "attention": 2, "norm": 3},
    ),
}


def ops_of(name: str) -> dict[str, int]:
    """How many of our ops a call of the module is, one way."""
    return {op: count for op, count in MODULES[name][2].items() if op not in COMPOSITES}


def output_of(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", MODULES)
def test_modules_forward_and_backward(name: str) -> None:
    make, arguments, _ = MODULES[name]
    expected = ops_of(name)
    module = make()
    # The weights, which attention returns otherwise, have no backward kernel.
    kwargs = {"need_weights": False} if name == "attention" else {}
    inputs = [one.requires_grad_() for one in arguments()]

    def train() -> None:
        output_of(module(*inputs, **kwargs)).sum().backward()

    found = recorded(train)
    counts = {op: len(calls) for op, calls in found.items()}
    both = {f"{op}_{way}": n for op, n in expected.items() for way in ("forward", "backward")}
    assert counts == both
    for op, calls in found.items():
        assert all(any(shapes) for shapes in calls), op
    module.eval()
    with torch.no_grad():
        found = recorded(lambda: module(*inputs, **kwargs))
    assert {op: len(calls) for op, calls in found.items()} == {
        f"{op}_forward": n for op, n in expected.items()
    }


@pytest.mark.parametrize("name", MODULES)
def test_results_are_the_same_bits(name: str) -> None:
    make, arguments, _ = MODULES[name]
    module = make()
    inputs = [one.requires_grad_() for one in arguments()]

    def run() -> list[Tensor]:
        output = output_of(module(*inputs))
        wanted = [*dict.fromkeys(inputs), *module.parameters()]
        return [output, *torch.autograd.grad(output.square().sum(), wanted)]

    plain = run()
    with profile():
        watched = run()
    assert all(map(torch.equal, plain, watched))


@pytest.mark.parametrize("name", MODULES)
def test_backward_alone(name: str) -> None:
    """Forward ran before the profiler began, past the dispatcher."""
    make, arguments, _ = MODULES[name]
    inputs = [one.requires_grad_() for one in arguments()]
    kwargs = {"need_weights": False} if name == "attention" else {}
    module = make()
    loss = output_of(module(*inputs, **kwargs)).square().sum()
    wanted = [*dict.fromkeys(inputs), *module.parameters()]
    plain = torch.autograd.grad(loss, wanted, retain_graph=True)
    watched: list[Tensor] = []
    found = recorded(lambda: watched.extend(torch.autograd.grad(loss, wanted)))
    assert {op: len(calls) for op, calls in found.items()} == {
        f"{op}_backward": n for op, n in ops_of(name).items()
    }
    assert all(map(torch.equal, plain, watched))


@pytest.mark.parametrize("memory", [False, True])
def test_generate(memory: bool) -> None:
    """The decoder's one call per position shows as the ops that it is made of."""
    layer = fnn.TransformerDecoderLayer(16, 2, 32, 0.0, batch_first=True, cross_attention=memory)
    stack = fnn.TransformerDecoder(layer, 2).eval()
    embedding, output = torch.nn.Embedding(13, 16), torch.nn.Linear(16, 13)

    def generate() -> Any:
        return fastseq.generate(
            stack,
            torch.tensor([[1]] * 3),
            memory=torch.ones(3, 6, 16) if memory else None,
            max_new_tokens=4,
            embed=lambda tokens, start: embedding(tokens),
            project=output,
        )

    plain = generate()
    kept: list[Any] = []
    found = recorded(lambda: kept.append(generate()))
    assert torch.equal(kept[0], plain)
    ops = {"linear", "attention", "norm"} - COMPOSITES
    assert set(found) == {f"{op}_forward" for op in ops}
    shapes = [call[:2] for call in found["attention_forward"]]
    for keys in range(1, 5):  # the cache grows by one key with every position
        assert shapes.count([[3, 2, 1, 8], [3, 2, keys, 8]]) == 2
    assert len(shapes) == (16 if memory else 8)


def test_nothing_but_the_active_steps_of_a_schedule() -> None:
    module = fnn.LSTM(7, 9)
    x = torch.randn(5, 3, 7)
    with torch.no_grad(), profile(schedule=schedule(wait=2, warmup=1, active=2)) as profiler:
        for _ in range(5):
            module(x)
            profiler.step()
    names = [event.name for event in profiler.events()]
    assert names.count("fastseq::rnn_forward") == 2


def test_the_padding_of_an_encoder_is_still_left_out() -> None:
    """A profile shows the rows that run without it, too."""
    layer = fnn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    stack = fnn.TransformerEncoder(layer, 1).eval()
    padding = torch.arange(6) >= torch.tensor([[2], [6]])
    with torch.no_grad():
        found = recorded(lambda: stack(torch.randn(2, 6, 16), src_key_padding_mask=padding))
    assert found["attention_forward"][0][0] == [8, 2, 8]


def test_a_wrapped_weight_is_left_to_torchs_operators() -> None:
    class Wrapped(Tensor):
        pass

    weight = torch.randn(9, 7).as_subclass(Wrapped)
    x = torch.randn(3, 7)
    with torch.no_grad():
        plain = ff.linear(x, weight)
        assert recorded(lambda: ff.linear(x, weight)) == {}
    assert type(plain) is Wrapped
