"""Which cells run on the C++ driver, and their kernels."""

from __future__ import annotations

import functools
import logging
import warnings

import torch

from fastseq import _cell_compiler, _config
from fastseq._cell_compiler import CellCompilerError, NoCompilerError
from fastseq.backends.compiled_cells.printing import struct, why_not
from fastseq.cells.plan import Plan

__all__ = ["is_chosen", "kernels", "why_not_chosen"]

_log = logging.getLogger("fastseq")
_DTYPES = {torch.float32: "float32", torch.float64: "float64"}

# By cell, dtype and tier: the number of the kernels, or why there are none.
_known: dict[tuple[str, str, torch.dtype, str], int | CellCompilerError] = {}


def kernels(plan: Plan, dtype: torch.dtype) -> int:
    """The number of the cell's kernels for the tier that is chosen now, compiled if need be.

    Raises:
        CellCompilerError: they cannot be compiled or loaded, now or in an earlier call.
    """
    extension = _config.extension()
    isa = extension.isa()
    key = (plan.name, plan.key, dtype, isa)
    found = _known.get(key)
    if found is None:
        found = _known[key] = _compiled(plan, dtype, isa)
    if isinstance(found, CellCompilerError):
        raise found
    return found


def _compiled(plan: Plan, dtype: torch.dtype, isa: str) -> int | CellCompilerError:
    name = _DTYPES[dtype]
    try:
        path = _cell_compiler.library(struct(plan), plan.name, name, isa)
        number = _config.extension().load_cell(str(path), isa, list(_DTYPES).index(dtype))
    except CellCompilerError as error:
        return error
    except ImportError as error:
        return CellCompilerError(str(error))
    return int(number)


def why_not_chosen(plan: Plan, dtype: torch.dtype) -> str | None:
    """Why the cell does not run on the C++ driver as things stand; ``None`` where it does.

    Compiles the cell if nothing else speaks against it.
    """
    if _config.cell_compiler_name() == "off":
        return "FASTSEQ_CELL_COMPILER is off"
    if _config.backend_name() != "cpu":
        return f"the backend is {_config.backend_name()!r}"
    found = _obstacle(plan, dtype)
    return None if found is None else str(found)


def _obstacle(plan: Plan, dtype: torch.dtype) -> CellCompilerError | str | None:
    """What the driver cannot hold, as a sentence, or how compiling failed."""
    reason = why_not(plan) if dtype in _DTYPES else f"there are no kernels for {dtype}"
    if reason is not None:
        return reason
    try:
        kernels(plan, dtype)
    except CellCompilerError as error:
        return error
    return None


def is_chosen(plan: Plan, dtype: torch.dtype) -> bool:
    """Whether the cell runs on the C++ driver; says once why one that could does not.

    Raises:
        CellCompilerError: it does not, although ``FASTSEQ_CELL_COMPILER`` is ``on``.
    """
    setting = _config.cell_compiler_name()
    # A backend that is not the C++ kernels was asked for by name, or there is no extension.
    if setting == "off" or _config.backend_name() != "cpu":
        return False
    found = _obstacle(plan, dtype)
    if found is None:
        return True
    if setting == "on":
        raise CellCompilerError(f"FASTSEQ_CELL_COMPILER is on, but cell {plan.name!r}: {found}")
    failed = isinstance(found, CellCompilerError) and not isinstance(found, NoCompilerError)
    _say(plan.name, str(found), failed)
    return False


@functools.cache
def _say(name: str, reason: str, failed: bool) -> None:
    """Once for each cell and reason; only a compiler that fails is worth a warning."""
    if failed:
        warnings.warn(
            f"fastseq: cell {name!r} is not compiled as C++ and runs on Numba: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    else:
        _log.info("fastseq: cell %s is not compiled as C++: %s", name, reason)
