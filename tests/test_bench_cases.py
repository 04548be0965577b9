"""The case registry, its models of work, the gate, the timing and the reports."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastseq.bench import build, command, families, gate, report, results, runner, screen
from fastseq.bench.cases import (
    LAYERS,
    QUICK,
    REGISTRY,
    RNN_SUITE,
    SUITES,
    Case,
    CaseOptions,
    from_record,
    make_case,
    select,
)

# What torch says about its own layers is not about ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections"),
    pytest.mark.filterwarnings("ignore:TF32 acceleration"),
]

CASES = RNN_SUITE
PLAN = runner.Plan(peers=("torch",), seconds=0.01)
# One of each kind at a size that takes no time.
SMALL_CASES = [
    make_case(layer, direction, T=5, B=3, I=7, H=9, options=options)
    for direction in ("inference", "training")
    for layer, options in (
        ("lstm", CaseOptions()),
        ("gru", CaseOptions()),
        ("rnn", CaseOptions()),
        ("lstm", CaseOptions(ragged=True)),
        ("lstm", CaseOptions(proj_size=4)),
        ("gru", CaseOptions(num_layers=2, bidirectional=True)),
        ("lstm", CaseOptions(bias=False, denormal=True)),
        ("gru", CaseOptions(bias=False, denormal=True)),
    )
]


def by_name(case: Case) -> str:
    return case.name


# --- registry


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_registry_needs_no_torch() -> None:
    program = "import sys; import fastseq.bench.cases; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("layer", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("direction", ["inference", "training"])
def test_grid_is_complete(layer: str, direction: str) -> None:
    shapes = {
        (case.B, case.I, case.H)
        for case in CASES
        if (case.layer, case.direction, case.T) == (layer, direction, 100) and case.plain
    }
    assert shapes == {
        (1, 128, 128),
        (1, 512, 512),
        (16, 256, 256),
        (32, 512, 512),
        (64, 1024, 1024),
    }


def test_every_case_is_registered_once_and_says_where_it_belongs() -> None:
    assert SUITES["full"] == tuple(REGISTRY.values())
    for name, case in REGISTRY.items():
        assert case.name == name
        assert case.tags
        assert len(set(case.tags)) == len(case.tags)
        for tag in case.tags:
            assert case in SUITES[tag]
    for suite, cases in SUITES.items():
        assert cases
        for case in cases:
            assert suite == "full" or suite in case.tags


def test_quick_is_a_little_of_everything() -> None:
    quick = SUITES["quick"]
    assert [case.name for case in quick] == list(QUICK)
    assert 20 <= len(quick) <= 25
    layers = {(case.layer, case.direction) for case in quick}
    for direction in ("inference", "training"):
        for layer in ("lstm", "gru", "rnn", "attention", "linear", "encoder"):
            assert (layer, direction) in layers
    assert {("mha", "inference"), ("layer_norm", "inference"), ("rms_norm", "training")} <= layers
    assert {case.layer for case in quick} <= set(LAYERS)
    assert "lstm-inference-T1-B1-H128" in QUICK
    # No call of it may take much of the three minutes.
    assert max(case.flops() for case in quick) < 6e10


def test_heat_map_is_complete() -> None:
    shapes = {(c.layer, c.direction, c.B, c.H) for c in SUITES["grid"] if isinstance(c, Case)}
    assert len(shapes) == len(SUITES["grid"]) == 3 * 2 * 4 * 5
    assert {(case.T, case.I == case.H, case.plain) for case in SUITES["grid"]} == {
        (100, True, True)
    }


def test_sweeps_change_one_size() -> None:
    lines: dict[tuple[str, int, int], list[int]] = {}
    for case in SUITES["latency_vs_steps"]:
        lines.setdefault((case.layer, case.B, case.H), []).append(case.T)
        assert case.direction == "inference"
    assert {key[:2] for key in lines} == {("lstm", 1), ("lstm", 16), ("gru", 1), ("gru", 16)}
    assert {tuple(sorted(steps)) for steps in lines.values()} == {(1, 3, 10, 30, 100, 300, 1000)}
    lengths = SUITES["memory_vs_length"]
    assert [case.Sq for case in lengths] == [256, 512, 1024, 2048, 4096]
    assert {case.direction for case in lengths} == {"training"}
    assert all("peak_memory" in case.options.probes for case in lengths)


def test_tags_change_no_name_and_survive_a_file() -> None:
    case = REGISTRY["lstm-inference-T100-B16-H256"]
    assert set(case.tags) == {"rnn", "grid", "latency_vs_steps"}
    assert case.name == make_case("lstm", "inference", T=100, B=16, H=256).name
    assert case.options.probes  # those of the suite that listed it first
    record = json.loads(json.dumps(dataclasses.asdict(case)))
    assert from_record(record) == case
    del record["tags"]
    assert from_record(record) == dataclasses.replace(case, tags=())


def test_select_by_glob() -> None:
    assert [case.name for case in select("rnn", ["gru-*-T1-*"])] == ["gru-inference-T1-B1-H128"]


@pytest.mark.parametrize(("suite", "patterns"), [("rnn", ["nothing*"]), ("poetry", [])])
def test_select_rejects(suite: str, patterns: list[str]) -> None:
    with pytest.raises(ValueError, match=suite):
        select(suite, patterns)


def test_make_case_rejects() -> None:
    with pytest.raises(ValueError, match="perceptron"):
        make_case("perceptron", "inference", T=1, B=1, H=1)
    with pytest.raises(ValueError, match="proj_size"):
        make_case("gru", "inference", T=1, B=1, H=2, options=CaseOptions(proj_size=1))


def test_ragged_lengths_cover_the_range() -> None:
    case = make_case("lstm", "inference", T=100, B=64, H=1, options=CaseOptions(ragged=True))
    lengths = case.lengths()
    assert max(lengths) == 100
    assert min(lengths) >= 1
    assert 0.35 < sum(lengths) / 6400 < 0.65
    assert lengths == case.lengths()


# --- models of work


def counted_flops(case: Case) -> int:
    """Operations torch itself counts when its layer runs as plain matrix products."""
    layer = build.torch_layer(case)
    data, _, output_gradient = build.build_inputs(case)
    leaf = build.input_tensor(data).clone().requires_grad_()
    state = build.build_state(case, lambda *shape: torch.zeros(*shape, requires_grad=True))
    # oneDNN's fused LSTM is one operator without a formula; switched off, the products show.
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        output, _ = layer(build.with_data(data, leaf), state)
        if case.direction == "training":
            # The last step's state reaches no further product, so it takes no part here.
            build.input_tensor(output).backward(output_gradient)
    return counter.get_total_flops()


@pytest.mark.parametrize("direction", ["inference", "training"])
@pytest.mark.parametrize(
    ("layer", "options"),
    [
        ("lstm", CaseOptions()),
        ("gru", CaseOptions()),
        ("rnn", CaseOptions()),
        ("lstm", CaseOptions(proj_size=4)),
        ("gru", CaseOptions(num_layers=2, bidirectional=True)),
        ("lstm", CaseOptions(ragged=True)),
    ],
    ids=str,
)
def test_flops_are_what_torch_counts(layer: str, direction: str, options: CaseOptions) -> None:
    case = make_case(layer, direction, T=6, B=4, I=5, H=8, options=options)
    assert case.flops() == counted_flops(case)


def test_flops_by_hand() -> None:
    case = make_case("lstm", "inference", T=100, B=32, H=512)
    assert case.flops() == 2 * 100 * 32 * 4 * 512 * (512 + 512)
    training = make_case("gru", "training", T=3, B=2, I=5, H=7)
    assert training.flops() == 3 * 2 * 3 * 2 * 3 * 7 * (5 + 7)
    projected = make_case("lstm", "inference", T=3, B=2, H=7, options=CaseOptions(proj_size=4))
    assert projected.flops() == 2 * 3 * 2 * (4 * 7 * (7 + 4) + 7 * 4)


def test_bytes_by_hand() -> None:
    case = make_case("rnn", "inference", T=3, B=2, I=5, H=7)
    weights = 7 * 5 + 7 * 7 + 2 * 7
    assert case.bytes() == 4 * (weights + 3 * 2 * 5 + 3 * 2 * 7 + 2 * 2 * 7)
    assert case.weight_elements() == weights
    training = dataclasses.replace(case, direction="training")
    assert training.bytes() > 2 * case.bytes()


@pytest.mark.parametrize("case", SMALL_CASES, ids=by_name)
def test_weight_elements_are_torch_parameters(case: Case) -> None:
    layer = build.torch_layer(case)
    assert case.weight_elements() == sum(weight.numel() for weight in layer.parameters())


# --- built cases and the gate


@pytest.mark.parametrize("case", SMALL_CASES, ids=by_name)
def test_build_is_deterministic_and_weights_are_equal(case: Case) -> None:
    first, second = build.build(case), build.build(case)
    assert torch.equal(build.input_tensor(first.input), build.input_tensor(second.input))
    assert torch.equal(first.output_gradient, second.output_gradient)
    ours = first.fastseq_layer.state_dict()
    for name, weight in second.torch_layer.state_dict().items():
        assert torch.equal(weight, ours[name])


def test_denormal_case_is_denormal() -> None:
    case = make_case("gru", "inference", T=2, B=2, H=3, options=CaseOptions(denormal=True))
    values = build.input_tensor(build.build(case).input)
    assert values.abs().max() < torch.finfo(torch.float32).tiny
    assert values.abs().max() > 0


@pytest.mark.parametrize("case", SMALL_CASES, ids=by_name)
def test_gate_passes(case: Case) -> None:
    result = gate.check(build.build(case))
    assert result.passed, result.summary()
    names = {error.name for error in result.errors}
    assert {"output", "hidden"} <= names
    if case.direction == "training":
        assert {"d_input", "d_hidden", "d_weight_ih_l0", "d_weight_hh_l0"} <= names


def test_gate_passes_in_float64() -> None:
    case = make_case("lstm", "training", T=5, B=3, I=7, H=9, dtype="float64")
    result = gate.check(build.build(case))
    assert result.passed, result.summary()


@pytest.mark.parametrize("value", [1e-3, float("nan")])
def test_gate_catches_a_wrong_result(value: float) -> None:
    built = build.build(SMALL_CASES[0])
    with torch.no_grad():
        next(built.fastseq_layer.parameters())[0] += value
    result = gate.check(built)
    assert not result.passed
    assert "FAILED" in result.summary()


def test_a_failed_gate_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = gate.GateResult((gate.TensorError("output", 1.0, 0.0, 0.1),))
    family = dataclasses.replace(families.family_of(SMALL_CASES[0]), check=lambda built: wrong)
    monkeypatch.setattr(runner, "family_of", lambda case: family)
    result = runner.run_case(SMALL_CASES[0], PLAN)
    assert not result.timings
    assert not result.first_call_s
    assert result.speedup("torch") is None
    screen.add_row(screen.new_table(), result)
    assert "FAILED" in screen.line(result, ["torch"])


# --- runner and reports


def tiny_results() -> list[runner.CaseResult]:
    cases = [
        make_case("lstm", "inference", T=1, B=1, H=8),
        make_case("gru", "training", T=3, B=2, H=8),
    ]
    return list(runner.run(cases, PLAN))


def test_runner_and_reports_on_tiny_cases() -> None:
    found = tiny_results()
    streaming, training = found
    assert set(streaming.timings) == {"torch", "fastseq", "fastseq.functional"}
    assert set(training.timings) == {"torch", "fastseq"}
    for result in found:
        speedup = result.speedup("torch")
        assert speedup is not None
        assert speedup > 0
    table = screen.new_table()
    for result in found:
        screen.add_row(table, result)
    assert table.row_count == 2
    assert screen.notes(found)


def test_readme_tables_follow_the_results(tmp_path: Path) -> None:
    machine = {"cpu": "C", "threads": 2, "isa": "base", "libraries": {"torch": "1"}, "date": "D"}
    file, readme = tmp_path / "results.json", tmp_path / "README.md"
    results.save(file, results.to_json(tiny_results(), machine, "rnn"))
    readme.write_text("before\n<!-- bench:inference -->\nold\n<!-- /bench -->\nafter\n")
    assert command.main(["readme", "--check", str(file), str(readme)]) == 2
    assert command.main(["readme", str(file), str(readme)]) == 0
    text = readme.read_text()
    assert "old" not in text
    assert "| 1, 1, 8 |" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert command.main(["readme", "--check", str(file), str(readme)]) == 0


def test_readme_rejects_unknown_marker() -> None:
    with pytest.raises(ValueError, match="marker"):
        report.fill_markers("<!-- bench:poetry --><!-- /bench -->", [], {})
    with pytest.raises(ValueError, match="marker"):
        report.fill_markers("nothing here", [], {})


def test_plot_draws_every_case(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from fastseq.bench.plot import draw

    path = tmp_path / "figure.svg"
    draw(tiny_results(), {"cpu": "C", "threads": 2}, path)
    svg = path.read_text()
    assert "prefers-color-scheme" in svg
    assert "T1 B1 H8" in svg


def test_command_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["list", "--case", "lstm-*-T1-*"]) == 0
    shown = capsys.readouterr().out
    assert "lstm-inference-T1-B1-H128" in shown
    assert "quick" in shown


# --- what the repository shows


@pytest.mark.parametrize("suite", ["rnn", "attention", "transformer"])
def test_readme_shows_the_committed_results(suite: str) -> None:
    root = Path(__file__).parents[1]
    file = root / "benchmarks" / "results" / f"{suite}.json"
    if not file.exists():
        pytest.skip("no results are committed yet")
    assert command.main(["readme", "--check", str(file), str(root / "README.md")]) == 0
