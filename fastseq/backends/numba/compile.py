"""Compiling a kernel, or fetching it from Numba's cache on disk."""

from __future__ import annotations

import functools
import hashlib
import logging
from pathlib import Path
from typing import Any

from numba import cfunc
from numba.core import event

__all__ = ["compiled", "sources_digest"]

_RECURRENT = ("arguments", "intrinsics", "matrix", "product", "step", "vectors")
_log = logging.getLogger("fastseq")


@functools.cache
def sources_digest(prefixes: tuple[str, ...] = _RECURRENT) -> str:
    """Changes with the code that writes instructions; a closure over it is filed under it.

    Numba itself watches the one file that a compiled function stands in. ``prefixes`` are those of
    the names of the modules that the function is made of.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name.startswith(prefixes):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


class _Announcement(event.Listener):  # type: ignore[misc,unused-ignore]
    """Says once that something is being compiled, as the first pass of a compilation begins."""

    said = False

    def on_start(self, event: Any) -> None:
        if not _Announcement.said:
            _Announcement.said = True
            _log.warning(
                "fastseq: compiling a kernel with Numba on its first use; per dtype, this takes a "
                "few seconds for a cell and some 25 for attention, and is kept on disk"
            )

    def on_end(self, event: Any) -> None:
        pass


def _own_files(function: Any) -> None:
    """Name the function after what it closes over, and so its files in Numba's cache.

    Under one name all cells would share an index. Two processes that file two of them at the same
    moment can both take the same number there, and what is found later under the one is the code
    of the other.
    """
    contents = [repr(cell.cell_contents) for cell in function.__closure__]
    digest = hashlib.sha256("\0".join(contents).encode()).hexdigest()[:16]
    function.__qualname__ = f"{function.__qualname__}_{digest}"


def compiled(signature: Any, function: Any) -> Any:
    """``function`` as a C function, its code kept on disk where Numba finds a place to."""
    _own_files(function)
    with event.install_listener("numba:run_pass", _Announcement()):
        return cfunc(signature, nopython=True, cache=True, error_model="numpy")(function)
