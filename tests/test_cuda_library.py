"""Whether the CUDA kernels are used, and why not; what CUDA tensors meet where they are off."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_cuda import ROOT, library_path
from kernels import needs_extension
from torch._subclasses.fake_tensor import FakeTensorMode

import fastseq
from fastseq import _config, _cuda_library, backends, functional, info
from fastseq.backends import cuda


@pytest.fixture(autouse=True)
def _undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda_library, "_found", None)
    monkeypatch.delenv(_cuda_library.SWITCH, raising=False)
    monkeypatch.setattr(backends, "_warned_reasons", set())


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Path:
    """As if the installation had the library: the emulated one."""
    path = library_path()
    monkeypatch.setattr(_cuda_library, "_path", lambda: path)
    return path


@pytest.fixture
def switched_on(built: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(_cuda_library.SWITCH, "1")
    return built


def test_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda_library, "_path", lambda: None)
    reason = _cuda_library.off_reason()
    assert reason is not None
    assert "FASTSEQ_CUDA=ON" in reason
    with pytest.raises(RuntimeError, match="the CUDA kernels are off: not built"):
        _cuda_library.library()


def test_decide_early(switched_on: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _cuda_library.decide_early()
    assert _cuda_library._found is None  # the driver is asked when a CUDA tensor arrives
    monkeypatch.delenv(_cuda_library.SWITCH)
    _cuda_library.decide_early()
    assert _cuda_library._found is not None
    assert _cuda_library._found == (None, _cuda_library.off_reason())


@pytest.mark.parametrize("value", [None, "0", ""])
def test_off_until_switched_on(
    built: Path, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv(_cuda_library.SWITCH, value)
    reason = _cuda_library.off_reason()
    assert reason is not None
    assert "never run on a device" in reason
    assert f"{_cuda_library.SWITCH}=1" in reason


def test_switched_on(switched_on: Path) -> None:
    assert _cuda_library.off_reason() is None
    assert _cuda_library.library() is _cuda_library.library()
    assert _cuda_library.describe()["available"]


def test_file_that_is_no_library(
    switched_on: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / _cuda_library.FILE_NAME
    broken.write_bytes(b"no library")
    monkeypatch.setattr(_cuda_library, "_path", lambda: broken)
    reason = _cuda_library.off_reason()
    assert reason is not None
    assert str(broken) in reason


def test_library_of_another_version(switched_on: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda_library, "_STRUCTS", (_cuda_library.Plan,))
    reason = _cuda_library.off_reason()
    assert reason is not None
    assert "another version of fastseq" in reason


def test_no_driver(switched_on: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> int:
        raise RuntimeError("CUDA error 35: CUDA driver version is insufficient")

    monkeypatch.setattr(_cuda_library.Library, "device_count", refuse)
    assert _cuda_library.off_reason() == "CUDA error 35: CUDA driver version is insufficient"


def test_no_device(switched_on: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda_library.Library, "device_count", lambda _: 0)
    assert _cuda_library.off_reason() == "the driver shows no device"


@needs_extension
def test_library_is_looked_for_beside_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = Path(_config.extension().__file__).with_name(_cuda_library.FILE_NAME)
    assert _cuda_library._path() == (beside if beside.exists() else None)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not in PATH")
@pytest.mark.parametrize("value", ["AUTO", "OFF", "MAYBE"])
def test_build_option(value: str) -> None:
    """AUTO builds nothing either: the script returns before it asks for a compiler."""
    script = str(ROOT / "cmake" / "cuda.cmake")
    command = ["cmake", f"-DFASTSEQ_CUDA={value}", "-P", script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == (value != "MAYBE"), done.stderr
    assert ("must be AUTO, ON or OFF, got 'MAYBE'" in done.stderr) == (value == "MAYBE")


def test_info_says_why(built: Path) -> None:
    line = next(line for line in info.lines(info.collect()) if line.startswith("CUDA kernels"))
    assert "not available: built, but" in line


# --- CUDA tensors without a device: fakes, which know shapes only


def fake(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(*shape, dtype=dtype, device="cuda")


def test_fallback_reason(switched_on: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert backends.fallback_reason(fake(2, dtype=dtype), has_cuda_kernels=True) is None
        assert backends.fallback_reason(fake(2, dtype=dtype)) == "device cuda has no fused kernels"
    complex_reason = backends.fallback_reason(fake(2, dtype=torch.complex64), has_cuda_kernels=True)
    assert complex_reason == "dtype torch.complex64 has no fused CUDA kernels"
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    found = backends.fallback_reason(fake(2), has_cuda_kernels=True)
    assert found == "autocast is enabled for CUDA"
    monkeypatch.setattr(_cuda_library, "_found", (None, "because"))
    assert backends.fallback_reason(fake(2), has_cuda_kernels=True) == (
        "the CUDA kernels are off: because"
    )


def test_torch_answers_with_one_warning() -> None:
    """Where the kernels are off, CUDA tensors get torch's own operators."""
    with FakeTensorMode():
        q = torch.empty(2, 3, 5, 8, device="cuda")
        x = torch.empty(4, 2, 3, device="cuda")
        weights = [x.new_empty(shape) for shape in ((20, 3), (20, 5), (20,), (20,))]
        with pytest.warns(fastseq.FastseqFallbackWarning, match="CUDA kernels are off"):
            assert functional.scaled_dot_product_attention(q, q, q).shape == q.shape
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert functional.lstm(x, None, weights)[0].shape == (4, 2, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registered_ops_size_their_results(switched_on: Path, dtype: torch.dtype) -> None:
    """Shapes and dtypes under a compiler, which are those of the kernels' own results."""
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(4, 2, 3, device="cuda", dtype=dtype)
        weights = [x.new_empty(shape) for shape in ((20, 3), (20, 5))]
        options = ("lstm", False, 0, False, False, True, 1)
        result = torch.ops.fastseq.rnn_forward(x, None, None, weights, None, None, *options)
        assert [t.device.type for t in result] == ["cuda"] * 4
        elements = cuda.rnn_reserve_elements("lstm", 8, 5, 1, dtype)
        assert result[3].shape == (elements,)
        assert elements == 8 * 5 * (6 if dtype is torch.float32 else 7)
        q = torch.empty(2, 3, 5, 8, device="cuda", dtype=dtype)
        output, lse = functional.attention(q, q, q, return_lse=True)
        assert (output.dtype, lse.dtype, lse.shape) == (dtype, torch.float32, (2, 3, 5))


def test_projection_goes_to_torch(switched_on: Path) -> None:
    with FakeTensorMode():
        x = torch.empty(4, 2, 3, device="cuda")
        weights = [x.new_empty(shape) for shape in ((20, 3), (20, 2), (20,), (20,), (2, 5))]
        with pytest.warns(fastseq.FastseqFallbackWarning, match="proj_size has no CUDA kernels"):
            output, _ = functional.lstm(x, None, weights, proj_size=2)
        assert output.shape == (4, 2, 2)
