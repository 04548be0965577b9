"""NVTX ranges around the CUDA kernels, emulated on the host, with a recorder in NVTX's place."""

from __future__ import annotations

import warnings

import pytest
import torch
from emulated_cuda import kernels
from kernels import skip_without_extension

import fastseq
from fastseq import functional

skip_without_extension()  # a profile records the compiled kernels


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was pushed, and ``"pop"``."""
    found: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", found.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: found.append("pop"))
    return found


def train() -> None:
    """One forward and backward of a layer and of attention, and a step of a cell."""
    x = torch.randn(5, 2, 3, requires_grad=True)
    weights = [torch.randn(*shape, requires_grad=True) for shape in ((16, 3), (16, 4))]
    output, _ = functional.lstm(x, None, weights, has_biases=False)
    output.sum().backward()
    q = torch.randn(1, 2, 6, 4, requires_grad=True)
    functional.attention(q, q, q).sum().backward()
    with torch.no_grad():
        functional.gru_cell(
            torch.randn(2, 3), torch.randn(2, 4), torch.randn(12, 3), torch.randn(12, 4)
        )


def test_every_call_is_in_a_range(marks: list[str]) -> None:
    with kernels(), warnings.catch_warnings():
        # Nothing is recorded of these kernels, but they ran.
        warnings.simplefilter("error", RuntimeWarning)
        with fastseq.profile() as profile:
            train()
    assert marks == [
        "fastseq::rnn_forward (5, 2, 3)",
        "pop",
        "fastseq::rnn_backward (5, 2, 4)",
        "pop",
        "fastseq::attention_forward (1, 2, 6, 4)",
        "pop",
        "fastseq::attention_backward (1, 2, 6, 4)",
        "pop",
        "fastseq::rnn_cell (2, 3)",
        "fastseq::rnn_forward (1, 2, 3)",
        "pop",
        "pop",
    ]
    assert not profile.calls


def test_a_call_that_raises_leaves_its_range(
    marks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with kernels() as library:

        def fails(*arguments: object) -> None:
            raise RuntimeError("no such device")

        monkeypatch.setattr(library, "use_device", fails)
        with pytest.raises(RuntimeError, match="no such device"), fastseq.profile():
            train()
    assert marks == ["fastseq::rnn_forward (5, 2, 3)", "pop"]


def test_no_ranges_without_a_profile_or_a_device(
    marks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with kernels():
        train()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.warns(RuntimeWarning, match="no kernels ran"), fastseq.profile():
            train()
    assert not marks
