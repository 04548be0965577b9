"""``fastseq.profile()`` around real kernels."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import profiler_recording as by_hand
import pytest
import torch
from kernels import skip_without_extension
from test_profiler_reports import assert_well_formed

import fastseq
from fastseq import _config
from fastseq.profiler import counters, roofs
from fastseq.profiler.counters import Counters, HardwareCounters
from fastseq.profiler.summary import shape_label

skip_without_extension()


@pytest.fixture(autouse=True)
def known_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Roofs in round numbers: measuring takes seconds and has tests of its own."""
    monkeypatch.setattr(roofs, "load_or_measure", lambda progress=None: by_hand.roofs())
    monkeypatch.setattr(roofs, "load", by_hand.roofs)


@pytest.fixture
def layer() -> torch.nn.Module:
    torch.manual_seed(0)
    return fastseq.nn.GRU(7, 9)


def test_training_step(layer: torch.nn.Module, isa: str, threads: int) -> None:
    x = torch.randn(5, 3, 7, requires_grad=True)
    with fastseq.profile() as profile:
        layer(x)[0].sum().backward()
    forward, backward = profile.calls
    assert (forward.kernel, forward.variant) == ("rnn_forward", "gru")
    assert backward.kernel == "rnn_backward"
    for call in (forward, backward):
        assert call.isa == isa
        assert call.dtype == "float32"
        assert 0 <= call.begin_s < call.end_s <= profile.wall_seconds
        assert {"T": 5, "B": 3, "I": 7, "H": 9, "rows": 15}.items() <= call.shape.items()
    assert forward.end_s <= backward.begin_s
    assert forward.shape["training"] == 1
    assert backward.shape["needs_x"] == backward.shape["needs_w"] == 1
    # Backward runs on autograd's thread or on this one; forward on this one.
    assert forward.thread_id == threading.get_native_id()


def test_every_family_is_recorded() -> None:
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    heads = torch.randn(1, 2, 20, 8, dtype=torch.float64)
    with (
        fastseq.linear_product("fused"),
        fastseq.profile(max_slices=0) as profile,
        torch.no_grad(),
    ):
        fastseq.nn.LSTM(8, 4, dtype=torch.float64)(x)
        fastseq.functional.scaled_dot_product_attention(heads, heads, heads)
        fastseq.functional.scaled_dot_product_attention(heads[:, :, :1], heads, heads)
        fastseq.functional.linear(x, x[0], activation="gelu")
        fastseq.functional.rms_norm(x, (8,))
    names = ["rnn_forward lstm", "attention_forward", "attention_decode", "linear_forward gelu"]
    found = [call.name for call in profile.calls]
    assert found == [*names, "norm_forward rms_norm"]
    # A label is the sizes, and nothing that they imply.
    assert [shape_label(call) for call in profile.calls] == [
        "T2 B6 I8 H4",
        "B1 Hq2 Sq20 Skv20 E8",
        "B1 Hq2 Sq1 Skv20 E8",
        "M12 K8 N6",
        "M12 F8",
    ]
    assert {call.dtype for call in profile.calls} == {"float64"}
    assert all(row.roof is not None for row in profile.rows(group="kernel"))


def test_phases_are_within_3_percent_of_the_calls_wall_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Filling the output with NaN before the kernel sees it takes 3 % by itself.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    layer = fastseq.nn.LSTM(512, 512)
    x = torch.randn(100, 32, 512)
    weights = list(layer.parameters())
    ratios = []
    with torch.no_grad():
        fastseq.functional.lstm(x, None, weights)
        for _ in range(5):
            with fastseq.profile() as profile:
                start = time.perf_counter()
                fastseq.functional.lstm(x, None, weights)
                seconds = time.perf_counter() - start
            (call,) = profile.calls
            phases = call.phases()
            # What no phase claims does not count.
            ratios.append(sum(phases.values()) - phases.get("other", 0.0))
            ratios[-1] /= seconds
    # The median, because another process may take the processor between the two clocks.
    assert statistics.median(ratios) == pytest.approx(1, abs=0.03), ratios


def test_threads_of_a_call_are_recorded_each(threads: int) -> None:
    layer = fastseq.nn.LSTM(256, 256)
    with torch.no_grad(), fastseq.profile() as profile:
        layer(torch.randn(20, 16, 256))
    (call,) = profile.calls
    assert len(call.threads) == threads
    for one in call.threads:
        assert call.begin_s <= one.begin_s < one.end_s <= call.end_s
        assert sum(one.seconds.values()) == pytest.approx(one.end_s - one.begin_s)
        assert one.seconds["recurrent product"] > 0
        assert one.counts["recurrent product"] >= 20
        reached = one.begin_s
        for _, begin, end in one.slices:
            assert begin == pytest.approx(reached, abs=1e-9)
            reached = end
    assert sum(call.phases().values()) == pytest.approx(call.seconds)


def test_python_threads_side_by_side() -> None:
    layer = fastseq.nn.GRU(32, 32)
    ready = threading.Barrier(3)

    def work() -> None:
        with torch.no_grad():
            x = torch.randn(10, 4, 32)
            ready.wait()
            for _ in range(20):
                layer(x)

    workers = [threading.Thread(target=work) for _ in range(2)]
    with fastseq.profile() as profile:
        for worker in workers:
            worker.start()
        ready.wait()
        for worker in workers:
            worker.join()
    by_thread: dict[int, int] = {}
    for call in profile.calls:
        by_thread[call.thread_id] = by_thread.get(call.thread_id, 0) + 1
        assert sum(call.phases().values()) == pytest.approx(call.seconds)
    assert sorted(by_thread.values()) == [20, 20]
    begins = [call.begin_s for call in profile.calls]
    assert begins == sorted(begins)


def test_backward_called_from_another_thread() -> None:
    layer = fastseq.nn.GRU(8, 8)
    with fastseq.profile() as profile:
        loss = layer(torch.randn(3, 2, 8))[0].sum()
        worker = threading.Thread(target=loss.backward)
        worker.start()
        worker.join()
    forward, backward = profile.calls
    assert backward.kernel == "rnn_backward"
    assert backward.thread_id != forward.thread_id


_SESSIONS = """
import threading, time, torch, fastseq
from fastseq import _cpu, _config
_config.extension()
layer, x, done = fastseq.nn.LSTM(64, 64), torch.randn(200, 8, 64), threading.Event()

def work():
    with torch.no_grad():
        while not done.is_set():
            layer(x)

worker = threading.Thread(target=work)
worker.start()
for _ in range(100):
    for limit in (1, 2000):
        _cpu.profile_start(1000, limit)
        time.sleep(0.001)
        for call in _cpu.profile_stop()["calls"]:
            for thread in call["threads"]:
                assert len(thread["slices"]) <= 3 * limit
                assert sum(thread["ticks"].values()) == thread["end"] - thread["begin"]
done.set()
worker.join()
"""


def test_a_call_outlives_the_profile_it_began_in() -> None:
    """What it may write is what its own profile gave it, not the next one's limit.

    In a process of its own: writing past the end would bring this one down.
    """
    done = subprocess.run(
        [sys.executable, "-c", _SESSIONS], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_results_do_not_change(layer: torch.nn.Module, threads: int) -> None:
    x = torch.randn(6, 4, 7)
    with torch.no_grad():
        plain = layer(x)[0]
        with fastseq.profile():
            assert torch.equal(layer(x)[0], plain)


# --- limits


def test_calls_beyond_the_limit_are_counted(layer: torch.nn.Module) -> None:
    with torch.no_grad(), fastseq.profile(max_calls=3) as profile:
        for _ in range(8):
            layer(torch.zeros(2, 1, 7))
    assert len(profile.calls) == 3
    assert profile.calls_dropped == 5
    assert "5 more calls" in profile.text()


def test_slices_beyond_the_limit_are_counted(layer: torch.nn.Module) -> None:
    with torch.no_grad(), fastseq.profile(max_slices=4) as profile:
        layer(torch.zeros(20, 4, 7))
    (call,) = profile.calls
    assert all(len(list(one.slices)) == 4 for one in call.threads)
    assert profile.slices_dropped > 0
    # Times do not depend on slices.
    assert sum(call.phases().values()) == pytest.approx(call.seconds)


@pytest.mark.parametrize("arguments", [{"max_calls": 0}, {"max_slices": -1}])
def test_limits_are_checked(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        fastseq.profile(**arguments)


# --- the block


def test_profiles_do_not_nest(layer: torch.nn.Module) -> None:
    with fastseq.profile() as outer:
        with (
            pytest.raises(RuntimeError, match="already running; profiles do not nest"),
            fastseq.profile(),
        ):
            pass
        with torch.no_grad():
            layer(torch.zeros(2, 1, 7))
    assert len(outer.calls) == 1
    with torch.no_grad(), fastseq.profile() as after:
        layer(torch.zeros(2, 1, 7))
    assert len(after.calls) == 1


def test_an_exception_keeps_what_was_recorded(layer: torch.nn.Module) -> None:
    profile = fastseq.profile()
    with contextlib.suppress(KeyError), torch.no_grad(), profile:
        layer(torch.zeros(2, 1, 7))
        raise KeyError("the user's")
    assert len(profile.calls) == 1
    with torch.no_grad(), fastseq.profile() as after:
        layer(torch.zeros(2, 1, 7))
    assert len(after.calls) == 1


def test_a_profile_is_used_once(layer: torch.nn.Module) -> None:
    with torch.no_grad(), fastseq.profile() as profile:
        layer(torch.zeros(2, 1, 7))
    with pytest.raises(RuntimeError, match="finished"), profile:
        pass


def test_a_running_profile_has_no_numbers(layer: torch.nn.Module) -> None:
    with fastseq.profile() as profile, torch.no_grad():
        layer(torch.zeros(2, 1, 7))
        for ask in (lambda: profile.calls, profile.table, lambda: profile.to_json("x.json")):
            with pytest.raises(RuntimeError, match="has not ended"):
                ask()
        assert "running" in str(profile)


def test_a_block_without_kernels_warns() -> None:
    with pytest.warns(RuntimeWarning, match="no kernels ran"), fastseq.profile() as profile:
        torch.zeros(3).sum()
    assert "no kernels ran" in profile.text()
    assert profile.calls == ()


def test_the_reference_backend_has_no_kernels() -> None:
    with (
        fastseq.backend("reference"),
        pytest.raises(RuntimeError, match="no kernels to profile"),
        fastseq.profile(),
    ):
        pass


def test_missing_kernels_are_a_runtime_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("not built")

    monkeypatch.setattr(_config, "extension", missing)
    with pytest.raises(RuntimeError, match="not built"), fastseq.profile():
        pass


def test_importing_the_profiler_needs_no_torch() -> None:
    program = (
        "import sys, fastseq, fastseq.profiler.command; fastseq.profile; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


# --- reports of real runs


def test_trace_of_a_real_run_merges_with_torchs(tmp_path: Path) -> None:
    layer = fastseq.nn.LSTM(64, 64)
    x = torch.randn(12, 8, 64, requires_grad=True)
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as theirs,
        fastseq.profile() as ours,
    ):
        for _ in range(3):
            layer(x)[0].cumsum(0).sum().backward()
    ours.trace(tmp_path / "ours.json")
    assert_well_formed(json.loads((tmp_path / "ours.json").read_text()))
    theirs.export_chrome_trace(str(tmp_path / "torch.json"))
    ours.trace(tmp_path / "both.json", merge=tmp_path / "torch.json")
    events = json.loads((tmp_path / "both.json").read_text())["traceEvents"]
    kernels = [e for e in events if e.get("cat") == "kernel" and e["name"] == "rnn_forward lstm"]
    ops = [e for e in events if e.get("cat") == "cpu_op"]
    # In backward there is one, too.
    sums = [e for e in ops if e["name"] == "aten::cumsum"][::2]
    assert len(kernels) == len(sums) == 3
    # One clock: the kernel of a step has ended when torch sums its result up, and the next step's
    # has not begun. A tenth of a millisecond is for two ways of reading the same clock.
    for index, (kernel, total) in enumerate(zip(kernels, sums, strict=True)):
        assert kernel["ts"] + kernel["dur"] <= total["ts"] + 100
        if index + 1 < len(kernels):
            assert total["ts"] + total["dur"] <= kernels[index + 1]["ts"] + 100
    assert {e["pid"] for e in kernels} == {e["pid"] for e in sums}
    assert not {e["tid"] for e in kernels} & {e["tid"] for e in sums}


def test_json_of_a_real_run(layer: torch.nn.Module, tmp_path: Path) -> None:
    with torch.no_grad(), fastseq.profile() as profile:
        layer(torch.zeros(4, 2, 7))
    profile.to_json(tmp_path / "profile.json")
    again = fastseq.Profile.from_json(tmp_path / "profile.json")
    assert again.calls == profile.calls
    assert again.machine == profile.machine
    assert again.machine["threads"] == torch.get_num_threads()


# --- hardware counters


def test_hardware_counters_are_numbers_or_a_reason(layer: torch.nn.Module) -> None:
    with torch.no_grad(), fastseq.profile(hardware_counters=True) as profile:
        layer(torch.zeros(20, 8, 7))
    counted = profile.hardware_counters
    assert counted is not None
    line = profile.text().splitlines()[-1]
    if counted.reason is None:
        assert counted.values["instructions"] > 1000
        assert "cycles" in line
    else:
        assert counted.values == {}
        assert f"n/a ({counted.reason})" in line


@pytest.mark.parametrize(
    ("error", "words"),
    [(13, "perf_event_paranoid is"), (2, "virtual machines"), (38, "ENOSYS")],
)
def test_reasons_of_the_kernel(error: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "_open_event", lambda *arguments: -error)
    counting = HardwareCounters()
    counting.start()
    reason = counting.stop().reason
    assert reason is not None
    assert words in reason


def test_reason_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    counting = HardwareCounters()
    counting.start()
    assert "needs Linux" in str(counting.stop().reason)


def test_counters_line() -> None:
    line = Counters({"cycles": 1000, "instructions": 2500, "cache misses": 7}).line()
    assert line == (
        "hardware counters: 1,000 cycles, 2,500 instructions, 7 cache misses, "
        "2.50 instructions per cycle"
    )
