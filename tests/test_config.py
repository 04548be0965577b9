"""FASTSEQ_ISA, FASTSEQ_BACKEND, capabilities() and what ``import fastseq`` costs."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from kernels import HAS_EXTENSION, KERNELS, needs_extension

import fastseq
from fastseq import _config
from fastseq.backends import reference

REPORT = (
    "import fastseq, torch, fastseq.functional as f; "
    "w = [torch.ones(3, 2), torch.ones(3, 3), torch.ones(3), torch.ones(3)]; "
    "f.rnn(torch.ones(2, 2, 2), None, w); "
    "from fastseq import _config; "
    "print(fastseq.capabilities()['isa_chosen'], _config.backend_name())"
)
# Loads the kernels, but not torch, which takes seconds.
CHOSEN = "import fastseq; print(fastseq.capabilities()['isa_chosen'])"


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if not k.startswith("FASTSEQ_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**variables, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@needs_extension
def test_forced_isa_runs(isa: str) -> None:
    result = run_python(REPORT, FASTSEQ_ISA=isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [isa, "cpu"]


@needs_extension
def test_default_isa_is_the_best_usable() -> None:
    for environment in ({}, {"FASTSEQ_ISA": ""}):
        result = run_python(CHOSEN, **environment)
        # The matrix unit's tier is never chosen unasked: beside some neighbours it is slower.
        tiers = [name for name in fastseq.capabilities()["isa_usable"] if name != "amx"]
        assert result.stdout.strip() == tiers[-1], result.stderr


@needs_extension
def test_unknown_isa_in_the_environment() -> None:
    result = run_python(CHOSEN, FASTSEQ_ISA="mmx")
    assert result.returncode != 0
    assert "ValueError" in result.stderr
    assert "mmx" in result.stderr
    for name in fastseq.capabilities()["isa_built"]:
        assert name in result.stderr


@needs_extension
def test_unknown_isa_leaves_the_choice_alone() -> None:
    before = _config.extension().isa()
    for choose in (fastseq.set_isa, lambda name: fastseq.isa(name).__enter__()):
        with pytest.raises(ValueError, match=r"one of \[.*got 'mmx'"):
            choose("mmx")
        assert _config.extension().isa() == before


@needs_extension
def test_isa_that_the_processor_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = set(_config.extension().isa_built()) - set(_config.extension().isa_usable())
    if not missing:
        pytest.skip("this processor runs every tier of the build")
    for name in missing:
        with pytest.raises(ValueError, match=name):
            fastseq.set_isa(name)


@needs_extension
def test_isa_block_restores(isa: str) -> None:
    for other in fastseq.capabilities()["isa_usable"]:
        with fastseq.isa(other):
            assert fastseq.capabilities()["isa_chosen"] == other
        assert fastseq.capabilities()["isa_chosen"] == isa
        with pytest.raises(KeyError), fastseq.isa(other):
            raise KeyError
        assert fastseq.capabilities()["isa_chosen"] == isa


@needs_extension
def test_tiers_are_different_code() -> None:
    """The peak of a wider tier is higher: the name is not all that changes."""
    usable = fastseq.capabilities()["isa_usable"]
    if not {"base", "avx2"} <= set(usable):
        pytest.skip("this processor runs a single tier")
    with fastseq.isa("base"):
        base = _config.fma_peak_gflops(threads=1)
    with fastseq.isa("avx2"):
        avx2 = _config.fma_peak_gflops(threads=1)
    # Twice the width and two operations at once make 2 to 4 times; a shared machine takes some.
    assert avx2 > 1.2 * base


def test_backend_in_the_environment() -> None:
    result = run_python(REPORT, FASTSEQ_BACKEND="reference")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[1] == "reference"


def test_unknown_backend() -> None:
    result = run_python(
        "from fastseq import _config; _config.backend_name()", FASTSEQ_BACKEND="abacus"
    )
    assert result.returncode != 0
    assert "ValueError: FASTSEQ_BACKEND must be one of" in result.stderr
    assert "abacus" in result.stderr
    with (
        pytest.raises(ValueError, match=r"backend must be one of .* got 'abacus'"),
        fastseq.backend("abacus"),
    ):
        pass


def test_backend_block_changes_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    layer_of_reference, cell_of_reference = reference.rnn_layer, reference.rnn_cell

    def spy_layer(*given: Any) -> Any:
        calls.append("rnn_layer")
        return layer_of_reference(*given)

    def spy_cell(*given: Any) -> Any:
        calls.append("rnn_cell")
        return cell_of_reference(*given)

    monkeypatch.setattr(reference, "rnn_layer", spy_layer)
    monkeypatch.setattr(reference, "rnn_cell", spy_cell)
    layer, cell = fastseq.nn.GRU(3, 4), fastseq.nn.GRUCell(3, 4)
    x = torch.randn(2, 2, 3)
    fused = [layer(x)[0], cell(x[0])]
    assert not calls
    with fastseq.backend("reference"):
        assert _config.backend_name() == "reference"
        plain = [layer(x)[0], cell(x[0])]
        assert len(calls) == 2
        with torch.no_grad():
            layer(x)
            cell(x[0])
        assert len(calls) == 4
    torch.testing.assert_close(fused, plain)
    with torch.no_grad():
        layer(x)
        cell(x[0])
    assert len(calls) == 4
    with pytest.raises(KeyError), fastseq.backend("reference"):
        raise KeyError
    assert _config.backend_name() == KERNELS


def test_capabilities() -> None:
    found = fastseq.capabilities()
    assert set(found) == {
        "version", "cpu", "isa_built", "isa_usable", "isa_chosen", "backend", "threads", "openmp",
        "caches_bytes", "extension", "cuda", "backend_reason", "numba",
    }  # fmt: skip
    assert found["version"] == fastseq.__version__
    assert set(found["isa_usable"]) <= set(found["isa_built"])
    if HAS_EXTENSION:
        assert found["isa_chosen"] in found["isa_usable"]
        assert found["extension"] == {"available": True, "reason": None}
    assert found["backend"] == KERNELS
    assert found["threads"] == torch.get_num_threads()
    assert found["cuda"]["available"] or found["cuda"]["reason"]
    assert all(size > 0 for size in found["caches_bytes"].values())


def test_openmp_is_the_one_that_torch_loaded() -> None:
    """A second runtime would bring a second pool of threads that fights the first."""
    code = (
        "import re, torch, fastseq; torch.ones(4096, 64) @ torch.ones(64, 64); "
        "fastseq.capabilities(); maps = open('/proc/self/maps').read(); "
        r"print(len(set(re.findall(r'/\S*lib(?:gomp|omp|iomp5)\S*', maps))))"
    )
    result = run_python(code)
    assert result.stdout.strip() == "1", result.stderr


def test_import_does_not_load_torch() -> None:
    heavy = "{'torch', 'numpy', 'numba', 'fastseq._cpu'}"
    result = run_python(f"import sys, fastseq; print(sorted({heavy} & set(sys.modules)))")
    assert result.stdout.strip() == "[]", result.stderr
    listed = run_python("import sys, fastseq; dir(fastseq); print('torch' in sys.modules)")
    assert listed.stdout.strip() == "False", listed.stderr
