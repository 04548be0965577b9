"""The attention function as ONNX graphs, in every form that may be onnxruntime's fastest.

Which one is differs. On a 2-core Cascade Lake, onnxruntime 1.32, in ms:

    case                          products  Attention  MultiHead  GroupQuery  torch
    B4 H8 S512 E64                13.7      13.5       13.2       -           14.5
    ... causal                    31.8      37.1       34.8       29.9        18.0
    ... with a bias               18.9      17.2       22.0       -           22.3
    B1 H16 S2048 E64 causal       341       320        328        187         159
    B1 H4 S4096 E64 window 256    371       435        361        156         227
    B1 H32 S1/4096 E128           14.1      14.2       39.1       12.3        13.3
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastseq.bench.attention import BuiltAttention
from fastseq.bench.peers import masks
from fastseq.bench.peers.graph import Graph, Outputs, model_bytes
from fastseq.bench.peers.onnx_operators import MICROSOFT

# ONNX's own attention operator is no older.
_ATTENTION_OPSET = 23


def graphs(built: BuiltAttention) -> list[Callable[[], Graph]]:
    """Makers of equivalent graphs, to be tried side by side."""
    case = built.case
    added = masks.bias(built)
    makers: list[Callable[[], Graph]] = []
    if masks.scores_fit(built):
        makers.append(lambda: _attention(built, added))
        if case.Hq == case.Hkv:
            makers.append(lambda: _products(built, added))
    if added is None and not masks.causal(built) and case.Hq == case.Hkv and case.Sq > 1:
        makers.append(lambda: _multi_head(built))
    if case.dtype == "float32" and built.padding is None and "bias" not in built.leaves:
        left, right = case.options.window or (-1, -1)
        one_sided = case.Sq == case.Skv and (masks.causal(built) or right == 0)
        if one_sided and case.Sq > 1:
            makers.append(lambda: _group_query(built, left))
        if case.Sq == 1 and case.options.window is None:
            makers.append(lambda: _one_query(built))
    return makers


def _feeds(built: BuiltAttention, added: Tensor | None) -> dict[str, Tensor]:
    feeds = {name: built.leaves[name].detach() for name in ("query", "key", "value")}
    return feeds if added is None else feeds | {"mask": added}


def _output(built: BuiltAttention) -> Outputs:
    return {"output": (tuple(built.leaves["query"].shape), getattr(torch, built.case.dtype))}


def _attention(built: BuiltAttention, added: Tensor | None) -> Graph:
    """ONNX's operator for it."""
    from onnx import helper

    feeds, outputs = _feeds(built, added), _output(built)
    if added is not None:
        # It does not repeat a mask over queries.
        case = built.case
        feeds["mask"] = added.expand(-1, -1, case.Sq, case.Skv).contiguous()
    causal = int(masks.causal(built))
    node = helper.make_node("Attention", list(feeds), ["output"], is_causal=causal)
    model = model_bytes(built.case.name, [node], feeds, {}, outputs, opset=_ATTENTION_OPSET)
    return Graph(model, feeds, outputs)


def _products(built: BuiltAttention, added: Tensor | None) -> Graph:
    """Two products and a softmax."""
    from onnx import helper

    dtype = getattr(torch, built.case.dtype)
    feeds, outputs = _feeds(built, added), _output(built)
    constants = {"scale": torch.tensor(built.case.E**-0.5, dtype=dtype)}
    nodes = [
        helper.make_node("Transpose", ["key"], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("Mul", ["query", "scale"], ["scaled"]),
        helper.make_node("MatMul", ["scaled", "turned"], ["scores"]),
    ]
    scores = "scores"
    if masks.causal(built):
        constants["causal"] = masks.causal_bias(built)
        nodes.append(helper.make_node("Add", [scores, "causal"], ["causal_scores"]))
        scores = "causal_scores"
    if added is not None:
        nodes.append(helper.make_node("Add", [scores, "mask"], ["masked"]))
        scores = "masked"
    nodes.append(helper.make_node("Softmax", [scores], ["weights"], axis=-1))
    nodes.append(helper.make_node("MatMul", ["weights", "value"], ["output"]))
    return Graph(model_bytes(built.case.name, nodes, feeds, constants, outputs), feeds, outputs)


def _joined(value: Tensor) -> Tensor:
    """(B, H, S, E) as (B, S, H * E), which onnxruntime's own operators take."""
    return value.detach().transpose(1, 2).flatten(2).contiguous()


def _apart(built: BuiltAttention) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    sizes = (built.case.Hq, built.case.E)
    return lambda found: {"output": found["output"].unflatten(2, sizes).transpose(1, 2)}


def _multi_head(built: BuiltAttention) -> Graph:
    """The operator of onnxruntime that without a mask never holds all scores."""
    from onnx import helper

    case = built.case
    feeds = {name: _joined(built.leaves[name]) for name in ("query", "key", "value")}
    shape = (case.B, case.Sq, case.Hq * case.E)
    outputs: Outputs = {"output": (shape, getattr(torch, case.dtype))}
    node = helper.make_node(
        "MultiHeadAttention", list(feeds), ["output"], domain=MICROSOFT, num_heads=case.Hq
    )
    model = model_bytes(case.name, [node], feeds, {}, outputs, domains=[MICROSOFT])
    return Graph(model, feeds, outputs, _apart(built))


def _group_query_graph(
    built: BuiltAttention, feeds: dict[str, Tensor], inputs: list[str], **attributes: Any
) -> Graph:
    from onnx import helper

    case = built.case
    heads: dict[str, Any] = {"num_heads": case.Hq, "kv_num_heads": case.Hkv}
    keys = ((case.B, case.Hkv, case.Skv, case.E), torch.float32)
    outputs: Outputs = {
        "output": ((case.B, case.Sq, case.Hq * case.E), torch.float32),
        "present_key": keys,
        "present_value": keys,
    }
    # The position of the last key of each sequence, and how many keys there are in all.
    constants = {
        "last": torch.full((case.B,), case.Skv - 1, dtype=torch.int32),
        "total": torch.tensor([case.Skv], dtype=torch.int32),
    }
    node = helper.make_node(
        "GroupQueryAttention",
        [*inputs, "last", "total"],
        list(outputs),
        domain=MICROSOFT,
        **heads,
        **attributes,
    )
    model = model_bytes(case.name, [node], feeds, constants, outputs, domains=[MICROSOFT])
    return Graph(model, feeds, outputs, _apart(built))


def _group_query(built: BuiltAttention, left: int) -> Graph:
    """The operator for decoders: causal, with a window where ``left`` is not negative."""
    feeds = {name: _joined(built.leaves[name]) for name in ("query", "key", "value")}
    window = {"local_window_size": left + 1} if left >= 0 else {}
    return _group_query_graph(built, feeds, [*feeds, "", ""], **window)


def _one_query(built: BuiltAttention) -> Graph:
    """The same with a cache, written in place: a step of decoding, the last key being new."""
    feeds = {
        "query": _joined(built.leaves["query"]),
        "key": _joined(built.leaves["key"][:, :, -1:]),
        "value": _joined(built.leaves["value"][:, :, -1:]),
        "past_key": built.leaves["key"].detach().clone(),
        "past_value": built.leaves["value"].detach().clone(),
    }
    graph = _group_query_graph(built, feeds, list(feeds))
    graph.in_place = {"present_key": "past_key", "present_value": "past_value"}
    return graph
