"""Timing of calls in turn: medians, percentiles, caches."""

import contextlib
import gc
import time

import pytest
import torch

from fastseq.bench import caches
from fastseq.bench import deadline as deadline_module
from fastseq.bench import timing as timing_module
from fastseq.bench.deadline import DeadlineError, deadline
from fastseq.bench.timing import interleave, interleave_cold, percentile, summarize


def test_summarize() -> None:
    timing = summarize([1.0, 2.0, 3.0, 4.0, 5.0], calls_per_visit=1)
    assert (timing.lower_quartile_s, timing.median_s, timing.upper_quartile_s) == (2.0, 3.0, 4.0)
    assert summarize([1.0], calls_per_visit=1).upper_quartile_s == 1.0


def test_percentiles_by_hand() -> None:
    # 1, 2, ..., 200 in another order: 190 of them are at most 190.
    samples = [float((index * 37) % 200 + 1) for index in range(200)]
    assert sorted(samples) == [float(value) for value in range(1, 201)]
    assert percentile(samples, 95) == 190.0
    assert percentile(samples, 99) == 198.0
    timing = summarize([5.0, 7.0], calls_per_visit=40, singles=samples)
    assert timing.median_s == 6.0
    assert (timing.p50_s, timing.p95_s, timing.p99_s) == (100.5, 190.0, 198.0)
    assert timing.minimum_s == 1.0


@pytest.mark.parametrize(("count", "given"), [(19, ()), (20, (95,)), (99, (95,)), (100, (95, 99))])
def test_no_percentile_that_would_be_the_maximum(count: int, given: tuple[int, ...]) -> None:
    samples = [float(index) for index in range(count)]
    for percent in (95, 99):
        found = percentile(samples, percent)
        assert (found is not None) == (percent in given)
        if found is not None:
            assert found < max(samples)


def test_visits_of_one_call_are_single_calls() -> None:
    timing = summarize([3.0, 1.0, 2.0], calls_per_visit=1)
    assert (timing.p50_s, timing.minimum_s) == (2.0, 1.0)
    assert timing.p95_s is None


def test_without_single_calls_only_the_median_is_known() -> None:
    timing = summarize([3.0, 1.0, 2.0], calls_per_visit=8)
    assert (timing.p50_s, timing.p95_s, timing.minimum_s) == (2.0, None, None)


def test_interleave_visits_every_call_equally() -> None:
    visited: list[str] = []
    calls = {name: (lambda name=name: visited.append(name)) for name in "ab"}
    timings = interleave(calls, seconds=0, minimum_visits=3, settle_seconds=0)
    assert {timing.visits for timing in timings.values()} == {3}
    assert {"a", "b"} == set(visited)


def test_short_calls_are_also_timed_one_by_one() -> None:
    timing = interleave({"a": lambda: None}, seconds=0, settle_seconds=0)["a"]
    assert timing.calls_per_visit > 1
    assert timing.p99_s is not None
    assert 0 < timing.minimum_s <= timing.p50_s <= timing.p95_s <= timing.p99_s


def test_slow_first_calls_do_not_decide_how_many_are_timed() -> None:
    pauses = [3e-2, 3e-2]

    def call() -> None:
        if pauses:
            time.sleep(pauses.pop())

    assert interleave({"a": call}, seconds=0, settle_seconds=0)["a"].calls_per_visit > 1


def test_long_calls_are_their_own_samples() -> None:
    timing = interleave({"a": lambda: time.sleep(3e-2)}, seconds=0, settle_seconds=0)["a"]
    assert (timing.visits, timing.calls_per_visit) == (7, 1)
    assert timing.p50_s == timing.median_s
    assert timing.minimum_s >= 3e-2


def test_a_limit_ends_what_would_take_long() -> None:
    """Every call has its turn, but not as often as asked for."""
    calls = {name: lambda: time.sleep(3e-2) for name in "ab"}
    timings = interleave(calls, seconds=0, limit_seconds=0.09, settle_seconds=0)
    assert {timing.visits for timing in timings.values()} == {2}
    cold = interleave_cold(calls, lambda: None, seconds=9, limit_seconds=0, settle_seconds=0)
    assert {timing.visits for timing in cold.values()} == {1}


def test_the_trial_of_a_long_call_is_a_visit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_module, "_SLOW_SECONDS", 1e-3)
    monkeypatch.setattr(timing_module, "_LONG_SECONDS", 2e-3)
    called: list[float] = []

    def call() -> None:
        called.append(time.perf_counter())
        time.sleep(3e-3)

    timing = interleave({"a": call}, seconds=0, limit_seconds=0, settle_seconds=0)["a"]
    assert timing.visits == len(called) == 2
    assert timing.calls_per_visit == 1


def test_between_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first and after the last, and in the middle when it was long ago."""
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    for wait, expected in ((0.0, "-ab-ba-ab-"), (9.0, "-abbaab-")):
        monkeypatch.setattr(timing_module, "_BETWEEN_SECONDS", wait)
        monkeypatch.setattr(timing_module, "_calls_per_visit", lambda call: (1, []))
        order.clear()
        interleave(
            calls,
            seconds=0,
            minimum_visits=3,
            settle_seconds=0,
            between=lambda: order.append("-"),
        )
        assert "".join(order) == expected


def test_deadlines_in_one_another() -> None:
    def inner_and_more() -> None:
        with pytest.raises(DeadlineError, match=r"it takes more than 0\.01 s"), deadline(0.01):
            time.sleep(5)
        time.sleep(5)

    with (
        pytest.raises(DeadlineError, match=r"the case takes more than 0\.02 s"),
        deadline(0.02, "the case takes"),
    ):
        inner_and_more()
    with deadline(0.01), deadline(5):
        pass
    time.sleep(0.02)  # nothing is left to go off


def test_a_deadline_that_was_caught_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def catches() -> None:
        with contextlib.suppress(DeadlineError):
            time.sleep(5)
        time.sleep(5)

    monkeypatch.setattr(deadline_module, "_AGAIN_SECONDS", 0.01)
    with pytest.raises(DeadlineError), deadline(0.01):
        catches()


def test_garbage_collection_is_as_before_after_an_error() -> None:
    def fails() -> None:
        assert not gc.isenabled()
        raise RuntimeError

    assert gc.isenabled()
    with pytest.raises(RuntimeError):
        interleave_cold({"a": fails}, lambda: None)
    assert gc.isenabled()


def test_every_cold_call_comes_after_a_flush() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    timings = interleave_cold(
        calls, lambda: order.append("flush"), seconds=0, minimum_visits=3, settle_seconds=0
    )
    turns = ["a", "b", "b", "a", "a", "b"]
    assert order == [step for name in turns for step in ("flush", name)]
    assert {(one.visits, one.calls_per_visit) for one in timings.values()} == {(3, 1)}


def test_the_flusher_writes_and_reads_twice_the_last_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "last_level_bytes", lambda: 1 << 20)
    flush = caches.CacheFlusher()
    assert flush._values.nbytes == 2 << 20
    flush()
    flush()
    assert torch.equal(flush._values, torch.full_like(flush._values, 2.0))


def test_the_last_cache_is_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"L1d": 32 << 10, "L2": 1 << 20, "L3": 30 << 20}
    monkeypatch.setattr("fastseq._config._caches_bytes", lambda: sizes)
    assert caches.last_level_bytes() == 30 << 20
    monkeypatch.setattr("fastseq._config._caches_bytes", dict)
    assert caches.last_level_bytes() > 0
