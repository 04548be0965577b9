"""Recurrent layers through pytest-benchmark: every case of the registry, torch side by side.

    make bench                                   # all cases
    make bench ARGS="-k 'gru and inference'"

For peers taking turns, onnxruntime and shares of the hardware's peak: ``python -m fastseq.bench``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import pytest
import torch

from fastseq.bench.build import BuiltCase, build, layer_call
from fastseq.bench.cases import RNN_SUITE, Case
from fastseq.bench.gate import GateResult, check

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


# One case at a time: the largest hold hundreds of megabytes.
@lru_cache(maxsize=1)
def checked(case: Case) -> tuple[BuiltCase, GateResult]:
    """A built case and its gate, shared by the libraries that are timed on it."""
    built = build(case)
    return built, check(built)


@pytest.mark.parametrize("library", ["torch", "fastseq"])
@pytest.mark.parametrize("case", RNN_SUITE, ids=lambda case: case.name)
def test_layer(benchmark: BenchmarkFixture, case: Case, library: str) -> None:
    built, gate = checked(case)
    assert gate.passed, gate.summary()
    benchmark.group = case.name
    benchmark.extra_info["flops"] = case.flops()
    layer = built.torch_layer if library == "torch" else built.fastseq_layer
    call = layer_call(layer, built)
    with torch.set_grad_enabled(case.direction == "training"):
        benchmark(call)
