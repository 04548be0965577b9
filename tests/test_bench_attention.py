"""The attention cases of the benchmark registry: their models of work, gate, runner and reports."""

import dataclasses
import json
import math

import pytest
import torch
from test_bench_cases import by_name

import fastseq.nn
from fastseq.bench import attention, command, report, results, runner, screen
from fastseq.bench.attention_cases import AttentionCase, AttentionOptions, make_attention_case
from fastseq.bench.cases import ATTENTION_SUITE, from_record, select

PLAN = runner.Plan(peers=("torch",), seconds=0.01)
OPTIONS = [
    AttentionOptions(),
    AttentionOptions(causal=True),
    AttentionOptions(dropout=0.1),
    AttentionOptions(window=(3, 0)),
    AttentionOptions(bias=True),
    AttentionOptions(ragged=True),
]
SMALL_CASES = [
    *(
        make_attention_case(direction, B=3, H=2, S=17, E=9, options=options)
        for direction in ("inference", "training")
        for options in OPTIONS
    ),
    make_attention_case("inference", B=1, H=4, Hkv=2, S=1, Skv=33, E=8),
]
MODULE_CASES = [
    make_attention_case(
        direction, B=2, H=2, S=9, E=8, layer="mha", options=AttentionOptions(need_weights=weights)
    )
    for direction in ("inference", "training")
    for weights in (False, True)
]
# A gate counts what is visible; so may torch, told pair by pair.
small = pytest.mark.parametrize("case", SMALL_CASES, ids=by_name)


def test_names_are_unique() -> None:
    assert len({case.name for case in ATTENTION_SUITE}) == len(ATTENTION_SUITE)


def test_every_figure_has_its_case() -> None:
    names = {case.name for case in ATTENTION_SUITE}
    for direction in ("inference", "training"):
        for shape in ("B4-H8-S512-E64", "B1-H16-S2048-E64", "B1-H8-S4096-E128"):
            assert f"attention-{direction}-{shape}" in names
            assert f"attention-{direction}-{shape}-causal" in names
        for option in ("dropout0.1", "window64_0", "bias"):
            assert f"attention-{direction}-B4-H8-S512-E64-{option}" in names
        assert f"attention-{direction}-B8-H8-S512-E64-ragged" in names
        assert f"mha-{direction}-B8-H8-S256-E64-weights" in names
    assert "attention-inference-B1-H32_8-S1_4096-E128" in names


def test_select_from_the_suite() -> None:
    found = select("attention", ["*-S1-*"])
    assert [case.name for case in found] == ["attention-inference-B1-H8-S1-E64"]


def test_make_case_rejects() -> None:
    with pytest.raises(ValueError, match="perceptron"):
        make_attention_case("inference", B=1, H=1, S=1, E=1, layer="perceptron")
    with pytest.raises(ValueError, match="need_weights"):
        make_attention_case(
            "inference", B=1, H=1, S=1, E=1, options=AttentionOptions(need_weights=True)
        )


@small
def test_visible_pairs_are_those_of_the_masks(case: AttentionCase) -> None:
    built = attention.build(case)
    visible = torch.ones(case.B, case.Sq, case.Skv, dtype=torch.bool)
    if case.options.causal:
        visible = visible.tril()
    if built.mask is not None:
        visible &= built.mask
    if built.padding is not None:
        visible &= ~built.padding.unsqueeze(1)
    pairs = int(visible.sum())
    # One sequence's pairs count for every sequence unless lengths tell them apart.
    assert case.visible_pairs() == pairs
    products = 7 if case.direction == "training" else 2
    assert case.flops() == 2 * products * pairs * case.Hq * case.E


def test_bytes_by_hand() -> None:
    case = make_attention_case("inference", B=2, H=4, Hkv=2, S=3, Skv=5, E=8)
    queries, keys = 2 * 4 * 3 * 8, 2 * 2 * 5 * 8
    assert case.bytes() == 4 * (2 * queries + 2 * keys)
    training = dataclasses.replace(case, direction="training")
    assert training.bytes() == 4 * (6 * queries + 6 * keys)


def test_ragged_lengths_cover_the_range() -> None:
    case = make_attention_case(
        "inference", B=64, H=1, S=512, E=1, options=AttentionOptions(ragged=True)
    )
    assert max(case.lengths()) == 512
    assert min(case.lengths()) >= 64
    assert case.lengths() == case.lengths()


@small
def test_gate_passes(case: AttentionCase) -> None:
    result = attention.check(attention.build(case))
    assert result.passed, result.summary()
    names = {error.name for error in result.errors}
    wanted = {"output"}
    if case.direction == "training":
        wanted |= {"d_query", "d_key", "d_value"} | ({"d_bias"} if case.options.bias else set())
    assert names == wanted


@pytest.mark.parametrize("case", MODULE_CASES, ids=by_name)
def test_gate_of_the_module(case: AttentionCase) -> None:
    result = attention.check(attention.build(case))
    assert result.passed, result.summary()
    names = {error.name for error in result.errors}
    assert ("weights" in names) == case.options.need_weights
    assert ("d_in_proj_weight" in names) == (case.direction == "training")


@pytest.mark.parametrize("value", [1e-3, math.nan])
def test_gate_catches_a_wrong_result(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fastseq.functional.scaled_dot_product_attention

    def wrong(*arguments: object, **options: object) -> torch.Tensor:
        return right(*arguments, **options) + value

    monkeypatch.setattr(fastseq.functional, "scaled_dot_product_attention", wrong)
    assert not attention.check(attention.build(SMALL_CASES[0])).passed


def test_runner_and_reports() -> None:
    cases = [SMALL_CASES[1], SMALL_CASES[9]]
    found = list(runner.run(cases, PLAN))
    table = screen.new_table()
    for result in found:
        assert set(result.timings) == {"torch", "fastseq"}
        screen.add_row(table, result)
    assert table.row_count == 2
    machine = {"cpu": "C", "threads": 2, "isa": "base", "libraries": {"torch": "1"}, "date": "D"}
    document = json.loads(json.dumps(results.to_json(found, machine, "attention")))
    assert results.from_json(document) == found
    text = report.fill_markers("<!-- bench:attention --><!-- /bench -->", found, machine)
    assert "| B3 H2 S17 E9 | causal |" in text
    assert "window3_0" in text


@pytest.mark.parametrize("case", [*SMALL_CASES, *MODULE_CASES], ids=by_name)
def test_record_round_trip(case: AttentionCase) -> None:
    assert from_record(json.loads(json.dumps(dataclasses.asdict(case)))) == case


def test_plot_draws_attention(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from fastseq.bench.plot import draw

    found = list(runner.run([SMALL_CASES[0], SMALL_CASES[6]], PLAN))
    draw(found, {"cpu": "C", "threads": 2}, tmp_path / "figure.svg")
    assert "B3 H2 S17 E9" in (tmp_path / "figure.svg").read_text()


def test_command_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["list", "--suite", "attention", "--case", "*-S1-*"]) == 0
    assert "attention-inference-B1-H8-S1-E64" in capsys.readouterr().out
