"""Work, traffic and least time of a recorded call, by the formulas of ``fastseq._work``.

Work is counted, traffic is *modelled*: the compulsory bytes of the call, not what the memory
controllers saw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fastseq._work import (
    ELEMENT_BYTES,
    AttentionSizes,
    LinearSizes,
    NormSizes,
    OwnCell,
    RecurrentSizes,
    Traffic,
)
from fastseq.profiler.record import Call

__all__ = ["Demand", "Model", "model"]


class Demand(NamedTuple):
    """Bytes to be moved, and how many different ones: that decides where they can lie."""

    traffic: Traffic
    working_set: int


class Model(NamedTuple):
    """What a call is known to need.

    Attributes:
        flops: Floating-point operations of the matrix products.
        traffic: Compulsory traffic in bytes.
        phase_flops: The operations that belong to a phase.
        demands: What memory has to deliver, each on its own: the compulsory traffic, and the
            weights of a recurrence, which every step reads again.
    """

    flops: int
    traffic: Traffic
    phase_flops: dict[str, int]
    demands: tuple[Demand, ...]


def model(call: Call) -> Model | None:
    """The model of a call; ``None`` for a kernel or dtype without one."""
    build, size = _MODELS.get(call.kernel), ELEMENT_BYTES.get(call.dtype)
    if build is None or size is None:
        return None
    try:
        flops, elements, phases, swept = build(call)
    except KeyError:  # a recording that lacks a size, or names a cell unknown here
        return None
    traffic = elements.times(size)
    demands = [Demand(traffic, traffic.total)]
    if swept is not None:
        weights, steps = swept
        demands.append(Demand(Traffic(weights * size * steps, 0), weights * size))
    return Model(flops, traffic, phases, tuple(demands))


_Parts = tuple[int, Traffic, dict[str, int], tuple[int, int] | None]


def _recurrent_sizes(call: Call) -> RecurrentSizes:
    shape = call.shape
    own = None
    if call.kernel.startswith("cell_"):
        own = OwnCell(*(shape[name] for name in OwnCell._fields))
    return RecurrentSizes(
        call.variant,
        shape["rows"],
        shape["B"],
        shape["I"],
        shape["H"],
        shape.get("P", 0),
        shape.get("D", 1),
        bool(shape.get("bias", 1)),
        own,
    )


def _rnn_forward(call: Call) -> _Parts:
    sizes = _recurrent_sizes(call)
    phases = {
        "input product": sizes.input_product(),
        "recurrent product": sizes.recurrent_product(),
        "recurrent product and gates": sizes.recurrent_product(),  # the one or the other
        "projection": sizes.projection(),
        # As Numba's kernels are seen, from outside of their loop over time.
        "recurrence": sizes.recurrent_product() + sizes.projection(),
        "products": sizes.input_product() + sizes.recurrent_product(),
        "single step": sizes.forward_flops(),
    }
    traffic = sizes.forward_traffic(bool(call.shape.get("training", 0)))
    return sizes.forward_flops(), traffic, phases, (sizes.recurrent_weights(), call.shape["T"])


def _rnn_backward(call: Call) -> _Parts:
    sizes = _recurrent_sizes(call)
    needs_x, needs_w = bool(call.shape["needs_x"]), bool(call.shape["needs_w"])
    handed_on = call.shape.get("rows_handed_on")
    phases = {
        "recurrent product": sizes.handed_back(handed_on),
        "projection": sizes.projection(),
        "recurrence": sizes.handed_back(handed_on) + sizes.projection(),
        "input gradient": sizes.input_product() if needs_x else 0,
        "weight gradient": sizes.weight_gradient() if needs_w else 0,
    }
    return (
        sizes.backward_flops(needs_x, needs_w, handed_on),
        sizes.backward_traffic(needs_x, needs_w),
        phases,
        (sizes.recurrent_weights(), call.shape["T"]),
    )


def _attention_sizes(call: Call) -> AttentionSizes:
    shape = call.shape
    return AttentionSizes(
        shape["Hq"],
        shape["Hkv"],
        shape.get("query_rows", shape["B"] * shape["Sq"]),
        shape.get("key_rows", shape["B"] * shape["Skv"]),
        shape["E"],
        shape["Ev"],
        shape["pairs"],
    )


def _attention_forward(call: Call) -> _Parts:
    sizes = _attention_sizes(call)
    phases = {
        "scores": sizes.scores(),
        "values": sizes.values(),
        "fused forward": sizes.forward_flops(),
    }
    return sizes.forward_flops(), sizes.forward_traffic(), phases, None


def _attention_backward(call: Call) -> _Parts:
    sizes, shape = _attention_sizes(call), call.shape
    bias = shape["Hq"] * shape["Sq"] * shape["Skv"] if shape["needs_bias"] else 0
    needs = (bool(shape["needs_query"]), bool(shape["needs_key"]), bool(shape["needs_value"]))
    phases = {
        "scores": sizes.scores(),
        "values": sizes.values(),
        "query gradient": sizes.scores() * needs[0],
        "key gradient": sizes.scores() * needs[1],
        "value gradient": sizes.values() * needs[2],
        "fused backward": sizes.backward_flops(*needs),
    }
    return sizes.backward_flops(*needs), sizes.backward_traffic(bias, *needs), phases, None


def _linear_forward(call: Call) -> _Parts:
    sizes = LinearSizes(call.shape["M"], call.shape["K"], call.shape["N"])
    shape = call.shape
    traffic = sizes.forward_traffic(bool(shape["residual"]), bool(shape.get("saves", 0)))
    return sizes.product(), traffic, {"product": sizes.product()}, None


def _linear_backward(call: Call) -> _Parts:
    shape = call.shape
    sizes = LinearSizes(shape["M"], shape["K"], shape["N"])
    needs_input, needs_weight = bool(shape["needs_input"]), bool(shape["needs_weight"])
    phases = {
        "input gradient": sizes.product() if needs_input else 0,
        "weight gradient": sizes.product() if needs_weight else 0,
    }
    flops = sizes.backward_flops(needs_input, needs_weight)
    return flops, sizes.backward_traffic(needs_input, needs_weight), phases, None


def _norm_sizes(call: Call) -> NormSizes:
    return NormSizes(call.shape["M"], call.shape["F"], 1 if call.variant == "rms_norm" else 2)


def _norm_forward(call: Call) -> _Parts:
    shape = call.shape
    traffic = _norm_sizes(call).forward_traffic(bool(shape["residual"]), bool(shape.get("sum", 0)))
    return 0, traffic, {}, None


def _norm_backward(call: Call) -> _Parts:
    shape = call.shape
    traffic = _norm_sizes(call).backward_traffic(
        bool(shape["needs_x"]),
        bool(shape["needs_weight"]),
        bool(shape.get("grad_sum", 0)),
        bool(shape.get("needs_input", 0)),
    )
    return 0, traffic, {}, None


_MODELS: dict[str, Callable[[Call], _Parts]] = {
    "rnn_forward": _rnn_forward,
    "rnn_backward": _rnn_backward,
    "cell_forward": _rnn_forward,
    "cell_backward": _rnn_backward,
    "attention_forward": _attention_forward,
    "attention_decode": _attention_forward,
    "attention_backward": _attention_backward,
    "linear_forward": _linear_forward,
    "linear_backward": _linear_backward,
    "norm_forward": _norm_forward,
    "norm_backward": _norm_backward,
}
