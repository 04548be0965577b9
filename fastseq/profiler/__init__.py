"""Where the kernels' time goes, phase by phase, and how far that is from the hardware.

:func:`profile` records, :class:`Profile` shows, :mod:`fastseq.profiler.roofs` knows what the
machine can do. Nothing here imports torch.
"""

from fastseq.profiler.record import Call, ThreadTimes
from fastseq.profiler.roofs import Roofs
from fastseq.profiler.session import Profile, profile

__all__ = ["Call", "Profile", "Roofs", "ThreadTimes", "profile"]
