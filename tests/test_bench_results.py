"""Result files: format 2, and format 1 that earlier versions wrote."""

import dataclasses
import json
from pathlib import Path

import pytest

from fastseq.bench import results
from fastseq.bench.cases import REGISTRY
from fastseq.bench.gate import GateResult, TensorError
from fastseq.bench.results import CaseResult
from fastseq.bench.timing import Timing

MACHINE = {"cpu": "C", "threads": [1, 2], "isa": "base", "libraries": {}, "date": "D"}
GATE = GateResult((TensorError("output", 1e-7, 2e-7, 3e-7),))


def timing(median: float) -> Timing:
    times = (median, median * 0.9, median * 1.1)
    return Timing(*times, 9, 4, median, median * 2, median * 3, median / 2)


def whole() -> CaseResult:
    return CaseResult(
        REGISTRY["lstm-inference-T1-B1-H128"],
        GATE,
        {"torch": timing(4.0), "fastseq": timing(2.0), "fastseq.functional": timing(1.0)},
        {"openvino": "not installed (openvino)"},
        {"first_call_over_later": 1.5},
        100.0,
        2,
        {"fastseq": timing(3.0)},
        {"fastseq": 0.5, "torch": 0.25},
        {"fastseq": 10, "torch": 20},
    )


def test_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "new" / "results.json"
    results.save(file, results.to_json([whole()], MACHINE, "quick"))
    found, machine = results.load(file)
    assert found == [whole()]
    assert machine == MACHINE
    assert [path.name for path in file.parent.iterdir()] == ["results.json"]


def test_a_file_has_the_documented_fields() -> None:
    document = results.to_json([whole()], MACHINE, "quick", complete=False)
    assert document["format"] == 2
    assert (document["suite"], document["complete"]) == ("quick", False)
    (record,) = document["results"]
    assert set(record) == {
        "case",
        "threads",
        "gate",
        "timings",
        "cold",
        "first_call_s",
        "peak_memory_bytes",
        "skipped",
        "probes",
        "fma_peak_gflops",
        "derived",
    }
    assert record["gate"]["passed"] is True
    assert set(record["timings"]["torch"]) == {
        "median_s",
        "lower_quartile_s",
        "upper_quartile_s",
        "p50_s",
        "p95_s",
        "p99_s",
        "minimum_s",
        "visits",
        "calls_per_visit",
    }


def test_format_1_still_loads() -> None:
    folder = Path(__file__).parents[1] / "benchmarks" / "results"
    document = results.to_json([whole()], MACHINE, "quick")
    (record,) = document["results"]
    for name in ("threads", "cold", "first_call_s", "peak_memory_bytes"):
        del record[name]
    for one in record["timings"].values():
        for name in ("p50_s", "p95_s", "p99_s", "minimum_s"):
            del one[name]
    del record["case"]["tags"]
    record["probes"] = {"peak_memory_bytes": 10, "peak_memory_bytes_torch": 20}
    document |= {"format": 1, "machine": MACHINE | {"threads": 2}}
    (found,) = results.from_json(json.loads(json.dumps(document)))
    assert found.threads == 2
    assert (found.cold, found.first_call_s) == ({}, {})
    assert found.peak_memory_bytes == {"fastseq": 10, "torch": 20}
    times = found.timings["torch"]
    assert (times.p50_s, times.p95_s, times.p99_s, times.minimum_s) == (4.0, None, None, None)
    for file in folder.glob("*.json"):
        assert results.load(file)[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 3}',
        '{"format": 2}',
        '{"format": 2, "machine": {}, "results": [{}]}',
        '{"format": 2, "machine": [], "results": []}',
    ],
)
def test_what_is_no_result_file_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "odd.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"odd\.json"):
        results.load(file)


def test_a_file_that_cannot_be_written_is_found_out_early(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"):
        results.check_writable(tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("kept")
    with pytest.raises(OSError, match="file"):
        results.check_writable(blocked / "results.json")
    results.check_writable(blocked)
    assert blocked.read_text() == "kept"


def test_an_empty_gate_has_not_passed() -> None:
    assert not GateResult(()).passed
    assert "nothing" in GateResult(()).summary()


def test_an_engine_is_held_against_the_functional_entry() -> None:
    result = whole()
    result.timings["onnxruntime"] = timing(3.0)
    assert result.peer_speedup("onnxruntime") == 3.0
    assert result.peer_speedup("torch") == 2.0
    del result.timings["fastseq.functional"]
    assert result.peer_speedup("onnxruntime") == 1.5
    assert result.peer_speedup("openvino") is None


def test_shares_and_rates() -> None:
    result = whole()
    rate = result.case.flops() / 2.0 / 1e9
    assert result.gflops() == pytest.approx(rate)
    assert result.share_of_peak() == pytest.approx(rate / 100)
    assert dataclasses.replace(result, fma_peak_gflops=None).share_of_peak() is None
