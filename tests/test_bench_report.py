"""``fastseq bench report``: the page's content, and how it looks and behaves in Chromium."""

import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import pytest
import synthetic_results as synthetic

from fastseq.bench import command
from fastseq.bench.cases import select
from fastseq.bench.html import charts, colour, content, figures
from fastseq.bench.html.charts import Series
from fastseq.bench.html.content import Source
from fastseq.bench.html.page import render
from fastseq.bench.results import from_json

ROOT = Path(__file__).parents[1]
COMMITTED = [ROOT / "benchmarks" / "results" / f"{s}.json" for s in ("rnn", "attention")]
VOID = {"meta", "link", "br", "input"}


class Page(HTMLParser):
    """Checks that elements nest, and collects what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.panel: dict[str, str | None] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if "data-for-peer" in found:
            self.panel = {
                "data-peer": found["data-for-peer"],
                "data-threads": found["data-for-threads"],
            }
        if tag == "td" and "data-case" in found:
            found |= self.panel
        self.elements.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def having(self, attribute: str) -> list[dict[str, str | None]]:
        return [found for _, found in self.elements if attribute in found]


def source(document: dict[str, Any], name: str = "invented.json") -> Source:
    return Source(name, from_json(document), document["machine"])


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return json.loads(json.dumps(synthetic.document()))


@pytest.fixture(scope="module")
def page_text(document: dict[str, Any]) -> str:
    return render([source(document)], synthetic.ROOFS)


@pytest.fixture(scope="module")
def page_file(page_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page_text, encoding="utf-8")
    return path


# --- content


def test_page_parses_and_stands_alone(page_text: str) -> None:
    page = Page(page_text)
    assert len(page_text.encode()) < 2e6
    for tag, attributes in page.elements:
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:"))
        assert tag not in ("iframe", "img", "object", "embed")
    assert "url(" not in page_text
    assert "@import" not in page_text
    assert "An invented &lt;processor&gt; &amp; friends" in page_text
    identifiers = [found["id"] for found in page.having("id")]
    assert len(identifiers) == len(set(identifiers))
    targets = {str(found["href"])[1:] for found in page.having("href")} - {"ata:,"}
    assert targets <= set(identifiers)


def test_every_case_is_there_and_failures_have_no_number(
    page_text: str, document: dict[str, Any]
) -> None:
    page = Page(page_text)
    identifiers = {found["id"] for found in page.having("id")}
    expected = {f"case-{r['case']['name']}-{r['threads']}" for r in document["results"]}
    assert expected == {name for name in identifiers if name and name.startswith("case-")}
    cells = page.having("data-case")
    for failed in (synthetic.FAILED, synthetic.RAISED):
        found = [cell for cell in cells if cell["data-case"] == failed and "data-peer" in cell]
        assert found
        assert all("data-ratio" not in cell and cell["class"] == "failed" for cell in found)
    text = " ".join(page.text)
    assert "raised: RuntimeError: <invented>" in text
    assert "FAILED: output error 1.00e+00" in text


def test_heat_maps_show_every_ratio(page_text: str, document: dict[str, Any]) -> None:
    found = {}
    for cell in Page(page_text).having("data-ratio"):
        key = (cell["data-case"], cell["data-peer"], int(cell["data-threads"] or 0))
        if "class" in cell:  # not the table of losses
            assert key not in found
            found[key] = float(cell["data-ratio"] or 0)
            assert ("loss" in str(cell["class"])) == (found[key] < 1)
    assert found == synthetic.speedups(document)


def test_cells_have_tables_of_their_own(document: dict[str, Any]) -> None:
    page = content.build([source(document)], {})
    panels = [panel for panel in page.panels if panel.title.startswith("Recurrent layers")]
    assert panels
    for panel in panels:
        (table,) = [drawn for drawn in panel.maps if drawn.title == "sLSTM"]
        assert table.columns == ("inference", "training")
        assert [label for label, _ in table.rows] == ["T100 B32 H256"]


def test_losses_come_first_and_sorted(page_text: str, document: dict[str, Any]) -> None:
    rows = [cell for cell in Page(page_text).having("data-ratio") if not cell.get("class")]
    ratios = [float(row["data-ratio"] or 0) for row in rows]
    assert ratios == sorted(ratio for ratio in synthetic.speedups(document).values() if ratio < 1)
    assert ratios
    assert page_text.index('id="losses-table"') < page_text.index('data-plot="heat"')


def test_percentiles_cold_and_first_calls(document: dict[str, Any]) -> None:
    page = content.build([source(document)], {})
    by_case = {(case.case, case.threads): case for case in page.cases}
    for one in document["results"]:
        case = by_case[one["case"]["name"], one["threads"]]
        assert {row.peer for row in case.rows} == set(one["timings"])
        for row in case.rows:
            shown = dict(zip(page.columns, row.columns, strict=True))
            timing = one["timings"][row.peer]
            assert shown["p95"] == content.format_seconds(timing["p95_s"])
            assert shown["p99"] == "-"
            assert (shown["cold"] != "-") == (row.peer in one["cold"])
            assert (shown["first call"] != "-") == (row.peer in one["first_call_s"])
            assert (shown["peak memory"] != "-") == (row.peer in one["peak_memory_bytes"])


def test_charts_hold_the_medians(document: dict[str, Any]) -> None:
    results = from_json(document)
    by_title = {chart.title: chart for chart in figures.latency_charts(results)}
    chart = by_title["LSTM B1 H64, inference, 2 threads"]
    assert [tick.label for tick in chart.x_ticks] == ["1", "10", "100", "1000"]
    found = {(r.case.name, r.threads): r for r in results}
    for row, steps in zip(chart.rows, (1, 10, 100, 1000), strict=True):
        timing = found[f"lstm-inference-T{steps}-B1-H64", 2].timings["fastseq"]
        assert row[:2] == (str(steps), content.format_seconds(timing.median_s))
    memory = {chart.title: chart for chart in figures.memory_charts(results)}
    assert [row[0] for row in memory["Attention B1 H8 E64, training, 1 thread"].rows] == [
        "256",
        "512",
        "1024",
    ]
    scaling = [row for plot in figures.scaling_plots(results) for row in plot.rows]
    assert len(scaling) == sum(r.threads == 1 and bool(r.timings) for r in results)
    name = "lstm-inference-T100-B16-H128"
    ratio = found[name, 1].timings["fastseq"].median_s / found[name, 2].timings["fastseq"].median_s
    (row,) = [r for r in scaling if r.label == "LSTM T100 B16 H128, inference"]
    assert f"fastseq {ratio:.2f}x" in row.values
    one, two = figures.rooflines(results, synthetic.ROOFS)[::-1]
    assert (one.title, two.title) == ("1 thread", "2 threads")
    assert {line.name for line in two.lines} >= {"FMA peak", "L2 read", "DRAM read"}


def test_labels_of_close_roofs_stand_apart() -> None:
    points = (Series("recurrent", "recurrent", ((0.1, 5.0, "a"), (100.0, 90.0, "b")), False),)
    close = {"L1 read": 96.0, "L2 read": 94.0, "L3 read": 14.0, "DRAM read": 13.0}
    found = {line.label: line for line in charts.roofline("", points, 100.0, close, ()).lines}
    for first, second in (("L1 read", "L2 read"), ("L3 read", "DRAM read")):
        (x1, y1), (x2, y2) = found[first].label_at, found[second].label_at
        # Further apart than the longer text is.
        assert math.hypot(x2 - x1, y2 - y1) > 6.5 * len(second)


def test_sections_without_data_say_so() -> None:
    document = synthetic.document(threads=(1,), only=2)
    for one in document["results"]:
        one["timings"] = {"fastseq": one["timings"]["fastseq"]}
        one["fma_peak_gflops"] = None
    text = " ".join(Page(render([source(document)])).text)
    for line in (
        "No case was timed beside another library, so there are no speed-ups.",
        "No case here has both matrix products and a measured peak.",
        "No kind of case was run at three lengths or more.",
        "Memory was not measured at several lengths",
        "No case was run with several thread counts.",
        "In no case here is another library faster.",
    ):
        assert line in text


def test_a_later_file_replaces_an_earlier_one(document: dict[str, Any]) -> None:
    later = synthetic.document(seed=1, only=2)
    page = content.build([source(document, "first.json"), source(later, "second.json")], {})
    assert len(page.cases) == len(document["results"])
    assert page.notes == (
        "4 cases of second.json are in an earlier file, too; shown as in the later one.",
    )
    shown = {(c.cell.case, c.cell.peer, c.cell.threads): c.cell.ratio for c in page.losses}
    expected = synthetic.speedups(document) | synthetic.speedups(later)
    assert shown == {key: ratio for key, ratio in expected.items() if ratio < 1}


@pytest.mark.parametrize("scheme", [colour.LIGHT, colour.DARK], ids=["light", "dark"])
def test_heat_map_colours_can_be_read(scheme: colour.Scheme) -> None:
    for number in range(-colour.STEPS, colour.STEPS + 1):
        behind = colour.background(number, scheme)
        assert colour.contrast(colour.ink(number, scheme), behind) >= 4.5


def test_heat_map_colours_are_centred_on_one() -> None:
    assert colour.step(1) == 0
    assert colour.step(0.5) == -colour.step(2)
    assert colour.step(100) == colour.STEPS
    assert colour.step(0.01) == -colour.STEPS
    steps = [colour.step(2 ** (i / 10)) for i in range(-40, 41)]
    assert steps == sorted(steps)


def test_log_ticks_are_round_and_within() -> None:
    assert charts.log_ticks(0.9, 11) == pytest.approx([1, 2, 5, 10])
    assert charts.log_ticks(1e-6, 1) == pytest.approx([10.0**p for p in range(-6, 1)])


def test_the_whole_registry_stays_below_two_megabytes() -> None:
    results = [synthetic.record(case, n) for case in select("full") for n in (1, 2)]
    document = {**synthetic.document(only=0), "results": results}
    assert len(render([source(document)]).encode()) < 2e6


# --- the command


def test_command_writes_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, roofs = tmp_path / "new" / "report.html", tmp_path / "roofs.json"
    roofs.write_text(json.dumps(synthetic.ROOFS))
    arguments = ["report", *map(str, COMMITTED), "--html", str(output), "--roofs", str(roofs)]
    assert command.main(arguments) == 0
    found = {}
    for cell in Page(output.read_text(encoding="utf-8")).having("data-ratio"):
        key = (cell["data-case"], cell["data-peer"], int(cell["data-threads"] or 0))
        found[key] = float(cell["data-ratio"] or 0)
    expected: dict[tuple[str, str, int], float] = {}
    for path in COMMITTED:
        expected |= synthetic.speedups(json.loads(path.read_text()))
    assert found == expected
    assert capsys.readouterr().err == ""


def test_command_says_that_a_run_was_stopped(tmp_path: Path, document: dict[str, Any]) -> None:
    path, page = tmp_path / "stopped.json", tmp_path / "page.html"
    path.write_text(json.dumps(document | {"complete": False}), encoding="utf-8")
    assert command.main(["report", str(path), "--html", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert f"after {len(document['results'])} runs" in text


def test_command_rejects_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, empty, good = tmp_path / "bad.json", tmp_path / "empty.json", tmp_path / "good.json"
    bad.write_text("{")
    empty.write_text(json.dumps({**synthetic.document(), "results": []}))
    good.write_text(json.dumps(synthetic.document(only=1)))
    roofs = tmp_path / "roofs.json"
    roofs.write_text(json.dumps({**synthetic.ROOFS, "bandwidths": [{"level": "L2"}]}))
    page = str(tmp_path / "page.html")
    for arguments in (
        [str(bad), "--html", page],
        [str(empty), "--html", page],
        [str(tmp_path / "missing.json"), "--html", page],
        [str(good), "--html", str(tmp_path)],
        [str(good), "--html", page, "--roofs", str(bad)],
        [str(good), "--html", page, "--roofs", str(good)],
        [str(good), "--html", page, "--roofs", str(roofs)],
    ):
        assert command.main(["report", *arguments]) == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1
        assert errors.startswith("fastseq bench: ")


def test_command_warns_of_other_machines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = synthetic.document(only=1), synthetic.document(only=1)
    second["machine"]["isa"] = "avx512"
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, one in zip(paths, (first, second), strict=True):
        path.write_text(json.dumps(one))
    output = tmp_path / "page.html"
    assert command.main(["report", *map(str, paths), "--html", str(output)]) == 0
    assert "isa base and avx512" in capsys.readouterr().err
    assert "avx512 (second.json)" in output.read_text(encoding="utf-8")


# --- in a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    program = browser.find()
    if program is None:
        pytest.skip("no program called chromium")
    with browser.Browser(program, tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.mark.parametrize(
    ("width", "dark"), [(360, False), (1280, True)], ids=["phone-light", "desktop-dark"]
)
def test_page_in_a_browser(
    chromium: browser.Browser,
    page_file: Path,
    document: dict[str, Any],
    width: int,
    dark: bool,
    tmp_path: Path,
) -> None:
    chromium.problems.clear()
    chromium.requests.clear()
    chromium.open(page_file, width=width, dark=dark)
    assert chromium.problems == []
    assert chromium.requests == [page_file.resolve().as_uri()]

    widths = chromium.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert widths == [width, width]
    # Nothing sticks out of the window but what scrolls by itself.
    outside = chromium.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, .skip')"
        " && e.getBoundingClientRect().right > window.innerWidth + 1).map(e => e.outerHTML)"
    )
    assert [text for text in outside if "overflow" not in text and "<text" not in text] == []

    results = from_json(document)
    page = content.build([source(document)], synthetic.ROOFS)
    expected = {
        "heat": sum(len(panel.maps) for panel in page.panels),
        "chart": len(page.latencies) + len(page.memories) + len(page.rooflines),
        "dots": len(page.peaks) + len(page.memory_plots) + len(page.scaling),
    }
    assert all(expected.values())
    for kind, count in expected.items():
        assert chromium.evaluate(f"document.querySelectorAll('[data-plot={kind}]').length") == count
    marks = chromium.evaluate("document.querySelectorAll('.chart .mark').length")
    assert marks >= sum(bool(result.timings) for result in results if result.case.flops())

    background, ink = chromium.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    lights = [
        colour.luminance(tuple(map(int, re.findall(r"\d+", text)[:3])))
        for text in (background, ink)
    ]
    assert lights == sorted(lights, reverse=not dark)
    assert abs(lights[0] - lights[1]) > 0.5

    image = tmp_path / "page.png"
    chromium.screenshot(image)
    assert image.read_bytes().startswith(b"\x89PNG")


def test_dom_shows_the_ratios_of_the_file(
    chromium: browser.Browser, page_file: Path, document: dict[str, Any]
) -> None:
    chromium.open(page_file, width=800)
    cells = chromium.evaluate(
        "[...document.querySelectorAll('.heat td[data-ratio]')].map(e => [e.dataset.case,"
        " e.closest('[data-for-peer]').dataset.forPeer,"
        " Number(e.closest('[data-for-peer]').dataset.forThreads), Number(e.dataset.ratio),"
        " e.textContent])"
    )
    expected = synthetic.speedups(document)
    assert {(case, peer, n): ratio for case, peer, n, ratio, _ in cells} == expected
    for *_, ratio, text in cells:
        assert text.lstrip("≈") == f"{ratio:.2f}x"


def test_peer_and_threads_can_be_chosen(chromium: browser.Browser, page_file: Path) -> None:
    chromium.open(page_file, width=360)
    shown = (
        "[...new Set([...document.querySelectorAll('.heat td[data-ratio]')]"
        ".filter(e => e.checkVisibility()).map(e => e.closest('[data-for-peer]').dataset)"
        ".map(data => data.forPeer + ' ' + data.forThreads))]"
    )
    assert chromium.evaluate(shown) == ["torch 2"]
    for name, value in (("peer", "onnxruntime"), ("threads", "1")):
        chromium.evaluate(
            f"(s => {{ s.value = '{value}'; s.dispatchEvent(new Event('change', {{bubbles: true}}))"
            f" }})(document.querySelector('select[name={name}]'))"
        )
    assert chromium.evaluate(shown) == ["onnxruntime 1"]
    charts_shown = (
        "[...new Set([...document.querySelectorAll('.chart')].filter(e => e.checkVisibility())"
        ".map(e => e.dataset.forThreads))]"
    )
    assert chromium.evaluate(charts_shown) == ["1"]


def test_tapping_a_value_shows_the_times(chromium: browser.Browser, page_file: Path) -> None:
    chromium.open(page_file, width=360)
    readout = "document.getElementById('readout').checkVisibility() && readout.textContent"
    assert chromium.evaluate(readout) is False
    chromium.evaluate("document.querySelector('.heat td[data-ratio]').click()")
    assert re.search(r"fastseq .*s \(.* to .*\), torch ", chromium.evaluate(readout))
    chromium.evaluate(
        "document.querySelector('.chart .mark').dispatchEvent("
        "new MouseEvent('click', {bubbles: true}))"
    )
    assert re.search(r"T \d+: ", chromium.evaluate(readout))
    chromium.evaluate("document.querySelector('h1').click()")
    assert chromium.evaluate(readout) is False


def test_cases_can_be_searched(chromium: browser.Browser, page_file: Path) -> None:
    chromium.open(page_file, width=800)
    assert chromium.evaluate("document.getElementById('search').checkVisibility()")
    chromium.evaluate(
        "(s => { s.value = 'GRU training'; s.dispatchEvent(new Event('input')) })"
        "(document.getElementById('search'))"
    )
    found = chromium.evaluate(
        "[...document.querySelectorAll('.everything tbody')].filter(e => e.checkVisibility())"
        ".map(e => e.id)"
    )
    assert found
    assert all(name.startswith("case-gru-training") for name in found)
