"""Table, roofline page, trace and JSON of a recording whose numbers are known."""

from __future__ import annotations

import copy
import dataclasses
import html.parser
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import profiler_recording as by_hand
import pytest

import fastseq
from fastseq.profiler import summary, table, trace
from fastseq.profiler.models import model
from fastseq.profiler.record import Recording
from fastseq.profiler.roofs import Bandwidth
from fastseq.profiler.session import Profile

FLOPS = 2 * 40 * 4 * 32 * (16 + 32)  # of the LSTM call


def finished(raw: dict[str, Any], tmp_path: Path, roofs: bool = True) -> Profile:
    """A profile with this recording, by way of a file."""
    document = {
        "fastseq_profile": 1,
        "machine": {"cpu": "paper", "threads": 2, "process": 4321},
        "roofs": by_hand.roofs().to_dict() if roofs else None,
        "hardware_counters": None,
        "recorded": raw,
    }
    path = tmp_path / "recorded.json"
    path.write_text(json.dumps(document, default=list))
    return Profile.from_json(path)


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return finished(by_hand.recording(), tmp_path)


def rows_by_name(profile: Profile, group: str = "phase") -> dict[str, summary.Row]:
    return {row.name: row for row in profile.rows(group=group)}


# --- numbers


def test_phases_of_a_call_add_up_to_its_time() -> None:
    call = Recording(by_hand.recording()).calls[0]
    phases = call.phases()
    assert phases == pytest.approx(
        {
            "start threads": 20e-6,  # (0 + 40) / 2
            "pack": 100e-6,
            "input product": 300e-6,
            "recurrent product": 400e-6,
            "gate update": 100e-6,
            "barrier wait": 50e-6,
            "join threads": 30e-6,  # (0 + 60) / 2
        }
    )
    assert sum(phases.values()) == pytest.approx(call.seconds) == pytest.approx(1e-3)
    assert call.phase_counts()["pack"] == 2


def test_times_are_seconds_from_the_begin() -> None:
    recording = Recording(by_hand.recording())
    assert recording.wall_seconds == pytest.approx(10e-3)
    assert recording.calls[0].begin_s == pytest.approx(0.5e-3)
    first = next(iter(recording.calls[0].threads[1].slices))
    assert first == ("pack", pytest.approx(0.54e-3), pytest.approx(0.64e-3))


def test_time_outside_counts_overlapping_calls_once() -> None:
    calls = [by_hand.lstm_call(2000), by_hand.lstm_call(2500, 78), by_hand.lstm_call(5000)]
    recording = Recording(by_hand.recording(*calls))
    assert recording.outside_seconds() == pytest.approx(10e-3 - 2.5e-3)


def test_kernel_rows(profile: Profile) -> None:
    rows = rows_by_name(profile, "kernel")
    assert list(rows) == ["rnn_forward lstm", "norm_forward layer_norm"]
    lstm = rows["rnn_forward lstm"]
    assert (lstm.calls, lstm.threads, lstm.dtype, lstm.isa) == (2, (2,), "float32", "avx512")
    assert lstm.shapes == ("T10 B4 I16 H32",)
    assert lstm.total_s == pytest.approx(2e-3)
    assert lstm.share == pytest.approx(0.2)
    assert lstm.gflops == pytest.approx(FLOPS / 1e-3 / 1e9)
    weights = 4 * 32 * (16 + 32) + 2 * 4 * 32
    moved = 4 * (weights + 40 * 16 + 40 * 32 + 2 * 2 * 4 * 32)
    assert lstm.gbytes == pytest.approx(moved / 1e-3 / 1e9)
    assert lstm.intensity == pytest.approx(FLOPS / moved)
    norm = rows["norm_forward layer_norm"]
    assert norm.gflops is None
    assert norm.intensity is None
    assert norm.mean_s == pytest.approx(125e-6)
    assert norm.p50_s == pytest.approx(125e-6)  # between 100 and 150
    assert norm.p95_s == pytest.approx(192.5e-6)  # 150 + 0.85 * 50


def test_roof_that_binds_multiply_adds(profile: Profile) -> None:
    lstm = rows_by_name(profile)["rnn_forward lstm"]
    # 491 520 operations at 200 GFLOP/s are 2.46 us. Traffic, 34 kB in the first level of two cores
    # (64 KiB): less than a tenth of that. The recurrence reads 16 KiB ten times: 0.41 us.
    assert lstm.roof == "FMA float32 avx512 x2"
    assert lstm.roof_share == pytest.approx(FLOPS / 200e9 / 1e-3)


def test_roof_that_binds_memory(profile: Profile) -> None:
    norm = rows_by_name(profile)["norm_forward layer_norm"]
    # 3200 elements read twice, parameters, and 3200 written: 38.7 kB on one thread lie in L2, and
    # a third is written: the roof of a copy, 50 GB/s.
    moved = 4 * (3 * 3200 + 64)
    assert norm.roof == "L2 copy x1"
    assert norm.roof_share == pytest.approx(4 * (moved / 50e9) / 500e-6)


def test_recurrence_that_reads_its_weights_again_binds() -> None:
    raw = by_hand.recording(by_hand.lstm_call(2000))
    # One row a step and 16 MB of recurrent weights: read a hundred times, from the last level.
    raw["calls"][0]["shape"] |= {"T": 100, "B": 1, "H": 1024, "rows": 100}
    (row,) = summary.rows(Recording(raw).calls, 1.0, by_hand.roofs(), "kernel", "time")
    swept = 100 * 4 * 4 * 1024 * 1024
    assert row.roof == "DRAM read x2"
    assert row.roof_share == pytest.approx(swept / 20e9 / 1e-3)


def test_phase_rows(profile: Profile) -> None:
    rows = profile.rows(group="phase")
    names = [row.name for row in rows]
    assert names.index("recurrent product") == names.index("rnn_forward lstm") + 1
    product = rows[names.index("recurrent product")]
    work = 2 * 40 * 4 * 32 * 32
    assert product.phase
    assert product.calls == 2
    assert product.total_s == pytest.approx(800e-6)
    assert product.gflops == pytest.approx(work / 400e-6 / 1e9)
    assert product.roof_share == pytest.approx(work / 200e9 / 400e-6)
    assert rows[names.index("gate update")].gflops is None
    phases = [row for row in rows[1 : names.index("norm_forward layer_norm")] if row.phase]
    assert sum(row.total_s for row in phases) == pytest.approx(2e-3)
    assert sum(row.share for row in phases) == pytest.approx(0.2)


def test_shape_rows_keep_shapes_and_threads_apart(tmp_path: Path) -> None:
    other, alone = by_hand.lstm_call(4000), by_hand.lstm_call(6000)
    other["shape"] |= {"B": 8, "rows": 50, "training": 1}
    del alone["threads"][1]
    raw = by_hand.recording(by_hand.lstm_call(2000), other, alone)
    rows = finished(raw, tmp_path).rows(group="shape")
    assert [(row.shapes[0], row.threads) for row in rows] == [
        ("T10 B4 I16 H32", (2,)),
        ("T10 B8 I16 H32 rows=50 training", (2,)),
        ("T10 B4 I16 H32", (1,)),
    ]
    (row,) = finished(raw, tmp_path).rows(group="kernel")
    assert row.threads == (1, 2)
    assert len(row.shapes) == 2


@pytest.mark.parametrize(
    ("sort", "first"),
    [("time", "rnn"), ("calls", "norm"), ("mean", "rnn"), ("name", "norm")],
)
def test_sort(profile: Profile, sort: str, first: str) -> None:
    assert profile.rows(sort=sort, group="kernel")[0].name.startswith(first)


@pytest.mark.parametrize("arguments", [{"sort": "colour"}, {"group": "colour"}])
def test_unknown_sort_or_group(profile: Profile, arguments: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"one of .*'colour'"):
        profile.rows(**arguments)


def test_percentiles() -> None:
    assert summary.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert summary.percentile([1.0], 0.95) == 1.0
    assert summary.percentile([0.0, 10.0], 0.95) == pytest.approx(9.5)


def test_calls_without_a_model_have_time_only() -> None:
    raw = by_hand.recording(by_hand.lstm_call(2000))
    raw["calls"][0]["kernel"] = "polish"
    (row,) = summary.rows(Recording(raw).calls, 1.0, by_hand.roofs(), "kernel", "time")
    assert row.total_s == pytest.approx(1e-3)
    assert (row.gflops, row.gbytes, row.roof) == (None, None, None)


# --- table


def test_table_shows_the_numbers(profile: Profile, capsys: pytest.CaptureFixture[str]) -> None:
    profile.table(sort="time")
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert all(
        heading in lines[0] for heading in ("calls", "% wall", "p95 us", "GFLOP/s", "% roof")
    )
    lstm = next(line for line in lines if line.startswith("rnn_forward lstm"))
    for cell in ("2.00", "20.0", "1,000", "0.5", "float32 avx512 x2", "T10 B4 I16 H32"):
        assert cell in lstm
    assert "  gate update" in text
    assert "wall 10.00 ms, of which 7.50 ms (75.0 %) outside the kernels; 6 calls" in text
    assert "paper" in text
    assert "raise" not in text


def test_table_says_what_was_dropped(tmp_path: Path) -> None:
    raw = by_hand.recording() | {"calls_dropped": 12, "slices_dropped": 3456}
    text = finished(raw, tmp_path).text()
    assert "12 more calls were not recorded; raise max_calls" in text
    assert "3,456 slices are missing from the trace; raise max_slices" in text


def test_narrow_table_names_what_it_leaves_out(profile: Profile) -> None:
    wide, narrow = profile.text(), profile.text(width=100)
    rows = [line for line in narrow.splitlines() if line.startswith(("rnn", "  ", "kernel"))]
    assert max(map(len, rows)) <= 100
    assert "left out for want of width: shape" in narrow
    assert "T10 B4" in wide
    assert "T10 B4" not in narrow


def test_table_without_calls(tmp_path: Path) -> None:
    raw = by_hand.recording() | {"calls": []}
    text = finished(raw, tmp_path, roofs=False).text()
    assert text.startswith("no kernels ran")


def test_table_without_roofs(tmp_path: Path) -> None:
    text = finished(by_hand.recording(), tmp_path, roofs=False).text()
    assert "no roofs" in text
    assert "rnn_forward lstm" in text


def test_lines_of_no_rows_are_the_headings() -> None:
    assert len(table.lines([])) == 2


# --- JSON


def test_json_round_trip(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "again.json"
    profile.to_json(path)
    again = Profile.from_json(path)
    assert again.calls == profile.calls
    assert again.roofs == profile.roofs
    assert again.text() == profile.text()
    assert list(again.calls[0].threads[0].slices) == list(profile.calls[0].threads[0].slices)


def damaged(change: Any) -> str:
    raw = copy.deepcopy(by_hand.recording())
    change(raw)
    document = {
        "fastseq_profile": 1,
        "machine": {},
        "roofs": None,
        "hardware_counters": None,
        "recorded": raw,
    }
    return json.dumps(document, default=list)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not JSON"),
        ("[]", "no profile of fastseq"),
        ('{"a": 1}', "no profile of fastseq"),
        ('{"fastseq_profile": 99}', "format 99"),
        ('{"fastseq_profile": 1}', "no profile of fastseq"),
        (damaged(lambda raw: raw.pop("calls")), "calls"),
        (damaged(lambda raw: raw.update(ticks_per_second=0)), "ticks_per_second"),
        (damaged(lambda raw: raw["calls"][0].update(shape=[1])), "recorded"),
        (damaged(lambda raw: raw["calls"][0]["shape"].update(H=-1)), "sizes"),
        (damaged(lambda raw: raw["calls"][0]["shape"].update(H=1e300)), "sizes"),
        (damaged(lambda raw: raw["calls"][0]["threads"][0].update(slices=[99, 1, 2])), "phase"),
        (damaged(lambda raw: raw["calls"][0]["threads"][0].update(slices=["a", 1, 2])), "phase"),
        (damaged(lambda raw: raw["calls"][0]["threads"][0].update(slices=[0, 1])), "phase"),
    ],
)
def test_odd_files_are_value_errors(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint) as caught:
        Profile.from_json(path)
    assert "odd.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_odd_machine_is_a_value_error(profile: Profile, tmp_path: Path) -> None:
    profile.to_json(tmp_path / "odd.json")
    document = json.loads((tmp_path / "odd.json").read_text())
    document["machine"]["libraries"] = "torch"  # the roofline page would look up versions in it
    (tmp_path / "odd.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"odd\.json is no profile of fastseq"):
        Profile.from_json(tmp_path / "odd.json")


def test_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fastseq.Profile.from_json(tmp_path / "nothing.json")


# --- trace


def assert_well_formed(document: dict[str, Any]) -> None:
    """What a viewer takes for granted: slices have lengths and nest, phases lie in their call."""
    tracks: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in document["traceEvents"]:
        assert math.isfinite(event["ts"])
        if event["ph"] == "X":
            assert event["dur"] >= 0
            tracks.setdefault((event["pid"], event["tid"]), []).append(event)
    for events in tracks.values():
        # At one begin the longer one is the outer one.
        events.sort(key=lambda event: (event["ts"], -event["dur"]))
        open_slices: list[tuple[str, float]] = []
        for event in events:
            end = event["ts"] + event["dur"]
            # Whole nanoseconds, so that half of one is never rounding.
            while open_slices and open_slices[-1][1] <= event["ts"] + 5e-4:
                open_slices.pop()
            if open_slices:
                assert end <= open_slices[-1][1] + 5e-4, (event, open_slices)
            assert (event["cat"] == "phase") == bool(open_slices), event
            open_slices.append((event["name"], end))


def test_trace_has_tracks_slices_and_counters(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    profile.trace(path)
    document = json.loads(path.read_text())
    assert_well_formed(document)
    events = document["traceEvents"]
    names = {e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    assert names == {"fastseq calls of thread 77", "fastseq thread 2 of 77"}
    kernels = [e for e in events if e.get("cat") == "kernel"]
    assert len(kernels) == 6
    assert kernels[0]["ts"] == pytest.approx(500)
    assert kernels[0]["dur"] == pytest.approx(1000)
    assert kernels[0]["args"]["shape"] == "T10 B4 I16 H32"
    assert kernels[0]["args"]["GFLOP/s"] == pytest.approx(FLOPS / 1e-3 / 1e9, abs=1e-3)
    phases = [e for e in events if e.get("cat") == "phase"]
    assert len(phases) == 2 * (5 + 4) + 4
    workers = [e for e in events if e.get("cat") == "kernel_thread"]
    assert [e["ts"] for e in workers] == pytest.approx([540, 2040])
    counters = [e["args"]["GFLOP/s"] for e in events if e["ph"] == "C"]
    rate = pytest.approx(FLOPS / 1e-3 / 1e9, abs=1e-3)
    assert counters == [rate, 0, rate, 0]
    assert document["baseTimeNanoseconds"] == 1_700_000_000_000_000_000


def test_counters_add_up_calls_side_by_side() -> None:
    recording = Recording(
        by_hand.recording(by_hand.lstm_call(2000), by_hand.lstm_call(2500, thread_id=78))
    )
    document = trace.build(recording)
    assert_well_formed(document)
    known = model(recording.calls[0])
    assert known is not None
    rate = known.flops / 1e-3 / 1e9
    values = [e["args"]["GFLOP/s"] for e in document["traceEvents"] if e["ph"] == "C"]
    assert values == pytest.approx([rate, 2 * rate, rate, 0], abs=1e-3)
    tracks = {e["tid"] for e in document["traceEvents"] if e.get("cat") == "kernel"}
    assert len(tracks) == 2


def test_merge_puts_both_on_one_clock(profile: Profile, tmp_path: Path) -> None:
    theirs = {
        "baseTimeNanoseconds": 1_699_999_999_000_000_000,
        "deviceProperties": [],
        "traceEvents": [
            {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 9, "tid": 9, "ts": 1, "dur": 2}
        ],
    }
    source, target = tmp_path / "torch.json", tmp_path / "both.json"
    source.write_text(json.dumps(theirs))
    profile.trace(target, merge=source)
    both = json.loads(target.read_text())
    assert both["traceEvents"][0] == theirs["traceEvents"][0]
    assert both["deviceProperties"] == []
    kernel = next(e for e in both["traceEvents"] if e.get("cat") == "kernel")
    assert kernel["ts"] == pytest.approx(1e6 + 500)
    assert kernel["pid"] == 9


@pytest.mark.parametrize("text", ["{", "{}", "3", '{"traceEvents": 1}'])
def test_merge_with_no_trace(profile: Profile, text: str, tmp_path: Path) -> None:
    source = tmp_path / "odd.json"
    source.write_text(text)
    with pytest.raises(ValueError, match=r"odd\.json"):
        profile.trace(tmp_path / "out.json", merge=source)


# --- roofline


class Page(html.parser.HTMLParser):
    """Which tags are opened and closed, and every address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        assert not {"src", "href"} & {name for name, _ in attributes}
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_roofline_page(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "roof.html"
    profile.roofline(path)
    text = path.read_text()
    page = Page(text)
    assert not page.open
    # One drawing for wide windows and one for phones; a norm has a place only in the table.
    assert page.count["svg"] == page.count["circle"] == 2
    assert "rnn_forward lstm" in page.text
    assert "norm_forward layer_norm" in page.text
    for label in ("FMA float32 avx512 x2", "FMA float32 avx512 x1", "DRAM read x2"):
        assert label in page.text
    assert "float64" not in page.text  # nothing here ran in it
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text
    for number in re.findall(r' (?:cx|cy|x1|x2|y1|y2)="([^"]+)"', text):
        assert 0 <= float(number) <= 860


def test_roofline_point_lies_below_its_roof(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "roof.html"
    profile.roofline(path)
    text = path.read_text()
    point = re.search(r'<circle[^>]* cy="([\d.]+)"', text)
    peak = re.search(r'y1="([\d.]+)" y2="[\d.]+"><title>FMA float32 avx512 x2', text)
    assert point
    assert peak
    assert float(point[1]) > float(peak[1])  # downwards


def test_roofline_labels_of_close_slopes_stand_apart(profile: Profile, tmp_path: Path) -> None:
    close = {"L1": 96.0, "L2": 92.0, "L3": 14.0, "DRAM": 13.0}
    known = by_hand.roofs()
    bands = tuple(
        Bandwidth(level, kind, threads, 1, rate)
        for level, rate in close.items()
        for kind in ("read", "copy")
        for threads in (1, 2)
    )
    profile._roofs = dataclasses.replace(known, bandwidths=bands)
    profile.roofline(tmp_path / "roof.html")
    text = (tmp_path / "roof.html").read_text()
    for drawing in re.findall("<svg.*?</svg>", text, re.DOTALL):
        found = re.findall(r'<text [^>]*x="([\d.]+)" y="([\d.]+)"[^>]*>\w+ \d+ GB/s<', drawing)
        places = [(float(x), float(y)) for x, y in found]
        (angle,) = set(re.findall(r'transform="rotate\((-[\d.]+) ', drawing))
        cosine, sine = math.cos(math.radians(float(angle))), math.sin(math.radians(float(angle)))
        assert len(places) >= 2
        for (x1, y1), (x2, y2) in itertools.combinations(places, 2):
            along = abs((x2 - x1) * cosine + (y2 - y1) * sine)
            across = abs((y2 - y1) * cosine - (x2 - x1) * sine)
            assert along >= 80 or across >= 12  # letters are 12 px high
        # Lines come first: none is drawn across a text.
        assert drawing.rindex('<line class="band"') < drawing.index('<text class="roof-label"')
    # A label without a place is not lost.
    note = re.search(r"Roofs: (.*?)\.</p>", text)
    assert note
    assert [f"{level} {rate:.0f} GB/s" in note[1] for level, rate in close.items()] == [True] * 4


def test_table_says_when_roofs_are_too_low(profile: Profile, tmp_path: Path) -> None:
    assert "above 100 % of a roof" not in profile.text()
    raw = by_hand.recording()
    for call in raw["calls"]:
        # The same work in a thousandth of the time or less.
        call["end"] = call["begin"] + 1
    text = finished(raw, tmp_path).text()
    assert "above 100 % of a roof: the roofs were measured while something else ran" in text
    assert "fastseq roof --measure" in text


@pytest.mark.parametrize(
    "damage",
    [
        {"multiply_adds": [{"isa": "base"}]},
        {"multiply_adds": [{"isa": "base", "dtype": "float32", "threads": 1, "gflops": "x"}]},
        {"bandwidths": [{"level": "L1", "kind": "read", "threads": 1, "gbytes": None}]},
    ],
)
def test_damaged_roofs_are_value_errors(damage: dict[str, Any]) -> None:
    fields = {**by_hand.roofs().to_dict(), **damage}
    with pytest.raises(ValueError, match="not measured roofs"):
        type(by_hand.roofs()).from_dict(fields)


def test_roofline_without_points_or_roofs(tmp_path: Path) -> None:
    raw = by_hand.recording(by_hand.norm_call(2000, 100))
    finished(raw, tmp_path, roofs=False).roofline(tmp_path / "roof.html")
    text = (tmp_path / "roof.html").read_text()
    assert "no point to draw" in text
    assert not Page(text).open
