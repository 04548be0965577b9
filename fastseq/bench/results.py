"""What was found out about a case, and the file that results are kept in."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastseq.bench.cases import DIRECTIONS, AnyCase, from_record
from fastseq.bench.gate import GateResult, TensorError
from fastseq.bench.timing import Timing

OURS = "fastseq"
OURS_FUNCTIONAL = "fastseq.functional"
TORCH = "torch"
COMPILED = "torch.compile"
ONNX = "onnxruntime"
OPENVINO = "openvino"
# Peers by the name that the command line takes.
PEERS = {"torch": TORCH, "torch-compile": COMPILED, "onnxruntime": ONNX, "openvino": OPENVINO}

FORMAT = 2
# Format 1 had neither several thread counts nor percentiles, cold calls, first calls, memory.
_READABLE = (1, 2)


@dataclass
class CaseResult:
    """All that was found out about one case on one number of threads.

    Attributes:
        case: What was run.
        gate: The correctness check; if it failed there are no timings.
        timings: Seconds per call by peer.
        skipped: Why a peer or probe did not run, by its name; "case" if the case raised.
        probes: Figures of the extra measurements.
        fma_peak_gflops: What the hardware could do, measured in the same run.
        threads: Threads of every peer; 0 in files that do not say.
        cold: Like ``timings``, with the caches flushed before each call.
        first_call_s: Seconds of the first call of a fresh layer, by peer.
        peak_memory_bytes: The most that a call needs above the level before it, by library.
    """

    case: AnyCase
    gate: GateResult
    timings: dict[str, Timing] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    probes: dict[str, float] = field(default_factory=dict)
    fma_peak_gflops: float | None = None
    threads: int = 0
    cold: dict[str, Timing] = field(default_factory=dict)
    first_call_s: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def raised(self) -> str | None:
        """The error that ended the case, if one did."""
        return self.skipped.get("case")

    def speedup(self, peer: str, ours: str = OURS) -> float | None:
        """How many times faster we are than a peer; below 1 is slower."""
        if peer not in self.timings or ours not in self.timings:
            return None
        return self.timings[peer].median_s / self.timings[ours].median_s

    def torch_speedup(self) -> float | None:
        """Speed-up over torch, eager or compiled, whichever is faster here."""
        found = [r for peer in (TORCH, COMPILED) if (r := self.speedup(peer)) is not None]
        return min(found, default=None)

    def peer_speedup(self, peer: str) -> float | None:
        """Speed-up over a peer, from the entry of ours that is compared with it.

        A single step of a recurrence goes through the functional entry where the peer is an engine
        such as onnxruntime, which has no module around its call either.
        """
        functional = peer in (ONNX, OPENVINO) and OURS_FUNCTIONAL in self.timings
        return self.speedup(peer, OURS_FUNCTIONAL if functional else OURS)

    def onnx_speedup(self) -> float | None:
        """Speed-up over onnxruntime."""
        return self.peer_speedup(ONNX)

    def gflops(self, peer: str = OURS) -> float | None:
        """Arithmetic rate of a peer; None for what has no matrix product."""
        if peer not in self.timings or not self.case.flops():
            return None
        return self.case.flops() / self.timings[peer].median_s / 1e9

    def share_of_peak(self) -> float | None:
        """Our arithmetic rate over the measured FMA peak."""
        rate = self.gflops()
        if rate is None or not self.fma_peak_gflops:
            return None
        return rate / self.fma_peak_gflops


def to_json(
    results: Sequence[CaseResult],
    machine: dict[str, Any],
    suite: str,
    *,
    complete: bool = True,
) -> dict[str, Any]:
    """A result file: what was measured, on what, and the figures derived from it.

    Args:
        results: What to write.
        machine: Record of the machine, see ``fastseq.bench.machine``.
        suite: Where the cases came from.
        complete: Whether the run came to its end.
    """
    records = []
    for result in results:
        record = asdict(result)
        record["gate"]["passed"] = result.gate.passed
        record["derived"] = {
            "flops": result.case.flops(),
            "bytes": result.case.bytes(),
            "gflops": {peer: result.gflops(peer) for peer in result.timings},
            "share_of_fma_peak": result.share_of_peak(),
            "speedup_over_torch": result.speedup(TORCH),
            "speedup_over_torch_compile": result.speedup(COMPILED),
            "speedup_over_onnxruntime": result.peer_speedup(ONNX),
            "speedup_over_openvino": result.peer_speedup(OPENVINO),
        }
        records.append(record)
    return {
        "format": FORMAT,
        "suite": suite,
        "complete": complete,
        "machine": machine,
        "results": records,
    }


def _number(value: Any, what: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what} is {value!r}, no number")
    return value


def _numbers(record: Any, what: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise TypeError(f"{what} are {record!r}")
    return {name: _number(value, f"{name} in {what}") for name, value in record.items()}


def _timings(records: dict[str, dict[str, Any]]) -> dict[str, Timing]:
    found = {}
    for peer, one in records.items():
        given = {name: value for name, value in one.items() if value is not None}
        known = _numbers(given, f"the timings of {peer}")
        # Ratios divide by these.
        for name in ("median_s", "lower_quartile_s", "upper_quartile_s"):
            if not 0 < known[name] < math.inf:
                raise ValueError(f"a time of {peer} is not above 0")
        found[peer] = Timing(**{"p50_s": known["median_s"]} | known)
    return found


def _gate(record: dict[str, Any]) -> GateResult:
    errors = [TensorError(**error) for error in record["errors"]]
    for error in errors:
        _numbers({"ours": error.ours, "torch": error.torch, "limit": error.limit}, "the gate")
    return GateResult(tuple(errors))


def _case(record: dict[str, Any]) -> AnyCase:
    case = from_record(record)
    # What is derived from a case takes its sizes and words for granted.
    _number(case.flops(), "a case's work")
    _number(case.bytes(), "a case's traffic")
    if not isinstance(case.name, str) or case.direction not in DIRECTIONS:
        raise ValueError(f"no case is named {case.name!r} and goes {case.direction!r}")
    return case


def _machine(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise TypeError(f"the machine is {record!r}")
    threads, libraries = record.get("threads", 0), record.get("libraries", {})
    for count in threads if isinstance(threads, list) else [threads]:
        _number(count, "the machine's number of threads")
    if not isinstance(libraries, dict):
        raise TypeError(f"the libraries are {libraries!r}")
    return record


def peak_memory(probes: dict[str, float]) -> dict[str, int]:
    """Bytes by library, from the figures that the probe of that name left."""
    names = {OURS: "peak_memory_bytes", TORCH: "peak_memory_bytes_torch"}
    return {library: int(probes[name]) for library, name in names.items() if name in probes}


def _result(record: dict[str, Any], threads: int) -> CaseResult:
    peak, probes = record["fma_peak_gflops"], _numbers(record["probes"], "the probes")
    skipped = {str(name): str(reason) for name, reason in record["skipped"].items()}
    return CaseResult(
        _case(record["case"]),
        _gate(record["gate"]),
        _timings(record["timings"]),
        skipped,
        probes,
        None if peak is None else _number(peak, "the FMA peak"),
        _number(record.get("threads", threads), "the number of threads"),
        _timings(record.get("cold", {})),
        _numbers(record.get("first_call_s", {}), "the first calls"),
        _numbers(record.get("peak_memory_bytes", peak_memory(probes)), "the peak memory"),
    )


def from_json(document: dict[str, Any]) -> list[CaseResult]:
    """The results in a file written by ``to_json``; derived figures are computed afresh.

    Raises:
        ValueError: It is no result file, or one of an unknown format.
    """
    if not isinstance(document, dict) or document.get("format") not in _READABLE:
        known = " or ".join(map(str, _READABLE))
        raise ValueError(f"expected a result file of format {known}")
    if document.get("kind") == "model":
        raise ValueError("these are results of bench model; expected those of bench run")
    try:
        threads = _machine(document["machine"]).get("threads", 0)
        threads = threads if isinstance(threads, int) else 0
        if not isinstance(document["results"], list):
            raise TypeError("the results are no list")
        return [_result(record, threads) for record in document["results"]]
    except KeyError as error:
        raise ValueError(f"the result file is damaged: {error} is missing or unknown") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"the result file is damaged: {error}") from error


# What `load` adds to the machine's record of a run that was stopped.
STOPPED = "stopped early"


def load(path: Path) -> tuple[list[CaseResult], dict[str, Any]]:
    """Results and machine record of a file; the record says so if the run did not come to its end.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no result file.
    """
    document = read_json(path)
    try:
        results, machine = from_json(document), document["machine"]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if document.get("complete") is False:
        machine = machine | {STOPPED: f"after {len(results)} runs"}
    return results, machine


def read_json(path: Path) -> Any:
    """What a file holds.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not JSON, or ends too early.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON, or cut short: {error}") from error


def check_writable(path: Path) -> None:
    """Find out before the work, not after it, whether a result file can be written.

    Raises:
        OSError: It cannot.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory")
    temporary = _temporary(path)
    temporary.write_text("", encoding="utf-8")
    temporary.unlink()


def save(path: Path, document: dict[str, Any]) -> None:
    """Write a result file, whole or not at all."""
    temporary = _temporary(path)
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _temporary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(path.name + ".part")
