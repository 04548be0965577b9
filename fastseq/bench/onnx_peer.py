"""onnxruntime as a peer for inference: one LSTM, GRU or RNN node holding the case's weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from fastseq.bench.build import BuiltCase
from fastseq.bench.cases import GATES, Case

# Where each of ONNX's gates is found among torch's: i o f c from i f g o, z r h from r z n.
_GATE_ORDER: dict[str, tuple[int, ...]] = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}
_OPSET = 17


class UnsupportedCaseError(Exception):
    """onnxruntime has no operator for this case; the message says why."""


@dataclass
class OnnxSession:
    """A prepared call and the padded, time-major output it last wrote."""

    call: Callable[[], object]
    output: Callable[[], Tensor]


def why_not(case: Case) -> str | None:
    """The reason this peer cannot run a case, or None."""
    if case.direction == "training":
        return "inference only"
    if case.options.proj_size:
        return "the ONNX LSTM has no projection"
    if case.options.num_layers > 1:
        return "one ONNX node is one layer"
    if case.dtype != "float32":
        return f"not built for {case.dtype}"
    return None


def _reorder(weight: Tensor, case: Case) -> Tensor:
    gates = weight.detach().unflatten(0, (GATES[case.layer], case.H))
    return gates[list(_GATE_ORDER[case.layer])].flatten(0, 1)


def _weights(layer: torch.nn.RNNBase, case: Case) -> dict[str, Tensor]:
    """W, R and B as ONNX lays them out, one leading entry per direction."""
    stacked: dict[str, list[Tensor]] = {"W": [], "R": [], "B": []}
    for suffix in ("l0", "l0_reverse")[: 2 if case.options.bidirectional else 1]:
        stacked["W"].append(_reorder(getattr(layer, f"weight_ih_{suffix}"), case))
        stacked["R"].append(_reorder(getattr(layer, f"weight_hh_{suffix}"), case))
        if case.options.bias:
            biases = [getattr(layer, f"bias_{kind}_{suffix}") for kind in ("ih", "hh")]
            stacked["B"].append(torch.cat([_reorder(bias, case) for bias in biases]))
    return {name: torch.stack(parts) for name, parts in stacked.items() if parts}


def _model_bytes(built: BuiltCase) -> bytes:
    from onnx import TensorProto, checker, helper, numpy_helper

    case = built.case
    directions = 2 if case.options.bidirectional else 1
    weights = _weights(built.torch_layer, case)
    node_inputs = ["X", "W", "R", "B" if "B" in weights else "", ""]
    graph_inputs = [helper.make_tensor_value_info("X", TensorProto.FLOAT, [case.T, case.B, case.I])]
    if case.options.ragged:
        node_inputs[4] = "lengths"
        graph_inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, [case.B]))
    outputs = ["Y", "Y_h"] + (["Y_c"] if case.layer == "lstm" else [])
    state_shape = [directions, case.B, case.H]
    if built.state is not None:
        for name in ("initial_h", "initial_c")[: len(outputs) - 1]:
            node_inputs.append(name)
            graph_inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, state_shape))
    attributes: dict[str, Any] = {"hidden_size": case.H}
    if case.options.bidirectional:
        attributes["direction"] = "bidirectional"
    if case.layer == "gru":
        attributes["linear_before_reset"] = 1  # torch's form of the GRU
    node = helper.make_node(case.layer.upper(), node_inputs, outputs, **attributes)
    shapes = [[case.T, directions, case.B, case.H]] + [state_shape] * (len(outputs) - 1)
    graph = helper.make_graph(
        [node],
        case.name,
        graph_inputs,
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in zip(outputs, shapes, strict=True)
        ],
        [numpy_helper.from_array(value.numpy(), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=8)
    checker.check_model(model)
    return bytes(model.SerializeToString())


def _feeds(built: BuiltCase) -> dict[str, Any]:
    import numpy

    case = built.case
    if isinstance(built.input, PackedSequence):
        padded = pad_packed_sequence(built.input)[0]
        feeds = {"X": padded.numpy(), "lengths": numpy.array(case.lengths(), dtype=numpy.int32)}
    else:
        feeds = {"X": built.input.numpy()}
    if built.state is not None:
        states = built.state if isinstance(built.state, tuple) else (built.state,)
        for name, state in zip(("initial_h", "initial_c"), states, strict=False):
            feeds[name] = state.numpy()
    return feeds


def prepare(built: BuiltCase, threads: int) -> OnnxSession:
    """Build the session and the fastest way of calling it.

    Args:
        built: The case.
        threads: Threads inside one operator.

    Raises:
        UnsupportedCaseError: The case has no equivalent node.
        ImportError: onnx or onnxruntime is not installed.
    """
    reason = why_not(built.case)
    if reason:
        raise UnsupportedCaseError(reason)
    import numpy
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        _model_bytes(built), options, providers=["CPUExecutionProvider"]
    )
    feeds = _feeds(built)
    names = [output.name for output in session.get_outputs()]
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
    results = {
        output.name: onnxruntime.OrtValue.ortvalue_from_shape_and_type(output.shape, numpy.float32)
        for output in session.get_outputs()
    }
    for name, value in results.items():
        binding.bind_ortvalue_output(name, value)

    def output() -> Tensor:
        session.run_with_iobinding(binding)
        y = torch.from_numpy(results["Y"].numpy())  # (T, directions, B, H)
        return y.transpose(1, 2).flatten(2)

    calls: list[Callable[[], object]] = [
        lambda: session.run_with_iobinding(binding),
        lambda: session.run(names, feeds),
    ]
    return OnnxSession(min(calls, key=_seconds), output)


def _seconds(call: Callable[[], object]) -> float:
    """Best of a few calls; only picks the way of calling, it is not a result."""
    best = float("inf")
    for _ in range(5):
        start = perf_counter()
        call()
        best = min(best, perf_counter() - start)
    return best
