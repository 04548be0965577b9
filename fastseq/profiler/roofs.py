"""What the machine can do: multiply-add peaks and the bandwidth of every level of memory.

Measured once per machine (about ten seconds) and kept in ``$XDG_CACHE_HOME/fastseq`` (default
``~/.cache/fastseq``), in a file named after processor, caches, threads and version. A file that
cannot be read, or belongs to something else, is measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from fastseq import _config
from fastseq.profiler.models import Model

__all__ = [
    "Bandwidth",
    "LeastTime",
    "MultiplyAdds",
    "Roofs",
    "cache_path",
    "identity",
    "load",
    "load_or_measure",
    "measure",
]

LEVELS = ("L1", "L2", "L3", "DRAM")
KINDS = ("read", "copy")
DTYPES = ("float32", "float64")
# A roof is a maximum: the best of so many runs of so many seconds.
_RUNS, _FMA_SECONDS, _MEMORY_SECONDS = 3, 0.05, 0.1
_MIB = 1 << 20
# For a processor that does not tell its caches.
_USUAL_CACHES = {"L1d": 32 << 10, "L2": _MIB, "L3": 16 * _MIB}

Progress = Callable[[int, int, str], None]  # done, of how many, what is measured next


@dataclass(frozen=True)
class MultiplyAdds:
    """The multiply-add peak of a tier and dtype on so many threads."""

    isa: str
    dtype: str
    threads: int
    gflops: float


@dataclass(frozen=True)
class Bandwidth:
    """What a level of memory delivers to all threads together.

    ``kind``: "read" sums an array up; "copy" writes it elsewhere, bytes read and written counted.
    """

    level: str
    kind: str
    threads: int
    bytes_per_thread: int
    gbytes: float


class LeastTime(NamedTuple):
    """The time that a call takes at least, and the roof that says so."""

    seconds: float
    roof: str


@dataclass(frozen=True)
class Roofs:
    """The roofs of one machine.

    Attributes:
        cpu: The processor's name.
        caches_bytes: Sizes by level, of one core.
        version: Version of fastseq, whose kernels measured.
        threads: The thread counts measured, 1 first.
        measured: Date.
        multiply_adds: One for every tier, dtype and thread count.
        bandwidths: One for every level, kind and thread count.
    """

    cpu: str
    caches_bytes: Mapping[str, int]
    version: str
    threads: tuple[int, ...]
    measured: str
    multiply_adds: tuple[MultiplyAdds, ...]
    bandwidths: tuple[Bandwidth, ...]

    def gflops(self, isa: str, dtype: str, threads: int) -> float | None:
        """The multiply-add peak; between two measured thread counts on the line through them.

        That of ``isa`` "numba", whose code uses the widest vectors there are, is the largest.
        """
        if isa == "numba":
            tiers = {peak.isa for peak in self.multiply_adds if peak.isa != "amx"}
            peaks = [self.gflops(tier, dtype, threads) for tier in tiers]
            return max((peak for peak in peaks if peak is not None), default=None)
        points = {
            peak.threads: peak.gflops
            for peak in self.multiply_adds
            if (peak.isa, peak.dtype) == (isa, dtype)
        }
        return _between(points, threads)

    def gbytes(self, level: str, kind: str, threads: int) -> float | None:
        """Bandwidth of a level, likewise."""
        points = {
            band.threads: band.gbytes
            for band in self.bandwidths
            if (band.level, band.kind) == (level, kind)
        }
        return _between(points, threads)

    def level(self, working_set: int, threads: int) -> str:
        """The first level that holds so many bytes: L1 and L2 per core, L3 for all."""
        caches = self.caches_bytes or _USUAL_CACHES
        if working_set <= threads * caches.get("L1d", 0):
            return "L1"
        if working_set <= threads * caches.get("L2", 0):
            return "L2"
        return "L3" if working_set <= caches.get("L3", 0) else "DRAM"

    def least_time(self, model: Model, isa: str, dtype: str, threads: int) -> LeastTime | None:
        """The longest of the times that multiplying and moving take at least, each on its own."""
        times = []
        peak = self.gflops(isa, dtype, threads)
        if model.flops and peak:
            roof = f"FMA {dtype} {isa} x{threads}"
            times.append(LeastTime(model.flops / (peak * 1e9), roof))
        for traffic, working_set in model.demands:
            level = self.level(working_set, threads)
            # A call that writes little meets the roof of reading.
            kind = "copy" if 3 * traffic.written >= traffic.read else "read"
            bandwidth = self.gbytes(level, kind, threads)
            if traffic.total and bandwidth:
                roof = f"{level} {kind} x{threads}"
                times.append(LeastTime(traffic.total / (bandwidth * 1e9), roof))
        return max(times, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Roofs:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: ``fields`` are not those of roofs.
        """
        try:
            return cls(
                cpu=str(fields["cpu"]),
                caches_bytes={str(k): int(v) for k, v in fields["caches_bytes"].items()},
                version=str(fields["version"]),
                threads=tuple(int(count) for count in fields["threads"]),
                measured=str(fields["measured"]),
                multiply_adds=tuple(
                    MultiplyAdds(
                        isa=str(peak["isa"]),
                        dtype=str(peak["dtype"]),
                        threads=int(peak["threads"]),
                        gflops=float(peak["gflops"]),
                    )
                    for peak in fields["multiply_adds"]
                ),
                bandwidths=tuple(
                    Bandwidth(
                        level=str(band["level"]),
                        kind=str(band["kind"]),
                        threads=int(band["threads"]),
                        bytes_per_thread=int(band["bytes_per_thread"]),
                        gbytes=float(band["gbytes"]),
                    )
                    for band in fields["bandwidths"]
                ),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not measured roofs: {error!r}") from error


def _between(points: Mapping[int, float], threads: int) -> float | None:
    if not points:
        return None
    if threads in points:
        return points[threads]
    known = sorted(points)
    if len(known) == 1 or threads < known[0]:
        return points[known[0]]
    below = max([count for count in known if count < threads])
    above = min([count for count in known if count > threads], default=None)
    if above is None:  # more threads than were measured have no more to share
        return points[below]
    share = (threads - below) / (above - below)
    return points[below] + share * (points[above] - points[below])


def _caches() -> dict[str, int]:
    return dict(_config.capabilities()["caches_bytes"]) or dict(_USUAL_CACHES)


def _thread_counts() -> tuple[int, ...]:
    return tuple(sorted({1, int(_config.capabilities()["threads"])}))


def identity() -> dict[str, Any]:
    """What measured roofs hold for."""
    known = _config.capabilities()
    return {
        "cpu": known["cpu"],
        "caches_bytes": _caches(),
        "threads": list(_thread_counts()),
        "version": known["version"],
        "isa_usable": list(known["isa_usable"]),
    }


def cache_path() -> Path | None:
    """The file of this machine's roofs; ``None`` without a home directory."""
    folder = _config.cache_folder()
    if folder is None:
        return None
    text = json.dumps(identity(), sort_keys=True)
    return folder / f"roofs-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def load() -> Roofs | None:
    """This machine's roofs as measured before; ``None`` where there are none."""
    path = cache_path()
    if path is None:
        return None
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["identity"] != identity():
            return None
        return Roofs.from_dict(held["roofs"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_or_measure(progress: Progress | None = None) -> Roofs:
    """This machine's roofs, measured now if they never were."""
    return load() or measure(progress)


def working_sets(caches: Mapping[str, int], threads: int) -> dict[str, int]:
    """Bytes per thread that lie in each level: half of a private cache, a quarter of the shared.

    The third level is shared with whoever else runs there; what a thread reads of it must at the
    same time be too large for its second level. Memory: four times the last cache, or 256 MiB.
    """
    private = {"L1": caches.get("L1d", 0) // 2, "L2": caches.get("L2", 0) // 2}
    sets = {level: size for level, size in private.items() if size}
    last = max(caches.values(), default=0)
    if "L3" in caches:
        sets["L3"] = max(caches["L3"] // (4 * threads), 2 * caches.get("L2", 0))
    sets["DRAM"] = min(max(4 * last, 256 * _MIB), 1024 * _MIB) // threads
    return sets


def measure(progress: Progress | None = None) -> Roofs:
    """Measure this machine and remember it where its cache directory can be written.

    Raises:
        ImportError: there are no compiled kernels.
    """
    kernels = _config.extension()
    caches, counts = _caches(), _thread_counts()
    tiers = list(kernels.isa_usable())
    jobs: list[tuple[str, Callable[[], MultiplyAdds | Bandwidth]]] = []
    for isa in tiers:
        for index, dtype in enumerate(DTYPES):
            for threads in counts:
                jobs.append(
                    (f"FMA {dtype} {isa} x{threads}", _fma_job(kernels, isa, index, threads))
                )
    for threads in counts:
        for level, size in working_sets(caches, threads).items():
            for kind in KINDS:
                jobs.append(
                    (f"{level} {kind} x{threads}", _memory_job(kernels, level, kind, size, threads))
                )
    results: list[MultiplyAdds | Bandwidth] = []
    for done, (name, job) in enumerate(jobs):
        if progress is not None:
            progress(done, len(jobs), name)
        results.append(job())
    if progress is not None:
        progress(len(jobs), len(jobs), "")
    known = identity()
    roofs = Roofs(
        cpu=known["cpu"],
        caches_bytes=caches,
        version=known["version"],
        threads=counts,
        measured=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        multiply_adds=tuple(r for r in results if isinstance(r, MultiplyAdds)),
        bandwidths=tuple(r for r in results if isinstance(r, Bandwidth)),
    )
    _store(roofs)
    return roofs


def _fma_job(kernels: Any, isa: str, dtype: int, threads: int) -> Callable[[], MultiplyAdds]:
    def run() -> MultiplyAdds:
        with _config.isa(isa):
            best = _best(lambda: kernels.fma_gflops(dtype, threads, _FMA_SECONDS))
        return MultiplyAdds(isa, DTYPES[dtype], threads, best)

    return run


def _memory_job(
    kernels: Any, level: str, kind: str, size: int, threads: int
) -> Callable[[], Bandwidth]:
    def run() -> Bandwidth:
        best = _best(lambda: kernels.memory_gbytes(kind, size, threads, _MEMORY_SECONDS))
        return Bandwidth(level, kind, threads, size, best)

    return run


def _best(run: Callable[[], float]) -> float:
    return max(float(run()) for _ in range(_RUNS))


def _store(roofs: Roofs) -> None:
    """Write the cache file; without one the next process measures again."""
    path = cache_path()
    if path is None:
        return
    text = json.dumps({"identity": identity(), "roofs": roofs.to_dict()}, indent=1) + "\n"
    try:
        write_atomically(path, text)
    except OSError:
        return


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step: who reads meanwhile sees the old one or the new one.

    Raises:
        OSError: the directory cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by tempfile, whose files nobody but their owner may read.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def lines(roofs: Roofs) -> list[str]:
    """The roofs as aligned text."""
    counts = [f"{count} thread{'s' * (count > 1)}" for count in roofs.threads]
    caches = ", ".join(f"{name} {_size(size)}" for name, size in roofs.caches_bytes.items())
    output = [
        f"{roofs.cpu}; {caches}",
        f"measured {roofs.measured} with fastseq {roofs.version}",
        "",
        _row("multiply-adds, GFLOP/s", counts),
    ]
    peaks = {(peak.isa, peak.dtype): None for peak in roofs.multiply_adds}
    for isa, dtype in peaks:
        values = [roofs.gflops(isa, dtype, count) for count in roofs.threads]
        output.append(_row(f"  {isa} {dtype}", _numbers(values)))
    output += ["", _row("memory, GB/s of all threads", counts)]
    for level in LEVELS:
        for kind in KINDS:
            values = [roofs.gbytes(level, kind, count) for count in roofs.threads]
            if any(value is not None for value in values):
                output.append(_row(f"  {level} {kind}", _numbers(values)))
    output += ["", "copy counts bytes read and bytes written"]
    return output


def _row(label: str, cells: Iterable[str]) -> str:
    return f"{label:<30}" + "".join(f"{cell:>12}" for cell in cells)


def _numbers(values: Iterable[float | None]) -> list[str]:
    return ["-" if value is None else f"{value:.1f}" for value in values]


def _size(size: int) -> str:
    return f"{size / _MIB:g} MiB" if size >= _MIB else f"{size / 1024:g} KiB"
