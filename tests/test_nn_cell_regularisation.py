"""fastseq.nn.CellLayer: zoneout and every kind of dropout, from their definitions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cell_loops import EXACT, IN, LOOPS, B, H, States, T
from torch import Tensor

import fastseq.nn as fast_nn
from fastseq import cells
from fastseq.functional import cells as functional_cells

pytest.importorskip("numba", reason="Numba is not installed: pip install 'fastseq[numba]'")


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
