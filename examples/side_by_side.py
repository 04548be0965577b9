"""What the examples share: two libraries, one seed, one progress bar."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

import fastseq.nn as fnn

__all__ = [
    "LIBRARIES",
    "check_same_weights",
    "comparison_table",
    "largest_difference",
    "losses_agree",
    "progress_bar",
    "speed_row",
]

# The two runs round differently in the last bit of a float32, and training amplifies that step by
# step: torch against itself with one bit of one weight changed ends about 0.1 % apart.
RELATIVE_TOLERANCE = 0.01

LIBRARIES: dict[str, ModuleType] = {"torch": nn, "fastseq": fnn}


def progress_bar(console: Console) -> Progress:
    """A bar with the time spent and the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)


def check_same_weights(first: nn.Module, second: nn.Module) -> None:
    """Make sure that the two libraries drew the same weights from the same seed.

    Raises:
        AssertionError: they did not.
    """
    ours, theirs = first.state_dict(), second.state_dict()
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
        raise AssertionError("the two models do not start from the same weights")


def comparison_table(title: str) -> Table:
    """A table with a column per library and one for the comparison."""
    table = Table(title=title)
    table.add_column("")
    for name in LIBRARIES:
        table.add_column(name, justify="right")
    table.add_column("fastseq is", justify="right")
    return table


def speed_row(table: Table, label: str, reference: float, ours: float) -> None:
    """Seconds of both libraries and how they compare."""
    ratio = f"{reference / ours:.2f}x as fast"
    table.add_row(f"{label}, seconds", f"{reference:.2f}", f"{ours:.2f}", ratio)


def largest_difference(reference: Sequence[float], ours: Sequence[float]) -> float:
    """Largest relative difference between the two libraries' losses; NaN if one is."""
    a, b = torch.tensor(reference), torch.tensor(ours)
    return float(((a - b).abs() / a.abs()).max())


def losses_agree(console: Console, difference: float) -> bool:
    """Whether the largest difference is one of rounding; says so."""
    # Written so that a NaN counts as disagreement.
    agrees = difference <= RELATIVE_TOLERANCE
    verdict = "agree" if agrees else "DO NOT AGREE"
    console.print(
        f"The losses {verdict}: largest difference {difference:.2%}, "
        f"allowed {RELATIVE_TOLERANCE:.0%}."
    )
    return agrees
