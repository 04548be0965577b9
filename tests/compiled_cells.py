"""What tests of compiled cells share: cells, and a folder in which each is compiled once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import fastseq
from fastseq import _config
from fastseq._cell_compiler import CellCompilerError, compiler, include_folder
from fastseq.cells import (
    absolute,
    exp,
    log,
    maximum,
    minimum,
    relu,
    sigmoid,
    softplus,
    sqrt,
    tanh,
    where,
)

# Beside what else is built: the names in it change with everything that decides on the code.
FOLDER = Path(__file__).parents[1] / "build"


def _missing() -> str | None:
    try:
        include_folder()
        compiler()
    except CellCompilerError as error:
        return str(error)
    return None


_reason = _missing()
needs_compiler = pytest.mark.skipif(
    _reason is not None, reason=f"cells are not compiled: {_reason}"
)


@contextmanager
def compiled_cells() -> Iterator[None]:
    """Run every cell in the block as C++; one that cannot be is an error."""
    with pytest.MonkeyPatch.context() as patch, fastseq.cell_compiler("on"):
        patch.setattr(_config, "cache_folder", lambda: FOLDER)
        yield


@fastseq.cell(gates=3, states=1)
def uneven(x: Any, h: Any, s: Any) -> Any:
    """More gates of the input than of the hidden state, and none of them the same."""
    f = sigmoid(x[2] + h[1])
    return f * s[0] + (1 - f) * tanh(x[0])


@fastseq.cell(gates=3, states=2)
def everything(x: Any, h: Any, s: Any) -> Any:
    """Every function that a cell may use, and a value beyond the last unit that is no number."""
    a, b = softplus(x[0] + h[0]), exp(-absolute(x[1] + h[1]))
    chosen = where(x[2] <= h[2], maximum(s[1], b), minimum(s[1], a))
    d = log(1.5 + a) + sqrt(0.5 + b) - relu(h[2]) / (2 + a) + chosen**2
    c = 0.5 * s[1] + 0.25 * tanh(d - s[0])
    return sigmoid(c + x[2]) * c + 0.01 * where(x[2] < h[2], a, -b), c


@fastseq.cell(gates=2)
def brittle(x: Any, h: Any, s: Any) -> Any:
    """Where all is zero, as it is beyond the last unit, the result is no number."""
    f = sigmoid(x[0] + h[0])
    n = tanh(x[1] + f * h[1])
    return (1 - f) * s[0] + f * (n * n / absolute(n))
