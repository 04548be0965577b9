"""``fastseq profile``: whole programs under the profile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import profiler_recording as by_hand
import pytest
from kernels import HAS_EXTENSION

import fastseq
from fastseq import cli
from fastseq.profiler import command, roofs

LAYER = """
import sys, torch, fastseq
layer = fastseq.nn.GRU(7, 9)
with torch.no_grad():
    layer(torch.zeros(3, 2, 7))
"""


@pytest.fixture(autouse=True)
def known_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofs, "load_or_measure", lambda progress=None: by_hand.roofs())


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "program.py"
    path.write_text(LAYER)
    return path


def append(script: Path, text: str) -> None:
    script.write_text(script.read_text() + text)


def test_table_follows_the_programs_output(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    append(script, "print('arguments', sys.argv[1:], __name__)\n")
    assert command.main([str(script), "--sort", "-x", "a b"]) == 0
    printed = capsys.readouterr().out
    assert "arguments ['--sort', '-x', 'a b'] __main__" in printed
    assert printed.index("arguments") < printed.index("rnn_forward gru")


def test_files_are_written(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--trace", "t.json", "--json=p.json", "--roofline", "r.html", "--group", "shape"]
    assert command.main([*arguments, "--sort", "calls", "--counters", str(script)]) == 0
    folder = script.parent
    assert json.loads((folder / "t.json").read_text())["traceEvents"]
    assert len(fastseq.Profile.from_json(folder / "p.json").calls) == 1
    assert "<svg" in (folder / "r.html").read_text()
    printed = capsys.readouterr().out
    assert "  pack" not in printed
    assert "hardware counters:" in printed


@pytest.mark.parametrize(
    ("ending", "status", "words"),
    [
        ("sys.exit(7)", 7, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('enough')", 1, "enough"),
        ("raise ValueError('mine')", 1, "ValueError: mine"),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
    ],
)
def test_exit_status_is_the_programs(
    script: Path, ending: str, status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    append(script, ending)
    assert command.main([str(script)]) == status
    captured = capsys.readouterr()
    assert "rnn_forward gru" in captured.out
    assert words in captured.err
    # The traceback is the program's, without what started it.
    assert "runpy" not in captured.err
    assert "profiler" not in captured.err


def test_traceback_shows_the_programs_line(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    append(script, "def inner():\n    return 1 / 0\ninner()\n")
    assert command.main([str(script)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback (most recent call last):")
    assert "program.py" in error
    assert error.index("in <module>") < error.index("in inner")


def test_a_syntax_error_is_shown(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script.write_text("this is no Python\n")
    assert command.main([str(script)]) == 1
    captured = capsys.readouterr()
    assert "SyntaxError" in captured.err
    assert "no kernels ran" in captured.out


def test_a_program_without_kernels(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script.write_text("import warnings\nwarnings.warn('its own')\nprint('done')\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert command.main([str(script)]) == 0
    # The table has the hint; a warning beside it would show a line of fastseq's own file.
    assert [str(one.message) for one in caught] == ["its own"]
    assert "is the model made of fastseq's layers" in capsys.readouterr().out


def test_modules_beside_the_script_are_found(script: Path) -> None:
    (script.parent / "beside_the_script.py").write_text("VALUE = 3\n")
    append(script, "import beside_the_script; sys.exit(beside_the_script.VALUE)\n")
    before = list(sys.path), list(sys.argv)
    os.chdir("/")
    assert command.main([str(script)]) == 3
    assert (sys.path, sys.argv) == before


def test_module(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append(script, "print('arguments', sys.argv[1:], __name__)\n")
    script.rename(script.parent / "profiled_module.py")
    assert command.main(["--sort", "name", "-m", "profiled_module", "-m", "x"]) == 0
    printed = capsys.readouterr().out
    assert "arguments ['-m', 'x'] __main__" in printed
    assert "rnn_forward gru" in printed


def test_folder_with_a_main(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = script.parent / "application"
    folder.mkdir()
    script.rename(folder / "__main__.py")
    assert command.main([str(folder)]) == 0
    assert "rnn_forward gru" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "a script is missing"),
        (["nothing.py"], "nothing.py does not exist"),
        (["."], "without a __main__.py"),
        (["-m", "no.such.module"], "no module named 'no.such.module'"),
        (["-m"], "expected one argument"),
        (["--sort", "colour", "program.py"], "colour"),
        (["--polish", "x", "program.py"], "--polish"),
        (["--sort"], "--sort"),
        (["--max-calls", "0", "program.py"], "max_calls must be at least 1"),
        (["--max-slices", "many", "program.py"], "many"),
        (["--trace", "nowhere/t.json", "program.py"], "nowhere is no folder"),
        (["--json", ".", "program.py"], "is a folder"),
    ],
)
@pytest.mark.usefixtures("script")
def test_wrong_use_is_one_line(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastseq profile: ")
    assert captured.err.count("\n") == 1
    assert complaint in captured.err


def test_reference_backend_is_one_line(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fastseq.backend("reference"):
        assert command.main([str(script)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_fastseq_command_knows_it(script: Path) -> None:
    append(script, "sys.exit(5)\n")
    # Roofs that lie in the cache folder, so that nothing is measured.
    cache = script.parent / "cache"
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    prepare = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import profiler_recording; "
        "from fastseq.profiler import roofs; roofs._store(profiler_recording.roofs())"
    )
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", prepare, here], env=environment, check=True)
    run = [sys.executable, "-m", "fastseq", "profile", str(script)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 5, done.stderr
    assert "rnn_forward gru" in done.stdout
    # What the compiled kernels have not measured nobody has.
    assert ("roofs of paper" in done.stdout) == HAS_EXTENSION
    assert done.stderr == ""


def test_help_lists_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "profile" in printed
    assert "roof" in printed
    with pytest.raises(SystemExit) as caught:
        command.main(["--help"])
    assert caught.value.code == 0
    assert "(script.py | -m module) [arguments]" in capsys.readouterr().out
