"""Runs cases: gate first, then every peer side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from fastseq._config import fma_peak_gflops
from fastseq.bench import peers
from fastseq.bench.caches import CacheFlusher
from fastseq.bench.cases import AnyCase
from fastseq.bench.compiled import CompileSkippedError, compiled_call
from fastseq.bench.deadline import deadline
from fastseq.bench.families import Call, Family, family_of
from fastseq.bench.gate import GateResult
from fastseq.bench.probes import PROBES, Measured, ProbeSkippedError
from fastseq.bench.results import (
    COMPILED,
    ONNX,
    OPENVINO,
    OURS,
    OURS_FUNCTIONAL,
    PEERS,
    TORCH,
    CaseResult,
    peak_memory,
)
from fastseq.bench.settle import settle
from fastseq.bench.timing import interleave, interleave_cold

__all__ = [
    "COMPILED",
    "ONNX",
    "OPENVINO",
    "OURS",
    "OURS_FUNCTIONAL",
    "PEERS",
    "TORCH",
    "CaseResult",
    "Plan",
    "run",
    "run_case",
]


_PEAK_SECONDS = 0.01
# A case that takes longer ends with an error, so that a run ends.
CASE_LIMIT_SECONDS = 600.0


def _silent(phase: str) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Plan:
    """How cases are run.

    Attributes:
        peers: Whom to time beside ourselves, by the names of ``results.PEERS``' values.
        threads: Numbers of threads; every case runs on each.
        seconds: Time to spend on timing all peers, and on each probe that times.
        cold: Whether to time once more with the caches flushed before each call.
        probes: Whether to ask the cases' extra questions.
        on_phase: Told what is about to be done within a case.
    """

    peers: Sequence[str] = (TORCH, ONNX, OPENVINO)
    threads: Sequence[int] = field(default_factory=lambda: (torch.get_num_threads(),))
    seconds: float = 2.0
    cold: bool = False
    probes: bool = True
    on_phase: Callable[[str], None] = _silent


def run(cases: Iterable[AnyCase], plan: Plan | None = None) -> Iterator[CaseResult]:
    """Run cases one after another, giving out each result as it is ready."""
    plan = plan or Plan()
    for case in cases:
        for threads in plan.threads:
            yield run_case(case, plan, threads)


def run_case(case: AnyCase, plan: Plan | None = None, threads: int | None = None) -> CaseResult:
    """Check a case and, if it is right, time it.

    An error does not end the run: it is noted in the result, and the next case can follow.

    Args:
        case: What to run.
        plan: How to run it.
        threads: Threads of every peer; the plan's first unless given.
    """
    plan = plan or Plan()
    before = torch.get_num_threads()
    result = CaseResult(case, GateResult(()), threads=threads or plan.threads[0])
    torch.set_num_threads(result.threads)
    try:
        with (
            deadline(CASE_LIMIT_SECONDS, "the case takes"),
            torch.set_grad_enabled(case.direction == "training"),
        ):
            _fill(result, plan)
    except Exception as error:  # whatever it is, other cases may be fine
        result.skipped["case"] = _one_line(error)
    finally:
        torch.set_num_threads(before)
    return result


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".removesuffix(": ")


def _fill(result: CaseResult, plan: Plan) -> None:
    case = result.case
    family = family_of(case)
    plan.on_phase("building")
    built = family.build(case)
    calls = _own_calls(family, built, plan)
    # Before the gate, which would be their first call otherwise. Ours goes first: whatever the
    # libraries share at their start is then on our account.
    first_call_s = {name: _seconds(calls[name]) for name in (OURS, TORCH) if name in calls}
    plan.on_phase("checking")
    result.gate = family.check(built)
    if not result.gate.passed:
        return
    result.first_call_s = first_call_s
    calls |= _peer_calls(family, built, result, plan)
    plan.on_phase("timing")
    seconds, visits = plan.seconds, family.minimum_visits
    peaks: list[float] = []
    result.timings = interleave(
        calls, seconds=seconds, minimum_visits=visits, between=lambda: _note_peak(peaks, case.dtype)
    )
    result.fma_peak_gflops = statistics.median(peaks) if peaks else None
    if plan.cold:
        plan.on_phase("timing with cold caches")
        result.cold = interleave_cold(calls, CacheFlusher(), seconds=seconds, minimum_visits=visits)
    if plan.probes:
        _ask(result, Measured(built, calls, result.timings, plan.seconds), plan)


def _note_peak(peaks: list[float], dtype: str) -> None:
    """Measure the multiply-add peak of this moment.

    What a shared machine can do changes from minute to minute, for the kernels as for this.
    """
    settle()
    with suppress(ImportError):  # the compiled extension measures it
        peaks.append(fma_peak_gflops(dtype, seconds=_PEAK_SECONDS))


def _own_calls(family: Family, built: Any, plan: Plan) -> dict[str, Call]:
    """Calls of what needs no preparation: torch and we."""
    calls: dict[str, Call] = {}
    if TORCH in plan.peers:
        calls[TORCH] = family.timed_call(built, "torch")
    calls[OURS] = family.timed_call(built, "fastseq")
    functional = family.functional(built)
    if functional is not None:
        calls[OURS_FUNCTIONAL] = functional
    return calls


def _seconds(call: Call) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def _peer_calls(family: Family, built: Any, result: CaseResult, plan: Plan) -> dict[str, Call]:
    """The call of every further peer that can run a case; the others are noted in the result."""
    calls: dict[str, Call] = {}
    for name in plan.peers:
        if name == TORCH:
            continue
        plan.on_phase(f"preparing {name}")
        try:
            if name == COMPILED:
                calls[name] = _compiled(family, built, result)
            else:
                calls[name] = _engine(name, built, result)
        except (CompileSkippedError, peers.PeerSkippedError) as error:
            result.skipped[name] = str(error)
        except Exception as error:  # somebody else's error should not cost our own figures
            result.skipped[name] = _one_line(error)
    return calls


def _compiled(family: Family, built: Any, result: CaseResult) -> Call:
    start = perf_counter()
    first: list[float] = []
    call = compiled_call(
        family.callee(built),
        lambda callee: family.timed_call(built, "torch", callee),
        dynamic=family.dynamic,
        on_first_call=lambda: first.append(perf_counter() - start),
    )
    if not family.agrees(built, call(), family.timed_call(built, "torch")()):
        raise CompileSkippedError("its results differ from those of torch uncompiled")
    result.first_call_s[COMPILED] = first[0]
    return call


def _engine(name: str, built: Any, result: CaseResult) -> Call:
    prepared = peers.prepare(name, built, result.threads)
    if not peers.agrees(built, prepared.output()):
        raise peers.PeerSkippedError("its output differs from torch's")
    result.first_call_s[name] = prepared.setup_seconds
    return prepared.call


def _ask(result: CaseResult, measured: Measured, plan: Plan) -> None:
    for name in result.case.options.probes:
        plan.on_phase(f"asking {name}")
        try:
            result.probes |= PROBES[name](measured)
        except ProbeSkippedError as error:
            result.skipped[name] = str(error)
    result.peak_memory_bytes = peak_memory(result.probes)
