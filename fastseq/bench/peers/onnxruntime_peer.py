"""onnxruntime: a session with every graph optimisation, inputs and outputs bound beforehand."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fastseq.bench.build import BuiltCase
from fastseq.bench.peers import recurrent
from fastseq.bench.peers.fastest import fastest
from fastseq.bench.peers.graph import Graph
from fastseq.bench.peers.prepared import AnyBuilt, PeerSkippedError, PreparedPeer


def graph(built: AnyBuilt) -> Graph:
    """The ONNX graph of a case, as this library runs it fastest.

    Raises:
        PeerSkippedError: There is no equivalent graph.
        ModuleNotFoundError: onnx is not installed.
    """
    if isinstance(built, BuiltCase):
        return recurrent.graph(built)
    raise PeerSkippedError("not built yet")


def prepare(built: AnyBuilt, threads: int) -> PreparedPeer:
    """Build the session and the fastest way of calling it.

    Args:
        built: The case.
        threads: Threads inside one operator.

    Raises:
        PeerSkippedError: There is no equivalent graph, or no kernel for it.
        ModuleNotFoundError: onnx or onnxruntime is not installed.
    """
    import onnxruntime

    start = perf_counter()
    made = graph(built)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            made.model, options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its errors share no type of their own
        raise PeerSkippedError(_first_line(error)) from error
    return _bound(session, made, start)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]


def _bound(session: Any, made: Graph, start: float) -> PreparedPeer:
    feeds = {name: value.detach().contiguous() for name, value in made.feeds.items()}
    outputs = {
        name: torch.empty(*shape, dtype=dtype) for name, (shape, dtype) in made.outputs.items()
    }
    binding = session.io_binding()
    for bind, tensors in ((binding.bind_input, feeds), (binding.bind_output, outputs)):
        for name, tensor in tensors.items():
            array = tensor.numpy()
            bind(name, "cpu", 0, array.dtype, array.shape, tensor.data_ptr())
    names = list(outputs)
    arrays = {name: value.numpy() for name, value in feeds.items()}

    def bound(held: object = (feeds, outputs)) -> None:
        # The binding has the arrays' addresses only; the default keeps the arrays alive.
        session.run_with_iobinding(binding)

    calls: list[Callable[[], object]] = [bound, lambda: session.run(names, arrays)]
    try:
        call = fastest(calls)
    except Exception as error:  # as above; some kernels say only now that they lack a dtype
        raise PeerSkippedError(_first_line(error)) from error

    def output() -> dict[str, Tensor]:
        for tensor in outputs.values():
            tensor.zero_()
        session.run_with_iobinding(binding)
        return {name: value.clone() for name, value in made.results(outputs).items()}

    return PreparedPeer(call, output, perf_counter() - start)
