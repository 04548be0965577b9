"""The README's tables and pictures say what the committed result files say."""

import copy
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import synthetic_results as synthetic

from fastseq.bench import command, plot, report
from fastseq.bench.results import from_json, load

ROOT = Path(__file__).parents[1]
RESULTS = [
    ROOT / "benchmarks" / "results" / f"{name}.json" for name in ("rnn", "attention", "transformer")
]
FIGURES = ROOT / "docs" / "figures"


def readme(results: list[Path], document: Path, figures: Path, *options: str) -> int:
    files = map(str, results)
    return command.main(["readme", *files, str(document), "--figures", str(figures), *options])


def test_committed_readme_and_pictures_are_up_to_date() -> None:
    assert readme(RESULTS, ROOT / "README.md", FIGURES, "--check") == 0


def test_makefile_names_every_committed_file() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (names,) = re.findall(r"^RESULTS := \$\(addprefix benchmarks/results/,(.*)\)$", makefile, re.M)
    assert sorted(names.split()) == sorted(path.name for path in RESULTS)
    text = (ROOT / "README.md").read_text()
    for path in RESULTS:
        assert f"docs/figures/{path.stem}-speedups.svg" in text


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_numbers_drawn_are_those_of_the_file(path: Path) -> None:
    """Not what the picture says of itself, but the text at its bars."""
    drawn: Counter[str] = Counter()
    for text in ElementTree.parse(FIGURES / f"{path.stem}-speedups.svg").iter(
        "{http://www.w3.org/2000/svg}text"
    ):
        words = "".join(text.itertext()).strip()
        if re.fullmatch(r"\d+\.\d\d", words):
            drawn[words] += 1
    expected: Counter[str] = Counter()
    for one in json.loads(path.read_text())["results"]:
        medians = {peer: timing["median_s"] for peer, timing in one["timings"].items()}
        if not one["case"]["options"].get("denormal"):
            fastest = min(medians[peer] for peer in ("torch", "torch.compile") if peer in medians)
            expected[f"{fastest / medians['fastseq']:.2f}"] += 1
    assert drawn == expected


def faster(document: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    changed["results"][0]["timings"]["fastseq"]["median_s"] /= 3
    return changed


def test_a_changed_result_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed, picture = tmp_path / "rnn.json", tmp_path / "rnn-speedups.svg"
    changed.write_text(json.dumps(faster(json.loads(RESULTS[0].read_text()))))
    shutil.copy(FIGURES / picture.name, picture)
    document = tmp_path / "README.md"
    document.write_text("<!-- bench:inference -->\n<!-- /bench -->\n")
    assert readme([changed], document, tmp_path, "--check") == 2
    assert "README.md does not show" in capsys.readouterr().err
    # The tables alone are redone: the picture is old still.
    assert command.main(["readme", str(changed), str(document)]) == 0
    assert readme([changed], document, tmp_path, "--check") == 2
    assert "rnn-speedups.svg does not show" in capsys.readouterr().err


def test_one_command_redoes_all(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    document, figures = tmp_path / "README.md", tmp_path / "figures"
    shutil.copy(ROOT / "README.md", document)
    results = [tmp_path / path.name for path in RESULTS]
    for source, path in zip(RESULTS, results, strict=True):
        path.write_text(json.dumps(faster(json.loads(source.read_text()))))
    assert readme(results, document, figures) == 0
    assert readme(results, document, figures, "--check") == 0
    assert document.read_text() != (ROOT / "README.md").read_text()
    for path in results:
        found, machine = load(path)
        assert plot.shown_in(figures / f"{path.stem}-speedups.svg") == plot.shown(found, machine)


def test_of_several_thread_counts_the_most_are_shown() -> None:
    document = synthetic.document()
    found = from_json(document)
    text = "<!-- bench:inference --><!-- /bench --> <!-- bench:machine --><!-- /bench -->"
    filled = report.fill_markers(text, found, document["machine"])
    alone = [result for result in found if result.threads == 2]
    assert filled == report.fill_markers(text, alone, document["machine"] | {"threads": 2})
    assert "2 threads" in filled
    assert plot.shown(found, document["machine"])["caption"].startswith(
        "Speed-up over torch, eager or compiled, whichever is faster, 2 threads, "
    )


@pytest.mark.parametrize("content", ["", "<svg", "<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_no_picture_or_an_empty_one_gets_one_line(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in RESULTS[:1]:
        (tmp_path / f"{path.stem}-speedups.svg").write_text(content)
    assert readme(RESULTS[:1], ROOT / "README.md", tmp_path, "--check") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert readme(RESULTS[:1], ROOT / "README.md", tmp_path / "missing", "--check") == 2
    assert capsys.readouterr().err.count("\n") == 1
