"""Recurrent cases as ONNX: one LSTM, GRU or RNN node per layer, holding the case's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from fastseq.bench.build import BuiltCase
from fastseq.bench.cases import GATES, Case
from fastseq.bench.peers.graph import Graph, Outputs, model_bytes
from fastseq.bench.peers.prepared import PeerSkippedError

# Where each of ONNX's gates is found among torch's: i o f c from i f g o, z r h from r z n.
_GATE_ORDER: dict[str, tuple[int, ...]] = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}


def _reorder(weight: Tensor, case: Case) -> Tensor:
    gates = weight.detach().unflatten(0, (GATES[case.layer], case.H))
    return gates[list(_GATE_ORDER[case.layer])].flatten(0, 1)


def _weights(layer: torch.nn.Module, case: Case, index: int) -> dict[str, Tensor]:
    """W, R and B of one layer as ONNX lays them out, one leading entry per direction."""
    stacked: dict[str, list[Tensor]] = {"W": [], "R": [], "B": []}
    for reverse in ("", "_reverse")[: 2 if case.options.bidirectional else 1]:
        suffix = f"l{index}{reverse}"
        stacked["W"].append(_reorder(getattr(layer, f"weight_ih_{suffix}"), case))
        stacked["R"].append(_reorder(getattr(layer, f"weight_hh_{suffix}"), case))
        if case.options.bias:
            biases = [getattr(layer, f"bias_{kind}_{suffix}") for kind in ("ih", "hh")]
            stacked["B"].append(torch.cat([_reorder(bias, case) for bias in biases]))
    return {f"{name}{index}": torch.stack(parts) for name, parts in stacked.items() if parts}


def _feeds(built: BuiltCase) -> dict[str, Tensor]:
    feeds = {}
    if isinstance(built.input, PackedSequence):
        feeds["X"] = pad_packed_sequence(built.input)[0]
        feeds["lengths"] = torch.tensor(built.case.lengths(), dtype=torch.int32)
    else:
        feeds["X"] = built.input
    if built.state is not None:
        directions = 2 if built.case.options.bidirectional else 1
        states = built.state if isinstance(built.state, tuple) else (built.state,)
        for kind, state in zip("hc", states, strict=False):
            for index, part in enumerate(state.split(directions)):
                feeds[f"initial_{kind}{index}"] = part
    return feeds


def graph(built: BuiltCase) -> Graph:
    """The case's layers as a chain of nodes.

    Raises:
        PeerSkippedError: There are no equivalent nodes.
        ModuleNotFoundError: onnx is not installed.
    """
    from onnx import helper

    case = built.case
    if case.options.proj_size:
        raise PeerSkippedError("the ONNX LSTM has no projection")
    attributes: dict[str, Any] = {"hidden_size": case.H}
    if case.options.bidirectional:
        attributes["direction"] = "bidirectional"
    if case.layer == "gru":
        attributes["linear_before_reset"] = 1  # torch's form of the GRU
    directions = 2 if case.options.bidirectional else 1
    kinds = "hc" if case.layer == "lstm" else "h"
    dtype = getattr(torch, case.dtype)
    feeds = _feeds(built)
    constants: dict[str, Tensor] = {}
    nodes = []
    outputs: Outputs = {}
    below = "X"
    last = case.options.num_layers - 1
    for index in range(last + 1):
        weights = _weights(built.torch_layer, case, index)
        constants |= weights
        inputs = [below, f"W{index}", f"R{index}"]
        optional = [f"B{index}", "lengths", *(f"initial_{kind}{index}" for kind in kinds)]
        inputs += [name if name in feeds or name in weights else "" for name in optional]
        while not inputs[-1]:
            inputs.pop()
        made = [f"Y{index}", *(f"final_{kind}{index}" for kind in kinds)]
        nodes.append(helper.make_node(case.layer.upper(), inputs, made, **attributes))
        outputs |= dict.fromkeys(made[1:], ((directions, case.B, case.H), dtype))
        if index < last:
            # (T, directions, B, H) to the next layer's (T, B, directions * H)
            below = f"X{index + 1}"
            constants["rows"] = torch.tensor([case.T, case.B, directions * case.H])
            nodes.append(
                helper.make_node("Transpose", made[:1], [f"{below}_apart"], perm=[0, 2, 1, 3])
            )
            nodes.append(helper.make_node("Reshape", [f"{below}_apart", "rows"], [below]))
    outputs[f"Y{last}"] = ((case.T, directions, case.B, case.H), dtype)

    def results(found: dict[str, Tensor]) -> dict[str, Tensor]:
        named = {"output": found[f"Y{last}"].transpose(1, 2).flatten(2)}
        for kind, name in zip(kinds, ("hidden", "cell"), strict=False):
            named[name] = torch.cat([found[f"final_{kind}{index}"] for index in range(last + 1)])
        return named

    model = model_bytes(case.name, nodes, feeds, constants, outputs)
    return Graph(model, feeds, outputs, results)
