"""Runs cases: gate first, then every peer side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from fastseq._config import fma_peak_gflops
from fastseq.bench import attention, onnx_peer
from fastseq.bench.build import BuiltCase, build, functional_call, layer_call
from fastseq.bench.cases import AnyCase, Case
from fastseq.bench.gate import GateResult, check, check_output
from fastseq.bench.probes import PROBES, ProbeSkippedError, read_bandwidth
from fastseq.bench.timing import Timing, interleave

OURS = "fastseq"
OURS_FUNCTIONAL = "fastseq.functional"
TORCH = "torch"
ONNX = "onnxruntime"


@dataclass
class CaseResult:
    """All that was found out about one case.

    Attributes:
        case: What was run.
        gate: The correctness check; if it failed there are no timings.
        timings: Seconds per call by peer.
        skipped: Why a peer or probe did not run, by its name.
        probes: Figures of the extra measurements.
        fma_peak_gflops: What the hardware could do, measured in the same run.
    """

    case: AnyCase
    gate: GateResult
    timings: dict[str, Timing] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    probes: dict[str, float] = field(default_factory=dict)
    fma_peak_gflops: float | None = None

    def speedup(self, peer: str, ours: str = OURS) -> float | None:
        """How many times faster we are than a peer; below 1 is slower."""
        if peer not in self.timings or ours not in self.timings:
            return None
        return self.timings[peer].median_s / self.timings[ours].median_s

    def onnx_speedup(self) -> float | None:
        """Speed-up over onnxruntime, from the entry that is compared with it.

        A single step goes through the functional entry: onnxruntime has no module around its
        call either.
        """
        return self.speedup(ONNX, OURS_FUNCTIONAL if self.case.streaming else OURS)

    def gflops(self, peer: str = OURS) -> float | None:
        """Arithmetic rate of a peer."""
        if peer not in self.timings:
            return None
        return self.case.flops() / self.timings[peer].median_s / 1e9

    def share_of_peak(self) -> float | None:
        """Our arithmetic rate over the measured FMA peak."""
        rate = self.gflops()
        if rate is None or not self.fma_peak_gflops:
            return None
        return rate / self.fma_peak_gflops


def _onnx_call(built: BuiltCase, result: CaseResult) -> Callable[[], object] | None:
    try:
        session = onnx_peer.prepare(built, torch.get_num_threads())
    except onnx_peer.UnsupportedCaseError as error:
        result.skipped[ONNX] = str(error)
        return None
    except ImportError as error:
        result.skipped[ONNX] = f"not installed ({error.name})"
        return None
    if not check_output(built, session.output()):
        result.skipped[ONNX] = "its output differs from torch's"
        return None
    return session.call


def peer_calls(built: BuiltCase, result: CaseResult) -> dict[str, Callable[[], object]]:
    """The call of every peer that can run a case; the others are noted in the result."""
    calls = {
        TORCH: layer_call(built.torch_layer, built),
        OURS: layer_call(built.fastseq_layer, built),
    }
    if built.case.streaming:
        calls[OURS_FUNCTIONAL] = functional_call(built)
    onnx_call = _onnx_call(built, result)
    if onnx_call is not None:
        calls[ONNX] = onnx_call
    return calls


def run_case(case: AnyCase, *, suite: str = "rnn", seconds: float = 2.0) -> CaseResult:
    """Check a case and, if it is right, time it.

    Args:
        case: What to run.
        suite: The suite that holds it; probes that start a process name the case by it.
        seconds: Time to spend on timing all peers, and on each probe that times.
    """
    if not isinstance(case, Case):
        built_attention = attention.build(case)
        result = CaseResult(case, attention.check(built_attention))
        if result.gate.passed:
            libraries: dict[str, attention.Library] = {TORCH: "torch", OURS: "fastseq"}
            calls = {
                name: attention.timed_call(built_attention, library)
                for name, library in libraries.items()
            }
            _time(result, calls, seconds)
            if "read_bandwidth" in case.options.probes:
                rate = case.bytes() / result.timings[OURS].median_s
                result.probes["share_of_read_bandwidth"] = rate / read_bandwidth()
        return result
    built = build(case)
    result = CaseResult(case, check(built))
    if not result.gate.passed:
        return result
    _time(result, peer_calls(built, result), seconds)
    for name in case.options.probes:
        try:
            result.probes |= PROBES[name](built, suite, seconds)
        except ProbeSkippedError as error:
            result.skipped[name] = str(error)
    return result


def _time(result: CaseResult, calls: dict[str, Callable[[], object]], seconds: float) -> None:
    result.fma_peak_gflops = fma_peak_gflops(result.case.dtype)
    with torch.set_grad_enabled(result.case.direction == "training"):
        result.timings = interleave(calls, seconds=seconds)


def run(
    cases: Iterable[AnyCase], *, suite: str = "rnn", seconds: float = 2.0
) -> Iterator[CaseResult]:
    """Run cases one after another, giving out each result as it is ready."""
    for case in cases:
        yield run_case(case, suite=suite, seconds=seconds)
