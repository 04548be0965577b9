"""``benchmarks/cuda_check.py``, on the emulated device: it has to work the first time it is run."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from emulated_cuda import ROOT, kernels

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("cuda_check", ROOT / "benchmarks/cuda_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    with kernels():
        yield module
    del sys.modules["cuda_check"]


@pytest.mark.parametrize("index", [3, 4, 5, 6, 7])
def test_quick_cases(script: ModuleType, index: int) -> None:
    case = script.QUICK[index]
    if isinstance(case, script.RnnCase):
        case = dataclasses.replace(case, H=min(case.H, 17), T=3)
    entry = script.run_case(case, CPU, repeats=0)
    assert entry["passed"], entry["reason"]
    assert "times" not in entry
    assert all(error["ours"] >= 0 for error in entry["errors"].values())


def test_dropout_is_held_against_the_composite(script: ModuleType) -> None:
    case = script.AttentionCase("float32", 1, 2, 20, 16, dropout=0.3)
    entry = script.run_case(case, CPU, repeats=1)
    assert entry["passed"], entry["reason"]
    assert set(entry["times"]) == {
        f"{who}_{what}_ms" for who in ("fastseq", "torch") for what in ("forward", "training")
    }


def test_a_wrong_result_has_no_time(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    make = script.job_of

    def spoiled(case: object) -> object:
        job = make(case)
        right = job.ours
        job.ours = lambda leaves: [right(leaves)[0] * 1.001]
        return job

    monkeypatch.setattr(script, "job_of", spoiled)
    entry = script.run_case(script.AttentionCase("float32", 1, 2, 20, 16), CPU, repeats=1)
    assert not entry["passed"]
    assert "output 0: error" in entry["reason"]
    assert "times" not in entry


def test_refused_launch_is_the_cases_failure(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA error 2: out of memory")

    monkeypatch.setattr(script, "check", refuse)
    entry = script.run_case(script.QUICK[0], CPU, repeats=1)
    assert (entry["passed"], entry["reason"]) == (False, "CUDA error 2: out of memory")


def test_case_names_differ(script: ModuleType) -> None:
    names = [case.name for case in (*script.FULL, *script.QUICK)]
    assert len(set(names)) == len(names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_says_that_there_is_no_device(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--quick"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
