"""``fastseq bench compare``: ratios, means, exit statuses, one-line errors."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import synthetic_results as synthetic

from fastseq.bench import command
from fastseq.bench.compare import compare, machine_differences
from fastseq.bench.results import from_json

ROOT = Path(__file__).parents[1]


def write(path: Path, document: dict[str, Any]) -> str:
    path.write_text(json.dumps(document))
    return str(path)


def slower(document: dict[str, Any], factor: float, peer: str = "fastseq") -> dict[str, Any]:
    """The same file with every time of a library multiplied."""
    changed = copy.deepcopy(document)
    for one in changed["results"]:
        for name, timing in one["timings"].items():
            if name == peer:
                for key in ("median_s", "lower_quartile_s", "upper_quartile_s"):
                    timing[key] *= factor
    return changed


def run(*arguments: str) -> int:
    return command.main(["compare", *arguments])


@pytest.fixture
def small() -> dict[str, Any]:
    return synthetic.document(only=3)


def test_ratio_is_first_over_second() -> None:
    before, after = synthetic.document(), synthetic.document(seed=1)
    found = compare(from_json(before), from_json(after))
    medians = [
        {(r["case"]["name"], r["threads"]): r["timings"] for r in document["results"]}
        for document in (before, after)
    ]
    timed = [change for change in found.changes if change.ratio is not None]
    assert len(timed) == sum(bool(timings) for timings in medians[0].values())
    for change in timed:
        first, second = (file[change.name, change.threads] for file in medians)
        expected = first["fastseq"]["median_s"] / second["fastseq"]["median_s"]
        assert change.ratio == pytest.approx(expected)
        ratios = [one["torch"]["median_s"] / one["fastseq"]["median_s"] for one in (first, second)]
        assert change.torch_change == pytest.approx(ratios[1] / ratios[0])
    mean = math.exp(math.fsum(math.log(change.ratio or 0) for change in timed) / len(timed))
    assert found.mean == pytest.approx(mean)


def test_noise_is_where_the_quartiles_overlap(small: dict[str, Any]) -> None:
    near, far = slower(small, 1.01), slower(small, 10)
    assert all(c.within_noise for c in compare(from_json(small), from_json(near)).changes)
    assert not any(c.within_noise for c in compare(from_json(small), from_json(far)).changes)


def test_exit_status(
    tmp_path: Path, small: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a.json", small)
    b = write(tmp_path / "b.json", slower(small, 1.25))
    assert run(a, b) == 0
    assert "0.80x" in capsys.readouterr().out
    assert run(a, b, "--fail-below", "0.75") == 0
    assert run(a, b, "--fail-below", "0.85") == 1
    assert "below 0.85x" in capsys.readouterr().out
    assert run(b, a, "--fail-below", "1.2") == 0
    # Times of torch did not change.
    assert run(a, b, "--fail-below", "0.99", "--peer", "torch") == 0


def test_mean_instead_of_every_case(tmp_path: Path, small: dict[str, Any]) -> None:
    changed = copy.deepcopy(small)
    first, *others = [one["timings"]["fastseq"] for one in changed["results"]]
    first["median_s"] *= 1.5
    for timing in others:
        timing["median_s"] /= 1.5
    a, b = write(tmp_path / "a.json", small), write(tmp_path / "b.json", changed)
    assert run(a, b, "--fail-below", "0.95") == 1
    assert run(a, b, "--fail-below", "0.95", "--mean") == 0
    assert run(b, a, "--fail-below", "0.95", "--mean") == 1


def test_a_check_that_fails_in_the_second_file_only(
    tmp_path: Path, small: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    changed = copy.deepcopy(small)
    broken = changed["results"][0]
    broken["gate"]["errors"][0]["ours"] = 1.0
    broken["timings"] = {}
    a, b = write(tmp_path / "a.json", small), write(tmp_path / "b.json", changed)
    assert run(a, b) == 0
    assert run(a, b, "--fail-below", "0.01") == 1
    assert "failed its check" in capsys.readouterr().out
    assert run(b, a, "--fail-below", "0.01") == 0


def test_a_case_that_raises_in_the_second_file_only(
    tmp_path: Path, small: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    changed = copy.deepcopy(small)
    # It raised behind its gate, while it was timed.
    changed["results"][0]["timings"] = {}
    changed["results"][0]["skipped"]["case"] = "DeadlineError: the case takes more than 600 s"
    a, b = write(tmp_path / "a.json", small), write(tmp_path / "b.json", changed)
    assert run(a, b) == 0
    assert "B: raised" in capsys.readouterr().out
    for arguments in ((), ("--mean",)):
        assert run(a, b, "--fail-below", "0.01", *arguments) == 1
        name = small["results"][0]["case"]["name"]
        assert f"{name} (1 thread) raised" in capsys.readouterr().out
    assert run(b, a, "--fail-below", "0.01") == 0


def test_cases_of_one_file_are_named(
    tmp_path: Path, small: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    shorter = {**small, "results": small["results"][1:]}
    a, b = write(tmp_path / "a.json", small), write(tmp_path / "b.json", shorter)
    name = small["results"][0]["case"]["name"]
    assert run(a, b) == 0
    assert f"only in A: {name} (1 thread)" in capsys.readouterr().out
    assert run(b, a) == 0
    assert f"only in B: {name} (1 thread)" in capsys.readouterr().out


def test_other_machine_is_a_warning(
    tmp_path: Path, small: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    other = copy.deepcopy(small)
    other["machine"] |= {"cpu": "another", "date": "2001-01-01"}
    a, b = write(tmp_path / "a.json", small), write(tmp_path / "b.json", other)
    assert run(a, b) == 0
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "another" in errors
    assert machine_differences(small["machine"], small["machine"]) == []


def test_a_stopped_run_is_a_warning(
    tmp_path: Path, small: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a.json", small)
    b = write(tmp_path / "b.json", small | {"complete": False})
    assert run(a, b) == 0
    expected = f"{b}: the run was stopped after {len(small['results'])} runs\n"
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert errors.endswith(expected)


def test_format_1_with_itself(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ROOT / "benchmarks" / "results" / "rnn.json")
    assert run(path, path, "--fail-below", "1") == 0
    output = capsys.readouterr().out
    assert "1.00x" in output
    assert "only in" not in output


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 3}',
        '{"format": 2}',
        '{"format": 2, "machine": {}, "results": 1}',
    ],
)
def test_bad_files_get_one_line(
    text: str, tmp_path: Path, small: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = write(tmp_path / "good.json", small), tmp_path / "bad.json"
    bad.write_text(text)
    for pair in ((good, str(bad)), (str(bad), good)):
        assert run(*pair) == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1
        assert errors.startswith("fastseq bench: ")
        assert "bad.json" in errors


@pytest.mark.parametrize("value", [0, -1.0, "fast", None])
def test_bad_times_get_one_line(
    value: object, tmp_path: Path, small: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    changed = copy.deepcopy(small)
    changed["results"][0]["timings"]["fastseq"]["median_s"] = value
    path = write(tmp_path / "bad.json", changed)
    assert run(path, path) == 2
    assert command.main(["report", path, "--html", str(tmp_path / "page.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


# A place in a result file, and what no run writes there.
DAMAGE: list[tuple[tuple[str | int, ...], object]] = [
    (("machine",), [1]),
    (("machine", "threads"), "two"),
    (("machine", "libraries"), ["torch"]),
    (("results",), {}),
    (("results", 0), None),
    (("results", 0, "threads"), "1"),
    (("results", 0, "skipped"), ["torch"]),
    (("results", 0, "probes"), {"share": "half"}),
    (("results", 0, "first_call_s"), {"torch": None}),
    (("results", 0, "peak_memory_bytes"), 3),
    (("results", 0, "fma_peak_gflops"), "fast"),
    (("results", 0, "gate", "errors", 0, "ours"), None),
    (("results", 0, "gate", "errors", 0, "limit"), "1e-7"),
    (("results", 0, "timings", "torch", "p50_s"), "x"),
    (("results", 0, "timings", "torch", "p95_s"), []),
    (("results", 0, "timings", "torch", "median_s"), float("inf")),
    (("results", 0, "timings", "torch", "median_s"), float("nan")),
    (("results", 0, "case", "name"), ["lstm"]),
    (("results", 0, "case", "layer"), "lstn"),
    (("results", 0, "case", "direction"), "sideways"),
    (("results", 0, "case", "dtype"), "float31"),
    (("results", 0, "case", "T"), "100"),
    (("results", 0, "case", "options", "num_layers"), None),
]


@pytest.mark.parametrize(("place", "value"), DAMAGE, ids=[".".join(map(str, p)) for p, _ in DAMAGE])
def test_damaged_files_get_one_line(
    place: tuple[str | int, ...],
    value: object,
    tmp_path: Path,
    small: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed: Any = copy.deepcopy(small)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    assert place[-1] in inner if isinstance(inner, dict) else len(inner) > 0
    inner[place[-1]] = value
    good, bad = write(tmp_path / "good.json", small), write(tmp_path / "bad.json", changed)
    page = str(tmp_path / "page.html")
    for arguments in (["compare", good, bad], ["report", bad, "--html", page]):
        assert command.main(arguments) == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1
        assert errors.startswith("fastseq bench: ")
        assert "bad.json: " in errors


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"format": 2, "results": [', "cut short"),
        (b"\x80\x04\x95", "not JSON"),
        (b'{"format": 1, "kind": "model"}', "results of bench model"),
    ],
    ids=["truncated", "binary", "of a model"],
)
def test_other_files_are_called_by_their_name(
    content: bytes, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "odd.json").write_bytes(content)
    assert run(str(tmp_path / "odd.json"), str(tmp_path / "odd.json")) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert f"{tmp_path / 'odd.json'}: " in errors
    assert complaint in errors


def test_wrong_use_gets_one_line(
    tmp_path: Path, small: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    good = write(tmp_path / "good.json", small)
    other = write(tmp_path / "other.json", {**small, "results": []})
    for arguments in (
        (good, str(tmp_path / "missing.json")),
        (good, other),
        (good, good, "--fail-below", "0"),
        (good, good, "--fail-below", "nan"),
        (good, good, "--mean"),
        (good, good, "--peer", "nobody"),
    ):
        assert run(*arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
