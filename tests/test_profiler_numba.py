"""``fastseq.profile()`` around kernels that Numba compiles."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import profiler_recording as by_hand
import pytest
import torch
from kernels import needs_extension
from test_profiler_reports import assert_well_formed

import fastseq
from fastseq import _recorder, cells
from fastseq.profiler import roofs
from fastseq.profiler.models import model
from fastseq.profiler.summary import shape_label

pytest.importorskip("numba", reason="Numba is not installed: pip install 'fastseq[numba]'")

T, B, IN, H = 5, 3, 7, 9


@pytest.fixture(autouse=True)
def _numba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the backend, with roofs in round numbers: measuring takes seconds."""
    monkeypatch.setattr(roofs, "load_or_measure", lambda progress=None: by_hand.roofs())
    monkeypatch.setattr(roofs, "load", by_hand.roofs)
    with fastseq.backend("numba"):
        yield


def train(layer: torch.nn.Module, x: torch.Tensor, **more: Any) -> tuple[Any, Any]:
    """The two calls of a training step."""
    with fastseq.profile() as profile:
        layer(x, **more)[0].sum().backward()
    forward, backward = profile.calls
    return forward, backward


def flops(call: Any) -> int:
    known = model(call)
    assert known is not None
    return known.flops


@pytest.mark.parametrize(("name", "gates"), [("RNN", 1), ("LSTM", 4), ("GRU", 3)])
def test_recurrent_layers_by_hand(name: str, gates: int) -> None:
    layer = getattr(fastseq.nn, name)(IN, H)
    forward, backward = train(layer, torch.randn(T, B, IN, requires_grad=True))
    variant = "rnn_tanh" if name == "RNN" else name.lower()
    assert (forward.name, backward.name) == (f"rnn_forward {variant}", f"rnn_backward {variant}")
    products = 2 * T * B * gates * H * (IN + H)
    assert flops(forward) == products
    assert flops(backward) == 2 * products
    for call in (forward, backward):
        assert (call.dtype, call.isa, call.team) == ("float32", "numba", torch.get_num_threads())
        assert shape_label(call).startswith(f"T{T} B{B} I{IN} H{H}")
    assert {"pack", "input product", "recurrence"} <= forward.phases().keys()
    assert {"recurrence", "input gradient", "weight gradient"} <= backward.phases().keys()
    (recurrence,) = (model(call).phase_flops["recurrence"] for call in (forward,))
    assert recurrence == 2 * T * B * gates * H * H


def test_lengths_and_projection_by_hand() -> None:
    layer = fastseq.nn.LSTM(IN, H, proj_size=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(T, B, IN, dtype=torch.float64)
    forward, backward = train(layer, x, lengths=[5, 1, 2])
    products = 2 * 2 * 8 * (4 * H * (IN + 2) + H * 2)
    assert forward.shape["rows"] == 8
    assert flops(forward) == products
    assert flops(backward) == products + 2 * 2 * 8 * (4 * H * 2 + H * 2)  # no input gradient
    assert forward.dtype == "float64"


def test_own_cells_by_hand() -> None:
    layer = fastseq.nn.CellLayer(cells.minimal_gated_unit, IN, H)
    forward, backward = train(layer, torch.randn(T, B, IN, requires_grad=True))
    assert forward.name == "cell_forward minimal_gated_unit"
    assert flops(forward) == 2 * T * B * 2 * H * (IN + H)
    assert flops(backward) == 2 * flops(forward)
    assert shape_label(forward) == f"T{T} B{B} I{IN} H{H} training"
    traffic = model(forward).traffic
    weights = 2 * H * (IN + H) + 4 * H
    saved = len(layer.cell.plan.entries) * H * T * B
    assert traffic.read == 4 * (weights + T * B * IN + B * H)
    assert traffic.written == 4 * (T * B * H + B * H + saved)
    independent = fastseq.nn.CellLayer(cells.ind_rnn, IN, H)
    forward, _ = train(independent, torch.randn(T, B, IN, requires_grad=True))
    assert flops(forward) == 2 * T * B * H * IN


def test_attention_by_hand() -> None:
    q = torch.randn(2, 4, 6, 8, requires_grad=True)
    k, v = (torch.randn(2, 2, 10, 8, requires_grad=True) for _ in range(2))
    with fastseq.profile() as profile:
        fastseq.functional.attention(q, k, v, causal=True, bottom_right=True).sum().backward()
        fastseq.functional.attention(q, k, v, key_lengths=torch.tensor([10, 4])).sum().backward()
    calls = {(call.kernel, call.shape["pairs"]): call for call in profile.calls}
    causal = 2 * sum(range(5, 11))
    assert list(calls) == [
        (f"attention_{direction}", pairs)
        for pairs in (causal, 6 * 14)
        for direction in ("forward", "backward")
    ]
    assert flops(calls["attention_forward", causal]) == 4 * causal * 4 * 8
    assert flops(calls["attention_backward", causal]) == 10 * causal * 4 * 8
    assert "fused forward" in calls["attention_forward", causal].phases()


def test_a_single_step() -> None:
    layer, cell = fastseq.nn.GRU(IN, H), fastseq.nn.GRUCell(IN, H)
    with torch.no_grad(), fastseq.profile() as profile:
        layer(torch.randn(1, B, IN))
        cell(torch.randn(B, IN))
    for call in profile.calls:
        assert call.name == "rnn_forward gru"
        assert flops(call) == 2 * B * 3 * H * (IN + H)
        assert "single step" in call.phases()
    assert len(profile.calls) == 2


def test_phases_are_the_wall_time() -> None:
    """They add up to the call by construction, and the call is what a clock around it sees."""
    # Long enough for the checks above the kernel not to count.
    layer = fastseq.nn.GRU(256, 256)
    x = torch.randn(200, 32, 256)
    ratios = []
    with torch.no_grad():
        layer(x)
        for _ in range(5):
            with fastseq.profile() as profile:
                begin = time.perf_counter()
                layer(x)
                seconds = time.perf_counter() - begin
            (call,) = profile.calls
            assert sum(call.phases().values()) == pytest.approx(call.seconds, abs=1e-8)
            ratios.append((call.seconds - call.phases().get("other", 0.0)) / seconds)
    # The median, because another process may take the processor between the two clocks.
    assert statistics.median(ratios) == pytest.approx(1, abs=0.03), ratios


def test_python_threads_side_by_side() -> None:
    layer = fastseq.nn.GRU(IN, H)
    x = torch.randn(T, B, IN)

    def work() -> None:
        with torch.no_grad():
            for _ in range(10):
                layer(x)

    workers = [threading.Thread(target=work) for _ in range(2)]
    with fastseq.profile() as profile:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    numbers = [call.thread_id for call in profile.calls]
    assert sorted(numbers.count(number) for number in set(numbers)) == [10, 10]
    for call in profile.calls:
        assert sum(call.phases().values()) == pytest.approx(call.seconds, abs=1e-8)


@needs_extension
def test_beside_compiled_kernels() -> None:
    """A user's cell between two compiled layers: one profile, one clock."""
    own = fastseq.nn.CellLayer(cells.minimal_gated_unit, 16, 16)
    compiled = fastseq.nn.LSTM(16, 16)
    x = torch.randn(20, 4, 16)
    with fastseq.backend("cpu"), torch.no_grad(), fastseq.profile() as profile:
        for _ in range(3):
            own(compiled(x)[0])
    names = [call.name for call in profile.calls]
    assert names == ["rnn_forward lstm", "cell_forward minimal_gated_unit"] * 3
    for first, second in zip(profile.calls, profile.calls[1:], strict=False):
        assert first.end_s <= second.begin_s + 1e-4  # two ways of reading the clock
    assert all(0 <= call.begin_s < call.end_s <= profile.wall_seconds for call in profile.calls)


def test_reports(tmp_path: Path) -> None:
    layer = fastseq.nn.LSTM(IN, H)
    with fastseq.profile(max_calls=3, max_slices=2) as profile:
        for _ in range(2):
            layer(torch.randn(T, B, IN))[0].sum().backward()
    assert (len(profile.calls), profile.calls_dropped) == (3, 1)
    assert profile.slices_dropped > 0
    assert "rnn_backward lstm" in profile.text()
    profile.trace(tmp_path / "trace.json")
    assert_well_formed(json.loads((tmp_path / "trace.json").read_text()))
    profile.to_json(tmp_path / "profile.json")
    assert fastseq.Profile.from_json(tmp_path / "profile.json").calls == profile.calls


def test_without_a_profile_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = fastseq.nn.GRU(IN, H)
    x = torch.randn(T, B, IN)
    with torch.no_grad():
        with fastseq.profile() as profile:
            recorded = layer(x)[0]
        assert _recorder.active is None
        monkeypatch.setattr(_recorder, "call", None)  # not even asked
        assert torch.equal(layer(x)[0], recorded)
    assert len(profile.calls) == 1
