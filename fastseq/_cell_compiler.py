"""The C++ compiler that users' cells are compiled with, and where the results are kept. No torch.

A cell becomes a shared library of its own, made of the headers that were installed with the
extension (``fastseq/include``), with the flags that the extension's own kernels were built with.
It is filed under everything that decides on its code, so that a file once written is never wrong.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fastseq import _config

__all__ = [
    "CellCompilerError",
    "Compiler",
    "NoCompilerError",
    "compiler",
    "describe",
    "include_folder",
    "library",
]

_log = logging.getLogger("fastseq")

# GCC first: what the figures in the docs were measured with.
_NAMES = ("g++", "c++", "clang++")
_ELEMENTS = {"float32": "float", "float64": "double"}
_SECONDS = 300
_lock = threading.Lock()


class CellCompilerError(RuntimeError):
    """A cell cannot be compiled; the message says why."""


class NoCompilerError(CellCompilerError):
    """There is no compiler on this machine, which is nothing to be surprised at."""


class Compiler(NamedTuple):
    """A command, with arguments that ``$CXX`` may hold, and what it calls itself."""

    command: tuple[str, ...]
    version: str


def compiler() -> Compiler:
    """The compiler: ``$CXX``, or the first of ``g++``, ``c++`` and ``clang++`` that there is.

    Raises:
        CellCompilerError: there is none, or ``$CXX`` does not run.
    """
    return _found(os.environ.get("CXX"), os.environ.get("PATH"))


@functools.cache
def _found(chosen: str | None, path: str | None) -> Compiler:
    if chosen:
        command = tuple(shlex.split(chosen))
    else:
        there = [name for name in _NAMES if shutil.which(name, path=path)]
        if not there:
            raise NoCompilerError(f"there is no C++ compiler: none of {', '.join(_NAMES)}")
        command = (there[0],)
    try:
        answer = _run([*command, "--version"])
    except (OSError, subprocess.SubprocessError) as error:
        raise CellCompilerError(f"the C++ compiler {command[0]!r} does not run: {error}") from None
    return Compiler(command, answer.stdout.strip().partition("\n")[0])


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=True, timeout=_SECONDS
    )


def include_folder() -> Path:
    """Where the headers are: beside the extension that they belong to.

    Raises:
        CellCompilerError: there is no extension, or it was installed without them.
    """
    found = importlib.util.find_spec("fastseq._cpu")
    if found is None or found.origin is None:
        raise CellCompilerError("there is no compiled extension")
    folder = Path(found.origin).parent / "include"
    if not (folder / "cell_flags.txt").is_file():
        raise CellCompilerError(f"the headers are not installed: {folder} is missing")
    return folder


@functools.cache
def _flags(folder: Path) -> dict[str, list[str]]:
    """Flags by tier, as CMake wrote them (cmake/cells.cmake)."""
    lines = (folder / "cell_flags.txt").read_text(encoding="utf-8").splitlines()
    parts = [shlex.split(line) for line in lines if line.strip()]
    shared = next(rest for name, *rest in parts if name == "all")
    return {name: shared + rest for name, *rest in parts if name != "all"}


@functools.cache
def _digest(folder: Path) -> str:
    """Changes with any of the headers."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(folder)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def describe() -> dict[str, object]:
    """Whether cells can be compiled, with which compiler, or why not, for ``fastseq info``."""
    if _config.cell_compiler_name() == "off":
        return {"available": False, "reason": "FASTSEQ_CELL_COMPILER is off", "version": None}
    try:
        include_folder()
        version = compiler().version
    except CellCompilerError as error:
        return {"available": False, "reason": str(error), "version": None}
    return {"available": True, "reason": None, "version": version}


def library(source: str, name: str, dtype: str, isa: str) -> Path:
    """The shared library of a cell, compiled now if it never was.

    Args:
        source: the header with ``struct UserCell``.
        name: what the cell is called, for the log and the file's name.
        dtype: ``"float32"`` or ``"float64"``.
        isa: the tier.

    Raises:
        CellCompilerError: there is no compiler, or it fails; with its last line.
    """
    folder, cxx = include_folder(), compiler()
    flags = [*_flags(folder)[isa], f"-DFS_ISA={isa}", f"-DFASTSEQ_CELL_ELEMENT={_ELEMENTS[dtype]}"]
    parts = (source, _digest(folder), " ".join(flags), " ".join(cxx.command), cxx.version)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    readable = "".join(c for c in name if c.isascii() and (c.isalnum() or c == "_"))[:40]
    with _lock:
        kept = _kept_in()
        path = kept / f"{readable or 'cell'}-{dtype}-{isa}-{digest}.so"
        if path.is_file():
            return path
        _log.warning(
            "fastseq: compiling cell %s (%s, %s) with %s on its first use, which takes some ten "
            "seconds; kept in %s. FASTSEQ_CELL_COMPILER=off leaves cells to Numba",
            name, dtype, isa, cxx.command[0], kept,
        )  # fmt: skip
        with _workplace(kept) as workplace:
            header, result = workplace / "cell.h", workplace / "cell.so"
            header.write_text(source, encoding="utf-8")
            _compile(cxx, folder, flags, header, result)
            # Another process may have been at it too: the same takes the place of the same.
            os.replace(header, path.with_suffix(".h"))
            os.replace(result, path)
    return path


def _compile(cxx: Compiler, folder: Path, flags: list[str], header: Path, result: Path) -> None:
    command = [
        *cxx.command, *flags, "-w", "-shared", "-Wl,--as-needed",
        f'-DFASTSEQ_CELL_SOURCE="{header}"', "-o", str(result),
        str(folder / "cpu" / "cell_library.cpp"),
    ]  # fmt: skip
    try:
        _run(command)
    except subprocess.CalledProcessError as error:
        said = [line for line in f"{error.stdout}\n{error.stderr}".splitlines() if line.strip()]
        last = said[-1] if said else f"exit status {error.returncode}"
        raise CellCompilerError(f"{cxx.command[0]} failed: {last.strip()}") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise CellCompilerError(f"{cxx.command[0]} failed: {error}") from None


def _kept_in() -> Path:
    """The folder of the libraries; for this process only where there is no place to keep them."""
    folder = _config.cache_folder()
    if folder is not None:
        try:
            (folder / "cells").mkdir(mode=0o700, parents=True, exist_ok=True)
            if _is_own(folder / "cells"):
                return folder / "cells"
        except OSError:
            pass
    return Path(_temporary().name)


def _is_own(folder: Path) -> bool:
    """Whether code may be kept there: this user can write the folder, and nobody else."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return False
    found = folder.stat()
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fastseq-cells-")


@contextmanager
def _workplace(kept: Path) -> Iterator[Path]:
    """A folder on the same disk, so that what is made in it can be moved in one step."""
    try:
        with tempfile.TemporaryDirectory(prefix=".making-", dir=kept) as name:
            yield Path(name)
    except OSError as error:
        raise CellCompilerError(f"{kept} cannot be written: {error}") from None
