"""``fastseq bench run``: peers, threads, display, file, errors, interruption."""

import dataclasses
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels import HAS_EXTENSION
from rich.console import Console

from fastseq.bench import caches, command, families, machine, peers, results, run_command, runner
from fastseq.bench.cases import SUITES, make_case
from fastseq.bench.display import Display, clock
from fastseq.bench.gate import GateResult, TensorError
from fastseq.bench.peers import PreparedPeer

TINY = ["--case", "rnn-inference-T1-B1-H128", "--case", "gru-inference-T1-B1-H128"]
FAST = ["--seconds", "0.01", "--no-probes"]
SMALL = make_case("gru", "inference", T=3, B=2, H=8)
TRAINING = make_case("gru", "training", T=3, B=2, H=8)
ENGINE = runner.Plan(peers=("torch", "onnxruntime"), seconds=0.01)


def run(*arguments: str) -> int:
    return command.main(["run", *TINY, *FAST, *arguments])


def one_line_error(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("fastseq bench: ")
    return shown.err


# --- a whole run


def test_two_cases_on_one_and_two_threads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Emptying a cache of hundreds of MiB takes longer than all else here.
    monkeypatch.setattr(caches, "last_level_bytes", lambda: 1 << 20)
    file = tmp_path / "out.json"
    before = torch.get_num_threads()
    assert run("--peer", "torch", "--threads", "1,2", "--cold", "--json", str(file)) == 0
    assert torch.get_num_threads() == before
    document = json.loads(file.read_text())
    assert (document["format"], document["complete"]) == (2, True)
    assert document["machine"]["threads"] == [1, 2]
    found, _ = results.load(file)
    assert [(one.case.name, one.threads) for one in found] == [
        (name, threads)
        for name in ("gru-inference-T1-B1-H128", "rnn-inference-T1-B1-H128")
        for threads in (1, 2)
    ]
    for one in found:
        names = {"torch", "fastseq", "fastseq.functional"}
        assert set(one.timings) == set(one.cold) == names
        assert set(one.first_call_s) == {"torch", "fastseq"}
        assert not one.skipped
        assert not one.probes
        if HAS_EXTENSION:
            assert one.fma_peak_gflops > 0
        else:
            assert one.fma_peak_gflops is None
        assert one.timings["fastseq"].p99_s is not None
    shown = capsys.readouterr().out
    assert "[4/4] rnn-inference-T1-B1-H128, 2 threads: " in shown
    assert "vs torch" in shown


def test_every_peer_runs_on_the_threads_of_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, int]] = []

    def prepare(name: str, built: object, threads: int) -> PreparedPeer:
        asked.append((name, threads, torch.get_num_threads()))
        raise peers.PeerSkippedError("only asked")

    monkeypatch.setattr(peers, "prepare", prepare)
    list(runner.run([SMALL], dataclasses.replace(ENGINE, threads=(1, 2))))
    assert asked == [("onnxruntime", 1, 1), ("onnxruntime", 2, 2)]


def test_a_peer_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    file = tmp_path / "out.json"
    assert run("--peer", "torch,onnxruntime", "--threads", "1", "--json", str(file)) == 0
    reason = "not installed (onnxruntime)"
    assert f"skipped onnxruntime in 2 cases: {reason}" in capsys.readouterr().out
    for one in results.load(file)[0]:
        assert one.skipped == {"onnxruntime": reason}
        assert "onnxruntime" not in one.timings


def test_torch_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--peer", "torch-compile", "--threads", "1") == 0
    assert "vs compiled" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "suite", "chosen", "probes", "seconds"),
    [
        ([], "quick", ["torch", "onnxruntime", "openvino"], False, 1.0),
        (["--case", "*"], "full", list(results.PEERS.values()), True, 2.0),
        (["--suite", "rnn"], "rnn", list(results.PEERS.values()), True, 2.0),
        (["--suite", "quick", "--probes"], "quick", None, True, 1.0),
        (
            ["--peer", "openvino,torch", "--peer", "torch-compile", "--seconds", "3"],
            "quick",
            ["torch", "torch.compile", "openvino"],
            False,
            3.0,
        ),
    ],
)
def test_defaults(
    given: list[str],
    suite: str,
    chosen: list[str] | None,
    probes: bool,
    seconds: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sessions = []

    def run_session(session: run_command._Session) -> int:
        sessions.append(session)
        return 0

    monkeypatch.setattr(run_command._Session, "run", run_session)
    assert command.main(["run", *given]) == 0
    (session,) = sessions
    assert session.suite == suite
    assert session.cases == list(SUITES[suite])
    assert chosen is None or list(session.plan.peers) == chosen
    assert (session.plan.probes, session.plan.seconds) == (probes, seconds)
    assert session.plan.threads == (torch.get_num_threads(),)


# --- what may go wrong


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--case", "nothing*"], "nothing*"),
        (["--suite", "poetry"], "poetry"),
        (["--peer", "torch,abacus"], "abacus"),
        (["--threads", "0"], "--threads"),
        (["--threads", "two"], "two"),
        (["--threads", ""], "--threads"),
        (["--seconds", "-1"], "--seconds"),
        (["--seconds", "soon"], "soon"),
        (["--device", "abacus"], "abacus"),
        (["--nonsense"], "--nonsense"),
        (["--json", "/dev/null/results.json"], "/dev/null"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = command.main(["run", *arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert named in one_line_error(capsys)


def test_cuda_is_refused_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    from fastseq._config import capabilities

    assert command.main(["run", "--device", "cuda"]) == 2
    assert (capabilities()["cuda"]["reason"] or "times the CPU") in one_line_error(capsys)


def test_a_failed_gate_is_not_timed_and_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = GateResult((TensorError("output", 1.0, 0.0, 0.1),))
    family = dataclasses.replace(families.family_of(SMALL), check=lambda built: wrong)
    monkeypatch.setattr(runner, "family_of", lambda case: family)
    assert run("--peer", "torch", "--threads", "1") == run_command.FAILED == 1
    shown = capsys.readouterr().out
    assert "FAILED: output error 1.00e+00" in shown
    assert "x torch" not in shown


def test_a_case_that_raises_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    good = families.family_of(SMALL)

    def build(case: object) -> object:
        if "gru" in case.name:
            raise MemoryError("no room\nfor it")
        return good.build(case)

    monkeypatch.setattr(runner, "family_of", lambda case: dataclasses.replace(good, build=build))
    file = tmp_path / "out.json"
    assert run("--peer", "torch", "--threads", "1", "--json", str(file)) == 1
    first, second = results.load(file)[0]
    assert first.skipped == {"case": "MemoryError: no room"}
    assert not first.gate.passed
    assert not first.timings
    assert second.timings
    assert "failed 1 case: MemoryError: no room" in capsys.readouterr().out


def test_a_case_that_takes_too_long_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    family = families.family_of(SMALL)
    slow = dataclasses.replace(family, check=lambda built: time.sleep(5))
    monkeypatch.setattr(runner, "family_of", lambda case: slow)
    monkeypatch.setattr(runner, "CASE_LIMIT_SECONDS", 0.05)
    result = runner.run_case(SMALL, runner.Plan(peers=("torch",)))
    assert result.raised == "DeadlineError: the case takes more than 0.05 s"
    assert not result.timings


def test_the_peak_is_that_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured between the turns of the peers, not once before them."""
    rates = iter([100.0, 300.0, 200.0, *[250.0] * 99])
    order: list[str] = []

    def peak(dtype: str, seconds: float) -> float:
        assert dtype == "float32"
        assert seconds < 0.05
        order.append("peak")
        return next(rates)

    def interleaved(calls: dict[str, Any], *, between: Any, **options: Any) -> dict[str, Any]:
        between()
        order.append("turn")
        between()
        order.append("turn")
        between()
        return {}

    monkeypatch.setattr(runner, "fma_peak_gflops", peak)
    monkeypatch.setattr(runner, "interleave", interleaved)
    result = runner.run_case(SMALL, runner.Plan(peers=("torch",), probes=False))
    assert order == ["peak", "turn", "peak", "turn", "peak"]
    assert result.fma_peak_gflops == 200.0


def test_interruption_keeps_what_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    right = runner.run_case
    calls = []

    def interrupted(*arguments: object) -> results.CaseResult:
        calls.append(arguments)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return right(*arguments)

    monkeypatch.setattr(runner, "run_case", interrupted)
    file = tmp_path / "out.json"
    arguments = ("--peer", "torch", "--threads", "1", "--json", str(file))
    assert run(*arguments) == run_command.INTERRUPTED == 130
    (found,), _ = results.load(file)
    assert found.timings
    assert json.loads(file.read_text())["complete"] is False
    shown = capsys.readouterr()
    assert "interrupted after 1 of 2 runs" in shown.err
    assert "gru-inference-T1-B1-H128" in shown.out


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_real_interrupt_ends_with_130(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    program = (
        "import os, signal, sys; from fastseq.bench import command, runner\n"
        # A process that a shell has started in the background ignores the signal from birth.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "right = runner.run_case\n"
        "def run_case(case, *rest):\n"
        "    if 'rnn' in case.name: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return right(case, *rest)\n"
        "runner.run_case = run_case\n"
        "sys.exit(command.main(sys.argv[1:]))"
    )
    arguments = ["run", *TINY, *FAST, "--peer", "torch", "--threads", "1", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert len(results.load(file)[0]) == 1


# --- peers are checked


def prepared(output: torch.Tensor) -> PreparedPeer:
    return PreparedPeer(lambda: None, lambda: {"output": output}, 0.5)


def test_a_peer_with_another_output_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = prepared(torch.zeros(3, 2, 8))
    monkeypatch.setattr(peers, "prepare", lambda name, built, threads: wrong)
    result = runner.run_case(SMALL, ENGINE)
    assert result.skipped == {"onnxruntime": "its output differs from torch's"}
    assert "onnxruntime" not in {**result.timings, **result.first_call_s}


def test_a_peer_that_raises_is_skipped_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(name: str, built: object, threads: int) -> PreparedPeer:
        raise RuntimeError("no such operator\nat all")

    monkeypatch.setattr(peers, "prepare", prepare)
    result = runner.run_case(SMALL, ENGINE)
    assert result.skipped == {"onnxruntime": "RuntimeError: no such operator"}
    assert set(result.timings) == {"torch", "fastseq"}


def test_a_peer_with_torchs_output_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "prepare", lambda name, built, threads: prepared(torch.zeros(1)))
    monkeypatch.setattr(peers, "agrees", lambda built, output: True)
    result = runner.run_case(SMALL, ENGINE)
    assert "onnxruntime" in result.timings
    assert result.first_call_s["onnxruntime"] == 0.5


@pytest.mark.parametrize("case", [SMALL, TRAINING], ids=lambda case: case.name)
@pytest.mark.parametrize("right", [True, False])
def test_compiled_results_are_checked(
    case: object, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_(layer: torch.nn.Module, dynamic: object = None) -> torch.nn.Module:
        if not right:
            with torch.no_grad():
                layer = families.family_of(case).build(case).torch_layer
                layer.weight_hh_l0 *= 1.1
        return layer

    monkeypatch.setattr(torch, "compile", compile_)
    result = runner.run_case(case, runner.Plan(peers=("torch", "torch.compile"), seconds=0.01))
    if right:
        assert {"torch", "torch.compile", "fastseq"} == set(result.timings)
        assert result.first_call_s["torch.compile"] > 0
    else:
        assert "differ" in result.skipped["torch.compile"]
        assert "torch.compile" not in result.timings


# --- display


def test_the_display_on_a_terminal() -> None:
    cases = [SMALL, TRAINING] * 20
    plan = runner.Plan(peers=("torch",), threads=(1,), seconds=0.01)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160, height=14)
    record = machine.describe(plan.threads)
    result = runner.run_case(SMALL, plan)
    with Display(record, cases, plan, console) as display:
        assert display.remaining_seconds() is None
        for index, _ in enumerate(display.steps()):
            display.phase("checking")
            display.add(result)
            if index == 0:
                first = screen.getvalue()
    display.finish([result])
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", first)
    assert "0/40" in text
    assert "1/40" in text
    assert "checking" in text
    assert "to go" in text
    # Redrawn in place, so it has to fit: never more rows than the screen has lines.
    frames = re.split(r"median ± half the quartile range", screen.getvalue())
    assert max(frame.count(SMALL.name) for frame in frames) < 14
    assert display.remaining_seconds() == 0


def test_remaining_time_goes_by_the_work() -> None:
    small, large = SMALL, make_case("lstm", "training", T=100, B=64, H=1024)
    plan = runner.Plan(peers=(), threads=(1,))
    console = Console(file=io.StringIO())
    with Display(machine.describe((1,)), [small, large], plan, console) as display:
        display.add(results.CaseResult(small, GateResult(())))
        display._started -= 10
        # The second case is many times the work of the first.
        assert display.remaining_seconds() > 40


def test_clock() -> None:
    assert [clock(seconds) for seconds in (0, 59.4, 61, 3661)] == [
        "0:00",
        "0:59",
        "1:01",
        "1:01:01",
    ]


# --- the machine


def test_machine_record() -> None:
    record = machine.describe((1, 2))
    assert json.loads(json.dumps(record)) == record
    assert record["threads"] == [1, 2]
    assert machine.describe(2)["threads"] == [2]
    assert record["libraries"]["torch"].startswith(torch.__version__.split("+")[0])
    assert {"virtualised", "governor", "load_average", "caches_bytes"} <= set(record)


def test_threads_in_words() -> None:
    shown = [machine.threads_text({"threads": one}) for one in (2, [1], [1, 2])]
    assert shown == ["2 threads", "1 thread", "1 and 2 threads"]


@pytest.mark.parametrize(
    ("load", "warned"), [(None, False), (2.9, False), (3.0, True), (6.32, True)]
)
def test_a_busy_machine_is_a_warning(
    load: float | None,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(machine, "load_average", lambda: load)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    machine.warn_if_busy()
    printed = capsys.readouterr()
    assert printed.out == ""
    if warned:
        text = f"fastseq bench: warning: the load average is {load:.1f} on 2 cores: "
        assert printed.err.startswith(text)
        assert printed.err.count("\n") == 1
    else:
        assert printed.err == ""


def test_a_reader_that_has_seen_enough() -> None:
    """``fastseq bench list | head -1`` says nothing but the line."""
    command = [sys.executable, "-m", "fastseq.bench", "list"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout
        assert running.stderr
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 1
