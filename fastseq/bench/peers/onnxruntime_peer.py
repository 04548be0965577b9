"""onnxruntime: sessions with inputs and outputs bound beforehand, the fastest of several graphs."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fastseq.bench.attention import BuiltAttention
from fastseq.bench.build import BuiltCase
from fastseq.bench.cell_cases import CellCase
from fastseq.bench.peers import modules, onnx_attention, recurrent
from fastseq.bench.peers.choose import choose, seconds_of
from fastseq.bench.peers.graph import Graph
from fastseq.bench.peers.onnx_operators import OnnxOperators
from fastseq.bench.peers.prepared import AnyBuilt, PeerSkippedError, PreparedPeer
from fastseq.bench.transformer import BuiltTransformer

# Undoes what is better left: see ``OnnxOperators.layer_norm``.
_DISABLED = ["SkipLayerNormFusion"]
# Calls longer than this do not notice how they get their arrays.
_SHORT_SECONDS = 1e-3


def graphs(built: AnyBuilt) -> list[Callable[[], Graph]]:
    """Makers of equivalent graphs of a case, to be tried side by side.

    Raises:
        PeerSkippedError: There is none.
    """
    if isinstance(built, BuiltCase):
        if isinstance(built.case, CellCase):
            raise PeerSkippedError("onnxruntime has no such recurrent layer")
        if built.case.dtype != "float32":
            raise PeerSkippedError(f"onnxruntime has no recurrent layers in {built.case.dtype}")
        return [lambda: recurrent.graph(built)]
    if isinstance(built, BuiltAttention) and not built.modules:
        return onnx_attention.graphs(built)
    assert isinstance(built, BuiltAttention | BuiltTransformer)
    styles = [True, False] if modules.has_choice(built) else [True]
    return [lambda fused=fused: _module(built, fused) for fused in styles]  # type: ignore[misc]


def _module(built: BuiltAttention | BuiltTransformer, fused: bool) -> Graph:
    operators = OnnxOperators(getattr(torch, built.case.dtype), fused)
    return operators.graph(built.case.name, modules.build(operators, built))


def prepare(built: AnyBuilt, threads: int) -> PreparedPeer:
    """Build the sessions of a case and keep the fastest.

    Args:
        built: The case.
        threads: Threads inside one operator.

    Raises:
        PeerSkippedError: There is no equivalent graph, or no kernel for it.
        ModuleNotFoundError: onnx or onnxruntime is not installed.
    """
    makers = graphs(built)
    return choose(built, [lambda make=make: _load(make, threads) for make in makers])  # type: ignore[misc]


def session_options(threads: int) -> Any:
    """Every graph optimisation that helps; threads spin between calls, as they do by default."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    return options


def _load(make: Callable[[], Graph], threads: int) -> PreparedPeer:
    import onnxruntime

    start = perf_counter()
    graph = make()
    session = onnxruntime.InferenceSession(
        graph.model,
        session_options(threads),
        providers=["CPUExecutionProvider"],
        disabled_optimizers=_DISABLED,
    )
    feeds = {name: value.detach().contiguous() for name, value in graph.feeds.items()}
    outputs = {
        name: feeds[graph.in_place[name]]
        if name in graph.in_place
        else torch.empty(*shape, dtype=dtype)
        for name, (shape, dtype) in graph.outputs.items()
    }
    binding = session.io_binding()
    for bind, tensors in ((binding.bind_input, feeds), (binding.bind_output, outputs)):
        for name, tensor in tensors.items():
            array = tensor.numpy()
            bind(name, "cpu", 0, array.dtype, array.shape, tensor.data_ptr())

    def bound(held: object = (feeds, outputs)) -> None:
        # The binding has the arrays' addresses only; the default keeps the arrays alive.
        session.run_with_iobinding(binding)

    def output() -> dict[str, Tensor]:
        for name, tensor in outputs.items():
            if name not in graph.in_place:
                tensor.fill_(float("nan"))
        bound()
        return {name: value.clone() for name, value in graph.results(outputs).items()}

    bound()
    setup_seconds = perf_counter() - start
    return PreparedPeer(_fastest_call(session, graph, bound, feeds), output, setup_seconds)


def _fastest_call(
    session: Any, graph: Graph, bound: Callable[[], None], feeds: dict[str, Tensor]
) -> Callable[[], object]:
    """Inputs bound beforehand or passed as arrays: for a few microseconds it is not clear which."""
    if graph.in_place or seconds_of(bound) > _SHORT_SECONDS:
        return bound
    names = list(graph.outputs)
    arrays = {name: value.numpy() for name, value in feeds.items()}

    def passed() -> None:
        session.run(names, arrays)

    best = {call: min(seconds_of(call) for _ in range(10)) for call in (bound, passed)}
    return min(best, key=lambda call: best[call])
