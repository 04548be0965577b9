"""Compiled functions run by torch's own OpenMP threads.

Numba's ``parallel=True`` brings a second pool of threads next to torch's. Both keep their threads
spinning for a while after a region, so that two pools on the same cores steal each other's time
between a matrix product of torch and the next loop of ours. Functions here go to the library that
torch has loaded.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch

__all__ = ["openmp_library", "run"]

_NAMES = ("libgomp.so.1", "libomp.so", "libomp.so.5", "libiomp5.so")


def _loaded(name: str) -> ctypes.CDLL | None:
    """A library that is in the process already; none is ever brought in."""
    try:
        return ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)  # type: ignore[attr-defined,unused-ignore]
    except (OSError, AttributeError):
        return None


@functools.cache
def openmp_library() -> ctypes.CDLL | None:
    """Torch's OpenMP library if it has GNU's entry points, else ``None``."""
    if sys.platform != "linux":
        return None
    folder = Path(torch.__file__).parent
    bundled = [*folder.glob("lib/libgomp*"), *folder.parent.glob("torch.libs/libgomp*")]
    for name in (*map(str, bundled), *_NAMES):
        library = _loaded(name)
        if library is not None and hasattr(library, "GOMP_parallel"):
            return library
    return None


@functools.cache
def thread_number_address() -> int:
    """Address of ``omp_get_thread_num``, or 0 where there is no such library."""
    library = openmp_library()
    if library is None:
        return 0
    return ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p).value or 0


@functools.cache
def _gomp_parallel() -> Any:
    function = openmp_library().GOMP_parallel  # type: ignore[union-attr]
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


def _granted(threads: int) -> int:
    """How many of so many threads OpenMP is sure to give: a part without a thread would be left."""
    library = openmp_library()
    if library is None:
        return threads
    if library.omp_in_parallel() or library.omp_get_dynamic():
        return 1
    return max(1, min(threads, int(library.omp_get_thread_limit())))


def run(compiled: Any, arguments: ctypes.Array[ctypes.c_int64], threads: int) -> None:
    """Call ``compiled(arguments)`` once per thread, the first ``threads`` numbers of a team.

    ``compiled`` is a Numba ``cfunc`` of one pointer. It reads from ``arguments[0]`` how to find out
    which part is its own: the address of ``omp_get_thread_num``, or 0; then ``arguments[1]`` is the
    number itself. ``arguments[2]`` is the number of parts, ``threads`` or as many as there can be.
    """
    threads = arguments[2] = _granted(threads)
    if threads == 1:
        arguments[0] = arguments[1] = 0
        compiled.ctypes(arguments)
        return
    arguments[0] = thread_number_address()
    if arguments[0]:
        _gomp_parallel()(compiled.address, ctypes.addressof(arguments), threads, 0)
        return
    # No OpenMP: plain threads, each with its own copy of the arguments. ctypes releases the GIL.
    copies = []
    for part in range(threads):
        copy = type(arguments)(*arguments)
        copy[1] = part
        copies.append(copy)
    workers = [threading.Thread(target=compiled.ctypes, args=(copy,)) for copy in copies[1:]]
    for worker in workers:
        worker.start()
    compiled.ctypes(copies[0])
    for worker in workers:
        worker.join()
