"""Whose matrix product a linear layer runs on: the kernels', or torch's where that is faster.

The kernels' is the default everywhere. Where torch's library is at home (MKL on some Intel
processors), :func:`tune` measures both once, by ``python -m fastseq.info --tune``, and writes down
in which classes of shapes torch's is faster; ``auto`` follows that table in later processes. The
epilogue (activation, dropout, residual) is then a pass of its own. ``FASTSEQ_LINEAR`` and
:func:`fastseq.linear_product` overrule the table.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
import time
import timeit
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastseq import _config

__all__ = ["fused", "table_path", "tune", "winner"]

# Elements of a weight from which on it is large.
_LARGE = 1 << 18
# What is measured: one shape (O, K) below and one above that, and rows of each class.
_DTYPES = (torch.float32, torch.float64)
_WEIGHTS = ((256, 256), (2048, 512))
_ROWS = (1, 8, 64, 1024)
_ROUNDS, _SAMPLE_SECONDS = 31, 0.01
# How much faster torch's product must be to be chosen.
_GAIN = 1.03

_table: dict[str, str] | None = None


def _class(training: bool, dtype: torch.dtype, rows: int, elements: int) -> str:
    block = "1" if rows == 1 else "2-15" if rows < 16 else "16-255" if rows < 256 else "256-"
    name = "float64" if dtype is torch.float64 else "float32"
    size = "large" if elements >= _LARGE else "small"
    return f"{'training' if training else 'inference'} {name} rows {block} {size}"


def fused(training: bool, dtype: torch.dtype, rows: int, outputs: int, features: int) -> bool:
    """Whether the kernels' product is to run: forward and backward, or forward alone."""
    if not (rows and features and outputs):
        return False  # nothing to multiply: torch fills in the zeros
    if _config.fused_everywhere:
        return True
    choice = _config.linear_product_name()
    if choice == "auto":
        torchs = _torchs()
        if torchs:
            return _class(training, dtype, rows, features * outputs) not in torchs
        choice = "fused"
    _config.fused_everywhere = choice == "fused"
    return _config.fused_everywhere


def table_path() -> Path | None:
    """Where the measurements of this processor are kept; ``None`` without a home directory."""
    folder = _config.cache_folder()
    if folder is None:
        return None
    name = re.sub(r"[^A-Za-z0-9]+", "-", str(_config.capabilities()["cpu"])).strip("-")
    return folder / f"{name}.json"


def _build() -> dict[str, Any]:
    """What the measurements hold for."""
    known = _config.capabilities()
    return {"version": known["version"], "isa": known["isa_chosen"], "torch": torch.__version__}


def _torchs() -> dict[str, str]:
    """The classes in which torch's product is faster. A table of another build says nothing."""
    global _table
    if _table is None:
        _table = {}
        path = table_path()
        try:
            held = json.loads(path.read_text()) if path is not None else {}
            if held and held["build"] == _build():
                _table = {key: who for key, who in held["products"].items() if who == "torch"}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
    return _table


def tune() -> dict[str, tuple[float, float]]:
    """Measure both products in every class, write the table, and follow it from now on.

    Returns:
        Seconds of the kernels' product and of torch's, by class.

    Raises:
        OSError: the table cannot be written.
    """
    global _table
    path = table_path()
    if path is None:
        raise OSError("no home directory to write the table to; set XDG_CACHE_HOME")
    times = {name: _compared(call) for name, call in _calls()}
    products = {name: winner(*seconds) for name, seconds in times.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"build": _build(), "products": products}, indent=1) + "\n")
    _table = None
    _config.fused_everywhere = False
    return times


def winner(ours: float, theirs: float) -> str:
    """Which product is chosen for these times: torch's only where it clearly gains."""
    return "torch" if ours > _GAIN * theirs else "fused"


def _calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every class with a call that falls into it, as a user makes it."""
    from fastseq.functional import linear

    def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
        with torch.no_grad():
            linear(x, weight, bias)

    def both(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
        torch.autograd.grad(linear(x, weight, bias), (x, weight, bias), grad)

    for dtype, (outputs, features), rows in itertools.product(_DTYPES, _WEIGHTS, _ROWS):
        shapes = ((rows, features), (outputs, features), (outputs,))
        arguments = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        grad = torch.randn(rows, outputs, dtype=dtype)
        for training, call in ((False, forward), (True, partial(both, grad))):
            yield _class(training, dtype, rows, outputs * features), partial(call, *arguments)


def _compared(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds with the kernels' product and with torch's.

    The first is a median; the second differs from it by the median ratio of samples taken one
    right after the other, which a machine that changes its speed in between does not mislead.
    """
    seconds: dict[str, list[float]] = {"fused": [], "torch": []}
    for product in seconds:  # the first call finds out more than it computes
        with _config.linear_product(product):
            call()
    start = time.perf_counter()
    call()
    repeats = max(1, int(_SAMPLE_SECONDS / (time.perf_counter() - start)))
    for turn in range(_ROUNDS):
        for product in sorted(seconds, reverse=bool(turn % 2)):
            with _config.linear_product(product):
                seconds[product].append(timeit.timeit(call, number=repeats) / repeats)
    ratios = (ours / theirs for ours, theirs in zip(*seconds.values(), strict=True))
    ours = statistics.median(seconds["fused"])
    return ours, ours / statistics.median(ratios)
