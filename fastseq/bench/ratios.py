"""When a ratio of two timings says nothing, and what else every comparison needs.

``compare`` and the HTML page both ask here, so that they agree on what counts as noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastseq.bench.timing import Timing

if TYPE_CHECKING:
    from fastseq.bench.results import CaseResult


def quartile_range(slower: Timing, faster: Timing) -> tuple[float, float]:
    """The ratio of two timings with the quartiles turned against it, and for it."""
    return (
        slower.lower_quartile_s / faster.upper_quartile_s,
        slower.upper_quartile_s / faster.lower_quartile_s,
    )


def within_noise(slower: Timing, faster: Timing) -> bool:
    """Whether the middle halves of the two timings overlap: their ratio may as well be 1."""
    low, high = quartile_range(slower, faster)
    return low <= 1 <= high


def peers_of(results: Iterable[CaseResult]) -> list[str]:
    """Every peer with a timing, in the order of the command line's names."""
    from fastseq.bench.results import OURS, OURS_FUNCTIONAL, PEERS

    order = list(PEERS.values())
    found = {name for result in results for name in result.timings} - {OURS, OURS_FUNCTIONAL}
    return sorted(found, key=lambda name: (order.index(name) if name in order else 99, name))


def geometric_mean(ratios: Iterable[float]) -> float | None:
    """The mean for ratios; None of none."""
    values = list(ratios)
    return statistics.geometric_mean(values) if values else None
