"""Same bits for any number of threads and on every run; calls from many threads at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import CELLS, Case, arguments, outputs_of, run
from torch import Tensor

import fastseq
import fastseq.nn as fast_nn

# Several chunks of 256 rows, tiles that do not divide, hidden sizes of several unequal blocks.
SIZES = {"steps": 23, "batch": 29, "input_size": 37, "hidden_size": 150}
CASES = [
    *(Case(cell, bidirectional=both, **SIZES) for cell in CELLS for both in (False, True)),
    *(Case(cell, layout=layout, bidirectional=True, **SIZES)
      for cell in CELLS for layout in ("packed", "lengths")),
    *(Case("lstm", layout=layout, projected=True, bidirectional=True, num_layers=2, **SIZES)
      for layout in ("padded", "packed")),
    *(Case(cell, steps=300, batch=1, input_size=37, hidden_size=150) for cell in CELLS),
    *(Case(cell, steps=1, batch=1, input_size=130, hidden_size=150) for cell in CELLS),
    *(Case(cell, "float64", bidirectional=True, **SIZES) for cell in CELLS),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results(case: Case, threads: int, drawn: Any = None) -> dict[str, Tensor]:
    torch.set_num_threads(threads)
    return run(case, "fastseq", getattr(torch, case.dtype), drawn=drawn)


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_threads_and_repetition(case: Case, isa: str) -> None:
    drawn = arguments(case, getattr(torch, case.dtype))
    first = results(case, 1, drawn)
    for threads in (2, 2, 3):
        assert_same_bits(first, results(case, threads, drawn))


# As many rows, and as many operations, as more than one thread goes to work on.
SMALL = {"steps": 9, "input_size": 37, "hidden_size": 50}
PARTS = [
    *(Case(cell, batch=29, **SMALL) for cell in CELLS),
    Case("gru", "float64", batch_first=True, states=False, batch=17, **SMALL),
    Case("lstm", projected=True, batch_first=True, batch=29, **SMALL),
]


@pytest.mark.parametrize("case", PARTS, ids=str)
def test_inference_by_parts_of_the_rows(case: Case, isa: str) -> None:
    leaves, lengths, _ = arguments(case, getattr(torch, case.dtype))
    found = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        with torch.no_grad():
            found.append(outputs_of(case, "fastseq", leaves, lengths))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_from_a_python_thread(case: Case) -> None:
    expected = results(case, 2)
    found: list[dict[str, Tensor]] = []
    thread = threading.Thread(target=lambda: found.append(results(case, 2)))
    thread.start()
    thread.join()
    assert_same_bits(expected, found[0])


def test_four_python_threads_at_once(isa: str) -> None:
    """Workspaces belong to a call, not to the library; the GIL is free while kernels run."""
    cases = [
        Case("lstm", bidirectional=True, **SIZES),
        Case("gru", layout="lengths", **SIZES),
        Case("rnn_tanh", steps=50, batch=1, input_size=20, hidden_size=90),
        Case("lstm", "float64", projected=True, layout="packed", **SIZES),
    ]
    expected = [results(case, 2) for case in cases]
    failures: list[str] = []

    def work(case: Case, truth: dict[str, Tensor]) -> None:
        try:
            for _ in range(8):
                assert_same_bits(truth, run(case, "fastseq", getattr(torch, case.dtype)))
        except BaseException as error:
            failures.append(f"{case}: {error!r}")

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(cases, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_a_step_from_given_states_waits_for_nothing_unready(name: str, isa: str) -> None:
    """Two modules in turns: what a thread reads too early is what the other one left there."""
    size, batch = 384, 4  # rows enough to be shared out, few enough to take the weights as they lie
    modules = [getattr(fast_nn, name)(size, size) for _ in range(2)]
    x, state = torch.randn(batch, size), torch.randn(batch, size)
    given = (state, state.sin()) if name == "LSTMCell" else state

    def step(module: Any) -> Tensor:
        result = module(x, given)
        return torch.stack(result) if isinstance(result, tuple) else result

    with torch.no_grad():
        torch.set_num_threads(1)
        expected = [step(module) for module in modules]
        torch.set_num_threads(3)
        for turn in range(300):
            assert torch.equal(step(modules[turn % 2]), expected[turn % 2]), turn


def test_between_parallel_torch_operators() -> None:
    """The pool is torch's own: both sides find it as they left it."""
    torch.set_num_threads(2)
    layer = fast_nn.LSTM(64, 96)
    x = torch.randn(20, 16, 64)
    with torch.no_grad():
        alone = layer(x)[0]
        square = torch.randn(512, 512)
        product = square @ square
        for _ in range(10):
            assert torch.equal(square @ square, product)
            assert torch.equal(layer(x)[0], alone)
    assert torch.get_num_threads() == 2


def test_one_thread_stays_one_thread() -> None:
    """After set_num_threads(1) a call adds no thread to the process and none of its time."""
    code = """
import os, torch, fastseq.nn as nn
torch.set_num_threads(1)
layer = nn.LSTM(256, 256)
x = torch.randn(50, 32, 256)
before = len(os.listdir("/proc/self/task"))
layer(x)[0].sum().backward()
print(len(os.listdir("/proc/self/task")) - before)
"""
    from test_config import run_python

    result = run_python(code)
    # The autograd engine may bring its own threads, CPU backward runs on the calling one.
    assert result.stdout.strip() == "0", result.stdout + result.stderr


def test_seeded_dropout_is_reproducible() -> None:
    layer = fast_nn.LSTM(9, 11, num_layers=3, dropout=0.5)
    x = torch.randn(5, 4, 9)
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(5)
        found.append(layer(x)[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], layer(x)[0])


def test_a_forward_is_not_changed_by_what_ran_before(isa: str) -> None:
    """Scratch memory is used again: NaN that a call left there must not reach the next one."""
    case = Case("lstm", projected=True, bidirectional=True, **SIZES)
    expected = results(case, 2)
    for cell in ("LSTM", "GRU", "RNN"):
        layer = getattr(fast_nn, cell)(70, 170, bidirectional=True)
        with torch.no_grad():
            for weight in layer.parameters():
                weight.fill_(float("nan"))
        layer(torch.full((30, 40, 70), float("nan"), requires_grad=True))[0].sum().backward()
    assert_same_bits(expected, results(case, 2))


def test_tiers_agree_closely() -> None:
    """Not in bits, but a tier that is wrong altogether would show."""
    usable = fastseq.capabilities()["isa_usable"]
    for case in CASES[:8]:
        found = []
        for name in usable:
            with fastseq.isa(name):
                found.append(results(case, 2))
        for other in found[1:]:
            torch.testing.assert_close(found[0], other, rtol=1e-3, atol=1e-4)
