"""The CUDA kernels on the host: builds them with the stand-in headers of ``cuda_emulation``.

:func:`kernels` puts the library in the place of a device's, so that calls on CPU tensors go the way
CUDA tensors would: through the ops, ``backends/cuda*.py``, the C ABI and every launch.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import fastseq.functional  # noqa: F401  loads the ops
from fastseq import _cuda_library, backends
from fastseq._cells import RESERVE_LAYOUT
from fastseq.backends import cuda, cuda_attention

ROOT = Path(__file__).parent.parent
EMULATION = ROOT / "tests" / "cuda_emulation"
STORAGE = {
    "float32": "float",
    "float64": "double",
    "bfloat16": "__nv_bfloat16",
    "float16": "__half",
}
# longjmp between stacks is what _FORTIFY_SOURCE is there to forbid.
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-Wall")
FLAGS += ("-Wextra", "-Wno-unknown-pragmas", f"-I{EMULATION}")


def compiler() -> str:
    """The C++ compiler; skips the test where there is none."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    pytest.skip("the CUDA kernels are emulated with a C++ compiler: none was found")


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


Source = tuple[Path, list[str]]  # and the compiler's options for it


def _build(sources: list[Source], folder: Path) -> Path:
    """A shared object in ``folder``, kept there until a source changes.

    Of several processes that want it one builds, with all cores, while the others wait.
    """
    program = compiler()
    digest = hashlib.sha256(repr((program, FLAGS, sources)).encode())
    for path in sorted([*(ROOT / "csrc").rglob("*"), *EMULATION.iterdir()]):
        if path.is_file():
            digest.update(path.read_bytes())
    target = folder / f"libemulated-{digest.hexdigest()[:16]}.so"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile(program, sources, target)
    return target


def _compile(program: str, sources: list[Source], target: Path) -> None:
    folder = target.parent
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    objects = [folder / f"{index}.o" for index in range(len(sources))]

    def compile_one(job: tuple[Source, Path]) -> None:
        (source, options), result = job
        _run(program, "-x", "c++", *FLAGS, *options, "-c", source, "-o", result)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, zip(sources, objects, strict=True)))
    _run(program, "-shared", "-o", folder / "incomplete.so", *objects)
    (folder / "incomplete.so").rename(target)


@functools.lru_cache
def library_path() -> Path:
    """``libfastseq_cuda`` for the host."""
    csrc = ROOT / "csrc" / "cuda"
    sources: list[Source] = [(csrc / "dispatch.cu", [])]
    sources += [(EMULATION / name, []) for name in ("control.cpp", "faults.cu")]
    for name, storage in STORAGE.items():
        # Where few tests run, compiling takes longer than they would gain.
        level = "-O1" if name in ("float32", "float64") else "-O0"
        definitions = [level, f"-DFS_STORAGE={storage}", f"-DFS_STORAGE_NAME={name}"]
        sources += [(csrc / f"{kind}.cu", definitions) for kind in ("attention", "rnn")]
    return _build(sources, ROOT / "build" / "cuda-emulation")


@contextlib.contextmanager
def kernels() -> Iterator[_cuda_library.Library]:
    """Calls on CPU tensors of every dtype that CUDA has kernels for go to the emulated library."""
    library = _cuda_library.Library(library_path())
    ops = "fastseq._ops"
    recurrent, attention = sys.modules[f"{ops}.recurrent"], sys.modules[f"{ops}.attention"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cuda_library, "_found", (library, None))
        patch.setattr(recurrent, "_chosen", lambda _: (cuda, RESERVE_LAYOUT))
        patch.setattr(recurrent, "_chosen_layout", lambda _: RESERVE_LAYOUT)
        patch.setattr(recurrent, "_of_layout", lambda *_: cuda)
        patch.setattr(attention, "_kernels", lambda _: cuda_attention)
        for name in ("plain_layer", "plain_attention"):  # the CPU kernels' own short cuts
            patch.setattr(sys.modules[ops], name, lambda *_: None)
        patch.setattr(backends, "FUSED_DTYPES", backends.CUDA_DTYPES)
        yield library


@contextlib.contextmanager
def device(
    multiprocessors: int = 4, shared_bytes: int = 227 << 10, descending: bool = False
) -> Iterator[None]:
    """The block on another device than the usual one, or with its threads run in reverse."""
    control = ctypes.CDLL(str(library_path())).fastseq_emulation_device
    control(multiprocessors, shared_bytes, int(descending))
    try:
        yield
    finally:
        control(4, 227 << 10, 0)


def half_bound(dtype: torch.dtype, torch_error: float, magnitude: float) -> float:
    """How far from the truth a result in half precision may be: twice as far as torch's own.

    Or a unit, where torch is exact by luck.
    """
    return 2 * torch_error + torch.finfo(dtype).eps * magnitude
