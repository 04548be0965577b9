"""NaN, Inf, huge and denormal numbers, empty batches, and the floating-point mode of the caller."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernels import TIERS, on_tier
from oracle import CELLS, Case, arguments, largest, outputs_of
from torch import Tensor

import fastseq.nn as fast_nn

# Where to plant a value: a leaf and, for sequences, an element in the middle.
PLACES: dict[str, tuple[int, ...]] = {
    "x": (2, 1, 3),
    "h_0": (0, 1, 4),
    "c_0": (0, 2, 5),
    "w_ih_0_0": (3, 2),
    "w_hh_0_0": (4, 6),
    "b_ih_0_0": (5,),
    "b_hh_0_0": (1,),
}


def results_with(
    case: Case, library: str, dtype: torch.dtype, change: Callable[[dict[str, Tensor]], None]
) -> dict[str, Tensor]:
    """Outputs and gradients by name after ``change`` was made to the leaves."""
    leaves, lengths, generator = arguments(case, dtype)
    with torch.no_grad():
        change(leaves)
    outputs = outputs_of(case, library, leaves, lengths)
    cotangents = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype) for o in outputs
    ]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    results.update({f"grad {n}": g for n, g in zip(leaves, grads, strict=True)})
    return results


def assert_same_specials(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, expected in theirs.items():
        actual = ours[name].to(expected.dtype)
        assert torch.equal(actual.isnan(), expected.isnan()), name
        infinite = expected.isinf()
        assert torch.equal(actual.isinf(), infinite), name
        assert torch.equal(actual[infinite], expected[infinite]), name
        # Rounding is the business of test_functional_rnn; here a wrong branch must show.
        finite = expected.isfinite()
        tolerance = 1e-11 if ours[name].dtype is torch.float64 else 1e-4
        torch.testing.assert_close(
            actual[finite], expected[finite], rtol=tolerance, atol=tolerance, msg=name
        )


# The truth is torch in float64, where its layers are composed of separate operators. Its float32
# LSTM goes to oneDNN, whose own exp and clamps let some NaN and Inf go other ways.
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("cell", CELLS)
def test_specials_spread_as_in_torch(cell: str, place: str, value: str) -> None:
    if place == "c_0" and cell != "lstm":
        pytest.skip("only the LSTM has a cell state")

    def plant(leaves: dict[str, Tensor]) -> None:
        leaves[place][PLACES[place]] = float(value)

    for layout in ("padded", "lengths"):
        case = Case(cell, layout=layout, bidirectional=True, hidden_size=9)
        theirs = results_with(case, "torch", torch.float64, plant)
        for tier in TIERS:
            for dtype in (torch.float64, torch.float32):
                with on_tier(tier):
                    assert_same_specials(results_with(case, "fastseq", dtype, plant), theirs)


@pytest.mark.parametrize("cell", CELLS)
def test_nan_stays_in_its_row(cell: str, isa: str, threads: int) -> None:
    """Sequences of a batch share register tiles, never values."""
    case = Case(cell, steps=6, batch=33, input_size=19, hidden_size=35, bidirectional=True)

    def plant(leaves: dict[str, Tensor]) -> None:
        leaves["x"][2, 17] = float("nan")

    clean = results_with(case, "fastseq", torch.float32, lambda leaves: None)
    spoiled = results_with(case, "fastseq", torch.float32, plant)
    others = torch.arange(33) != 17
    for name in ("output 0", "output 1", "grad x", "grad h_0"):
        assert torch.equal(clean[name][:, others], spoiled[name][:, others]), name
    assert spoiled["output 1"][:, 17].isnan().all()


@pytest.mark.parametrize("layout", ["lengths", "packed_unsorted"])
@pytest.mark.parametrize("cell", CELLS)
def test_padding_is_never_read(cell: str, layout: str, isa: str) -> None:
    case = Case(cell, steps=7, batch=5, layout=layout, bidirectional=True, dtype="float64")
    _, lengths, _ = arguments(case, torch.float64)
    assert lengths is not None
    padding = torch.arange(7)[:, None] >= lengths

    def plant(leaves: dict[str, Tensor]) -> None:
        leaves["x"][padding] = float("nan")

    clean = results_with(case, "fastseq", torch.float64, lambda leaves: None)
    spoiled = results_with(case, "fastseq", torch.float64, plant)
    for name, value in clean.items():
        assert torch.equal(value, spoiled[name]), name
    assert not clean["grad x"][padding].any()


@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize("cell", CELLS)
def test_huge_inputs(cell: str, scale: float, isa: str) -> None:
    """Gates saturate; the ReLU cell has no bound, and grows the same in both libraries."""

    def grow(leaves: dict[str, Tensor]) -> None:
        leaves["x"].mul_(scale)

    case = Case(cell, steps=6, batch=5, bidirectional=True, hidden_size=9)
    truth = results_with(case, "torch", torch.float64, grow)
    for dtype in (torch.float64, torch.float32):
        ours = results_with(case, "fastseq", dtype, grow)
        for name, value in truth.items():
            # Where a gate is not saturated its pre-activation of 1e4 carries an error of 1e4
            # units; where it is, 1 - tanh^2 has an error of one unit, and 1e4 times that in the
            # gradients of the input's weights. Sums over a few rows.
            bound = 8 * 1e4 * torch.finfo(dtype).eps * (largest(value) + 1)
            assert largest(ours[name].double() - value) <= bound, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_denormal_inputs_and_states(cell: str, dtype: torch.dtype, isa: str, threads: int) -> None:
    """Flushing them to zero changes results by no more than what was flushed."""
    tiny = torch.finfo(dtype).tiny

    def shrink(leaves: dict[str, Tensor]) -> None:
        for name in ("x", "h_0", "c_0"):
            if name in leaves:
                leaves[name].mul_(tiny / 16)

    case = Case(cell, steps=5, batch=6, hidden_size=33)
    truth = (
        results_with(case, "torch", torch.float64, shrink)
        if dtype == torch.float32
        else (results_with(case, "torch", dtype, shrink))
    )
    ours = results_with(case, "fastseq", dtype, shrink)
    for name, value in truth.items():
        bound = 64 * torch.finfo(dtype).eps * largest(value) + 64 * tiny
        assert largest(ours[name].double() - value.double()) <= bound, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_floating_point_mode_is_given_back(dtype: torch.dtype, isa: str, threads: int) -> None:
    """On the calling thread and on the workers, which torch's own operators use after us."""
    denormal = torch.finfo(dtype).tiny / 4
    values = torch.full((1 << 18,), denormal, dtype=dtype)  # enough for torch to use its pool
    expected = values * 1.5
    assert bool((expected > 0).all()), "the test itself runs with denormals flushed"
    layer = fast_nn.LSTM(20, 40, bidirectional=True, dtype=dtype)
    x = torch.randn(10, 8, 20, dtype=dtype) * denormal
    for _ in range(3):
        layer(x)[0].sum().backward()
        assert torch.equal(values * 1.5, expected)
        with torch.no_grad():
            layer(x[:1, :1])
        assert torch.equal(values * 1.5, expected)
        assert denormal * 1.5 > 0


def test_a_caller_that_flushes_keeps_flushing() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        fast_nn.GRU(5, 6)(torch.randn(3, 2, 5))[0].sum().backward()
        flushed = torch.tensor([torch.finfo(torch.float32).tiny]) * 0.25
        assert flushed.item() == 0.0
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("layout", ["padded", "lengths"])
@pytest.mark.parametrize("cell", [*CELLS, "lstm_projected"])
def test_empty_batch(cell: str, layout: str, isa: str, threads: int) -> None:
    projected = cell == "lstm_projected"
    case = Case(
        cell.removesuffix("_projected"), steps=3, batch=0, layout=layout, bidirectional=True,
        projected=projected, num_layers=2,
    )  # fmt: skip
    leaves, _, _ = arguments(case, torch.float32)
    lengths = torch.zeros(0, dtype=torch.int64) if layout == "lengths" else None
    outputs = outputs_of(case, "fastseq", leaves, lengths)
    width = case.proj_size or case.hidden_size
    assert outputs[0].shape == (3, 0, 2 * width)
    assert outputs[1].shape == (4, 0, width)
    # An empty sum: gradients of the weights are zeros.
    sum(output.sum() for output in outputs).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any(), name


@pytest.mark.parametrize("cell", CELLS)
def test_steps_without_rows(cell: str, isa: str, threads: int) -> None:
    """No sequence reaches the last steps: they cost nothing and change nothing."""
    short = Case(cell, steps=3, batch=4, layout="lengths", bidirectional=True)
    long = Case(cell, steps=9, batch=4, layout="lengths", bidirectional=True)
    leaves, _, _ = arguments(short, torch.float32)
    lengths = torch.tensor([3, 1, 2, 3])
    padded = {
        n: torch.cat([leaf, torch.full((6, 4, 7), float("nan"))]) if n == "x" else leaf
        for n, leaf in leaves.items()
    }
    expected = outputs_of(short, "fastseq", leaves, lengths)
    found = outputs_of(long, "fastseq", padded, lengths)
    assert torch.equal(found[0][:3], expected[0])
    assert not found[0][3:].any()
    assert all(torch.equal(a, b) for a, b in zip(found[1:], expected[1:], strict=True))
    weights = [leaf for name, leaf in leaves.items() if name != "x"]
    for a, b in zip(
        torch.autograd.grad(sum(o.sum() for o in found), weights),
        torch.autograd.grad(sum(o.sum() for o in expected), weights),
        strict=True,
    ):
        assert torch.equal(a, b)
