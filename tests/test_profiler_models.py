"""Work and traffic of recorded calls, against torch's own count, hand counts and the registry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels import COMPOSITES, HAS_EXTENSION, needs_extension
from torch.utils.flop_counter import FlopCounterMode

import fastseq
from fastseq._cells import GATES
from fastseq._work import (
    AttentionSizes,
    LinearSizes,
    NormSizes,
    RecurrentSizes,
    Traffic,
)
from fastseq.bench.attention_cases import AttentionOptions, make_attention_case
from fastseq.bench.cases import CaseOptions, make_case
from fastseq.bench.transformer_cases import TransformerOptions, make_transformer_case
from fastseq.profiler.models import Model, model
from fastseq.profiler.record import Call
from fastseq.profiler.summary import shape_label

# What torch says about its own layers is not about ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections"),
    pytest.mark.filterwarnings("ignore:TF32 acceleration"),
]

CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN"}


def modelled(call: Call) -> Model:
    found = model(call)
    assert found is not None
    return found


def recorded(run: Any) -> list[Call]:
    with fastseq.profile() as profile:
        run()
    return list(profile.calls)


def by_kernel(calls: list[Call]) -> dict[str, Call]:
    found = {call.kernel: call for call in calls}
    assert len(found) == len(calls)
    return found


# --- against torch.utils.flop_counter


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("needs_x", "needs_w"), [(True, True), (True, False), (False, True)], ids=str
)
def test_recurrent_layer_counts_what_torch_counts(cell: str, needs_x: bool, needs_w: bool) -> None:
    sizes: dict[str, Any] = {"bidirectional": True} | ({"proj_size": 3} if cell == "lstm" else {})
    theirs = getattr(torch.nn, CELLS[cell])(5, 8, **sizes)
    ours = getattr(fastseq.nn, CELLS[cell])(5, 8, **sizes)
    states = [torch.zeros(2, 4, 3 if cell == "lstm" else 8, requires_grad=True)]
    if cell == "lstm":
        states.append(torch.zeros(2, 4, 8, requires_grad=True))
    state = tuple(states) if cell == "lstm" else states[0]
    x = torch.randn(6, 4, 5, requires_grad=needs_x)
    for layer in (ours, theirs):
        layer.requires_grad_(needs_w)
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as forward:
        output = theirs(x, state)[0].sum()
    with FlopCounterMode(display=False) as backward:
        output.backward()
    calls = by_kernel(recorded(lambda: ours(x, state)[0].sum().backward()))
    assert modelled(calls["rnn_forward"]).flops == forward.get_total_flops()
    assert modelled(calls["rnn_backward"]).flops == backward.get_total_flops()


@needs_extension
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("steps", [1, 6])
def test_first_steps_hand_nothing_on_to_a_state_without_gradient(
    cell: str, bidirectional: bool, steps: int
) -> None:
    module = getattr(fastseq.nn, CELLS[cell])(5, 8, bidirectional=bidirectional)
    x = torch.randn(steps, 4, 5, requires_grad=True)
    output = module(x)[0].sum()
    with FlopCounterMode(display=False) as backward:
        output.backward()
    call = by_kernel(recorded(lambda: module(x)[0].sum().backward()))["rnn_backward"]
    assert modelled(call).flops == backward.get_total_flops()
    one_step = 2 * 4 * (2 if bidirectional else 1) * 8 * 8 * GATES[cell]
    assert modelled(call).phase_flops["recurrent product"] == (steps - 1) * one_step
    assert "handed" not in shape_label(call)


@needs_extension
def test_first_steps_of_padded_sequences() -> None:
    module, x = fastseq.nn.GRU(5, 8, bidirectional=True), torch.randn(6, 4, 5)
    lengths = [6, 0, 3, 1]
    call = by_kernel(recorded(lambda: module(x, lengths=lengths)[0].sum().backward()))
    # Ten rows each way; three sequences begin at step 0, one of them ends at the last step.
    assert call["rnn_backward"].shape["rows_handed_on"] == (10 - 3) + (10 - 1)


@needs_extension
@pytest.mark.parametrize(
    ("needs_input", "needs_weight"), [(True, True), (True, False), (False, True)], ids=str
)
def test_linear_counts_what_torch_counts(needs_input: bool, needs_weight: bool) -> None:
    x = torch.randn(7, 5, requires_grad=needs_input)
    weight = torch.randn(9, 5, requires_grad=needs_weight)
    bias = torch.randn(9)
    with FlopCounterMode(display=False) as forward:
        output = torch.nn.functional.linear(x, weight, bias).sum()
    with FlopCounterMode(display=False) as backward:
        output.backward()
    with fastseq.linear_product("fused"):
        calls = by_kernel(
            recorded(lambda: fastseq.functional.linear(x, weight, bias).sum().backward())
        )
    assert modelled(calls["linear_forward"]).flops == forward.get_total_flops()
    assert modelled(calls["linear_backward"]).flops == backward.get_total_flops()


def test_attention_counts_what_torch_counts() -> None:
    q, k, v = (torch.randn(2, 3, 17, 8, requires_grad=True) for _ in range(3))
    # torch counts the products of its composite; in backward it does not compute scores again.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            output = torch.nn.functional.scaled_dot_product_attention(q, k, v).sum()
        with FlopCounterMode(display=False) as backward:
            output.backward()
    calls = by_kernel(
        recorded(
            lambda: (
                fastseq.functional.scaled_dot_product_attention(q, k, v, is_causal=False)
                .sum()
                .backward()
            )
        )
    )
    scores_again = 2 * 2 * 3 * 17 * 17 * 8
    assert modelled(calls["attention_forward"]).flops == forward.get_total_flops()
    assert modelled(calls["attention_backward"]).flops == backward.get_total_flops() + scores_again


# --- by hand


def test_causal_attention_counts_visible_pairs() -> None:
    q = torch.randn(2, 4, 9, 16)
    k, v = torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    (call,) = recorded(
        lambda: fastseq.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
    )
    pairs = 2 * 9 * 10 // 2
    assert modelled(call).flops == 4 * pairs * 2 * (16 + 16)
    elements = 2 * 4 * 9 * 16 * 2 + 2 * 2 * 9 * 16 * 2
    assert modelled(call).traffic.total == 4 * elements


def test_gradients_not_asked_for_are_not_counted() -> None:
    q = torch.randn(1, 2, 33, 8, requires_grad=True)
    k, v = torch.randn(1, 2, 33, 8), torch.randn(1, 2, 33, 8)
    calls = by_kernel(
        recorded(lambda: fastseq.functional.scaled_dot_product_attention(q, k, v).sum().backward())
    )
    # Scores again, the weights' gradient, the queries': three products of five.
    assert modelled(calls["attention_backward"]).flops == 3 * 2 * 2 * 33 * 33 * 8


def test_decoding_is_one_query() -> None:
    q = torch.randn(1, 8, 1, 16)
    k, v = torch.randn(1, 8, 100, 16), torch.randn(1, 8, 100, 16)
    (call,) = recorded(lambda: fastseq.functional.scaled_dot_product_attention(q, k, v))
    # Numba's kernel for many queries does for one.
    assert call.kernel == ("attention_decode" if HAS_EXTENSION else "attention_forward")
    assert modelled(call).flops == 2 * 2 * 8 * 100 * 16
    assert modelled(call).traffic == Traffic(4 * (128 + 2 * 12800), 4 * 128)


@needs_extension
def test_norm_moves_its_arrays_and_multiplies_nothing() -> None:
    x, weight, bias = torch.randn(6, 10, requires_grad=True), torch.randn(10), torch.randn(10)
    calls = by_kernel(
        recorded(lambda: fastseq.functional.layer_norm(x, (10,), weight, bias).sum().backward())
    )
    forward, backward = modelled(calls["norm_forward"]), modelled(calls["norm_backward"])
    assert (forward.flops, backward.flops) == (0, 0)
    assert forward.traffic == Traffic(4 * (60 + 20), 4 * 60)
    assert backward.traffic == Traffic(4 * (2 * 60 + 20), 4 * 60)


def test_ragged_rows_are_those_that_exist() -> None:
    layer = fastseq.nn.GRU(3, 5)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(n, 3) for n in (7, 4, 1)])
    with torch.no_grad():
        (call,) = recorded(lambda: layer(packed))
    assert call.shape["rows"] == 12
    assert modelled(call).flops == 2 * 12 * 3 * 5 * (3 + 5)


# --- phases


def test_phases_share_the_work_of_the_call() -> None:
    q, k, v = (torch.randn(2, 2, 40, 16, requires_grad=True) for _ in range(3))
    layer = fastseq.nn.LSTM(12, 40, proj_size=7)
    x = torch.randn(5, 3, 12, requires_grad=True)

    def run() -> None:
        fastseq.functional.scaled_dot_product_attention(q, k, v).sum().backward()
        layer(x)[0].sum().backward()

    with fastseq.linear_product("fused"):
        weight = torch.randn(9, 12, requires_grad=True)
        calls = recorded(lambda: (run(), fastseq.functional.linear(x, weight).sum().backward()))
    assert len({call.kernel for call in calls}) == (4 if "linear" in COMPOSITES else 6)
    for call in calls:
        known = modelled(call)
        happened = call.phases()
        counted = sum(work for phase, work in known.phase_flops.items() if phase in happened)
        assert counted == known.flops, (call.kernel, sorted(happened))


# --- the registry reads the same formulas


@pytest.mark.parametrize("layer", ["lstm", "gru", "rnn"])
def test_sum_of_both_ways_is_the_registrys_case(layer: str) -> None:
    options = CaseOptions(bidirectional=True, ragged=True)
    case = make_case(layer, "training", T=5, B=3, I=7, H=9, options=options)
    cell = "rnn_tanh" if layer == "rnn" else layer
    sizes = RecurrentSizes(cell, case.rows(), 3, 7, 9, directions=2)
    assert sizes.forward_flops() + sizes.backward_flops() == case.flops()
    traffic = sizes.forward_traffic(training=True).plus(sizes.backward_traffic())
    assert traffic.total * 4 == case.bytes()


def test_other_families_agree_with_the_registry() -> None:
    attention = make_attention_case(
        "training", B=2, H=4, Hkv=2, S=6, E=8, options=AttentionOptions(causal=True)
    )
    sizes = AttentionSizes(4, 2, 12, 12, 8, 8, attention.visible_pairs())
    assert sizes.forward_flops() + sizes.backward_flops() == attention.flops()
    both = sizes.forward_traffic().plus(sizes.backward_traffic())
    assert both.total * 4 == attention.bytes()
    linear = make_transformer_case(
        "linear", "training", S=5, E=7, F=9, options=TransformerOptions(residual=True)
    )
    sizes_ = LinearSizes(5, 7, 9)
    assert sizes_.product() + sizes_.backward_flops() == linear.flops()
    both = sizes_.forward_traffic(residual=True).plus(sizes_.backward_traffic())
    assert both.total * 4 == linear.bytes()
    norm = make_transformer_case("rms_norm", "training", S=5, E=7)
    norm_sizes = NormSizes(5, 7, 1)
    both = norm_sizes.forward_traffic(residual=True, keeps_sum=True).plus(
        norm_sizes.backward_traffic()
    )
    assert both.total * 4 == norm.bytes()


def test_backward_moves_only_what_is_asked_for() -> None:
    linear = LinearSizes(5, 7, 9)
    assert linear.backward_traffic(needs_input=True, needs_weight=False) == (45 + 72, 35)
    assert linear.backward_traffic(needs_input=False, needs_weight=True) == (45 + 35, 72)
    recurrent = RecurrentSizes("gru", 10, 2, 3, 5)
    full, less = recurrent.backward_traffic(), recurrent.backward_traffic(needs_x=False)
    assert full.written - less.written == 10 * 3
    less = recurrent.backward_traffic(needs_w=False)
    assert full.written - less.written == recurrent.weights()
    assert full.read - less.read == 10 * 3


def test_unknown_kernels_and_dtypes_have_no_model() -> None:
    call = Call("polish", "", "float32", "base", 1, 0.0, 1.0, {}, ())
    assert model(call) is None
    call = Call("rnn_forward", "lstm", "float8", "base", 1, 0.0, 1.0, {"T": 1}, ())
    assert model(call) is None
    call = Call("rnn_forward", "lstm", "float32", "base", 1, 0.0, 1.0, {"T": 1}, ())
    assert model(call) is None
