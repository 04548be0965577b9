"""Memory stays flat over many shapes, is not shared between results and is given back."""

from __future__ import annotations

import gc
import itertools
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernels import HAS_EXTENSION
from oracle import CELLS, Case, arguments, outputs_of

import fastseq.nn as fast_nn

MEBIBYTE = 1 << 20


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_a_thousand_shapes(name: str) -> None:
    """Nothing is kept per shape: growth is bounded, whatever number of shapes came by.

    A shape's results are about 250 KB on average here; keeping a workspace, a plan or packed
    weights per shape would show as hundreds of MB. 16 MB is what the allocator's heap may move.
    """
    torch.set_num_threads(1)  # a barrier per step would be most of the time
    layer = getattr(fast_nn, name)(48, 64)
    shapes = list(itertools.product(range(1, 41), range(1, 26)))
    order = torch.randperm(len(shapes), generator=torch.Generator().manual_seed(0)).tolist()
    assert len(shapes) == 1000

    def call(steps: int, batch: int) -> None:
        layer(torch.zeros(steps, batch, 48))[0].sum().backward()
        with torch.no_grad():
            layer(torch.zeros(steps, batch, 48))

    # The largest of all, so that the workspace has its final size, and some others for the heap.
    for steps, batch in (*shapes[-5:], *shapes[::50]):
        call(steps, batch)
    gc.collect()
    before = resident_bytes()
    for index in order:
        call(*shapes[index])
    gc.collect()
    assert resident_bytes() - before < 16 * MEBIBYTE


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_large_call_gives_its_memory_back() -> None:
    layer = fast_nn.LSTM(64, 256)
    torch.set_num_threads(1)

    def train() -> None:
        layer(torch.zeros(100, 64, 64))[0].sum().backward()

    # The C library learns in the first rounds which block sizes to return to the system.
    for _ in range(6):
        train()
    gc.collect()
    before = resident_bytes()
    for _ in range(10):
        train()
    gc.collect()
    # One call's reserve is 32 MB; ten kept ones would be 320.
    assert resident_bytes() - before < 64 * MEBIBYTE


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_results_share_no_memory(cell: str, grad: bool) -> None:
    for steps, batch, both in ((1, 1, False), (1, 3, True), (5, 3, False)):
        case = Case(cell, steps=steps, batch=batch, bidirectional=both)
        leaves, _, _ = arguments(case, torch.float32)
        with torch.set_grad_enabled(grad):
            outputs = outputs_of(case, "fastseq", leaves, None)
        held = [*outputs, *leaves.values()]
        if grad:
            held += torch.autograd.grad(
                outputs, list(leaves.values()), [torch.ones_like(o) for o in outputs]
            )
        places = [tensor.untyped_storage().data_ptr() for tensor in held]
        assert len(set(places)) == len(places)


def reserves_made(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[torch.Tensor]]:
    """Weak references to the reserve of every forward from now on."""
    made: list[weakref.ref[torch.Tensor]] = []
    from importlib import import_module

    backend = import_module("fastseq.backends." + ("cpu" if HAS_EXTENSION else "numba.layers"))
    original = backend.rnn_forward

    def spy(*given: object) -> object:
        result = original(*given)
        if result[3] is not None:
            made.append(weakref.ref(result[3]))
        return result

    monkeypatch.setattr(backend, "rnn_forward", spy)
    return made


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_the_reserve_dies_with_the_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By reference counting alone: a cycle would keep the largest tensor of a training step."""
    made = reserves_made(monkeypatch)
    layer = getattr(fast_nn, name)(5, 6, num_layers=2)
    gc.collect()
    gc.disable()
    try:
        output, _ = layer(torch.randn(3, 2, 5))
        assert len(made) == 2
        assert all(reference() is not None for reference in made)
        output.sum().backward()
        # Saved tensors go at once after backward, though the outputs are still here.
        assert all(reference() is None for reference in made)
        made.clear()
        output, final = layer(torch.randn(3, 2, 5))
        del output, final
        assert all(reference() is None for reference in made)
    finally:
        gc.enable()


def test_inference_makes_no_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    made = reserves_made(monkeypatch)
    with torch.no_grad():
        fast_nn.LSTM(5, 6, num_layers=2)(torch.randn(3, 2, 5))
    assert not made
