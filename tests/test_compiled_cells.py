"""Users' cells compiled as C++: results and gradients against the reference, on every tier."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cell_loops import EXACT, IN, B, H, T, as_tuple, draw_states, given, leaves_and_grads, run
from compiled_cells import brittle, compiled_cells, everything, needs_compiler, uneven
from kernels import needs_extension
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import fastseq
import fastseq.nn as fast_nn
from fastseq import _config, cells
from fastseq._cells import COMPILED_CELL_LAYOUT
from fastseq.backends.compiled_cells.choice import kernels
from fastseq.backends.compiled_cells.printing import why_not
from fastseq.profiler.models import model

pytestmark = [needs_compiler, needs_extension]
MGU = cells.minimal_gated_unit


@pytest.fixture(scope="module", autouse=True)
def compiled() -> Iterator[None]:
    with compiled_cells():
        yield


def against_reference(layer: Any, x: Any, hx: Any, wanted: list[Tensor], **options: Any) -> None:
    found = run(layer, x, hx, wanted, **options)
    with fastseq.backend("reference"):
        expected = run(layer, x, hx, wanted, **options)
    torch.testing.assert_close(found, expected, **EXACT)


LAYOUTS: dict[str, dict[str, Any]] = {
    "batch_first": {"batch_first": True},
    "two_layers_and_directions": {"num_layers": 2, "bidirectional": True},
    "no_bias": {"bias": False, "bidirectional": True, "batch_first": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", [uneven, cells.lstm], ids=lambda cell: cell.name)
def test_layouts(cell: Any, layout: str) -> None:
    """Padded, packed and ragged input, with and without states; part of a vector and several."""
    torch.manual_seed(0)
    options = LAYOUTS[layout]
    lengths = torch.tensor([3, 6, 0, 2])
    for hidden in (1, H, 65):
        layer = fast_nn.CellLayer(cell, IN, hidden, dtype=torch.float64, **options)
        x = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)
        batch_first = options.get("batch_first", False)
        padded = x.transpose(0, 1) if batch_first else x
        states = draw_states(layer)
        weights = list(layer.parameters())
        against_reference(layer, padded, None, [x, *weights])
        hx = given(layer, states)
        against_reference(layer, padded, hx, [x, *states, *weights], lengths=lengths)
        packed = pack_padded_sequence(
            padded.detach(), lengths.clamp_min(1), batch_first, enforce_sorted=False
        )
        packed.data.requires_grad_()
        against_reference(layer, packed, hx, [packed.data, *states, *weights])
        against_reference(layer, padded[:1], None, weights)  # one step or one sequence


@pytest.mark.parametrize("cell", [everything, uneven], ids=lambda cell: cell.name)
def test_own_formulas(cell: Any) -> None:
    torch.manual_seed(0)
    layer = fast_nn.CellLayer(cell, IN, 33, bidirectional=True, dtype=torch.float64)
    x = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)
    states = draw_states(layer)
    wanted = [x, *states, *layer.parameters()]
    against_reference(layer, x, given(layer, states), wanted, lengths=torch.tensor([6, 1, 3, 0]))
    # Nobody is alive: all gradients are zero, in their own shapes.
    against_reference(
        layer, x, given(layer, states), wanted, lengths=torch.zeros(B, dtype=torch.long)
    )


def test_projection() -> None:
    torch.manual_seed(0)
    layer = fast_nn.CellLayer(
        cells.lstm, IN, 33, proj_size=6, bidirectional=True, dtype=torch.float64
    )
    x = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)
    for more in ({}, {"lengths": torch.tensor([3, 6, 0, 2])}):
        against_reference(layer, x, None, [x, *layer.parameters()], **more)


def test_the_builtin_cell_is_the_builtin_layer() -> None:
    torch.manual_seed(0)
    theirs = fast_nn.LSTM(IN, 33, 2, bidirectional=True, dtype=torch.float64)
    ours = fast_nn.CellLayer(cells.lstm, IN, 33, 2, bidirectional=True, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)
    found = run(ours, x, None, [x, *ours.parameters()])
    torch.testing.assert_close(found, run(theirs, x, None, [x, *theirs.parameters()]), **EXACT)


# Rows and units enough for the matrix unit, too. It multiplies what is beyond the last unit with
# zeros, and NaN times zero is NaN.
@pytest.mark.parametrize("batch", [1, 17])
def test_float32_on_every_tier(isa: str, batch: int) -> None:
    """As close to float64 as torch's operators in float32; one and two threads, the same bits."""
    torch.manual_seed(0)
    exact = fast_nn.CellLayer(brittle, 19, 45, dtype=torch.float64)
    x = torch.randn(12, batch, 19, dtype=torch.float64, requires_grad=True)
    state = (torch.rand(1, batch, 45, dtype=torch.float64) - 0.5).requires_grad_()
    narrow = copy.deepcopy(exact).float()
    x32, state32 = (t.detach().float().requires_grad_() for t in (x, state))
    with fastseq.backend("reference"):
        truth = run(exact, x, state, [x, state, *exact.parameters()])
        theirs = run(narrow, x32, state32, [x32, state32, *narrow.parameters()])
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(run(narrow, x32, state32, [x32, state32, *narrow.parameters()]))
    torch.set_num_threads(before)
    for ours, again, other, right in zip(*found, theirs, truth, strict=True):
        assert torch.equal(ours, again)
        error, peer = (ours - right).abs().max(), (other - right).abs().max()
        assert error <= 1.5 * peer + 4 * torch.finfo(torch.float32).eps * right.abs().max()


def test_the_reserve_is_what_the_library_says() -> None:
    # Not at the top of the file: it needs the extension.
    from fastseq.backends.compiled_cells import recurrent

    number = kernels(cells.lstm.plan, torch.float64)
    for hidden, proj_size in ((33, 0), (64, 5)):
        elements = recurrent.reserve_elements(cells.lstm.plan, 11, hidden, 2, 8, proj_size)
        bytes_ = _config.extension().rnn_reserve_bytes(number, 1, 11, hidden, proj_size, 2)
        assert 8 * elements == bytes_


# --- autograd, compiler, profile


def test_gradcheck() -> None:
    torch.manual_seed(0)
    layer = fast_nn.CellLayer(everything, 2, 3, bidirectional=True, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    states = draw_states(layer, 2)
    names = [n for n, _ in layer.named_parameters()]

    def call(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, rest[2:], strict=True))
        output, final = functional_call(layer, parameters, (x, given(layer, rest[:2])))
        return output, *as_tuple(final)

    assert gradcheck(call, (x, *states, *layer.parameters()), fast_mode=True)


def test_a_backward_runs_as_its_forward_did() -> None:
    """Whatever is chosen in between: the reserve has one layout."""
    pytest.importorskip("numba")
    torch.manual_seed(0)
    layer = fast_nn.CellLayer(uneven, IN, 33, dtype=torch.float64)
    x = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.parameters()]
    expected = run(layer, x, None, wanted)
    for first, second in (("on", "off"), ("off", "on")):
        with fastseq.cell_compiler(first):
            output, final = layer(x)
        with fastseq.cell_compiler(second):
            found = leaves_and_grads(output, (final,), wanted)
        torch.testing.assert_close(found, expected, **EXACT)


def test_another_tier_in_between() -> None:
    torch.manual_seed(0)
    layer = fast_nn.CellLayer(brittle, 19, 45)
    x = torch.randn(T, 17, 19, requires_grad=True)
    wanted = [x, *layer.parameters()]
    expected = run(layer, x, None, wanted)
    with fastseq.isa("base"):
        output, final = layer(x)
    torch.testing.assert_close(
        leaves_and_grads(output, (final,), wanted), expected, rtol=1e-4, atol=1e-5
    )


def test_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    # Padding inside the reserve is not written: zero, so that it equals itself.
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    torch.manual_seed(0)
    layer = fast_nn.CellLayer(cells.lstm, 3, 4, dtype=torch.float64)
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    states, weights = list(draw_states(layer, 2)), list(layer.parameters())
    options = (layer.cell.key, False, False, True, False, False)
    rows = (None, torch.tensor([3, 1]))
    forward = (x, states, weights, None, *rows, *options, True, COMPILED_CELL_LAYOUT)
    torch.library.opcheck(torch.ops.fastseq.cell_forward.default, forward)
    with torch.no_grad():
        plain = [t.detach() for t in (x, *states, *weights)]
        x, states, weights = plain[0], plain[1:3], plain[3:]
        output, final, reserve = torch.ops.fastseq.cell_forward(
            x, states, weights, None, *rows, *options, True, COMPILED_CELL_LAYOUT
        )
    needs = [True, False, *[True] * (len(plain) - 2)]
    torch.library.opcheck(
        torch.ops.fastseq.cell_backward.default,
        (torch.randn_like(output), [torch.randn_like(s) for s in final], x, states, weights,
         None, reserve, *rows, *options, needs, COMPILED_CELL_LAYOUT),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_compile() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = fast_nn.CellLayer(uneven, 3, 4, bidirectional=True, dtype=torch.float64)
    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.parameters()]
    found = run(graph, x, None, wanted)
    torch.testing.assert_close(found, run(layer, x, None, wanted), **EXACT)
    # The graph keeps to what it was recorded with.
    with fastseq.cell_compiler("off"):
        torch.testing.assert_close(run(graph, x, None, wanted), found, **EXACT)
    torch._dynamo.reset()


def test_profile_and_flops() -> None:
    layer = fast_nn.CellLayer(uneven, IN, H, dtype=torch.float64)
    x = torch.randn(T, B, IN, dtype=torch.float64, requires_grad=True)
    with fastseq.profile() as profile:
        layer(x)[0].sum().backward()
    forward, backward = profile.calls
    assert (forward.name, backward.name) == ("cell_forward uneven", "cell_backward uneven")
    assert forward.isa == _config.extension().isa()
    products = 2 * T * B * (2 * H * IN + H * H)
    assert model(forward).flops == products
    assert model(backward).phase_flops["weight gradient"] == products
    assert "recurrent product" in forward.phases()
    with FlopCounterMode(display=False) as counter:
        layer(x)[0].sum().backward()
    assert counter.get_total_flops() == 3 * products


# --- which cells


def test_cells_that_the_driver_cannot_hold() -> None:
    @fastseq.cell(gates=2)
    def no_hidden(x: Any, h: Any, s: Any) -> Any:
        return x[0] * s[0] + x[1]

    @fastseq.cell(gates=1)
    def no_input(x: Any, h: Any, s: Any) -> Any:
        return cells.tanh(h[0])

    @fastseq.cell(gates=9)
    def wide(x: Any, h: Any, s: Any) -> Any:
        return sum(x[g] * h[g] for g in range(9))

    reasons = {
        cells.ind_rnn.plan: "learned values",
        cells.s_lstm.plan: "4 states",
        MGU.regularised(False, True): "zoneout",
        cells.lstm.regularised(True, False): "recurrent dropout",
        no_hidden.plan: "no gate of the hidden state",
        no_input.plan: "no gate of the input",
        wide.plan: "18 values per unit",
    }
    for plan, reason in reasons.items():
        assert reason in (why_not(plan) or "")
    for held in (MGU, cells.janet, cells.coupled_lstm, cells.lstm, cells.gru, cells.rnn_relu):
        assert why_not(held.plan) is None
