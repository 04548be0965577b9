"""Recurrent layers outside the fused kernels, and inside compilers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from recurrent import (
    EXACT,
    IN,
    B,
    H,
    T,
    build_pair,
    each_name,
    leaves,
    raised,
    run,
    states,
)
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
import fastseq.nn as fast_nn
from fastseq import backends


@pytest.fixture(autouse=True)
def _seed_and_forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(backends, "_warned_reasons", set())


# --- where the fused kernels do not apply ------------------------------------------------------


@each_name
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.filterwarnings("ignore::fastseq.FastseqFallbackWarning")
def test_other_dtypes_are_torchs_own(name: str, dtype: torch.dtype) -> None:
    theirs, ours = build_pair(name, IN, H, 2, bidirectional=True, batch_first=True, dtype=dtype)
    x = torch.randn(B, T, IN, dtype=dtype)
    for args in ((x,), (x, states(theirs)), (x[0],)):
        expected, actual = leaves(theirs(*args)), leaves(ours(*args))
        assert all(map(torch.equal, actual, expected))
    short = pack_padded_sequence(x, [6, 4, 4, 1], batch_first=True)
    assert all(map(torch.equal, leaves(ours(short)), leaves(theirs(short))))


def test_fallback_warns_once_per_reason() -> None:
    layer = fast_nn.GRU(IN, H).bfloat16()
    x = torch.randn(T, B, IN, dtype=torch.bfloat16)
    with pytest.warns(fastseq.FastseqFallbackWarning, match="bfloat16"):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
    with pytest.warns(fastseq.FastseqFallbackWarning, match="float16"):
        layer.half()(x.half())
    assert issubclass(fastseq.FastseqFallbackWarning, UserWarning)


def test_no_warning_where_kernels_apply() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast_nn.GRU(IN, H)(torch.randn(T, B, IN))


@each_name
@pytest.mark.filterwarnings("ignore::fastseq.FastseqFallbackWarning")
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_is_torchs_own(name: str, input_dtype: torch.dtype) -> None:
    theirs, ours = build_pair(name, IN, H, 2, dtype=torch.float32)
    x = torch.randn(T, B, IN, dtype=input_dtype)

    def call(module: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return leaves(module(x))

    expected_error = raised(lambda: call(theirs))
    assert raised(lambda: call(ours)) is expected_error
    if expected_error is None:
        for actual, expected in zip(call(ours), call(theirs), strict=True):
            assert actual.dtype is expected.dtype
            assert torch.equal(actual, expected)


@pytest.mark.filterwarnings("ignore::fastseq.FastseqFallbackWarning")
@each_name
def test_lengths_under_autocast(name: str) -> None:
    _, ours = build_pair(name, IN, H, dtype=torch.float32)
    x, lengths = torch.randn(T, B, IN), [4, 1, 6, 4]
    expected = leaves(ours(x, lengths=lengths))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state, *rest = leaves(ours(x, lengths=lengths))
    assert state.dtype is output.dtype
    # bfloat16 keeps 8 bits; six steps of values below one lose a few of them.
    torch.testing.assert_close(
        [out.float() for out in (output, state, *rest)], expected, rtol=0.05, atol=0.05
    )


@pytest.mark.filterwarnings("ignore::fastseq.FastseqFallbackWarning")
@each_name
def test_lengths_work_in_a_fallback(name: str) -> None:
    _, ours = build_pair(name, IN, H, bidirectional=True, dtype=torch.float32)
    x, lengths = torch.randn(T, B, IN), [4, 1, 6, 4]
    expected = leaves(ours(x, lengths=lengths))
    actual = leaves(ours.bfloat16()(x.bfloat16(), lengths=lengths))
    # bfloat16 keeps 8 bits; six steps of values below one lose a few of them.
    torch.testing.assert_close([out.float() for out in actual], expected, rtol=0.05, atol=0.05)


class Wrapper(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


@each_name
@pytest.mark.filterwarnings("ignore")
def test_jit_script_and_trace(name: str) -> None:
    theirs, ours = build_pair(name, IN, H, 2, bidirectional=True, dtype=torch.float32)
    x, longer = torch.randn(T, B, IN), torch.randn(T + 3, B + 1, IN)
    for graph in (torch.jit.trace(Wrapper(ours), (x,)), torch.jit.script(Wrapper(ours))):
        assert f"aten::{'rnn_tanh' if name == 'RNN' else name.lower()}" in str(graph.inlined_graph)
        torch.testing.assert_close(graph(longer), theirs(longer)[0])


@each_name
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_compile_whole_graph(name: str, options: dict[str, Any]) -> None:
    _, ours = build_pair(name, IN, H, **options)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    hx = states(ours, 3)
    torch.testing.assert_close(
        run(compiled, [x, *leaves(hx)], x, hx), run(ours, [x, *leaves(hx)], x, hx), **EXACT
    )


@each_name
def test_export_with_dynamic_batch(name: str) -> None:
    _, ours = build_pair(name, IN, H)
    batch = torch.export.Dim("batch", min=2, max=64)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    program = torch.export.export(Wrapper(ours), (x,), dynamic_shapes={"x": {1: batch}})
    wider = torch.randn(2, 9, IN, dtype=torch.float64)
    torch.testing.assert_close(program.module()(wider), ours(wider)[0], **EXACT)
