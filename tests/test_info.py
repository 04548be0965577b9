"""``fastseq info`` and the ``fastseq`` command."""

import json
import subprocess
import sys

import pytest
from kernels import HAS_EXTENSION, KERNELS, needs_extension

from fastseq import cli, info


def test_text_names_every_topic(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([]) == 0
    printed = capsys.readouterr().out
    for topic in ("fastseq", "Python", "torch", "CPU", "ISA tier chosen", "caches", "CUDA kernels"):
        assert topic in printed


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backend"] == KERNELS
    assert found["extension"]["available"] == HAS_EXTENSION
    if HAS_EXTENSION:
        assert found["isa_chosen"] in found["isa_usable"]
    assert set(found["isa_usable"]) <= set(found["isa_built"])


def test_bad_argument_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--jsn"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "--jsn" in captured.err


def test_unavailable_parts_say_why() -> None:
    found = info.collect()
    found["extension"] = {"available": False, "reason": "not compiled"}
    found["isa_built"], found["isa_usable"], found["isa_chosen"] = [], [], None
    found["caches_bytes"] = {}
    found["backend"], found["backend_reason"] = "numba", "nothing compiled"
    found["numba"] = {"available": False, "reason": "not installed"}
    text = "\n".join(info.lines(found))
    assert "not available: not compiled" in text
    assert "not available: not installed" in text
    assert "numba (nothing compiled)" in text
    assert "none" in text


def test_runs_without_torch() -> None:
    # A finder that refuses torch stands for an environment that lacks it.
    program = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "from fastseq.info import main\n"
        "sys.exit(main([]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ISA tiers built" in done.stdout


@needs_extension
def test_unusable_tier_is_one_line() -> None:
    program = (
        "import os, sys\n"
        "os.environ['FASTSEQ_ISA'] = 'abacus'\n"
        "from fastseq.info import main\n"
        "sys.exit(main([]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert "abacus" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("module", ["fastseq.info", "fastseq"])
def test_module_entry_points(module: str) -> None:
    command = [sys.executable, "-m", module] + (["info"] if module == "fastseq" else [])
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ISA tier chosen" in done.stdout


def test_cli_help_lists_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "info" in printed
    assert "bench" in printed


@pytest.mark.parametrize("arguments", [[], ["polish"]])
def test_cli_rejects_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_cli_version(capsys: pytest.CaptureFixture[str]) -> None:
    import fastseq

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == fastseq.__version__
