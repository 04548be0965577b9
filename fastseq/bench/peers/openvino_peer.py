"""openvino: one stream in float32, its tensors bound beforehand, the fastest of several graphs.

Modules are written in its operators by hand rather than converted by its reader of TorchScript:
on a 2-core Cascade Lake, openvino 2026.4, that took 67 in place of 72 ms for an encoder layer
(B8 S256 E512 F2048), 95 in place of 102 for a decoder layer and 121 in place of 133 for a
Transformer (B16 S64 E256, 6 layers each). Recurrent layers are read from ONNX, which came out the
same as by hand (LSTM T100 B32 H512 62.1 and 62.0 ms, T100 B16 H256 10.0 and 11.5 ms).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fastseq.bench.attention import BuiltAttention
from fastseq.bench.build import BuiltCase
from fastseq.bench.cell_cases import CellCase
from fastseq.bench.peers import modules, openvino_attention, recurrent
from fastseq.bench.peers.choose import choose
from fastseq.bench.peers.openvino_library import core, library
from fastseq.bench.peers.openvino_operators import OpenvinoOperators
from fastseq.bench.peers.prepared import AnyBuilt, PeerSkippedError, PreparedPeer
from fastseq.bench.transformer import BuiltTransformer


@dataclass
class _Model:
    """A model, its inputs in order, and how its outputs in order become results by name."""

    model: Any
    feeds: list[Tensor]
    results: Callable[[list[Tensor]], dict[str, Tensor]]


def configuration(threads: int) -> dict[str, Any]:
    """How models are compiled."""
    return {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        # Otherwise bfloat16, where the machine has it.
        "INFERENCE_PRECISION_HINT": "f32",
    }


def prepare(built: AnyBuilt, threads: int) -> PreparedPeer:
    """Compile the models of a case and keep the fastest.

    Args:
        built: The case.
        threads: Threads of the one stream.

    Raises:
        PeerSkippedError: There is no equivalent model.
        ModuleNotFoundError: openvino is not installed (recurrent layers need onnx, too).
    """
    library()  # before anything else, so that its absence is the reason
    if built.case.dtype != "float32":
        raise PeerSkippedError(f"openvino computes {built.case.dtype} in float32")
    makers = _models(built)
    return choose(built, [lambda make=make: _load(make, threads) for make in makers])  # type: ignore[misc]


def _models(built: AnyBuilt) -> list[Callable[[], _Model]]:
    if isinstance(built, BuiltCase):
        if isinstance(built.case, CellCase):
            raise PeerSkippedError("openvino has no such recurrent layer")
        return [lambda: _recurrent(built)]
    if isinstance(built, BuiltAttention) and not built.modules:
        writers = openvino_attention.models(built)
        return [
            lambda write=write: _written(lambda make: {"output": write(make)}, True)  # type: ignore[misc]
            for write in writers
        ]
    assert isinstance(built, BuiltAttention | BuiltTransformer)
    styles = [True, False] if modules.has_choice(built) else [True]
    return [
        lambda fused=fused: _written(lambda make: modules.build(make, built), fused)  # type: ignore[misc]
        for fused in styles
    ]


def _written(write: Callable[[OpenvinoOperators], dict[str, Any]], fused_attention: bool) -> _Model:
    operators = OpenvinoOperators(fused_attention)
    results = write(operators)
    model = library().Model(list(results.values()), operators.parameters, "case")
    names = list(results)
    return _Model(model, operators.feeds, lambda found: dict(zip(names, found, strict=True)))


def _recurrent(built: BuiltCase) -> _Model:
    graph = recurrent.graph(built)
    model = core().read_model(graph.model)
    names = [port.get_any_name() for port in model.outputs]
    return _Model(
        model,
        [graph.feeds[port.get_any_name()] for port in model.inputs],
        lambda found: graph.results(dict(zip(names, found, strict=True))),
    )


def _load(make: Callable[[], _Model], threads: int) -> PreparedPeer:
    start = perf_counter()
    made = make()
    wanted = configuration(threads)
    compiled = core().compile_model(made.model, "CPU", wanted)
    check_settings(compiled, wanted)
    request = compiled.create_infer_request()
    feeds = [value.detach().contiguous() for value in made.feeds]
    outputs = [torch.empty(*port.get_shape()) for port in compiled.outputs]
    for index, value in enumerate(feeds):
        request.set_input_tensor(index, library().Tensor(value.numpy(), shared_memory=True))
    for index, value in enumerate(outputs):
        request.set_output_tensor(index, library().Tensor(value.numpy(), shared_memory=True))

    def call(held: object = (compiled, feeds, outputs)) -> None:
        # The request has the arrays' addresses only; the default keeps the arrays alive.
        request.infer(share_outputs=True)

    def output() -> dict[str, Tensor]:
        for value in outputs:
            value.fill_(float("nan"))
        call()
        return {name: value.clone() for name, value in made.results(outputs).items()}

    call()
    return PreparedPeer(call, output, perf_counter() - start)


def check_settings(compiled: Any, wanted: dict[str, Any]) -> None:
    """Settings are requests; hold the model to those that decide what is compared."""
    wanted = wanted | {"INFERENCE_PRECISION_HINT": library().Type.f32}
    for name in ("INFERENCE_NUM_THREADS", "NUM_STREAMS", "INFERENCE_PRECISION_HINT"):
        found = compiled.get_property(name)
        if str(found) != str(wanted[name]):
            raise PeerSkippedError(f"{name} is {found}, asked for {wanted[name]}")
