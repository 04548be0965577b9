"""fastseq.nn.CellLayer: cells against plain loops, layouts, ops, compiler, regularisation."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

import fastseq
import fastseq.nn as fast_nn
from fastseq import cells
from fastseq._ops.cells import composite
from fastseq.backends import FastseqFallbackWarning
from fastseq.cells.shipped import SHIPPED
from fastseq.functional import cells as functional_cells

pytest.importorskip("numba", reason="Numba is not installed: pip install 'fastseq[numba]'")

T, B, IN, H = 6, 4, 5, 7
EXACT = {"rtol": 1e-12, "atol": 1e-12}
States = tuple[Tensor, ...]

# --- plain torch loops, written from the papers


def peephole_lstm(x: Tensor, h: Tensor | None, s: States, p: dict[str, Tensor]) -> States:
    i, f, g, o = (x + h).chunk(4, -1)
    i = torch.sigmoid(i + p["peephole_i"] * s[1])
    f = torch.sigmoid(f + p["peephole_f"] * s[1])
    c = f * s[1] + i * torch.tanh(g)
    return torch.sigmoid(o + p["peephole_o"] * c) * torch.tanh(c), c


def coupled_lstm(x: Tensor, h: Tensor | None, s: States, p: dict[str, Tensor]) -> States:
    i, g, o = (x + h).chunk(3, -1)
    i = torch.sigmoid(i)
    c = (1 - i) * s[1] + i * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def minimal_gated_unit(x: Tensor, h: Tensor, s: States, p: dict[str, Tensor]) -> States:
    (f_x, n_x), (f_h, n_h) = x.chunk(2, -1), h.chunk(2, -1)
    f = torch.sigmoid(f_x + f_h)
    return ((1 - f) * s[0] + f * torch.tanh(n_x + f * n_h),)


def ind_rnn(x: Tensor, h: Tensor | None, s: States, p: dict[str, Tensor]) -> States:
    return (torch.relu(x + p["recurrent"] * s[0]),)


def s_lstm(x: Tensor, h: Tensor | None, s: States, p: dict[str, Tensor]) -> States:
    i, f, z, o = (x + h).chunk(4, -1)
    log_f = torch.nn.functional.logsigmoid(f)
    m = torch.maximum(log_f + s[3], i)
    i, f = torch.exp(i - m), torch.exp(log_f + s[3] - m)
    c, n = f * s[1] + i * torch.tanh(z), f * s[2] + i
    return torch.sigmoid(o) * c / n, c, n, m


def janet(x: Tensor, h: Tensor | None, s: States, p: dict[str, Tensor]) -> States:
    f, c = (x + h).chunk(2, -1)
    return (torch.sigmoid(f) * s[0] + (1 - torch.sigmoid(f - 1)) * torch.tanh(c),)


LOOPS: dict[str, Callable[..., States]] = {
    "peephole_lstm": peephole_lstm,
    "coupled_lstm": coupled_lstm,
    "minimal_gated_unit": minimal_gated_unit,
    "ind_rnn": ind_rnn,
    "s_lstm": s_lstm,
    "janet": janet,
}
each_cell = pytest.mark.parametrize("name", LOOPS)


def loop(layer: Any, x: Tensor, states: States) -> tuple[Tensor, States]:
    """One layer, one direction, time first."""
    p = {name: getattr(layer, f"{name}_l0") for name in layer.cell.parameters}
    outputs = []
    for step in torch.nn.functional.linear(x, layer.weight_ih_l0, layer.bias_ih_l0):
        from_hidden = None
        if layer.cell.recurrent:
            from_hidden = torch.nn.functional.linear(
                states[0], layer.weight_hh_l0, layer.bias_hh_l0
            )
        states = LOOPS[layer.cell.name](step, from_hidden, states, p)
        outputs.append(states[0])
    return torch.stack(outputs), states


def as_tuple(states: Any) -> States:
    return states if isinstance(states, tuple) else (states,)


def draw_states(layer: Any, batch: int = B) -> States:
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    dtype = next(layer.parameters()).dtype
    # Positive, as the sLSTM's normaliser is.
    return tuple(
        (torch.rand(rows, batch, layer.hidden_size, dtype=dtype) + 0.1).requires_grad_()
        for _ in range(layer.cell.states)
    )


def given(layer: Any, states: States) -> Any:
    return states if layer.cell.states > 1 else states[0]


def leaves_and_grads(output: Tensor, states: States, wanted: list[Tensor]) -> list[Tensor]:
    results = [output, *states]
    loss = sum(
        (r * torch.linspace(0.5, 1.5, r.numel(), dtype=r.dtype).view_as(r)).sum() for r in results
    )
    return [*(r.detach() for r in results), *torch.autograd.grad(loss, wanted)]


@each_cell
def test_against_a_plain_loop(name: str) -> None:
    """float64 to the last digits; float32 as close to float64 as the loop's own float32."""
    torch.manual_seed(0)
    exact = fast_nn.CellLayer(SHIPPED[name], IN, 33, dtype=torch.float64)
    for steps, batch in ((T, B), (3, 1), (1, 2)):
        x = torch.randn(steps, batch, IN, dtype=torch.float64, requires_grad=True)
        states = draw_states(exact, batch)
        wanted = [x, *states, *exact.parameters()]
        first = tuple(state[0] for state in states)
        output, final = loop(exact, x, first)
        truth = leaves_and_grads(output, final, wanted)
        output, final = exact(x, given(exact, states))
        found = leaves_and_grads(output, tuple(s[0] for s in as_tuple(final)), wanted)
        torch.testing.assert_close(found, truth, **EXACT)

        narrow = copy.deepcopy(exact).float()
        x32 = x.detach().float().requires_grad_()
        states32 = tuple(state.detach().float().requires_grad_() for state in states)
        wanted = [x32, *states32, *narrow.parameters()]
        output, final = loop(narrow, x32, tuple(state[0] for state in states32))
        theirs = leaves_and_grads(output, final, wanted)
        output, final = narrow(x32, given(narrow, states32))
        ours = leaves_and_grads(output, tuple(s[0] for s in as_tuple(final)), wanted)
        # What rounding the arguments to float32 does is the same for both, and counts for both.
        for mine, other, right in zip(ours, theirs, truth, strict=True):
            scale = right.abs().max()
            error, peer = (mine - right).abs().max(), (other - right).abs().max()
            assert error <= 1.5 * peer + 4 * torch.finfo(torch.float32).eps * scale


LAYOUTS: dict[str, dict[str, Any]] = {
    "batch_first": {"batch_first": True},
    "two_layers_and_directions": {"num_layers": 2, "bidirectional": True},
    "no_bias": {"bias": False, "bidirectional": True, "batch_first": True},
    "zoneout": {"zoneout": 0.3, "bidirectional": True},
    "recurrent_dropout": {"recurrent_dropout": 0.4, "num_layers": 2},
    "all": {"zoneout": 0.3, "recurrent_dropout": 0.4, "weight_dropout": 0.2, "dropout": 0.1,
            "num_layers": 2, "bidirectional": True},
}  # fmt: skip


def run(layer: Any, x: Any, hx: Any, wanted: list[Tensor], **options: Any) -> list[Tensor]:
    torch.manual_seed(3)
    output, final = layer(x, hx, **options)
    output = output.data if not isinstance(output, Tensor) else output
    return leaves_and_grads(output, as_tuple(final), wanted)


# Not every pair: each new set of masks is another kernel to compile.
PAIRS = [
    *(("s_lstm", layout) for layout in ("batch_first", "two_layers_and_directions", "all")),
    *(("minimal_gated_unit", layout) for layout in ("no_bias", "zoneout", "recurrent_dropout")),
    *(("ind_rnn", layout) for layout in ("two_layers_and_directions", "zoneout")),
]


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_kernels_against_the_composite(name: str, layout: str) -> None:
    """Every layout with padded, packed and ragged input, with and without states."""
    torch.manual_seed(0)
    options = LAYOUTS[layout]
    layer = fast_nn.CellLayer(SHIPPED[name], IN, H, dtype=torch.float64, **options)
    x = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)
    batch_first = options.get("batch_first", False)
    padded = x.transpose(0, 1) if batch_first else x
    lengths = torch.tensor([3, 6, 0, 2])
    states = draw_states(layer)
    calls: list[tuple[Any, Any, dict[str, Any]]] = [
        (padded, None, {}),
        (padded, states, {"lengths": lengths}),
    ]
    packed = pack_padded_sequence(
        padded.detach(), lengths.clamp_min(1), batch_first, enforce_sorted=False
    )
    packed.data.requires_grad_()
    calls.append((packed, states, {}))
    for input, hx, more in calls:
        leaf = packed.data if input is packed else x
        wanted = [leaf, *(states if hx is not None else ()), *layer.parameters()]
        hx = None if hx is None else given(layer, hx)
        found = run(layer, input, hx, wanted, **more)
        with fastseq.backend("reference"):
            expected = run(layer, input, hx, wanted, **more)
        torch.testing.assert_close(found, expected, **EXACT)


def test_lengths_and_packed_agree() -> None:
    torch.manual_seed(0)
    layer = fast_nn.CellLayer(cells.s_lstm, IN, H, bidirectional=True, dtype=torch.float64)
    x, lengths = torch.randn(T, B, IN, dtype=torch.float64), torch.tensor([3, 6, 1, 2])
    output, final = layer(x, lengths=lengths)
    packed, final_of_packed = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
    torch.testing.assert_close(output, pad_packed_sequence(packed)[0], **EXACT)
    torch.testing.assert_close(final, final_of_packed, **EXACT)
    alone, final_alone = layer(x[:3, 0])
    torch.testing.assert_close(output[:3, 0], alone, **EXACT)
    torch.testing.assert_close(tuple(s[:, 0] for s in final), final_alone, **EXACT)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_builtin_cells_hold_torchs_state_dict(name: str) -> None:
    """So that the regularisations exist for them, too."""
    theirs = getattr(torch.nn, name)(IN, H, 2, bidirectional=True, dtype=torch.float64)
    cell = cells.rnn_tanh if name == "RNN" else getattr(cells, name.lower())
    ours = fast_nn.CellLayer(cell, IN, H, 2, bidirectional=True, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(T, B, IN, dtype=torch.float64)
    found, expected = ours(x), theirs(x)
    torch.testing.assert_close(found[0], expected[0], **EXACT)
    torch.testing.assert_close(as_tuple(found[1]), as_tuple(expected[1]), **EXACT)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_projection_is_torchs(options: dict[str, Any]) -> None:
    """state_dict, outputs and every gradient of torch's LSTM with proj_size."""
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(IN, 33, proj_size=6, dtype=torch.float64, **options)
    ours = fast_nn.CellLayer(cells.lstm, IN, 33, proj_size=6, dtype=torch.float64, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)
    shape = (theirs.num_layers * (1 + theirs.bidirectional), B)
    h, c = torch.randn(*shape, 6, dtype=torch.float64), torch.randn(*shape, 33, dtype=torch.float64)
    states = (h.requires_grad_(), c.requires_grad_())
    found = run(ours, x, states, [x, *states, *ours.parameters()])
    wanted = run(theirs, x, states, [x, *states, *theirs.parameters()])
    torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize("name", ["peephole_lstm", "s_lstm"])
def test_projection_against_the_composite(name: str) -> None:
    torch.manual_seed(0)
    layer = fast_nn.CellLayer(
        SHIPPED[name], IN, H, proj_size=3, bidirectional=True, dtype=torch.float64
    )
    x = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.parameters()]
    for more in ({}, {"lengths": torch.tensor([3, 6, 0, 2])}):
        found = run(layer, x, None, wanted, **more)
        with fastseq.backend("reference"):
            expected = run(layer, x, None, wanted, **more)
        torch.testing.assert_close(found, expected, **EXACT)
    with FlopCounterMode(display=False) as counter:
        output = layer(x)[0]
        forward = counter.get_total_flops()
        output.sum().backward()
    products = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    assert (forward, counter.get_total_flops()) == (2 * T * B * products, 6 * T * B * products)


def test_projection_errors() -> None:
    def make(cell: Any, size: Any, **options: Any) -> Any:
        return fast_nn.CellLayer(cell, IN, H, proj_size=size, **options)

    raises(ValueError, "smaller than hidden_size, 7, got 7", lambda: make(cells.lstm, 7))
    raises(TypeError, "proj_size must be an int, got float", lambda: make(cells.lstm, 2.0))
    raises(ValueError, "'gru', which reads s.0. itself, got 2", lambda: make(cells.gru, 2))
    raises(ValueError, "has no recurrent matrix", lambda: make(cells.ind_rnn, 2))
    raises(ValueError, "or zoneout, got 2", lambda: make(cells.lstm, 2, zoneout=(0, 0.1)))
    layer = make(cells.lstm, 2)
    assert repr(layer) == "CellLayer(lstm, 5, 7, proj_size=2)"
    state = torch.zeros(1, B, H)
    x = torch.randn(T, B, IN)
    raises(RuntimeError, r"state 0 must have shape \(1, 4, 2\)", lambda: layer(x, (state, state)))


# --- autograd and compiler


@each_cell
def test_gradcheck(name: str) -> None:
    torch.manual_seed(0)
    layer = fast_nn.CellLayer(SHIPPED[name], 2, 3, bidirectional=True, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    states = draw_states(layer, 2)
    names = [n for n, _ in layer.named_parameters()]
    count = len(states)

    def call(x: Tensor, *rest: Tensor) -> States:
        parameters = dict(zip(names, rest[count:], strict=True))
        output, final = functional_call(layer, parameters, (x, given(layer, rest[:count])))
        return output, *as_tuple(final)

    inputs = (x, *states, *layer.parameters())
    assert gradcheck(call, inputs, fast_mode=name not in ("minimal_gated_unit", "ind_rnn"))
    if name == "janet":
        assert gradgradcheck(call, inputs, fast_mode=True)


def test_gradcheck_of_regularisation() -> None:
    torch.manual_seed(0)
    layer = fast_nn.CellLayer(
        cells.peephole_lstm, 3, 4, dtype=torch.float64, zoneout=(0.2, 0.4), recurrent_dropout=0.3
    )
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    states = draw_states(layer, 2)

    def call(x: Tensor, *states: Tensor) -> States:
        torch.manual_seed(1)
        output, final = layer(x, states)
        return output, *final

    assert gradcheck(call, (x, *states), fast_mode=True)


def test_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    # Padding inside the reserve is not written: zero, so that it equals itself.
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    torch.manual_seed(0)
    layer = fast_nn.CellLayer(cells.peephole_lstm, 3, 4, dtype=torch.float64)
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    states, weights = list(draw_states(layer, 2)), list(layer.parameters())
    options = (layer.cell.key, False, False, True, False, False)
    rows = (None, torch.tensor([3, 1]))
    forward = (x, states, weights, None, *rows, *options, True)
    torch.library.opcheck(torch.ops.fastseq.cell_forward.default, forward)
    with torch.no_grad():
        plain = [t.detach() for t in (x, *states, *weights)]
        x, states, weights = plain[0], plain[1:3], plain[3:]
        output, final, reserve = torch.ops.fastseq.cell_forward(
            x, states, weights, None, *rows, *options, True
        )
    needs = [True, False, *[True] * (len(plain) - 2)]
    torch.library.opcheck(
        torch.ops.fastseq.cell_backward.default,
        (torch.randn_like(output), [torch.randn_like(s) for s in final], x, states, weights,
         None, reserve, *rows, *options, needs),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_compile() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = fast_nn.CellLayer(
        cells.minimal_gated_unit, 3, 4, bidirectional=True, dtype=torch.float64, zoneout=0.2
    ).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.parameters()]
    for more in ({}, {"lengths": torch.tensor([2, 5])}):
        found = run(compiled, x, None, wanted, **more)
        torch.testing.assert_close(found, run(layer, x, None, wanted, **more), **EXACT)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["minimal_gated_unit", "ind_rnn"])
def test_flop_counter(name: str) -> None:
    """Products forward; backward as many again for the data, and for the weights."""
    layer = fast_nn.CellLayer(SHIPPED[name], IN, H, bidirectional=True)
    x = torch.randn(T, B, IN, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        output = layer(x)[0]
        forward = counter.get_total_flops()
        output.sum().backward()
    rows = 4 * H * IN + (4 * H * H if layer.cell.recurrent else -2 * H * IN)
    assert forward == 2 * T * B * rows
    assert counter.get_total_flops() == 3 * forward


def test_transforms_take_the_composite() -> None:
    torch.manual_seed(0)
    layer = fast_nn.CellLayer(cells.janet, 3, 4, dtype=torch.float64)
    x = torch.randn(4, 5, 1, 3, dtype=torch.float64)
    parameters = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,))[0].square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for index in range(4):
        alone = torch.autograd.grad(layer(x[index])[0].square().sum(), list(layer.parameters()))
        found = [per_sample[name][index] for name in parameters]
        torch.testing.assert_close(found, list(alone), **EXACT)


def test_other_dtypes_run_on_torch_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastseq.backends._warned_reasons", set())
    layer = fast_nn.CellLayer(cells.janet, IN, H, dtype=torch.bfloat16)
    x = torch.randn(T, B, IN)
    with pytest.warns(FastseqFallbackWarning, match="bfloat16"):
        found = layer(x.bfloat16())[0]
    torch.testing.assert_close(found.float(), layer.float()(x)[0], rtol=0.1, atol=0.05)


def test_without_numba_cells_run_on_torch_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastseq.backends._warned_reasons", set())
    layer = fast_nn.CellLayer(cells.janet, IN, H, dtype=torch.float64)
    x = torch.randn(T, B, IN, dtype=torch.float64)
    expected = layer(x)[0]
    monkeypatch.setattr(functional_cells, "_NO_NUMBA", "Numba is not installed")
    with pytest.warns(FastseqFallbackWarning, match="Numba is not installed"):
        torch.testing.assert_close(layer(x)[0], expected, **EXACT)


# --- regularisation, from its definition


def masked_loop(layer: Any, x: Tensor, zone: Tensor, dropped: Tensor) -> tuple[Tensor, States]:
    """Zoneout by ``zone`` (T, states, B, H), the hidden state into the product by ``dropped``."""
    states = tuple(x.new_zeros(x.size(1), layer.hidden_size) for _ in range(layer.cell.states))
    outputs = []
    gates = torch.nn.functional.linear(x, layer.weight_ih_l0, layer.bias_ih_l0)
    for t, step in enumerate(gates):
        into = states[0] * dropped
        h = torch.nn.functional.linear(into, layer.weight_hh_l0, layer.bias_hh_l0)
        new = LOOPS[layer.cell.name](step, h, states, {})
        states = tuple(z * a + (1 - z) * b for z, a, b in zip(zone[t], new, states, strict=True))
        outputs.append(states[0])
    return torch.stack(outputs), states


def test_zoneout_and_recurrent_dropout_are_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    masks_of = functional_cells._masks

    def spy(*arguments: Any) -> Tensor:
        seen.append(masks_of(*arguments))
        return seen[-1]

    monkeypatch.setattr(functional_cells, "_masks", spy)
    torch.manual_seed(0)
    rates, p = (0.25, 0.5), 0.4
    layer = fast_nn.CellLayer(
        cells.coupled_lstm, IN, 65, dtype=torch.float64, zoneout=rates, recurrent_dropout=p
    )
    x = torch.randn(50, B, IN, dtype=torch.float64)
    output, final = layer(x)
    (masks,) = seen
    assert masks.shape == (1, 50, B, 3, 65)
    zone, dropped = masks[0, :, :, :2].transpose(1, 2), masks[0, 0, :, 2]
    expected, states = masked_loop(layer, x, zone, dropped)
    torch.testing.assert_close(output, expected, **EXACT)
    torch.testing.assert_close(tuple(s[0] for s in final), states, **EXACT)
    # Zeros and ones, as many as was asked for; one mask per sequence for the hidden state.
    for index, rate in enumerate(rates):
        assert set(zone[:, index].unique().tolist()) == {0.0, 1.0}
        assert abs(float((zone[:, index] == 0).double().mean()) - rate) < 0.02
    assert set(dropped.unique().tolist()) == {0.0, 1 / (1 - p)}
    assert torch.equal(masks[:, :, :, 2], masks[:, :1, :, 2].expand(-1, 50, -1, -1))
    assert not torch.equal(dropped[0], dropped[1])


def test_evaluation_takes_zoneouts_expectation_and_drops_nothing() -> None:
    torch.manual_seed(0)
    options = {"zoneout": 0.25, "recurrent_dropout": 0.4, "weight_dropout": 0.5}
    layer = fast_nn.CellLayer(cells.coupled_lstm, IN, H, dtype=torch.float64, **options).eval()
    x = torch.randn(T, B, IN, dtype=torch.float64)
    before = torch.get_rng_state()
    output, _ = layer(x)
    assert torch.equal(torch.get_rng_state(), before)
    zone = torch.full((T, 2, B, H), 0.75, dtype=torch.float64)
    expected, _ = masked_loop(layer, x, zone, torch.ones(B, H, dtype=torch.float64))
    torch.testing.assert_close(output, expected, **EXACT)


def test_weight_dropout() -> None:
    torch.manual_seed(0)
    layer = fast_nn.CellLayer(cells.gru, IN, H, dtype=torch.float64, weight_dropout=0.5)
    plain = copy.deepcopy(layer).eval()
    x = torch.randn(T, B, IN, dtype=torch.float64)
    torch.manual_seed(5)
    output, _ = layer(x)
    torch.manual_seed(5)
    with torch.no_grad():
        plain.weight_hh_l0.copy_(torch.nn.functional.dropout(layer.weight_hh_l0, 0.5, True))
    torch.testing.assert_close(output, plain(x)[0], **EXACT)
    output.sum().backward()
    assert torch.equal(layer.weight_hh_l0.grad == 0, plain.weight_hh_l0 == 0)


@pytest.mark.parametrize("option", ["zoneout", "recurrent_dropout", "weight_dropout", "dropout"])
def test_random_numbers_follow_the_seed(option: str) -> None:
    layer = fast_nn.CellLayer(cells.lstm, IN, H, 2, **{option: 0.5})
    x = torch.randn(T, B, IN)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(layer(x)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# --- the module


def test_constructor_and_state_dict() -> None:
    layer = fast_nn.CellLayer(cells.peephole_lstm, IN, H, 2, bidirectional=True, bias=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes["weight_ih_l0"] == (4 * H, IN)
    assert shapes["weight_ih_l1_reverse"] == (4 * H, 2 * H)
    assert shapes["peephole_f_l1_reverse"] == (H,)
    assert not any("bias" in name for name in shapes)
    assert all(p.abs().max() <= 1 / math.sqrt(H) for p in layer.parameters())
    options = "num_layers=2, bias=False, bidirectional=True"
    assert repr(layer) == f"CellLayer(peephole_lstm, 5, 7, {options})"
    independent = fast_nn.CellLayer(cells.ind_rnn, IN, H)
    assert list(independent.state_dict()) == ["weight_ih_l0", "bias_ih_l0", "recurrent_l0"]


def test_pickle_copy_and_save() -> None:
    layer = fast_nn.CellLayer(cells.janet, IN, H)
    x = torch.randn(T, B, IN)
    expected = layer(x)[0]
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (
        pickle.loads(pickle.dumps(layer)),
        copy.deepcopy(layer),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(other(x)[0], expected)


def raises(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_errors() -> None:
    def make(**options: Any) -> Any:
        return fast_nn.CellLayer(cells.s_lstm, IN, H, **options)

    undecorated: Any = janet
    raises(TypeError, "got function", lambda: fast_nn.CellLayer(undecorated, 1, 1))
    raises(ValueError, "at least 1, got 0", lambda: fast_nn.CellLayer(cells.janet, 1, 0))
    raises(ValueError, "zoneout must be a prob.*got 1.5", lambda: make(zoneout=1.5))
    raises(ValueError, r"one for each of 4 state\(s\), got 2", lambda: make(zoneout=(0.1, 0.2)))
    raises(ValueError, "weight_dropout must be a prob", lambda: make(weight_dropout=-1))
    layer = make()
    x = torch.randn(T, B, IN)
    state = torch.zeros(1, B, H)
    raises(TypeError, "tuple of 4 tensors, got one tensor", lambda: layer(x, state))
    raises(TypeError, "tuple of 4 tensors, got 3", lambda: layer(x, (state,) * 3))
    wrong = (state, state, torch.zeros(1, B, H + 1), state)
    raises(RuntimeError, r"state 2 must have shape \(1, 4, 7\)", lambda: layer(x, wrong))
    six = torch.randn(T, B, 6)
    raises(RuntimeError, "equal to input_size: expected 5, got 6", lambda: layer(six))
    raises(ValueError, "2-D or 3-D, got 4-D", lambda: layer(x.unsqueeze(0)))
    raises(ValueError, "dtype of the weights: expected torch.float32", lambda: layer(x.double()))
    raises(RuntimeError, "at least one time step", lambda: layer(x[:0]))
    raises(ValueError, "lengths must lie between 0 and 6", lambda: layer(x, lengths=[7, 1, 1, 1]))
    assert layer(x[:, :0])[0].shape == (T, 0, H)  # no sequences are no mistake


def test_composite_is_what_ops_hand_over_to() -> None:
    """The import above is the reference: one definition of what the kernels compute."""
    assert composite.__module__ == "fastseq.backends.reference_cells"
