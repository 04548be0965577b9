"""Fixtures for every test: poisoned memory, and a choice of instruction set and threads."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Which vector instructions torch's compiler may use is nothing that tests of fastseq depend on, and
# it takes 20 seconds to find out, by compiling a program for each set.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
# Cells run on Numba but for the tests that are about compiling them as C++ (compiled_cells.py).
os.environ["FASTSEQ_CELL_COMPILER"] = "off"
# Beside another process of the suite, a team of threads that spins between two calls takes the core
# that the other one computes on: the suite takes twice as long. Read when torch loads its OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from kernels import TIERS, on_tier

if TYPE_CHECKING:
    from user_model import Bench


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` and its relatives hand out with NaN.

    The kernels write into such tensors; an element that they forget then shows up as NaN instead of
    as whatever the memory held before, which too often is the right answer of the call before.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture(autouse=True)
def idle_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark warns on a busy machine, and while tests run the machine is busy."""
    machine = sys.modules.get("fastseq.bench.machine")
    if machine is not None:
        monkeypatch.setattr(machine, "load_average", lambda: 0.0)


@pytest.fixture(params=TIERS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction-set tier that this processor runs, one after the other."""
    with on_tier(request.param):
        yield request.param


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Calls with one and with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Bench:
    """``fastseq bench model`` on files that tests write; see ``user_model.py``."""
    from user_model import bench_in  # brings the benchmark, which other tests need not wait for

    return bench_in(tmp_path, monkeypatch, capsys)
