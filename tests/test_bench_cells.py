"""Cases of the shipped cells: right before they are timed, their work as torch counts it."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastseq
from fastseq.bench import build, families
from fastseq.bench.cases import SUITES, from_record
from fastseq.bench.cell_cases import CELL_LAYERS, CellCase, make_cell_case

pytest.importorskip("numba", reason="Numba is not installed: pip install 'fastseq[numba]'")


def test_every_shipped_cell_has_cases() -> None:
    assert {(c.layer, c.direction) for c in SUITES["cells"]} == {
        (cell, direction) for cell in CELL_LAYERS for direction in ("inference", "training")
    }
    for case in SUITES["cells"]:
        assert from_record(dataclasses.asdict(case)) == case
        assert isinstance(case, CellCase)


def test_unknown_cell() -> None:
    with pytest.raises(ValueError, match=r"cell must be one of .* got 'lstm'"):
        make_cell_case("lstm", "training", T=1, B=1, H=1)


@pytest.mark.parametrize("cell", CELL_LAYERS)
def test_gate_and_work(cell: str) -> None:
    # Numba takes seconds for each cell, and test_nn_cell_layer.py has all of them. Here it is about
    # the gate and the calls: one cell goes through the kernels, the others through their composite.
    with nullcontext() if cell == "janet" else fastseq.backend("reference"):
        gate_and_work(cell)


def gate_and_work(cell: str) -> None:
    case = make_cell_case(cell, "training", T=4, B=3, H=9)
    family = families.family_of(case)
    built = family.build(case)
    result = family.check(built)
    assert result.passed, result.summary()
    assert case.weight_elements() == sum(p.numel() for p in built.fastseq_layer.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        built.torch_layer(build.input_tensor(built.input))
    inference = dataclasses.replace(case, direction="inference")
    assert counter.get_total_flops() == inference.flops()
    assert case.flops() == 3 * inference.flops()
    for library in ("torch", "fastseq"):
        family.timed_call(built, library)()


def test_a_wrong_result_is_seen() -> None:
    built = families.family_of(case := make_cell_case("janet", "training", T=4, B=3, H=9)).build(
        case
    )
    with torch.no_grad():
        built.fastseq_layer.weight_hh_l0[0, 0] += 0.1
    assert not families.family_of(case).check(built).passed
