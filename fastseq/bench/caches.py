"""Filling the caches with something else, so that the next call finds nothing of its own."""

from __future__ import annotations

import torch

# Where the system does not say how large the last cache is.
_UNKNOWN_BYTES = 32 << 20


def last_level_bytes() -> int:
    """Size of the largest cache, as the system describes it."""
    from fastseq._config import capabilities

    return max(capabilities()["caches_bytes"].values(), default=_UNKNOWN_BYTES)


class CacheFlusher:
    """Writes and reads an array twice as large as the last cache, on all of torch's threads.

    Every thread takes its share, so that the caches that belong to one core are filled on each.
    """

    def __init__(self) -> None:
        self._values = torch.zeros(2 * last_level_bytes() // 4)

    def __call__(self) -> None:
        """Fill the caches."""
        with torch.no_grad():
            self._values.add_(1.0)
            self._values.sum()
