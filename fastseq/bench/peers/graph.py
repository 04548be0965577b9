"""A case as an ONNX graph: what onnxruntime runs, and openvino can read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# What the installed converters of either library read; none of the operators used is younger.
OPSET = 17
_IR_VERSION = 8

# Shape and dtype by name.
Outputs = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass
class Graph:
    """An ONNX model and what goes in and out of it.

    Attributes:
        model: The serialised model.
        feeds: Values of its inputs by name.
        outputs: Shape and dtype of its outputs by name.
        results: Makes the case's results by name from the outputs by name.
        in_place: Outputs that are written over an input: the input's name by theirs.
    """

    model: bytes
    feeds: dict[str, Tensor]
    outputs: Outputs
    results: Callable[[dict[str, Tensor]], dict[str, Tensor]] = field(default=dict)
    in_place: dict[str, str] = field(default_factory=dict)


def element_type(dtype: torch.dtype) -> int:
    """ONNX's number for a torch dtype."""
    from onnx import TensorProto

    return {
        torch.float32: TensorProto.FLOAT,
        torch.float64: TensorProto.DOUBLE,
        torch.int32: TensorProto.INT32,
        torch.int64: TensorProto.INT64,
        torch.bool: TensorProto.BOOL,
    }[dtype]


def model_bytes(
    name: str,
    nodes: Sequence[NodeProto],
    feeds: dict[str, Tensor],
    constants: dict[str, Tensor],
    outputs: Outputs,
    *,
    domains: Sequence[str] = (),
    opset: int = OPSET,
) -> bytes:
    """Check and serialise a graph; all shapes in it are fixed.

    Args:
        name: The graph's name.
        nodes: Its operators, in order.
        feeds: Its inputs by name.
        constants: Its initialisers by name.
        outputs: Shape and dtype of its outputs by name.
        domains: Operator sets beside ONNX's own, version 1; their operators are not checked.
        opset: Version of ONNX's own operator set.
    """
    from onnx import checker, helper, numpy_helper

    def info(name: str, shape: Sequence[int], dtype: torch.dtype) -> Any:
        return helper.make_tensor_value_info(name, element_type(dtype), list(shape))

    graph = helper.make_graph(
        list(nodes),
        name,
        [info(name, value.shape, value.dtype) for name, value in feeds.items()],
        [info(name, shape, dtype) for name, (shape, dtype) in outputs.items()],
        [
            numpy_helper.from_array(value.detach().numpy(), name)
            for name, value in constants.items()
        ],
    )
    sets = [helper.make_opsetid("", opset)]
    sets += [helper.make_opsetid(domain, 1) for domain in domains]
    model: ModelProto = helper.make_model(graph, opset_imports=sets, ir_version=_IR_VERSION)
    checker.check_model(model)
    return bytes(model.SerializeToString())
