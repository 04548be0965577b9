"""How compiled functions are made, found on disk, announced and run.

A kernel's body is a C function of two int64: the address of its arguments and the number of a piece
of work. One parallel loop, compiled once, calls whichever function it is given. Compiling the loop
around every body would take longer than the bodies do.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, prange, types
from numba.extending import intrinsic

from fastseq.backends.numba.vectors import OPTIONS, inner, pointer

__all__ = ["compile_body", "integers_at", "numbers_at", "run", "version"]

_SIGNATURE = types.int64(types.int64, types.int64)
_INTEGERS = np.zeros(1, np.int64)


@functools.cache
def version() -> int:
    """A number that is another one once the text of any module in this folder is another.

    Numba finds a function in its cache by the function's own file. What that function calls may
    lie in other files, and stale machine code would be called as if nothing had changed.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:7], "little")


def compile_body(body: Any) -> Any:
    """Compile a function ``(arguments, piece) -> version`` or load it from the cache."""
    return cfunc(_SIGNATURE, cache=True, **_CFUNC_OPTIONS)(body)


_CFUNC_OPTIONS = {name: value for name, value in OPTIONS.items() if name != "nogil"}


@inner
def integers_at(address: int, count: int) -> Any:
    """The array of int64 at an address."""
    return carray(pointer(address, _INTEGERS), count)


@inner
def numbers_at(address: int, count: int, like: Any) -> Any:
    """The array of ``like``'s dtype at an address."""
    return carray(pointer(address, like), count)


@intrinsic
def _call(typingctx: Any, function: Any, arguments: Any, piece: Any) -> Any:  # noqa: ARG001
    """Call the C function at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integer = args[0].type
        kind = ir.FunctionType(integer, [integer, integer])
        target = builder.inttoptr(args[0], kind.as_pointer())
        return builder.call(target, args[1:])

    return types.int64(types.int64, types.int64, types.int64), codegen


@njit(parallel=True, cache=True, **OPTIONS)
def _parallel_loop(function: int, arguments: int, count: int) -> None:
    for piece in prange(count):
        _call(function, arguments, piece)


@njit(cache=True, **OPTIONS)
def _serial_loop(function: int, arguments: int, count: int) -> None:
    for piece in range(count):
        _call(function, arguments, piece)


_lock = threading.Lock()


def run(body: Any, threads: int, arguments: np.ndarray[Any, Any], count: int) -> None:
    """Call a compiled body for every piece of work.

    Args:
        body: what :func:`compile_body` returned.
        threads: as many as are wanted; there may be fewer.
        arguments: int64, whose address the body gets.
        count: of pieces.
    """
    threads = min(threads, numba.config.NUMBA_NUM_THREADS, count)
    if threads <= 1:
        _serial_loop(body.address, arguments.ctypes.data, count)
        return
    with _lock:
        if numba.get_num_threads() != threads:
            numba.set_num_threads(threads)
        _parallel_loop(body.address, arguments.ctypes.data, count)
