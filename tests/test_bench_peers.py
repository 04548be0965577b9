"""Peer libraries: each family of cases computes what torch computes, or says why it does not."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastseq.bench import attention, build, generation, peers, settle, transformer
from fastseq.bench.attention_cases import AttentionCase, AttentionOptions, make_attention_case
from fastseq.bench.cases import AnyCase, Case, CaseOptions, make_case
from fastseq.bench.peers import choose, expected, masks
from fastseq.bench.transformer_cases import (
    TransformerCase,
    TransformerOptions,
    make_transformer_case,
)

_NEEDED = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}


@pytest.fixture(params=peers.PEERS)
def peer(request: pytest.FixtureRequest) -> Iterator[str]:
    for module in _NEEDED[request.param]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    with torch.no_grad():
        yield request.param


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    # Which form is faster does not matter here.
    monkeypatch.setattr(choose, "settle", lambda: None)


def _build(case: AnyCase) -> Any:
    if isinstance(case, Case):
        return build.build(case)
    if isinstance(case, AttentionCase):
        return attention.build(case)
    return (generation if case.layer == "generation" else transformer).build(case)


def _has_attention_operator() -> bool:
    """Whether the libraries are new enough for ONNX's own attention, opset 23."""
    import onnxruntime
    from onnx import defs

    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    return defs.onnx_opset_version() >= 23 and version >= (1, 23)


def _recurrent_cases() -> list[Case]:
    cases = []
    for layer in ("lstm", "gru", "rnn"):
        for options in (
            CaseOptions(),
            CaseOptions(bias=False),
            CaseOptions(num_layers=2, bidirectional=True),
            CaseOptions(ragged=True, bidirectional=True),
        ):
            cases.append(make_case(layer, "inference", T=5, B=3, I=7, H=9, options=options))
        # One step: the state is given.
        stacked = CaseOptions(num_layers=2)
        cases.append(make_case(layer, "inference", T=1, B=3, I=7, H=9, options=stacked))
    return cases


def _attention_cases() -> list[AttentionCase]:
    shapes: list[dict[str, Any]] = [
        {"S": 13},
        {"S": 13, "Hkv": 2},
        {"S": 5, "Skv": 9},
        {"S": 1, "Skv": 13},
        {"S": 1, "Skv": 13, "Hkv": 2},
        {"S": 1},
    ]
    options: list[dict[str, Any]] = [
        {"causal": True},
        {"window": (8, 0)},
        {"window": (3, 4)},
        {"bias": True},
        {"ragged": True},
    ]
    makers: list[tuple[dict[str, Any], dict[str, Any]]] = [(shape, {}) for shape in shapes]
    makers += [({"S": 40, "Hkv": heads}, option) for option in options for heads in (4, 2)]
    cases = [
        make_attention_case("inference", B=2, H=4, E=16, options=AttentionOptions(**o), **shape)
        for shape, o in makers
    ]
    for need_weights in (False, True):
        weighted = AttentionOptions(need_weights=need_weights)
        cases.append(
            make_attention_case("inference", B=2, H=4, S=13, E=8, layer="mha", options=weighted)
        )
    return cases


def _transformer_cases() -> list[TransformerCase]:
    def make(layer: str, options: TransformerOptions | None = None, **sizes: int) -> Any:
        return make_transformer_case(layer, "inference", options=options, **sizes)

    cases = [
        make("linear", TransformerOptions(activation=name, residual=residual), S=7, E=12, F=20)
        for name in (None, "relu", "gelu", "gelu_tanh", "silu")
        for residual in (False, True)
    ]
    cases += [make(layer, S=7, E=12) for layer in ("layer_norm", "rms_norm")]
    sizes = {"B": 2, "S": 40, "E": 16, "F": 20, "heads": 2}
    cases += [make(layer, **sizes) for layer in ("encoder", "decoder")]
    cases.append(make("encoder", TransformerOptions(ragged=True), **sizes))
    cases.append(make("transformer", **sizes, depth=2))
    return cases


_CASES: list[AnyCase] = [*_recurrent_cases(), *_attention_cases(), *_transformer_cases()]


@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.name)
def test_computes_what_torch_computes(peer: str, case: AnyCase) -> None:
    built = _build(case)
    prepared = peers.prepare(peer, built, threads=1)
    prepared.call()
    found = prepared.output()
    assert peers.agrees(built, found)
    assert found.keys() == expected.expected(built).keys()
    assert prepared.setup_seconds > 0


@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.name)
def test_every_form_is_right(peer: str, case: AnyCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """A form that is wrong would be left out in silence, and a slower one be timed."""
    tried: list[bool] = []
    compare = choose.matches

    def watched(*arguments: Any) -> bool:
        tried.append(compare(*arguments))
        return tried[-1]

    monkeypatch.setattr(choose, "matches", watched)
    makers: list[Any] = []
    select = choose.choose

    def counted(built: Any, found: Any) -> Any:
        makers.extend(found)
        return select(built, found)

    module = importlib.import_module(f"fastseq.bench.peers.{peer}_peer")
    monkeypatch.setattr(module, "choose", counted)
    peers.prepare(peer, _build(case), threads=1)
    assert tried
    assert all(tried)
    if peer == "openvino" or _has_attention_operator():
        assert len(tried) == len(makers)


def test_onnxruntime_computes_in_float64() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    sizes = {"B": 2, "S": 13, "E": 16, "F": 20, "heads": 2}
    cases: list[AnyCase] = [
        make_attention_case("inference", B=2, H=4, S=13, E=16, dtype="float64"),
        make_transformer_case("encoder", "inference", dtype="float64", **sizes),
    ]
    for case in cases:
        built = _build(case)
        assert peers.agrees(built, peers.prepare("onnxruntime", built, threads=1).output())


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (
            make_case("lstm", "inference", T=2, B=1, H=4, options=CaseOptions(proj_size=2)),
            "projection",
        ),
        (make_case("gru", "inference", T=2, B=1, H=4, dtype="float64"), "float64"),
        (make_case("rnn", "training", T=2, B=1, H=4), "inference only"),
        (make_attention_case("training", B=1, H=2, S=3, E=4), "inference only"),
        (make_transformer_case("rms_norm", "inference", S=3, E=8, dtype="float64"), "float64|doub"),
        (
            make_transformer_case("generation", "inference", S=2, E=8, F=8, heads=2, depth=1),
            "loop",
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_says_what_it_cannot_do(peer: str, case: AnyCase, reason: str) -> None:
    with pytest.raises(peers.PeerSkippedError, match=reason) as raised:
        peers.prepare(peer, _build(case), threads=1)
    assert "\n" not in str(raised.value)


_LINEAR = make_transformer_case("linear", "inference", S=3, E=4, F=5)


@pytest.mark.parametrize("name", peers.PEERS)
def test_names_what_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastseq.bench.peers import openvino_library

    monkeypatch.setitem(sys.modules, name, None)
    openvino_library.library.cache_clear()
    with pytest.raises(peers.PeerSkippedError, match=rf"^not installed \({name}\)$"):
        peers.prepare(name, _build(_LINEAR), threads=1)
    openvino_library.library.cache_clear()


def test_unknown_peer() -> None:
    with pytest.raises(ValueError, match="peer must be one of onnxruntime, openvino, got 'jax'"):
        peers.prepare("jax", _build(_LINEAR), threads=1)


def test_wrong_output_is_never_timed(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = expected.expected

    def off(built: Any) -> dict[str, torch.Tensor]:
        return {name: value * 1.001 for name, value in theirs(built).items()}

    monkeypatch.setattr(choose, "expected", off)
    with pytest.raises(peers.PeerSkippedError, match="its output differs from torch's"):
        peers.prepare(peer, _build(_LINEAR), threads=1)


def test_agrees_compares_all_results_but_padding() -> None:
    options = TransformerOptions(ragged=True)
    built = _build(
        make_transformer_case(
            "encoder", "inference", B=2, S=40, E=16, F=20, heads=2, options=options
        )
    )
    right = expected.expected(built)["output"]
    assert peers.agrees(built, {"output": right})
    padded = right.clone()
    padded[~built.valid] = float("nan")
    assert peers.agrees(built, {"output": padded})
    wrong = right.clone()
    wrong[built.valid.nonzero()[0].tolist()[0], 0, 0] += 1e-2
    assert not peers.agrees(built, {"output": wrong})
    assert not peers.agrees(built, {"output": right[:1]})
    assert not peers.agrees(built, {"output": right.double()})
    assert not peers.agrees(built, {})
    weighted = AttentionOptions(need_weights=True)
    case = make_attention_case("inference", B=2, H=2, S=5, E=8, layer="mha", options=weighted)
    both = expected.expected(_build(case))
    assert not peers.agrees(_build(case), {"output": both["output"]})


def test_output_is_a_copy_and_call_repeats(peer: str) -> None:
    """A step with a cache in place must not change what the next call sees."""
    built = _build(make_attention_case("inference", B=2, H=4, Hkv=2, S=1, Skv=13, E=16))
    prepared = peers.prepare(peer, built, threads=2)
    first = prepared.output()
    for _ in range(3):
        prepared.call()
    assert torch.equal(first["output"], prepared.output()["output"])
    assert peers.agrees(built, first)


def test_forms_that_hold_all_scores_are_left_out_where_they_do_not_fit() -> None:
    built = _build(make_attention_case("inference", B=1, H=1, S=4, E=4))
    assert masks.scores_fit(built)
    huge = make_attention_case("inference", B=1, H=4, S=8192, E=4)
    assert not masks.scores_fit(attention.BuiltAttention(huge, {}, None, None, torch.empty(0), {}))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_onnxruntime_has_the_threads_asked_for() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    built = _build(_LINEAR)
    more = {}
    for threads in (1, 4):
        before = len(os.listdir("/proc/self/task"))
        prepared = peers.prepare("onnxruntime", built, threads)
        more[threads] = len(os.listdir("/proc/self/task")) - before
        del prepared
    assert more[4] - more[1] == 3


def test_openvino_settings_took() -> None:
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    from fastseq.bench.peers import openvino_peer
    from fastseq.bench.peers.openvino_library import core, library

    x = library().opset13.parameter([2, 3], library().Type.f32)
    model = library().Model([library().opset13.relu(x)], [x], "one")
    wanted = openvino_peer.configuration(1)
    compiled = core().compile_model(model, "CPU", wanted)
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == library().Type.f32
    assert str(compiled.get_property("PERFORMANCE_HINT")) == "LATENCY"
    openvino_peer.check_settings(compiled, wanted)
    with pytest.raises(peers.PeerSkippedError, match="INFERENCE_NUM_THREADS is 1, asked for 2"):
        openvino_peer.check_settings(compiled, openvino_peer.configuration(2))


def test_openvino_sends_no_reports() -> None:
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    import subprocess

    program = (
        "from fastseq.bench.peers.openvino_library import library; library(); import sys;"
        "assert not any(name.startswith('openvino_telemetry') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_settle_waits_for_a_thread_that_spins(monkeypatch: pytest.MonkeyPatch) -> None:
    def spin(rounds: int) -> None:
        # Without Python's lock, like a library's threads: a core is all it can be waiting for.
        hashlib.pbkdf2_hmac("sha256", b"word", b"salt", rounds)

    thread = threading.Thread(target=spin, args=(50_000,))
    thread.start()
    settle.settle()
    assert not thread.is_alive()
    monkeypatch.setattr(settle, "_LIMIT_SECONDS", 0.02)
    thread = threading.Thread(target=spin, args=(800_000,))
    thread.start()
    settle.settle()
    assert thread.is_alive()  # there is an end to patience
    thread.join()


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="looks at threads in /proc")
def test_settle_sees_a_thread_whose_core_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settle.time, "process_time", lambda: 0.0)  # no thread gets any time
    thread = threading.Thread(target=hashlib.pbkdf2_hmac, args=("sha256", b"word", b"salt", 50_000))
    thread.start()
    settle.settle()
    assert not thread.is_alive()
