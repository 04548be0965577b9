"""Bad arguments of the recurrent layers: torch's exception classes, and messages that help."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recurrent import (
    IN,
    B,
    H,
    T,
    build_pair,
    each_name,
    raised,
)
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastseq.nn as fast_nn
from fastseq import backends, functional


@pytest.fixture(autouse=True)
def _seed_and_forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(backends, "_warned_reasons", set())


def zeros(name: str, *shape: int, **kwargs: Any) -> Any:
    hx = torch.zeros(*shape, **kwargs)
    return (hx, hx) if name == "LSTM" else hx


# What a call with bad arguments looks like; every entry takes the module and its name.
BAD_CALLS: dict[str, Callable[[Any, str], Any]] = {
    "1-D input": lambda m, n: m(torch.randn(3)),
    "4-D input": lambda m, n: m(torch.randn(1, 2, 3, 4)),
    "input features": lambda m, n: m(torch.randn(T, B, IN + 1)),
    "unbatched input features": lambda m, n: m(torch.randn(T, IN + 1)),
    "float64 input": lambda m, n: m(torch.randn(T, B, IN).double()),
    "bfloat16 input": lambda m, n: m(torch.randn(T, B, IN).bfloat16()),
    "integer input": lambda m, n: m(torch.ones(T, B, IN, dtype=torch.int64)),
    "complex input": lambda m, n: m(torch.ones(T, B, IN, dtype=torch.complex64)),
    "meta input": lambda m, n: m(torch.randn(T, B, IN, device="meta")),
    "list input": lambda m, n: m([[1.0]]),
    "None input": lambda m, n: m(None),
    "numpy input": lambda m, n: m(torch.randn(T, B, IN).numpy()),
    "no time": lambda m, n: m(torch.randn(0, B, IN)),
    "no time, unbatched": lambda m, n: m(torch.randn(0, IN)),
    "no time, no batch": lambda m, n: m(torch.randn(0, 0, IN)),
    "hx layers": lambda m, n: m(torch.randn(T, B, IN), zeros(n, 2, B, H)),
    "hx batch": lambda m, n: m(torch.randn(T, B, IN), zeros(n, 1, B + 1, H)),
    "hx size": lambda m, n: m(torch.randn(T, B, IN), zeros(n, 1, B, H + 1)),
    "hx 2-D": lambda m, n: m(torch.randn(T, B, IN), zeros(n, B, H)),
    "hx 3-D, unbatched": lambda m, n: m(torch.randn(T, IN), zeros(n, 1, 1, H)),
    "hx size, unbatched": lambda m, n: m(torch.randn(T, IN), zeros(n, 1, H + 1)),
    "hx float64": lambda m, n: m(torch.randn(T, B, IN), zeros(n, 1, B, H, dtype=torch.float64)),
    "hx on meta": lambda m, n: m(torch.randn(T, B, IN), zeros(n, 1, B, H, device="meta")),
    "hx one-tuple": lambda m, n: m(torch.randn(T, B, IN), (torch.zeros(1, B, H),)),
    "hx three-tuple": lambda m, n: m(torch.randn(T, B, IN), (torch.zeros(1, B, H),) * 3),
    "hx pair of None": lambda m, n: m(torch.randn(T, B, IN), (None, None)),
    "packed features": lambda m, n: m(packed(torch.randn(T, B, IN + 1))),
    "packed float64": lambda m, n: m(packed(torch.randn(T, B, IN).double())),
    "packed hx batch": lambda m, n: m(packed(torch.randn(T, B, IN)), zeros(n, 1, B - 1, H)),
    "packed hx size": lambda m, n: m(packed(torch.randn(T, B, IN)), zeros(n, 1, B, H + 1)),
    "batch_sizes too large": lambda m, n: m(with_batch_sizes([9, 9])),
    "batch_sizes increasing": lambda m, n: m(with_batch_sizes([1, 3, 6])),
    "batch_sizes ending in zero": lambda m, n: m(with_batch_sizes([3, 3, 4, 0])),
    "batch_sizes empty": lambda m, n: m(with_batch_sizes([])),
    "batch_sizes 2-D": lambda m, n: m(with_batch_sizes([[3, 3]])),
    "batch_sizes int32": lambda m, n: m(with_batch_sizes([5, 5], torch.int32)),
}


def packed(x: torch.Tensor) -> PackedSequence:
    return pack_padded_sequence(x, [6, 4, 4, 1])


def with_batch_sizes(sizes: list[Any], dtype: torch.dtype = torch.int64) -> PackedSequence:
    return PackedSequence(torch.randn(10, IN), torch.tensor(sizes, dtype=dtype))


@each_name
@pytest.mark.parametrize("mistake", BAD_CALLS)
@pytest.mark.filterwarnings("ignore::fastseq.FastseqFallbackWarning")
def test_bad_calls_raise_what_torch_raises(name: str, mistake: str) -> None:
    theirs, ours = build_pair(name, IN, H, dtype=torch.float32)
    call = BAD_CALLS[mistake]
    expected = raised(lambda: call(theirs, name))
    assert expected is not None, "torch accepts this, so it is no mistake"
    assert raised(lambda: call(ours, name)) is expected


@each_name
def test_messages_name_expected_and_actual(name: str) -> None:
    _, ours = build_pair(name, IN, H, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"input_size: expected 5, got 6"):
        ours(torch.randn(T, B, IN + 1))
    with pytest.raises(RuntimeError, match=r"hx must have shape \(1, 4, 7\), got \(1, 3, 7\)"):
        ours(torch.randn(T, B, IN), zeros(name, 1, 3, H))
    with pytest.raises(ValueError, match=r"expected torch.float32, got torch.float64"):
        ours(torch.randn(T, B, IN, dtype=torch.float64))


BAD_LENGTHS = {
    "too long": ([1, 2, 3, T + 1], ValueError, f"between 0 and {T}.*got {T + 1}"),
    "negative": ([1, -2, 3, 4], ValueError, f"between 0 and {T}.*got -2"),
    "count": ([1, 2], ValueError, f"expected {B}, got 2"),
    "2-D": ([[1, 2, 3, 4]], ValueError, "1-D, got 2-D"),
    "floats": ([1.0, 2.0, 3.0, 4.0], TypeError, "integers, got torch.float32"),
    "booleans": ([True] * B, TypeError, "integers, got torch.bool"),
    "text": ("abcd", TypeError, "sequence of integers"),
}


@each_name
@pytest.mark.parametrize("mistake", BAD_LENGTHS)
def test_bad_lengths(name: str, mistake: str) -> None:
    lengths, kind, message = BAD_LENGTHS[mistake]
    _, ours = build_pair(name, IN, H, dtype=torch.float32)
    with pytest.raises(kind, match=message):
        ours(torch.randn(T, B, IN), lengths=lengths)


@each_name
def test_lengths_are_refused_for_packed_input(name: str) -> None:
    _, ours = build_pair(name, IN, H, dtype=torch.float32)
    with pytest.raises(ValueError, match="packed"):
        ours(packed(torch.randn(T, B, IN)), lengths=[1, 2, 3, 4])


@each_name
@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("weight_hh_l0", torch.zeros(3, 3)),
        ("weight_ih_l0", torch.zeros(4 * H, IN + 1)),
        ("bias_hh_l0", torch.zeros(1)),
        ("bias_ih_l0", torch.zeros(4 * H, dtype=torch.float64)),
        ("weight_hh_l0", torch.zeros(4 * H, H, device="meta")),
    ],
    ids=["hh-shape", "ih-shape", "bias-shape", "bias-dtype", "hh-device"],
)
@pytest.mark.parametrize("layers", [1, 2])
def test_wrong_weights_raise(name: str, attribute: str, value: torch.Tensor, layers: int) -> None:
    """Replaced weights that do not fit must never reach a kernel, which would read past them."""
    _, ours = build_pair(name, IN, H, layers, dtype=torch.float32)
    setattr(ours, attribute, torch.nn.Parameter(value))
    with pytest.raises(RuntimeError):
        ours(torch.randn(T, B, IN))


@each_name
def test_weights_of_no_whole_number_of_gates_raise(name: str) -> None:
    if name == "RNN":
        pytest.skip("one gate divides everything")
    weights = [torch.zeros(10, IN), torch.zeros(10, 2), torch.zeros(10), torch.zeros(10)]
    with pytest.raises(RuntimeError, match="weights"):
        getattr(functional, name.lower())(torch.randn(T, B, IN), None, weights)


BAD_CONSTRUCTORS = {
    "zero input": ((0, H), {}),
    "zero hidden": ((IN, 0), {}),
    "zero layers": ((IN, H, 0), {}),
    "float input": ((1.5, H), {}),
    "float hidden": ((IN, 2.5), {}),
    "no arguments": ((), {}),
    "one argument": ((IN,), {}),
    "unknown keyword": ((IN, H), {"hidden": 3}),
    "bias number": ((IN, H), {"bias": 1}),
    "batch_first number": ((IN, H), {"batch_first": 1}),
    "dropout above one": ((IN, H), {"dropout": 1.5}),
    "dropout bool": ((IN, H), {"dropout": True}),
    "projection as large": ((IN, H), {"proj_size": H}),
    "projection negative": ((IN, H), {"proj_size": -1}),
    "projection": ((IN, H), {"proj_size": 2}),
    "nonlinearity": ((IN, H), {"nonlinearity": "sigmoid"}),
    "nonlinearity in place": ((IN, H, 1, "sigmoid"), {}),
    "nonlinearity twice": ((IN, H, 1, "tanh"), {"nonlinearity": "tanh"}),
}


@each_name
@pytest.mark.parametrize("mistake", BAD_CONSTRUCTORS)
def test_bad_constructors_raise_what_torch_raises(name: str, mistake: str) -> None:
    args, kwargs = BAD_CONSTRUCTORS[mistake]
    expected = raised(lambda: getattr(torch.nn, name)(*args, **kwargs))
    assert raised(lambda: getattr(fast_nn, name)(*args, **kwargs)) is expected
