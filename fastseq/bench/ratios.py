"""Ratios of timings, and when a ratio says nothing.

Every place that compares two timings (``compare``, the HTML page) asks here, so that they agree on
which of our two entries a peer is held against and on what counts as noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastseq.bench.timing import Timing

if TYPE_CHECKING:
    from fastseq.bench.runner import CaseResult

OURS = "fastseq"
OURS_FUNCTIONAL = "fastseq.functional"
# Peers with no module around their call: a single step is held against our functional entry.
_BARE_PEERS = ("onnxruntime", "openvino")
# In the order in which tables and pictures show them; a peer not listed comes last.
PEERS = ("torch", "torch.compile", *_BARE_PEERS)


def median_ratio(slower: Timing, faster: Timing) -> float:
    """How many times the second timing goes into the first."""
    return slower.median_s / faster.median_s


def quartile_range(slower: Timing, faster: Timing) -> tuple[float, float]:
    """The ratio with either side's quartiles turned against it and for it."""
    return (
        slower.lower_quartile_s / faster.upper_quartile_s,
        slower.upper_quartile_s / faster.lower_quartile_s,
    )


def within_noise(slower: Timing, faster: Timing) -> bool:
    """Whether the middle halves of the two timings overlap: the ratio may as well be 1."""
    low, high = quartile_range(slower, faster)
    return low <= 1 <= high


def our_entry(result: CaseResult, peer: str) -> str:
    """The name of our timing that a peer is held against."""
    bare = peer in _BARE_PEERS and result.case.streaming
    return OURS_FUNCTIONAL if bare and OURS_FUNCTIONAL in result.timings else OURS


def peer_timings(result: CaseResult, peer: str) -> tuple[Timing, Timing] | None:
    """A peer's timing and ours to hold against it; None where one of them is missing."""
    ours = our_entry(result, peer)
    if not result.gate.passed or peer not in result.timings or ours not in result.timings:
        return None
    return result.timings[peer], result.timings[ours]


def peer_speedup(result: CaseResult, peer: str) -> float | None:
    """How many times faster than a peer we are; None without both timings or with a failed gate."""
    pair = peer_timings(result, peer)
    return None if pair is None else median_ratio(*pair)


def peers_of(results: Iterable[CaseResult]) -> list[str]:
    """Every peer with a timing, in the order of ``PEERS``."""
    found = {name for result in results for name in result.timings} - {OURS, OURS_FUNCTIONAL}
    return sorted(found, key=lambda name: (PEERS.index(name) if name in PEERS else 99, name))


def geometric_mean(ratios: Iterable[float]) -> float | None:
    """The mean for ratios; None of none."""
    values = list(ratios)
    return statistics.geometric_mean(values) if values else None
