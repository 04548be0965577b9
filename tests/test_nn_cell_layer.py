"""fastseq.nn.CellLayer: cells against plain loops, layouts, projections, the module itself."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from cell_loops import (
    EXACT,
    IN,
    LOOPS,
    B,
    H,
    T,
    as_tuple,
    draw_states,
    each_cell,
    given,
    leaves_and_grads,
    loop,
    raises,
    run,
)
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

import fastseq
import fastseq.nn as fast_nn
from fastseq import cells
from fastseq.cells.shipped import SHIPPED

pytest.importorskip("numba", reason="Numba is not installed: pip install 'fastseq[numba]'")


# In float32, too: learned parameters, slots of the hidden state alone, no recurrent matrix, four
# states. The other cells' formulas bring nothing of their own to it, and each costs three kernels;
# every function that a cell may use meets both dtypes in test_cells.py.
NARROW = ("peephole_lstm", "minimal_gated_unit", "ind_rnn", "s_lstm")


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
        if name not in NARROW:
            continue

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


def test_errors() -> None:
    def make(**options: Any) -> Any:
        return fast_nn.CellLayer(cells.s_lstm, IN, H, **options)

    undecorated: Any = LOOPS["janet"]
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
