"""What runs: the backend, the instruction-set tier, the threads; and what this machine offers.

Environment, read when the kernels are first needed:

``FASTSEQ_BACKEND``
    ``cpu`` (the compiled kernels), ``numba`` (kernels that Numba compiles on first use;
    ``pip install fastseq[numba]``) or ``reference`` (plain torch operators). Default: ``cpu`` where
    this installation has the compiled extension, else ``numba`` where Numba is installed, else
    ``reference``.
``FASTSEQ_ISA``
    a tier of :func:`capabilities` ``["isa_built"]``, e.g. ``avx2``. Default: the last
    usable one but ``amx``, which is to be asked for (docs/architecture.md, "The matrix unit").
``FASTSEQ_LINEAR``
    whose matrix product linear layers run on: ``fused`` (the kernels'), ``torch``, or ``auto``, the
    default: what ``python -m fastseq.info --tune`` has measured here, ``fused`` before.
``FASTSEQ_CELL_COMPILER``
    whether cells that users define are compiled as C++ (docs/cells.md): ``auto``, the default,
    where there is a compiler and the cell allows it, ``off`` never; ``on`` makes it an error where
    one cannot be.

A name that is unknown or that this processor cannot run raises :class:`ValueError`: a measurement
must never silently have come from other code than was asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = [
    "BACKENDS",
    "CELL_COMPILERS",
    "LINEAR_PRODUCTS",
    "backend",
    "backend_name",
    "cache_folder",
    "capabilities",
    "cell_compiler",
    "cell_compiler_name",
    "extension",
    "fma_peak_gflops",
    "has_extension",
    "isa",
    "linear_product",
    "linear_product_name",
    "set_isa",
]

BACKENDS = ("cpu", "numba", "reference")
LINEAR_PRODUCTS = ("auto", "fused", "torch")
CELL_COMPILERS = ("auto", "on", "off")

_extension: ModuleType | None = None
_extension_error: str | None = None
_backend: str | None = None
_linear_product: str | None = None
_cell_compiler: str | None = None
# Whether every product of linear layers is known to be the kernels'. fastseq._products finds out.
fused_everywhere = False


def extension() -> ModuleType:
    """The compiled kernels, loaded at the first call.

    Raises:
        ImportError: there is no compiled extension for this Python, or it cannot be loaded.
        ValueError: ``FASTSEQ_ISA`` names no tier that this processor runs.
    """
    global _extension, _extension_error
    if _extension is None:
        try:
            _cpu = importlib.import_module("fastseq._cpu")
        except ImportError as error:
            _extension_error = str(error)
            raise ImportError(f"fastseq has no compiled kernels here: {error}") from error
        default = [name for name in _cpu.isa_usable() if name != "amx"][-1]
        _cpu.set_isa(os.environ.get("FASTSEQ_ISA") or default)
        _extension = _cpu
    return _extension


def has_extension() -> bool:
    """Whether the compiled kernels are there."""
    try:
        extension()
    except ImportError:
        return False
    return True


def backend_name() -> str:
    """The backend that answers calls on CPU tensors."""
    global _backend
    if _backend is None:
        name = os.environ.get("FASTSEQ_BACKEND") or _default_backend()[0]
        _backend = _checked_backend(name, "FASTSEQ_BACKEND")
    return _backend


def _default_backend() -> tuple[str, str | None]:
    """What runs where nobody chose, and why it is not the compiled kernels."""
    # A tier was asked for: only the compiled kernels have any, so that their absence is an error.
    if os.environ.get("FASTSEQ_ISA"):
        return "cpu", None
    try:
        extension()
    except ImportError as error:
        # A pure-Python installation is one on purpose; a broken one should be seen.
        if getattr(error.__cause__, "name", None) != "fastseq._cpu":
            warnings.warn(str(error), RuntimeWarning, stacklevel=3)
    else:
        return "cpu", None
    reason = "there is no compiled extension"
    if _has_numba():
        return "numba", reason
    return "reference", f"{reason}, and Numba is not installed: pip install 'fastseq[numba]'"


def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def _checked_backend(name: str, argument: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {list(BACKENDS)}, got {name!r}")
    if name == "cpu":
        extension()
    if name == "numba" and not _has_numba():
        raise ImportError(
            f"{argument} is 'numba', but Numba is not installed: pip install 'fastseq[numba]'"
        )
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the block with another backend: ``with fastseq.backend("reference"): ...``.

    Raises:
        ValueError: ``name`` is not in ``("cpu", "numba", "reference")``.
        ImportError: what the backend needs is not installed.
    """
    global _backend
    checked = _checked_backend(name, "backend")
    previous, _backend = backend_name(), checked
    try:
        yield
    finally:
        _backend = previous


def linear_product_name() -> str:
    """Whose matrix product linear layers run on: ``"auto"``, ``"fused"`` or ``"torch"``."""
    global _linear_product
    if _linear_product is None:
        name = os.environ.get("FASTSEQ_LINEAR") or "auto"
        _linear_product = _checked_product(name, "FASTSEQ_LINEAR")
    return _linear_product


def _checked_product(name: str, argument: str) -> str:
    return _checked(name, argument, LINEAR_PRODUCTS)


def _checked(name: str, argument: str, names: tuple[str, ...]) -> str:
    if name not in names:
        raise ValueError(f"{argument} must be one of {list(names)}, got {name!r}")
    return name


@contextmanager
def linear_product(name: str) -> Iterator[None]:
    """Run linear layers in the block on the matrix product of ``name``.

    ``"fused"``: the kernels'. ``"torch"``: torch's, followed by activation, dropout and residual as
    operators of their own. ``"auto"``: whichever ``python -m fastseq.info --tune`` found faster.

    Raises:
        ValueError: ``name`` is none of these.
    """
    global _linear_product, fused_everywhere
    checked = _checked_product(name, "linear_product")
    previous, _linear_product = linear_product_name(), checked
    fused_everywhere = False
    try:
        yield
    finally:
        _linear_product = previous
        fused_everywhere = False


def cell_compiler_name() -> str:
    """Whether users' cells are compiled as C++: ``"auto"``, ``"on"`` or ``"off"``."""
    global _cell_compiler
    if _cell_compiler is None:
        name = os.environ.get("FASTSEQ_CELL_COMPILER") or "auto"
        _cell_compiler = _checked(name, "FASTSEQ_CELL_COMPILER", CELL_COMPILERS)
    return _cell_compiler


@contextmanager
def cell_compiler(name: str) -> Iterator[None]:
    """Run users' cells in the block as C++ where they can be (``"auto"``), ``"off"`` on Numba.

    ``"on"`` raises for a cell that cannot be compiled. A backward pass runs as its forward did.

    Raises:
        ValueError: ``name`` is none of these.
    """
    global _cell_compiler
    checked = _checked(name, "cell_compiler", CELL_COMPILERS)
    previous, _cell_compiler = cell_compiler_name(), checked
    try:
        yield
    finally:
        _cell_compiler = previous


def set_isa(name: str) -> None:
    """Use the kernels of tier ``name`` from now on.

    A forward and its backward must run on the same tier: what one saves, the other reads.

    Raises:
        ValueError: the tier is not in this build or this processor does not run it.
    """
    extension().set_isa(name)


@contextmanager
def isa(name: str) -> Iterator[None]:
    """Run the block on another instruction-set tier: ``with fastseq.isa("avx2"): ...``.

    Raises:
        ValueError: the tier is not in this build or this processor does not run it.
    """
    kernels = extension()
    previous = kernels.isa()
    kernels.set_isa(name)
    try:
        yield
    finally:
        kernels.set_isa(previous)


def fma_peak_gflops(
    dtype: str = "float32", threads: int | None = None, seconds: float = 0.2
) -> float:
    """Multiply-add peak of the chosen tier in GFLOP/s, measured now.

    Args:
        dtype: ``"float32"`` or ``"float64"``.
        threads: how many threads; default: as many as torch uses.
        seconds: for how long to measure, about.
    """
    kernels = extension()
    if threads is None:
        threads = _threads()
    return float(kernels.fma_gflops(("float32", "float64").index(dtype), threads, seconds))


def cache_folder() -> Path | None:
    """Where what was measured or compiled here is kept; ``None`` without a home directory."""
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(cache) if cache else Path.home() / ".cache") / "fastseq"
    except RuntimeError:
        return None


def _threads() -> int:
    if "torch" in sys.modules:
        import torch

        return torch.get_num_threads()
    try:
        return int(extension().max_threads())
    except ImportError:
        return os.cpu_count() or 1


def capabilities() -> dict[str, Any]:
    """What this build and this machine can do, as a plain dict (see ``python -m fastseq.info``)."""
    from fastseq import __version__, _cuda_library

    result: dict[str, Any] = {
        "version": __version__,
        "cpu": _cpu_name(),
        "isa_built": [],
        "isa_usable": [],
        "isa_chosen": None,
        "backend": None,
        "backend_reason": None,
        "threads": _threads(),
        "openmp": None,
        "caches_bytes": _caches_bytes(),
        "extension": {"available": True, "reason": None},
        "numba": {"available": True, "reason": None},
        "cuda": _cuda_library.describe(),
    }
    if not _has_numba():
        result["numba"] = {"available": False, "reason": "pip install 'fastseq[numba]'"}
    chosen = _backend or os.environ.get("FASTSEQ_BACKEND")
    try:
        kernels = extension()
    except ImportError as error:
        result["extension"] = {"available": False, "reason": str(error.__cause__ or error)}
        result["backend"], result["backend_reason"] = _default_backend()
        if chosen:
            result["backend"] = chosen
        return result
    result["backend"] = chosen or "cpu"
    result.update(
        isa_built=kernels.isa_built(),
        isa_usable=kernels.isa_usable(),
        isa_chosen=kernels.isa(),
        threads=_threads(),
        openmp=kernels.openmp_library(),
    )
    return result


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _caches_bytes() -> dict[str, int]:
    """Data caches of the first core by level, as Linux lists them."""
    sizes: dict[str, int] = {}
    units = {"K": 1024, "M": 1024**2, "G": 1024**3}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level = (index / "level").read_text().strip()
            kind = (index / "type").read_text().strip()
            size = (index / "size").read_text().strip()
        except OSError:
            continue
        if kind == "Instruction":
            continue
        name = "L1d" if level == "1" else f"L{level}"
        sizes[name] = int(size[:-1]) * units[size[-1]] if size[-1] in units else int(size)
    return sizes
