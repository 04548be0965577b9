"""Which kernels this installation has: for tests that run on all, and for those that need one.

Without the compiled extension (a pure-Python installation) the same tests hold the kernels that
answer there; what is about the compiled ones as such is skipped and says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import fastseq
from fastseq import _config

__all__ = [
    "COMPOSITES",
    "HAS_EXTENSION",
    "KERNELS",
    "TIERS",
    "needs_extension",
    "on_tier",
    "skip_without_extension",
]

# The backend that answers where nobody chooses another.
KERNELS = _config.backend_name()
HAS_EXTENSION = KERNELS == "cpu"
_REASON = f"about the compiled kernels; here backend {KERNELS!r} answers"
needs_extension = pytest.mark.skipif(not HAS_EXTENSION, reason=_REASON)

# Layers that are operators of torch's where there is no extension: no op of ours runs then.
COMPOSITES: frozenset[str] = frozenset() if HAS_EXTENSION else frozenset({"linear", "norm"})

# Every instruction-set tier that this processor runs; other backends have one way only.
TIERS: list[str] = list(_config.extension().isa_usable()) if HAS_EXTENSION else [KERNELS]


def skip_without_extension() -> None:
    """Called by a module of tests of the compiled extension before it imports that."""
    if not HAS_EXTENSION:
        pytest.skip(_REASON, allow_module_level=True)


@contextmanager
def on_tier(name: str) -> Iterator[None]:
    """Run the block on one of ``TIERS``."""
    if not HAS_EXTENSION:
        yield
        return
    with fastseq.isa(name):
        yield
