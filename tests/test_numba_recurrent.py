"""The recurrent layers on backend "numba": a second implementation, held to the same oracle."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernels import needs_extension
from oracle import CELLS, Case, arguments, compare, expected, outputs_of, pairwise_cases, run
from torch import Tensor

import fastseq
import fastseq.nn as fast_nn

pytest.importorskip("numba", reason="Numba is not installed: pip install 'fastseq[numba]'")

from fastseq.backends import reference
from fastseq.backends.numba import layout, recurrent, threads, vectors
from fastseq.backends.numba.weights import padded_units

CHOICES: dict[str, Any] = {
    "dtype": ("float32", "float64"),
    "num_layers": (1, 2),
    "bidirectional": (False, True),
    "layout": ("padded", "packed", "packed_unsorted", "lengths", "unbatched"),
    "has_biases": (True, False),
    "batch_first": (False, True),
    "states": (True, False),
    "strides": ("contiguous", "transposed", "expanded", "every_other", "offset"),
    "steps": (1, 2, 17),
    "batch": (1, 2, 3, 17, 40),
    "input_size": (1, 7, 65),
    "hidden_size": (1, 7, 63, 65),
}
SMALL = {"steps": 3, "batch": 2, "input_size": 3, "hidden_size": 4}
EXACT = {"rtol": 1e-12, "atol": 1e-12}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_biases": {"has_biases": False, "states": False},
    "lengths": {"layout": "lengths", "bidirectional": True},
    "packed": {"layout": "packed", "bidirectional": True},
    "projected": {"projected": True, "layout": "lengths", "bidirectional": True},
}


@pytest.fixture(autouse=True)
def _numba() -> Iterator[None]:
    with fastseq.backend("numba"):
        yield


def covering_cases() -> list[Case]:
    cases = []
    for seed, cell in enumerate(CELLS):
        rows = pairwise_cases({"cell": (cell,), **CHOICES}, 8_000_000, seed)
        cases += [Case(**row) for row in rows[: 10 if cell in ("lstm", "gru") else 4]]
    # A projection is another way through the same loops.
    projected = [case for case in cases if case.cell == "lstm" and case.hidden_size > 1]
    cases += [dataclasses.replace(case, projected=True) for case in projected]
    return cases


# More terms than are summed in registers at once, and tiles of every height.
DEEP = [
    Case("gru", steps=2, batch=23, input_size=3, hidden_size=300),
    Case("lstm", steps=2, batch=1, input_size=300, hidden_size=258, dtype="float64"),
    *(
        Case("rnn_tanh", steps=2, batch=batch, input_size=2, hidden_size=33)
        for batch in (5, 7, 8, 9, 10, 11, 12, 24)
    ),
]


@pytest.mark.parametrize("case", [*covering_cases(), *DEEP], ids=str)
def test_against_float64_torch(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and every gradient; without gradients the same bits."""
    composite = []
    monkeypatch.setattr(reference, "rnn_layer", lambda *_: composite.append(case))
    truth, bounds = expected(case)
    dtype = getattr(torch, case.dtype)
    found = []
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(run(case, "fastseq", dtype))
            compare(found[-1], truth, bounds, f"{count} thread(s)")
    finally:
        torch.set_num_threads(before)
    leaves, lengths, _ = arguments(case, dtype)
    with torch.no_grad():
        inferred = outputs_of(case, "fastseq", leaves, lengths)
    for name, output in zip(("output", "h_n", "c_n"), inferred, strict=False):
        assert torch.equal(output.double(), found[-1][name]), f"{name}: no_grad differs"
    assert not composite


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell: str, variant: str) -> None:
    if variant == "projected" and cell != "lstm":
        pytest.skip("only LSTMs have projections")
    case = Case(cell, "float64", **SMALL, **VARIANTS[variant])
    leaves, lengths, _ = arguments(case, torch.float64)
    names = list(leaves)

    def layer(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(outputs_of(case, "fastseq", dict(zip(names, tensors, strict=True)), lengths))

    assert torch.autograd.gradcheck(layer, tuple(leaves.values()), fast_mode=True)


@needs_extension
def test_agrees_with_the_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two implementations with nothing in common but formulas."""
    calls = []
    forward = recurrent.forward
    monkeypatch.setattr(recurrent, "forward", lambda *a: calls.append(a) or forward(*a))
    torch.manual_seed(0)
    for name in ("RNN", "LSTM", "GRU"):
        layer = getattr(fast_nn, name)(33, 65, 2, bidirectional=True)
        x = torch.randn(9, 5, 33)
        ours = layer(x)[0]
        assert len(calls) == 2  # one for each layer
        with fastseq.backend("cpu"):
            theirs = layer(x)[0]
        assert len(calls) == 2
        calls.clear()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@needs_extension
def test_backward_runs_on_the_backend_of_its_forward() -> None:
    torch.manual_seed(0)
    layer = fast_nn.GRU(3, 5, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    (expected_grad,) = torch.autograd.grad(layer(x)[0].square().sum(), x)
    loss = layer(x)[0].square().sum()
    with fastseq.backend("cpu"):
        (found,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert torch.equal(found, expected_grad)
        loss_on_cpu = layer(x)[0].square().sum()
    (found,) = torch.autograd.grad(loss, x)  # a second time, from the same reserve
    assert torch.equal(found, expected_grad)
    (found,) = torch.autograd.grad(loss_on_cpu, x)
    torch.testing.assert_close(found, expected_grad, rtol=1e-12, atol=1e-12)


def test_compile() -> None:
    torch._dynamo.reset()
    layer = fast_nn.LSTM(3, 5, 2, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    found = torch.autograd.grad(compiled(x)[0].square().sum(), list(layer.parameters()))
    wanted = torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_streaming_is_one_call(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer and cell: one compiled function, no driver; a weight changed in place is seen."""
    torch.manual_seed(0)
    exact = getattr(torch.nn, name)(5, 33, dtype=torch.float64, batch_first=True)
    layer = getattr(fast_nn, name)(5, 33, dtype=dtype, batch_first=True)
    cell = getattr(fast_nn, f"{name}Cell")(5, 33, dtype=dtype)
    monkeypatch.setattr(recurrent, "forward", None)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else EXACT
    with torch.no_grad():
        for batch in (1, 3):
            state = exact_state = cell_state = None
            for _ in range(3):
                for weight in exact.parameters():
                    weight.mul_(0.9)
                layer.load_state_dict(exact.state_dict())
                cell.load_state_dict(
                    {k.removesuffix("_l0"): v for k, v in exact.state_dict().items()}
                )
                x = torch.randn(batch, 1, 5, dtype=torch.float64)
                wanted, exact_state = exact(x, exact_state)
                output, state = layer(x.to(dtype), state)
                cell_state = cell(x[:, 0].to(dtype), cell_state)
                hidden = cell_state[0] if name == "LSTM" else cell_state
                for found in (output, hidden.unsqueeze(1)):
                    torch.testing.assert_close(found.double(), wanted, **close)
                torch.testing.assert_close(
                    torch.stack(list(state)).double(), torch.stack(list(exact_state)), **close
                )


def test_cells_and_one_step() -> None:
    torch.manual_seed(0)
    for name in ("RNN", "LSTM", "GRU"):
        cell = getattr(fast_nn, f"{name}Cell")(5, 7, dtype=torch.float64)
        x = torch.randn(3, 5, dtype=torch.float64)
        with torch.no_grad():
            found = cell(x)
            with fastseq.backend("reference"):
                torch.testing.assert_close(found, cell(x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("batch_first", [False, True])
def test_input_is_not_copied(batch_first: bool) -> None:
    """Dense rows in either order of time and batch, and rows with room between them."""
    dense = torch.randn(3, 4, 5)
    roomy = torch.randn(3, 4, 9)[:, :, :5]
    for input in (dense, dense.transpose(0, 1), roomy, roomy.transpose(0, 1)):
        rows, order = layout.as_rows(input, batch_first)
        assert rows.data_ptr() == input.data_ptr()
        time_major = input.transpose(0, 1) if batch_first else input
        for t in range(time_major.size(0)):
            for b in range(time_major.size(1)):
                row = rows[t * order.step + b * order.stride]
                assert torch.equal(row, time_major[t, b])
    scattered = torch.randn(3, 4, 10)[:, ::2, ::2]
    rows, order = layout.as_rows(scattered, batch_first)
    assert rows.is_contiguous()


def test_threads_without_an_openmp_library(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = fast_nn.GRU(5, 7, bidirectional=True)
    x = torch.randn(6, 5, 5)
    expected_output = layer(x)[0]
    monkeypatch.setattr(threads, "thread_number_address", lambda: 0)
    assert torch.equal(layer(x)[0], expected_output)


def test_no_part_is_left_where_openmp_gives_fewer_threads() -> None:
    script = (
        "import torch, fastseq, fastseq.nn as nn; torch.set_num_threads(2); torch.manual_seed(0); "
        "layer, x = nn.GRU(64, 64), torch.randn(4, 16, 64); expected = layer(x)[0]\n"
        "with fastseq.backend('numba'): torch.testing.assert_close(layer(x)[0], expected)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "OMP_THREAD_LIMIT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_openmp_library_is_torchs() -> None:
    """A second runtime would bring a second pool of threads that fights the first."""
    assert threads.openmp_library() is not None
    fast_nn.GRU(5, 7)(torch.randn(6, 5, 5))
    with open("/proc/self/maps") as maps:
        loaded = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}
    assert len(loaded) == 1


def test_not_a_number_and_infinity_pass_through() -> None:
    """As in torch they spoil the sequence they are in and no other."""
    torch.manual_seed(0)
    for name in ("RNN", "LSTM", "GRU"):
        theirs, ours = getattr(torch.nn, name)(5, 7), getattr(fast_nn, name)(5, 7)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(4, 3, 5)
        x[1, 1, 2], x[2, 0, 1] = float("nan"), float("inf")
        found, wanted = ours(x)[0], theirs(x)[0]
        assert torch.equal(found.isnan(), wanted.isnan())
        torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 13, 32])
@pytest.mark.parametrize("input_size", [256, 250])
def test_products_of_few_rows_have_the_same_bits(rows: int, input_size: int) -> None:
    """Sums of 1024 terms, few of them: torch's products split these over threads."""
    case = Case("lstm", steps=1, batch=rows, input_size=input_size, hidden_size=256)
    drawn = arguments(case, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(run(case, "fastseq", torch.float32, drawn=drawn))
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_kernels_share_no_file_of_the_cache() -> None:
    """Two processes that compile two cells at once would take the same place in a common index."""
    script = (
        "from fastseq.backends.numba.drivers import backward_kernel, forward_kernel\n"
        "from fastseq.cells import gru, lstm\n"
        "for maker in (forward_kernel, backward_kernel):\n"
        "    for plan, item_bytes in ((lstm.plan, 4), (gru.plan, 4), (lstm.plan, 8)):\n"
        "        print(maker(plan, item_bytes)._cache._cache_file._index_path)\n"
    )
    paths = [
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert len(set(paths[0])) == 6
    assert paths[0] == paths[1]  # or nothing would ever be found again
    assert all(os.path.exists(path) for path in paths[0])


def test_padded_units() -> None:
    for item_bytes in (4, 8):
        columns = 2 * vectors.lanes(item_bytes)
        for hidden in (1, columns - 1, columns, columns + 1):
            units = padded_units(hidden, item_bytes)
            assert units % columns == 0
            assert hidden <= units < hidden + columns


def test_case_can_say_what_is_tested() -> None:
    """The list above has every layout, dtype and cell."""
    cases = covering_cases()
    for field in ("cell", "dtype", "layout", "strides", "steps", "hidden_size"):
        values = {getattr(case, field) for case in cases}
        assert len(values) == len({"cell": CELLS, **CHOICES}[field]), field
    assert all(dataclasses.is_dataclass(case) for case in cases)
