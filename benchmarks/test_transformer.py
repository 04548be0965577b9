"""The Transformer through pytest-benchmark: every case of the registry, torch side by side.

    make bench ARGS="-k 'transformer and linear'"

torch is taken as it is; for its compiled form, taking turns, and bandwidth:
``python -m fastseq.bench run --suite transformer``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fastseq.bench import generation, transformer
from fastseq.bench.cases import TRANSFORMER_SUITE
from fastseq.bench.gate import GateResult
from fastseq.bench.transformer_cases import TransformerCase

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


def maker(case: TransformerCase) -> Any:
    return generation if case.layer == "generation" else transformer


@lru_cache(maxsize=1)
def checked(case: TransformerCase) -> tuple[Any, GateResult]:
    """A built case and its gate, shared by the libraries that are timed on it."""
    built = maker(case).build(case)
    return built, maker(case).check(built)


@pytest.mark.parametrize("library", ["torch", "fastseq"])
@pytest.mark.parametrize("case", TRANSFORMER_SUITE, ids=lambda case: case.name)
def test_transformer(
    benchmark: BenchmarkFixture, case: TransformerCase, library: transformer.Library
) -> None:
    built, gate = checked(case)
    assert gate.passed, gate.summary()
    benchmark.group = case.name
    benchmark.extra_info["flops"] = case.flops()
    with torch.set_grad_enabled(case.direction == "training"):
        benchmark(maker(case).timed_call(built, library))
