"""What the machine can do: measured, kept, shown."""

from __future__ import annotations

import json
import os
from pathlib import Path

import profiler_recording as by_hand
import pytest
from kernels import needs_extension

from fastseq import _config
from fastseq.profiler import command, roofs
from fastseq.profiler.roofs import Roofs


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small arrays and short runs."""
    monkeypatch.setattr(roofs, "_RUNS", 1)
    monkeypatch.setattr(roofs, "_FMA_SECONDS", 0.002)
    monkeypatch.setattr(roofs, "_MEMORY_SECONDS", 0.002)
    sizes = {"L1": 1 << 14, "L2": 1 << 18, "L3": 1 << 21, "DRAM": 1 << 22}
    monkeypatch.setattr(roofs, "working_sets", lambda caches, threads: sizes)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """``measure`` without measuring: how many times it was called."""
    calls: list[int] = []

    def measure(progress: object = None) -> Roofs:
        calls.append(1)
        found = by_hand.roofs()
        roofs._store(found)
        return found

    monkeypatch.setattr(roofs, "measure", measure)
    return calls


@needs_extension
@pytest.mark.usefixtures("quick")
def test_measured_roofs_are_complete_and_kept() -> None:
    seen: list[tuple[int, int, str]] = []
    before = _config.extension().isa()
    found = roofs.measure(lambda *step: seen.append(step))
    tiers = _config.extension().isa_usable()
    for threads in found.threads:
        for dtype in roofs.DTYPES:
            for isa in tiers:
                assert (found.gflops(isa, dtype, threads) or 0) > 0.1
        for level in roofs.LEVELS:
            for kind in roofs.KINDS:
                assert (found.gbytes(level, kind, threads) or 0) > 0.1
    wide, narrow = found.gflops(tiers[-1], "float32", 1), found.gflops("base", "float32", 1)
    assert wide is not None
    assert narrow is not None
    assert wide >= narrow / 2  # loosely: the machine is shared
    assert [step[0] for step in seen] == list(range(len(seen)))
    assert seen[-1][0] == seen[-1][1]
    path = roofs.cache_path()
    assert path is not None
    assert path.exists()
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing temporary stays
    assert roofs.load() == found
    assert _config.extension().isa() == before


def test_second_time_is_read(counted: list[int]) -> None:
    first = roofs.load_or_measure()
    assert roofs.load_or_measure() == first
    assert len(counted) == 1


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"identity": 1}', '{"identity": {}, "roofs": {}}'],
)
def test_unreadable_file_is_measured_again(text: str, counted: list[int]) -> None:
    path = roofs.cache_path()
    assert path is not None
    path.parent.mkdir(parents=True)
    path.write_text(text)
    roofs.load_or_measure()
    assert len(counted) == 1
    roofs.load_or_measure()
    assert len(counted) == 1


def test_damaged_roofs_are_measured_again(counted: list[int]) -> None:
    path = roofs.cache_path()
    assert path is not None
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"identity": roofs.identity(), "roofs": {"cpu": "x"}}))
    roofs.load_or_measure()
    assert len(counted) == 1
    path.write_bytes(b"\xff\xfe\x00")
    roofs.load_or_measure()
    assert len(counted) == 2


@pytest.mark.parametrize("what", ["cpu", "version", "caches_bytes", "threads"])
def test_another_machine_or_version_is_measured(
    what: str, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    roofs.load_or_measure()
    other = {"cpu": "other", "version": "9", "caches_bytes": {"L1d": 1}, "threads": 77}[what]
    known = _config.capabilities()
    monkeypatch.setattr(_config, "capabilities", lambda: {**known, what: other})
    roofs.load_or_measure()
    assert len(counted) == 2


def test_a_file_of_the_same_name_for_another_machine(counted: list[int]) -> None:
    roofs.load_or_measure()
    path = roofs.cache_path()
    assert path is not None
    held = json.loads(path.read_text())
    held["identity"]["cpu"] = "other"
    path.write_text(json.dumps(held))
    roofs.load_or_measure()
    assert len(counted) == 2


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert roofs.load_or_measure() == by_hand.roofs()
    assert roofs.load_or_measure() == by_hand.roofs()
    assert len(counted) == 2


def test_no_home_directory(counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert roofs.cache_path() is None
    assert roofs.load_or_measure() == by_hand.roofs()


def test_atomic_write_leaves_the_old_file_on_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")

    def fail(source: str, target: Path) -> None:
        raise OSError("full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        roofs.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file.json"]


# --- numbers


def test_round_trip() -> None:
    found = by_hand.roofs()
    assert Roofs.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    with pytest.raises(ValueError, match="not measured roofs"):
        Roofs.from_dict({"cpu": "x"})


def test_threads_between_the_measured_ones() -> None:
    found = by_hand.roofs()
    few = roofs._between({1: 10.0, 9: 50.0}, 5)
    assert few == pytest.approx(30)
    assert found.gflops("avx512", "float32", 2) == 200
    assert found.gflops("avx512", "float32", 16) == 200
    assert found.gflops("avx9000", "float32", 1) is None
    assert found.gbytes("L2", "copy", 1) == 50


@pytest.mark.parametrize(
    ("size", "threads", "level"),
    [
        (32 << 10, 1, "L1"),
        (33 << 10, 1, "L2"),
        (33 << 10, 2, "L1"),
        (2 << 20, 2, "L2"),
        (3 << 20, 2, "L3"),
        (9 << 20, 2, "DRAM"),
    ],
)
def test_level_that_holds_a_working_set(size: int, threads: int, level: str) -> None:
    assert by_hand.roofs().level(size, threads) == level


def test_working_sets_lie_in_their_level() -> None:
    caches = {"L1d": 32 << 10, "L2": 1 << 20, "L3": 32 << 20}
    for threads in (1, 2, 8):
        sets = roofs.working_sets(caches, threads)
        assert sets["L1"] < caches["L1d"] < sets["L2"] < caches["L2"] < sets["L3"]
        assert sets["L3"] * threads <= caches["L3"]
        assert sets["DRAM"] * threads >= 4 * caches["L3"]
    assert list(roofs.working_sets({"L1d": 32 << 10}, 1)) == ["L1", "DRAM"]


# --- fastseq roof


@pytest.mark.usefixtures("counted")
def test_command_shows_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "roofs.json"
    assert command.roof_main(["--json", str(target)]) == 0
    printed = capsys.readouterr().out
    for words in ("paper", "avx512 float32", "200.0", "DRAM copy", "2 threads", "kept in"):
        assert words in printed
    assert Roofs.from_dict(json.loads(target.read_text())) == by_hand.roofs()


def test_command_measures_again(counted: list[int]) -> None:
    assert command.roof_main([]) == 0
    assert command.roof_main([]) == 0
    assert len(counted) == 1
    assert command.roof_main(["--measure"]) == 0
    assert len(counted) == 2


@pytest.mark.usefixtures("counted")
def test_command_says_when_it_cannot_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert command.roof_main([]) == 0
    assert "not kept" in capsys.readouterr().out


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(
    "arguments", [["--polish"], ["extra"], ["--json"], ["--json", "/dev/null/x.json"]]
)
def test_command_complains_in_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.roof_main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastseq roof: ")
    assert error.count("\n") == 1
