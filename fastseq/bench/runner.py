"""Runs cases: gate first, then every peer side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fastseq._config import fma_peak_gflops
from fastseq.bench import attention, generation, onnx_peer, transformer
from fastseq.bench.build import BuiltCase, build, functional_call, layer_call
from fastseq.bench.cases import AnyCase, Case
from fastseq.bench.compiled import CompileSkippedError, compiled_call
from fastseq.bench.gate import GateResult, check, check_output
from fastseq.bench.probes import (
    PROBES,
    ProbeSkippedError,
    copy_bandwidth,
    peak_memory_of,
    read_bandwidth,
)
from fastseq.bench.timing import Timing, interleave
from fastseq.bench.transformer_cases import ELEMENT_BYTES, TransformerCase

OURS = "fastseq"
OURS_FUNCTIONAL = "fastseq.functional"
TORCH = "torch"
COMPILED = "torch.compile"
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
        threads: Threads that every peer used.
        cold: Seconds per call by peer, the caches flushed before each.
        first_call_s: Seconds of the first call of a fresh layer, by peer.
        peak_memory_bytes: Peak memory of a call above the level before it, by library.
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
    peak_memory_bytes: dict[str, float] = field(default_factory=dict)

    def speedup(self, peer: str, ours: str = OURS) -> float | None:
        """How many times faster we are than a peer; below 1 is slower."""
        if peer not in self.timings or ours not in self.timings:
            return None
        return self.timings[peer].median_s / self.timings[ours].median_s

    @property
    def raised(self) -> str | None:
        return self.skipped.get("case")

    def peer_speedup(self, peer: str) -> float | None:
        functional = peer in (ONNX, "openvino") and OURS_FUNCTIONAL in self.timings
        return self.speedup(peer, OURS_FUNCTIONAL if functional else OURS)

    def torch_speedup(self) -> float | None:
        """Speed-up over torch, eager or compiled, whichever is faster here."""
        found = [r for peer in (TORCH, COMPILED) if (r := self.speedup(peer)) is not None]
        return min(found, default=None)

    def onnx_speedup(self) -> float | None:
        """Speed-up over onnxruntime, from the entry that is compared with it.

        A single step goes through the functional entry: onnxruntime has no module around its
        call either.
        """
        return self.speedup(ONNX, OURS_FUNCTIONAL if self.case.streaming else OURS)

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


def run_case(
    case: AnyCase, *, suite: str = "rnn", seconds: float = 2.0, compiled: bool = True
) -> CaseResult:
    """Check a case and, if it is right, time it.

    Args:
        case: What to run.
        suite: The suite that holds it; probes that start a process name the case by it.
        seconds: Time to spend on timing all peers, and on each probe that times.
        compiled: Whether ``torch.compile`` is one of the peers, in the suites that have it.
    """
    if isinstance(case, TransformerCase):
        return _run_transformer(case, suite, seconds, compiled)
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


def _run_transformer(
    case: TransformerCase, suite: str, seconds: float, compiled: bool
) -> CaseResult:
    making: Any = generation if case.layer == "generation" else transformer
    built = making.build(case)
    result = CaseResult(case, making.check(built))
    if not result.gate.passed:
        return result
    calls: dict[str, Callable[[], object]] = {
        TORCH: making.timed_call(built, "torch"),
        OURS: making.timed_call(built, "fastseq"),
    }
    with torch.set_grad_enabled(case.direction == "training"):
        if compiled:
            try:
                calls[COMPILED] = compiled_call(
                    built.callees["torch"],
                    lambda callee: making.timed_call(built, "torch", callee),
                    dynamic=True if making is generation else None,
                )
            except CompileSkippedError as error:
                result.skipped[COMPILED] = str(error)
        # One call of torch's generation takes seconds.
        _time(result, calls, seconds, minimum_visits=3 if making is generation else 7)
        probes = case.options.probes
        if "copy_bandwidth" in probes:
            result.probes |= copy_bandwidth(calls[OURS], case.bytes(), seconds)
    if "read_bandwidth" in probes:
        rate = case.bytes() / result.timings[OURS].median_s
        weights = case.weight_elements() * ELEMENT_BYTES[case.dtype]
        result.probes["share_of_read_bandwidth"] = rate / read_bandwidth(weights)
    if "peak_memory" in probes:
        try:
            result.probes |= peak_memory_of(case, suite)
        except ProbeSkippedError as error:
            result.skipped["peak_memory"] = str(error)
    return result


def _time(
    result: CaseResult,
    calls: dict[str, Callable[[], object]],
    seconds: float,
    minimum_visits: int = 7,
) -> None:
    result.fma_peak_gflops = fma_peak_gflops(result.case.dtype)
    with torch.set_grad_enabled(result.case.direction == "training"):
        result.timings = interleave(calls, seconds=seconds, minimum_visits=minimum_visits)


def run(
    cases: Iterable[AnyCase], *, suite: str = "rnn", seconds: float = 2.0, compiled: bool = True
) -> Iterator[CaseResult]:
    """Run cases one after another, giving out each result as it is ready."""
    for case in cases:
        yield run_case(case, suite=suite, seconds=seconds, compiled=compiled)
