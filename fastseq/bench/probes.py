"""Extra questions asked of some cases: what else besides speed at one shape must hold."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from fastseq import _config
from fastseq._work import ELEMENT_BYTES
from fastseq.bench import memory
from fastseq.bench.build import BuiltCase, build, input_tensor, layer_call
from fastseq.bench.results import OURS
from fastseq.bench.timing import Timing, interleave
from fastseq.bench.transformer_cases import TransformerCase

_NEW_SHAPES = 15
_LATER_CALLS = 5


class ProbeSkippedError(Exception):
    """The probe cannot run here; the message says why."""


@dataclass(frozen=True)
class Measured:
    """A case that has been timed, as a probe finds it.

    Attributes:
        built: The case made concrete.
        calls: What was timed, by peer.
        timings: What came out.
        seconds: Time to spend on further timing.
    """

    built: Any
    calls: Mapping[str, Callable[[], object]]
    timings: Mapping[str, Timing]
    seconds: float


def first_call(measured: Measured) -> dict[str, float]:
    """Time of the first call at a new shape over that of later calls at it."""
    built: BuiltCase = measured.built
    ratios = []
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        built.fastseq_layer(input_tensor(built.input))
        for index in range(_NEW_SHAPES):
            steps = built.case.T - index  # the layer has seen none of these
            shape = (steps, built.case.B + 1, built.case.I)
            layer_input = torch.randn(*shape, generator=generator)
            times = []
            for _ in range(1 + _LATER_CALLS):
                start = perf_counter()
                built.fastseq_layer(layer_input)
                times.append(perf_counter() - start)
            ratios.append(times[0] / statistics.median(times[1:]))
    return {"first_call_over_later": statistics.median(ratios)}


def shape_sweep(measured: Measured) -> dict[str, float]:
    """Memory that the second 500 of 1,000 different shapes add."""
    return _memory(measured, "shapes", "shape_sweep_growth_bytes")


def peak_memory(measured: Measured) -> dict[str, float]:
    """Peak memory of one call, ours and torch's."""
    return _memory(measured, "peak", "peak_memory_bytes")


def _memory(measured: Measured, question: memory.Question, name: str) -> dict[str, float]:
    if not memory.available():
        raise ProbeSkippedError("reading a process's memory needs Linux")
    case, threads = measured.built.case, torch.get_num_threads()
    try:
        return {
            name: memory.measure(case, "fastseq", question, threads),
            f"{name}_torch": memory.measure(case, "torch", question, threads),
        }
    except RuntimeError as error:
        raise ProbeSkippedError(str(error)) from error


def evaluation_mode(measured: Measured) -> dict[str, float]:
    """Forward in eval() without no_grad, over forward in train()."""
    built: BuiltCase = measured.built
    layer_input = built.input
    training, evaluating = built.fastseq_layer, build(built.case).fastseq_layer.eval()
    training.train()
    with torch.enable_grad():
        timings = interleave(
            {"train": lambda: training(layer_input), "eval": lambda: evaluating(layer_input)},
            seconds=measured.seconds,
        )
    ratio = timings["eval"].median_s / timings["train"].median_s
    return {"evaluation_over_training_forward": ratio}


def denormal(measured: Measured) -> dict[str, float]:
    """Time with denormal inputs and states over the time with ordinary ones."""
    built: BuiltCase = measured.built
    options = dataclasses.replace(built.case.options, denormal=False)
    ordinary = build(dataclasses.replace(built.case, options=options))
    ordinary = dataclasses.replace(ordinary, state=_ordinary_state(built))
    calls = {
        "denormal": layer_call(built.fastseq_layer, built),
        "ordinary": layer_call(ordinary.fastseq_layer, ordinary),
    }
    with torch.set_grad_enabled(built.case.direction == "training"):
        timings = interleave(calls, seconds=measured.seconds)
    return {"denormal_over_ordinary": timings["denormal"].median_s / timings["ordinary"].median_s}


def _ordinary_state(built: BuiltCase) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
    """A state of the same form, so that only the values differ."""
    if isinstance(built.state, tuple):
        hidden, cell = (torch.rand_like(state) for state in built.state)
        return hidden, cell
    return None if built.state is None else torch.rand_like(built.state)


_READ_BYTES = 256 << 20  # beyond any cache
_READ_SECONDS = 0.5


def read_bandwidth(size: int = _READ_BYTES) -> float:
    """Bytes per second at which all threads together read an array.

    The faster of two ways counts: torch's sum, and the kernels' own reading, along one stream or
    four for each thread.

    Args:
        size: Of the array in bytes; by default beyond any cache.
    """
    values = torch.zeros(size // 4)
    times = []
    for _ in range(7):
        start = perf_counter()
        values.sum()
        times.append(perf_counter() - start)
    rate = size / statistics.median(times[1:])
    try:
        kernels = _config.extension()
    except ImportError:
        return rate
    threads = torch.get_num_threads()
    return max(rate, 1e9 * kernels.memory_gbytes("read", size // threads, threads, _READ_SECONDS))


def copy_bandwidth(call: Callable[[], object], traffic: int, seconds: float) -> dict[str, float]:
    """Time of a copy over that of a call with as much traffic; they are timed in turns.

    The copy reads half the bytes and writes the other half, so that it fits the same caches. It
    is taken twice: onto an array that exists, which is what memory can do at best, and into a new
    one, whose pages the system has to hand out first, as it has for every result of a function.

    Args:
        call: What to hold against the copy.
        traffic: Bytes that the call reads and writes.
        seconds: Time to spend.
    """
    source = torch.zeros(max(1, traffic // 8))
    target = torch.empty_like(source)
    copies = {"copy": lambda: target.copy_(source), "clone": source.clone}
    timings = interleave({**copies, "call": call}, seconds=seconds)
    return {
        f"share_of_{name}_bandwidth": timings[name].median_s / timings["call"].median_s
        for name in copies
    }


def _copied(measured: Measured) -> dict[str, float]:
    return copy_bandwidth(measured.calls[OURS], measured.built.case.bytes(), measured.seconds)


def _read(measured: Measured) -> dict[str, float]:
    """Bytes per second of the case over those that the threads read."""
    case = measured.built.case
    rate = case.bytes() / measured.timings[OURS].median_s
    size = _READ_BYTES
    if isinstance(case, TransformerCase):
        # What generation reads over and over: as much as its weights.
        size = case.weight_elements() * ELEMENT_BYTES[case.dtype]
    return {"share_of_read_bandwidth": rate / read_bandwidth(size)}


PROBES: dict[str, Callable[[Measured], dict[str, float]]] = {
    "first_call": first_call,
    "shape_sweep": shape_sweep,
    "peak_memory": peak_memory,
    "evaluation_mode": evaluation_mode,
    "copy_bandwidth": _copied,
    "read_bandwidth": _read,
    "denormal": denormal,
}
