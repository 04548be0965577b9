"""FlopCounterMode over fastseq's ops: hand counts, and what torch counts for its own layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import fastseq
import fastseq.nn as fnn
from fastseq import functional as ff


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def count(call: Callable[[], Any]) -> int:
    # oneDNN's fused LSTM is one operator without a formula; switched off, the products show.
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


RNN_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True, "num_layers": 2},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
}
RNN_CASES = [
    (kind, options) for kind in ("LSTM", "GRU", "RNN") for options in RNN_OPTIONS.values()
] + [("LSTM", {"proj_size": 4}), ("LSTM", {"proj_size": 4, "bias": False, "bidirectional": True})]


def rnn_pair(kind: str, options: dict[str, Any]) -> list[nn.Module]:
    return [getattr(library, kind)(5, 8, **options) for library in (fnn, nn)]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(("kind", "options"), RNN_CASES, ids=str)
@pytest.mark.parametrize("wants_input", [False, True])
def test_recurrent_layers(kind: str, options: dict[str, Any], wants_input: bool) -> None:
    """Forward, backward alone and both, from states without and with gradients."""
    counts = []
    for module in rnn_pair(kind, options):
        x = torch.randn(6, 6, 5, requires_grad=wants_input)
        outputs: list[Tensor] = []
        with torch.no_grad():
            inference = count(lambda: module(x))  # noqa: B023
        forward = count(lambda: outputs.append(module(x)[0]))  # noqa: B023
        backward = count(lambda: outputs[0].sum().backward())  # noqa: B023
        assert inference == forward
        counts.append((forward, backward, count(lambda: module(x)[0].sum().backward())))  # noqa: B023
    assert counts[0] == counts[1]
    assert counts[0][2] == counts[0][0] + counts[0][1] > 0


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_rows(kind: str, bidirectional: bool) -> None:
    data = pack_sequence([torch.randn(n, 5) for n in (6, 4, 4, 1)])
    counts = [
        count(lambda: module(data)[0].data.sum().backward())  # noqa: B023
        for module in rnn_pair(kind, {"bidirectional": bidirectional})
    ]
    assert counts[0] == counts[1] > 0


def test_padded_rows_are_not_counted() -> None:
    module, x = fnn.GRU(5, 8), torch.randn(6, 4, 5)
    with torch.no_grad():
        counted = count(lambda: module(x, lengths=[6, 0, 3, 1]))
    assert counted == 2 * 10 * 3 * 8 * (5 + 8)
    # Backward: both weights, and the way back through time but to the first steps' zero state.
    backward = 2 * 3 * 8 * (10 * 5 + 10 * 8 + 7 * 8)
    trained = count(lambda: module(x, lengths=[6, 0, 3, 1])[0].sum().backward())
    assert trained == counted + backward


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_cells(kind: str) -> None:
    counts = []
    for library in (fnn, nn):
        cell = getattr(library, f"{kind}Cell")(5, 8)
        counts.append(count(lambda: cell(torch.randn(3, 5))))  # noqa: B023
    assert counts[0] == counts[1] == 2 * 3 * {"LSTM": 4, "GRU": 3, "RNN": 1}[kind] * 8 * 13


def test_initial_states_and_frozen_weights() -> None:
    """Only what takes a gradient costs one."""
    module, x = fnn.GRU(5, 8), torch.randn(6, 4, 5)
    product = 2 * 24 * 3 * 8
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("hh" in name)
    first = torch.zeros(1, 4, 8, requires_grad=True)
    output = module(x, first)[0]
    assert count(lambda: output.sum().backward()) == product * (8 + 8)


def norms() -> dict[str, Callable[[], Any]]:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    return {
        "layer norm": lambda: ff.layer_norm(x, (8,), weight, weight).sum().backward(),
        "rms norm": lambda: ff.rms_norm(x, (8,), weight).sum().backward(),
    }


@pytest.mark.parametrize("name", norms())
def test_norms_have_no_products(name: str) -> None:
    assert count(norms()[name]) == 0


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_one_query_on_a_cache(heads: tuple[int, int]) -> None:
    query, keys = torch.randn(2, heads[0], 1, 8), torch.randn(2, heads[1], 64, 8)
    with torch.no_grad():
        assert count(lambda: ff.attention(query, keys, keys)) == 4 * 2 * 4 * 64 * 8


def test_varlen_training() -> None:
    q, k, v = (torch.randn(7, 3, 8, requires_grad=True) for _ in range(3))
    pairs = 3 * (2 * 4 + 5 * 3)
    output = None

    def forward() -> None:
        nonlocal output
        output = ff.attention_varlen(q, k, v, [0, 2, 7], [0, 4, 7])

    assert count(forward) == 2 * 2 * pairs * 8
    assert count(lambda: output.sum().backward()) == 2 * 5 * pairs * 8


E, F, B, S, M = 16, 32, 3, 5, 6  # features, inner features, batch, rows, rows of the memory
PROJECTIONS, INNER = 4 * 2 * B * S * E * E, 2 * 2 * B * S * E * F


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(need_weights: bool) -> None:
    module, x = fnn.MultiheadAttention(E, 2, batch_first=True), torch.randn(B, S, E)
    x.requires_grad_()
    pairs = 2 * B * S * S * E
    with torch.no_grad():
        assert count(lambda: module(x, x, x, need_weights=need_weights)) == PROJECTIONS + 2 * pairs
    trained = count(lambda: module(x, x, x, need_weights=need_weights)[0].sum().backward())
    # Backward computes the scores again.
    assert trained == 3 * PROJECTIONS + (2 + 5) * pairs
    theirs = nn.MultiheadAttention(E, 2, batch_first=True)
    assert trained - pairs == count(lambda: theirs(x, x, x)[0].sum().backward())


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer(norm_first: bool) -> None:
    layer = fnn.TransformerEncoderLayer(E, 2, F, batch_first=True, norm_first=norm_first)
    x = torch.randn(B, S, E, requires_grad=True)
    pairs = 2 * B * S * S * E
    trained = count(lambda: layer(x).sum().backward())
    assert trained == 3 * (PROJECTIONS + INNER) + 7 * pairs
    stack = fnn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad():
        assert count(lambda: stack(x)) == 2 * (PROJECTIONS + INNER + 2 * pairs)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("crosses", [False, True])
def test_a_decoding_step(crosses: bool, norm_first: bool) -> None:
    """One call of the kernels for everything, when nobody counts, its parts when one does."""
    layer = fnn.TransformerDecoderLayer(
        E, 2, F, batch_first=True, norm_first=norm_first, cross_attention=crosses
    ).eval()
    memory = torch.randn(B, M, E) if crosses else None
    caches = [fnn.DecoderLayerCache(), fnn.DecoderLayerCache()]
    tokens = torch.randn(4, B, 1, E)
    for position in range(4):
        results: list[Tensor] = []
        with torch.no_grad():
            expected = layer(tokens[position], memory, cache=caches[0])
            counted = count(
                lambda: results.append(layer(tokens[position], memory, cache=caches[1]))  # noqa: B023
            )
        torch.testing.assert_close(results[0], expected)
        work = 2 * B * (4 * E * E + 2 * E * F) + 4 * B * E * (position + 1)
        if crosses:
            work += 2 * B * 2 * E * E + 4 * B * E * M
            # Keys and values of the memory: each time, because the counter hooks all modules and
            # cross-attention that is called as a module knows no cache.
            work += 2 * B * M * 2 * E * E
        assert counted == work, position


def test_generate() -> None:
    layer = fnn.TransformerDecoderLayer(E, 2, F, batch_first=True, cross_attention=False)
    stack = fnn.TransformerDecoder(layer, 2).eval()
    embedding, output = nn.Embedding(13, E), nn.Linear(E, 13)
    new = 4
    counted = count(
        lambda: fastseq.generate(
            stack,
            torch.tensor([[1]] * B),
            new,
            embed=lambda tokens, start: embedding(tokens),
            project=output,
        )
    )
    per_layer = new * 2 * B * (4 * E * E + 2 * E * F) + 4 * B * E * sum(range(1, new + 1))
    assert counted == 2 * per_layer + new * 2 * B * E * 13
