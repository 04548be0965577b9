"""The Transformer cases of the benchmark registry: models of work, gate, runner and reports."""

import dataclasses
import json
import math
import sys
import time

import pytest
import torch
from test_bench_cases import by_name
from torch import nn

import fastseq
from fastseq.bench import (
    command,
    compiled,
    generation,
    memory,
    probes,
    report,
    results,
    runner,
    screen,
    transformer,
)
from fastseq.bench.cases import TRANSFORMER_SUITE, from_record, select
from fastseq.bench.transformer_cases import (
    VOCABULARY,
    TransformerCase,
    TransformerOptions,
    make_transformer_case,
)

MACHINE = {"cpu": "C", "threads": 2, "isa": "base", "libraries": {"torch": "1"}, "date": "D"}
DIRECTIONS = ("inference", "training")
PLAN = runner.Plan(peers=("torch",), seconds=0.01)

FUNCTIONS = [
    *(
        make_transformer_case("linear", direction, S=5, E=7, F=9, options=options)
        for direction in DIRECTIONS
        for options in (
            TransformerOptions(),
            TransformerOptions(activation="gelu"),
            TransformerOptions(activation="silu", residual=True),
        )
    ),
    make_transformer_case(
        "linear", "training", S=5, E=7, F=9, options=TransformerOptions(residual=True, dropout=0.5)
    ),
    *(
        make_transformer_case(layer, direction, S=5, E=9)
        for layer in ("layer_norm", "rms_norm")
        for direction in DIRECTIONS
    ),
]
MODULES = [
    make_transformer_case(
        layer,
        direction,
        B=3,
        S=17,
        E=12,
        F=20,
        heads=2,
        depth=2 if layer == "transformer" else 1,
        options=TransformerOptions(dropout=0.3 if direction == "training" else 0.0, ragged=ragged),
    )
    for direction in DIRECTIONS
    for layer, ragged in (
        ("encoder", False),
        ("encoder", True),
        ("decoder", False),
        ("transformer", False),
    )
]
GENERATION = [
    make_transformer_case(
        "generation",
        "inference",
        S=6,
        E=12,
        F=20,
        heads=2,
        depth=2,
        options=TransformerOptions(memory=with_memory),
    )
    for with_memory in (False, True)
]
EVERY = [*FUNCTIONS, *MODULES, *GENERATION]
GATED = pytest.mark.parametrize("case", [*FUNCTIONS, *MODULES], ids=by_name)


# --- registry and models of work


def test_names_are_unique() -> None:
    assert len({case.name for case in TRANSFORMER_SUITE}) == len(TRANSFORMER_SUITE)


def test_every_figure_has_its_case() -> None:
    names = {case.name for case in TRANSFORMER_SUITE}
    layer = "B8-S256-E512-F2048-H8"
    for direction, dropout in (("inference", ""), ("training", "-dropout0.1")):
        for rows in (2048, 64, 1):
            assert f"linear-{direction}-{rows}x512-2048" in names
        assert f"linear-{direction}-2048x512-2048-gelu" in names
        assert f"linear-{direction}-2048x512-2048-residual{dropout}" in names
        assert f"layer_norm-{direction}-4096x512" in names
        assert f"rms_norm-{direction}-4096x512" in names
        assert f"encoder-{direction}-{layer}{dropout}" in names
        assert f"encoder-{direction}-{layer}{dropout}-ragged" in names
        assert f"decoder-{direction}-{layer}{dropout}" in names
        assert f"transformer-{direction}-B16-S64-E256-F1024-H8-layers6{dropout}" in names
    assert "generation-inference-B1-S256-E512-F2048-H8-layers6" in names
    assert "generation-inference-B1-S256-E512-F2048-H8-layers6-memory" in names


def test_select_from_the_suite() -> None:
    found = select("transformer", ["linear-*-1x*"])
    assert [case.name for case in found] == [
        "linear-inference-1x512-2048",
        "linear-training-1x512-2048",
    ]


@pytest.mark.parametrize(
    ("layer", "direction", "options", "named"),
    [
        ("perceptron", "inference", TransformerOptions(), "perceptron"),
        ("generation", "training", TransformerOptions(), "training"),
        ("encoder", "inference", TransformerOptions(dropout=0.1), "dropout"),
    ],
)
def test_make_case_rejects(
    layer: str, direction: str, options: TransformerOptions, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        make_transformer_case(layer, direction, S=1, E=1, options=options)


def test_ragged_lengths_cover_the_range() -> None:
    ragged = TransformerOptions(ragged=True)
    case = make_transformer_case("encoder", "inference", B=64, S=256, E=2, F=2, options=ragged)
    assert max(case.lengths()) == 256
    assert min(case.lengths()) >= 32
    assert case.lengths() == case.lengths()


@pytest.mark.parametrize("case", MODULES, ids=by_name)
def test_weight_elements_are_the_modules(case: TransformerCase) -> None:
    module = transformer.module(case, "torch")
    assert case.weight_elements() == sum(one.numel() for one in module.parameters())


@pytest.mark.parametrize("case", GENERATION, ids=by_name)
def test_weight_elements_are_those_of_generation(case: TransformerCase) -> None:
    built = generation.build(case)
    modules = nn.ModuleList([built.callees["fastseq"], built.project])
    assert case.weight_elements() == sum(one.numel() for one in modules.parameters())
    size = sum(one.numel() for one in built.callees["torch"].parameters())
    assert size == sum(one.numel() for one in built.callees["fastseq"].parameters())


def test_flops_by_hand() -> None:
    linear = make_transformer_case("linear", "training", S=5, E=7, F=9)
    assert linear.flops() == 3 * 2 * 5 * 7 * 9
    shape = {"B": 2, "S": 3, "E": 8, "F": 10, "heads": 2}
    encoder = make_transformer_case("encoder", "inference", **shape)
    assert encoder.flops() == 2 * 6 * (4 * 64 + 2 * 80) + 4 * 8 * (2 * 3 * 3)
    decoder = make_transformer_case("decoder", "training", **shape)
    pairs = 2 * (3 * 4 // 2) + 2 * 3 * 3
    assert decoder.flops() == 3 * 2 * 6 * (8 * 64 + 2 * 80) + 7 * 2 * 8 * pairs
    both = make_transformer_case("transformer", "inference", **shape, depth=2)
    alone = dataclasses.replace(decoder, direction="inference")
    assert both.flops() == 2 * (encoder.flops() + alone.flops())
    generated = make_transformer_case("generation", "inference", **shape, depth=2)
    per_layer = 2 * 6 * (4 * 64 + 2 * 80) + 4 * 8 * 2 * 6
    assert generated.flops() == 2 * per_layer + 2 * 6 * VOCABULARY * 8
    assert make_transformer_case("layer_norm", "training", S=5, E=7).flops() == 0


def test_bytes_by_hand() -> None:
    linear = make_transformer_case("linear", "inference", S=5, E=7, F=9)
    weights = 7 * 9 + 9
    assert linear.bytes() == 4 * (5 * 7 + weights + 5 * 9)
    training = dataclasses.replace(linear, direction="training")
    assert training.bytes() == 4 * (3 * 5 * 7 + 3 * weights + 2 * 5 * 9)
    norm = make_transformer_case("layer_norm", "inference", S=5, E=7)
    assert norm.bytes() == 4 * (3 * 5 * 7 + 2 * 7)
    assert dataclasses.replace(norm, direction="training").bytes() == 4 * (7 * 5 * 7 + 3 * 2 * 7)
    case = make_transformer_case("generation", "inference", S=3, E=8, F=10, heads=2, depth=2)
    assert case.bytes() == 4 * (3 * case.weight_elements() + 2 * 2 * 8 * (1 + 2 + 3))
    attending = dataclasses.replace(case, options=TransformerOptions(memory=True))
    once = 2 * 2 * (8 * 8 + 8)
    weights = 3 * (attending.weight_elements() - once) + once
    assert attending.bytes() == 4 * (weights + 2 * 2 * 8 * (6 + 3 * 3))


@pytest.mark.parametrize("case", EVERY, ids=by_name)
def test_record_round_trip(case: TransformerCase) -> None:
    assert from_record(json.loads(json.dumps(dataclasses.asdict(case)))) == case


# --- the gate


@GATED
def test_gate_passes(case: TransformerCase) -> None:
    result = transformer.check(transformer.build(case))
    assert result.passed, result.summary()
    names = {error.name for error in result.errors}
    if case.direction == "inference":
        assert names == {"output"}
        return
    built = transformer.build(case)
    wanted = {"output", *(f"d_{name}" for name in built.leaves)}
    if isinstance(built.callees["torch"], nn.Module):
        wanted |= {f"d_{name}" for name, _ in built.callees["torch"].named_parameters()}
        wanted |= {f"{name} with ReLU" for name in wanted}
    assert names == wanted


@pytest.mark.parametrize("case", GENERATION, ids=by_name)
def test_gate_of_generation(case: TransformerCase) -> None:
    built = generation.build(case)
    result = generation.check(built)
    assert result.passed, result.summary()
    with torch.no_grad():
        # At this size no two logits are near enough for another choice.
        ours, theirs = (generation.timed_call(built, one)() for one in ("fastseq", "torch"))
    assert torch.equal(ours, theirs)
    assert ours.shape == (1, 7)


@pytest.mark.parametrize("value", [1e-3, math.nan])
def test_gate_catches_a_wrong_function(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fastseq.functional.linear

    def wrong(*arguments: object, **options: object) -> torch.Tensor:
        return right(*arguments, **options) + value

    monkeypatch.setattr(fastseq.functional, "linear", wrong)
    assert not transformer.check(transformer.build(FUNCTIONS[0])).passed


def test_gate_catches_a_wrong_module() -> None:
    built = transformer.build(MODULES[0])
    with torch.no_grad():
        built.callees["fastseq"].linear1.weight[0, 0] += 0.1
    assert not transformer.check(built).passed


def test_gate_catches_a_wrong_token(monkeypatch: pytest.MonkeyPatch) -> None:
    built = generation.build(GENERATION[0])
    right = fastseq.generate

    def wrong(*arguments: object, **options: object) -> torch.Tensor:
        tokens = right(*arguments, **options)
        tokens[:, 3] = (tokens[:, 3] + 1) % VOCABULARY
        return tokens

    monkeypatch.setattr(fastseq, "generate", wrong)
    assert not generation.check(built).passed


def test_padding_gets_no_gradient_and_is_not_compared() -> None:
    case = next(one for one in MODULES if one.options.ragged and one.direction == "training")
    built = transformer.build(case)
    assert built.valid is not None
    assert built.valid.sum().item() == sum(case.lengths()) < case.B * case.S
    assert not built.output_gradient[~built.valid].any()


# --- runner, peers, probes


def test_runner_and_reports() -> None:
    copied = dataclasses.replace(
        FUNCTIONS[7], options=TransformerOptions(probes=("copy_bandwidth",))
    )
    reading = dataclasses.replace(
        GENERATION[0], options=TransformerOptions(probes=("read_bandwidth",))
    )
    cases = [FUNCTIONS[0], FUNCTIONS[6], copied, MODULES[1], reading]
    found = list(runner.run(cases, PLAN))
    table = screen.new_table()
    for result in found:
        assert set(result.timings) == {"torch", "fastseq"}
        screen.add_row(table, result)
    assert table.row_count == 5
    assert found[2].gflops() is None
    assert set(found[2].probes) == {"share_of_copy_bandwidth", "share_of_clone_bandwidth"}
    assert found[4].probes["share_of_read_bandwidth"] > 0
    assert screen.notes(found)
    document = json.loads(json.dumps(results.to_json(found, MACHINE, "transformer")))
    assert results.from_json(document) == found
    text = "<!-- bench:transformer --><!-- /bench --><!-- bench:inference -->kept<!-- /bench -->"
    text = report.fill_markers(text, found, MACHINE)
    assert "| linear | 5x7 to 9 | - |" in text
    assert "| linear | 5x7 to 9 | residual, dropout0.5 | - |" in text
    assert "of copy" in text
    assert "| encoder | B3 S17 E12 F20 | ragged |" in text
    assert "of read" in text
    assert "kept" in text


def test_the_better_of_torchs_two_forms_counts() -> None:
    result = runner.run_case(FUNCTIONS[0], PLAN)
    eager = result.timings["torch"]
    ratio = result.speedup("torch")
    assert ratio is not None
    assert result.torch_speedup() == ratio
    result.timings["torch.compile"] = dataclasses.replace(eager, median_s=eager.median_s / 2)
    assert result.torch_speedup() == pytest.approx(ratio / 2)
    result.timings["torch.compile"] = dataclasses.replace(eager, median_s=eager.median_s * 2)
    assert result.torch_speedup() == ratio


def test_compiled_peer_has_run_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda callee, dynamic=None: callee)
    calls = []
    call = compiled.compiled_call(lambda: calls.append(1), lambda callee: callee)
    assert len(calls) == 2
    call()
    assert len(calls) == 3


def test_compilation_that_fails_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(callee: object, dynamic: object = None) -> object:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", fails)
    plan = runner.Plan(peers=("torch", "torch.compile"), seconds=0.01)
    result = runner.run_case(FUNCTIONS[0], plan)
    assert result.skipped == {"torch.compile": "RuntimeError: no compiler"}
    assert set(result.timings) == {"torch", "fastseq"}


@pytest.mark.skipif(sys.platform == "win32", reason="signals with a timer need POSIX")
def test_compilation_that_takes_long_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def takes_long(callee: object, dynamic: object = None) -> object:
        time.sleep(30)
        return callee

    monkeypatch.setattr(torch, "compile", takes_long)
    start = time.perf_counter()
    with pytest.raises(compiled.CompileSkippedError, match=r"more than 0\.1 s"):
        compiled.compiled_call(lambda: None, lambda callee: callee, limit_seconds=0.1)
    assert time.perf_counter() - start < 10


def test_copy_bandwidth_of_a_copy_is_one() -> None:
    values = torch.zeros(1 << 20)
    found = probes.copy_bandwidth(lambda: values.clone(), 2 * values.numel() * 4, seconds=0.05)
    # Times, so a wide margin; a factor of two in the traffic would show.
    assert 0.5 < found["share_of_clone_bandwidth"] < 2


@pytest.mark.skipif(not memory.available(), reason="reading a process's memory needs Linux")
def test_peak_memory_of_a_layer() -> None:
    case = next(
        one for one in TRANSFORMER_SUITE if one.layer == "encoder" and one.direction == "training"
    )
    assert "peak_memory" in case.options.probes
    # At least the gradients of parameters and input are there at the end.
    results = 4 * (case.weight_elements() + case.B * case.S * case.E)
    assert memory.measure(case, "fastseq", "peak") > results


def test_plot_draws_the_transformer(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from fastseq.bench.plot import draw

    cases = [FUNCTIONS[1], FUNCTIONS[7], MODULES[0], GENERATION[0]]
    found = list(runner.run(cases, PLAN))
    draw(found, MACHINE, tmp_path / "figure.svg")
    svg = (tmp_path / "figure.svg").read_text()
    for label in ("5x7 to 9", "layer norm 5x9", "encoder B3 S17 E12 F20", "NORMS", "compiled"):
        assert label in svg


def test_command_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["list", "--suite", "transformer", "--case", "generation*"]) == 0
    assert "generation-inference-B1-S256-E512-F2048-H8-layers6" in capsys.readouterr().out
