"""Backend "numba", one sequence: units shared out among threads that wait for each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import CELLS, Case, arguments, compare, expected, outputs_of, run

import fastseq
import fastseq.nn as fast_nn

pytest.importorskip("numba", reason="Numba is not installed: pip install 'fastseq[numba]'")

from fastseq.backends.numba import threads, unit_parts

pytestmark = pytest.mark.skipif(
    threads.openmp_library() is None,
    reason="torch has loaded no OpenMP library with GNU's entry points, so units are not shared",
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every size goes this way; the list has the threads of each call that did."""
    found: list[int] = []
    prepare = unit_parts.prepare

    def counted(arguments: Any, count: int) -> None:
        found.append(count)
        prepare(arguments, count)

    monkeypatch.setattr(unit_parts, "_LEAST_WEIGHT_BYTES", 0)
    monkeypatch.setattr(unit_parts, "prepare", counted)
    before = torch.get_num_threads()
    with fastseq.backend("numba"):
        yield found
    torch.set_num_threads(before)


CASES = [
    *(Case(cell, steps=5, batch=1, input_size=7, hidden_size=65) for cell in CELLS),
    Case("gru", "float64", steps=3, batch=1, input_size=3, hidden_size=130, has_biases=False),
    Case("lstm", steps=17, batch=1, input_size=5, hidden_size=300, layout="packed"),
    Case("gru", steps=17, batch=1, input_size=5, hidden_size=70, layout="lengths"),
    Case("lstm", steps=4, batch=1, input_size=5, hidden_size=70, layout="unbatched"),
    Case("gru", steps=6, batch=1, input_size=5, hidden_size=40, num_layers=2, batch_first=True),
    # Fewer panels than threads: one of them has nothing but its place at the barrier.
    Case("gru", steps=3, batch=1, input_size=2, hidden_size=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64_torch(case: Case, calls: list[int]) -> None:
    """Outputs and every gradient; the same bits for any number of threads, and on repeat."""
    truth, bounds = expected(case)
    dtype = getattr(torch, case.dtype)
    found = []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        found.append(run(case, "fastseq", dtype))
        compare(found[-1], truth, bounds, f"{count} thread(s)")
    assert calls == [2] * case.num_layers + [3] * case.num_layers + [2] * case.num_layers
    for other in found[2:]:
        for name, value in found[1].items():
            assert torch.equal(value, other[name]), name
    leaves, lengths, _ = arguments(case, dtype)
    inferred = []
    for count in (1, 2):
        torch.set_num_threads(count)
        with torch.no_grad():
            inferred.append(outputs_of(case, "fastseq", leaves, lengths))
    for name, one, two in zip(("output", "h_n", "c_n"), *inferred, strict=False):
        assert torch.equal(one, two), f"{name}: 1 and 2 threads differ"
        assert torch.equal(two.double(), found[-1][name]), f"{name}: no_grad differs"


@pytest.mark.parametrize("cell", ["peephole_lstm", "s_lstm"])
def test_cells_with_learned_values_and_masks(cell: str, calls: list[int]) -> None:
    layer = fast_nn.CellLayer(
        getattr(fastseq.cells, cell), 5, 40, recurrent_dropout=0.3, zoneout=0.2
    )
    x = torch.randn(6, 1, 5)
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        torch.manual_seed(1)
        output, states = layer(x)
        found.append([output, *states])
    assert calls == [2]
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
    assert found[0][0].abs().sum() > 0


def test_small_weights_stay_on_one_thread(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit_parts, "_LEAST_WEIGHT_BYTES", 512 << 10)
    torch.set_num_threads(2)
    with torch.no_grad():
        fast_nn.GRU(4, 64)(torch.randn(3, 1, 4))
        assert not calls
        fast_nn.GRU(4, 256)(torch.randn(3, 1, 4))
        assert calls == [2]
        fast_nn.GRU(4, 256)(torch.randn(3, 2, 4))
        fast_nn.GRU(4, 256, bidirectional=True)(torch.randn(3, 1, 4))
        assert calls == [2]
