"""The ops of users' cells: gradcheck, opcheck, compiler, transforms, and what falls back."""

from __future__ import annotations

import pytest
import torch
from cell_loops import EXACT, IN, B, H, States, T, as_tuple, draw_states, each_cell, given, run
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode

import fastseq.nn as fast_nn
from fastseq import cells
from fastseq._cells import NUMBA_CELL_LAYOUT
from fastseq._ops.cells import composite
from fastseq.backends import FastseqFallbackWarning
from fastseq.cells.shipped import SHIPPED
from fastseq.functional import cells as functional_cells

pytest.importorskip("numba", reason="Numba is not installed: pip install 'fastseq[numba]'")


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
    forward = (x, states, weights, None, *rows, *options, True, NUMBA_CELL_LAYOUT)
    torch.library.opcheck(torch.ops.fastseq.cell_forward.default, forward)
    with torch.no_grad():
        plain = [t.detach() for t in (x, *states, *weights)]
        x, states, weights = plain[0], plain[1:3], plain[3:]
        output, final, reserve = torch.ops.fastseq.cell_forward(
            x, states, weights, None, *rows, *options, True, NUMBA_CELL_LAYOUT
        )
    needs = [True, False, *[True] * (len(plain) - 2)]
    torch.library.opcheck(
        torch.ops.fastseq.cell_backward.default,
        (torch.randn_like(output), [torch.randn_like(s) for s in final], x, states, weights,
         None, reserve, *rows, *options, needs, NUMBA_CELL_LAYOUT),
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
    x = torch.randn(T, B, IN).bfloat16()
    with pytest.warns(FastseqFallbackWarning, match="bfloat16"):
        found = layer(x)[0]
    # JANET's state is a weighted mean of itself and a tanh, so that errors add up and do not grow;
    # a step rounds some four values of about 1 on the way to it, each by up to 2^-9.
    bound = T * 4 * 2**-9
    torch.testing.assert_close(found.float(), layer.float()(x.float())[0], rtol=0, atol=bound)


def test_without_numba_cells_run_on_torch_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastseq.backends._warned_reasons", set())
    layer = fast_nn.CellLayer(cells.janet, IN, H, dtype=torch.float64)
    x = torch.randn(T, B, IN, dtype=torch.float64)
    expected = layer(x)[0]
    monkeypatch.setattr(functional_cells, "_NO_NUMBA", "Numba is not installed")
    with pytest.warns(FastseqFallbackWarning, match="Numba is not installed"):
        torch.testing.assert_close(layer(x)[0], expected, **EXACT)


def test_composite_is_what_ops_hand_over_to() -> None:
    """The import above is the reference: one definition of what the kernels compute."""
    assert composite.__module__ == "fastseq.backends.reference_cells"
