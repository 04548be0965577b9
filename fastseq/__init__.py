"""fastseq: fused sequence-model kernels under the API of :mod:`torch.nn`.

Importing the package is cheap: torch and the kernels are loaded when a name is first used.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastseq import cells, functional, generation, integrations, nn
    from fastseq._config import (
        backend,
        capabilities,
        cell_compiler,
        isa,
        linear_product,
        set_isa,
    )
    from fastseq.backends import FastseqFallbackWarning
    from fastseq.cells import cell
    from fastseq.convert import Report, convert, revert
    from fastseq.generation import Beam, Greedy, Sample, generate
    from fastseq.patch import patch_sdpa
    from fastseq.profiler import Profile, profile

try:
    __version__ = version("fastseq")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0+unknown"

# Public name -> the submodule that holds it.
_HOME = {
    "Beam": "generation",
    "FastseqFallbackWarning": "backends",
    "Greedy": "generation",
    "Profile": "profiler",
    "Report": "convert",
    "Sample": "generation",
    "backend": "_config",
    "capabilities": "_config",
    "cell": "cells",
    "cell_compiler": "_config",
    "convert": "convert",
    "generate": "generation",
    "isa": "_config",
    "linear_product": "_config",
    "patch_sdpa": "patch",
    "profile": "profiler",
    "revert": "convert",
    "set_isa": "_config",
}
_SUBMODULES = ("cells", "functional", "generation", "integrations", "nn")

__all__ = [
    "Beam",
    "FastseqFallbackWarning",
    "Greedy",
    "Profile",
    "Report",
    "Sample",
    "__version__",
    "backend",
    "capabilities",
    "cell",
    "cell_compiler",
    "cells",
    "convert",
    "functional",
    "generate",
    "generation",
    "integrations",
    "isa",
    "linear_product",
    "nn",
    "patch_sdpa",
    "profile",
    "revert",
    "set_isa",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"fastseq.{_HOME[name]}"), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"fastseq.{name}")
    else:
        raise AttributeError(f"module 'fastseq' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps ``fastseq.convert`` the function.

    Importing the submodule ``fastseq.convert`` makes the import system bind the module to that
    same name of the package, which would hide the function from then on.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "convert" and isinstance(value, ModuleType):
            value = value.convert
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
