"""Attention through pytest-benchmark: every case of the registry, torch side by side.

make bench ARGS="-k 'attention and causal'"
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import pytest
import torch

from fastseq.bench.attention import BuiltAttention, Library, build, check, timed_call
from fastseq.bench.attention_cases import AttentionCase
from fastseq.bench.cases import ATTENTION_SUITE
from fastseq.bench.gate import GateResult

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


@lru_cache(maxsize=1)
def checked(case: AttentionCase) -> tuple[BuiltAttention, GateResult]:
    """A built case and its gate, shared by the libraries that are timed on it."""
    built = build(case)
    return built, check(built)


@pytest.mark.parametrize("library", ["torch", "fastseq"])
@pytest.mark.parametrize("case", ATTENTION_SUITE, ids=lambda case: case.name)
def test_attention(benchmark: BenchmarkFixture, case: AttentionCase, library: Library) -> None:
    built, gate = checked(case)
    assert gate.passed, gate.summary()
    benchmark.group = case.name
    benchmark.extra_info["flops"] = case.flops()
    with torch.set_grad_enabled(case.direction == "training"):
        benchmark(timed_call(built, library))
