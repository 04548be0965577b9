"""fastseq.nn.PositionalEncoding."""

from __future__ import annotations

import math

import pytest
import torch

from fastseq.nn import PositionalEncoding


def test_formula() -> None:
    for size in (1, 6, 7):
        module = PositionalEncoding(size, dropout=0.0, max_len=50)
        found = module(torch.zeros(50, size))
        for position in (0, 1, 17, 49):
            for feature in range(size):
                angle = position / 10000 ** (feature // 2 * 2 / size)
                expected = math.cos(angle) if feature % 2 else math.sin(angle)
                assert float(found[position, feature]) == pytest.approx(expected, abs=1e-7)


def test_far_positions_are_exact() -> None:
    module = PositionalEncoding(4, dropout=0.0, max_len=100_000)
    row = module(torch.zeros(1, 4), start=99_999)[0]
    angles = [99_999.0, 99_999.0, 999.99, 999.99]
    for value, angle, function in zip(
        row, angles, (math.sin, math.cos, math.sin, math.cos), strict=True
    ):
        assert float(value) == pytest.approx(function(angle), abs=1e-7)


def test_layouts_and_start() -> None:
    x = torch.randn(2, 5, 6)
    first, last = PositionalEncoding(6, batch_first=True), PositionalEncoding(6)
    first.eval(), last.eval()
    expected = first(x)
    assert torch.equal(last(x.transpose(0, 1)).transpose(0, 1), expected)
    assert torch.equal(first(x[1]), expected[1])
    assert torch.equal(first(x[:, 3:], start=3), expected[:, 3:])
    assert first(x.double()).dtype is torch.float64


def test_dropout_and_state() -> None:
    module = PositionalEncoding(6, dropout=0.5, batch_first=True)
    output = module(torch.ones(20, 30, 6))
    assert 0.4 < float((output == 0).float().mean()) < 0.6
    assert not module.state_dict()
    assert repr(module).startswith("PositionalEncoding(\n  6, max_len=5000")


def test_errors() -> None:
    with pytest.raises(ValueError, match="d_model=0"):
        PositionalEncoding(0)
    with pytest.raises(ValueError, match="dropout"):
        PositionalEncoding(4, dropout=2.0)
    module = PositionalEncoding(4, max_len=5)
    with pytest.raises(ValueError, match="4 features, got shape"):
        module(torch.zeros(3, 5))
    for start, steps in ((0, 6), (3, 3), (-1, 2)):
        with pytest.raises(ValueError, match=f"max_len=5, got start={start}"):
            module(torch.zeros(steps, 4), start)
