"""Attention on backend "numba": a second implementation, held to the same oracle as the first.

Outputs and every gradient against the float64 composite, and against the compiled kernels where
this installation has them.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import test_attention_masking as masking
import test_functional_attention as options_of
import torch
from attention_oracle import Case, arguments, compare, distance, expected, outputs_of, run
from kernels import needs_extension
from torch import Tensor

import fastseq
from fastseq import functional

pytest.importorskip("numba", reason="Numba is not installed: pip install 'fastseq[numba]'")

from fastseq.backends import reference_attention
from fastseq.backends.numba import attention

SHAPE = options_of.SHAPE
# More than backward works on at a time, against more than one block of keys.
MANY_QUERIES = (1, 1, 2, 2100, 150, 8, 8)


@pytest.fixture(autouse=True)
def _numba() -> Iterator[None]:
    threads = torch.get_num_threads()
    with fastseq.backend("numba"):
        yield
    torch.set_num_threads(threads)


def hold(case: Case) -> None:
    """The bounds of the oracle; the same bits for one and two threads and without gradients."""
    truth, bounds = expected(case)
    dtype = getattr(torch, case.dtype)
    leaves, others, _ = arguments(case, dtype)
    before: dict[str, Tensor] = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results = run(case, "numba", dtype)
        compare(results, truth, bounds, f"{threads} thread(s)")
        with torch.no_grad():
            inferred = outputs_of(case, leaves, others)
        for name, output in inferred.items():
            assert distance(output.double(), results[name]) == 0, f"{name}: no_grad differs"
        for name, value in before.items():
            assert torch.equal(value, results[name]), f"{name}: bits depend on the threads"
        before = results


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", options_of.ALONE, ids=str)
def test_one_option(options: dict[str, Any], dtype: str) -> None:
    hold(Case(**{"dtype": dtype, **SHAPE, **options}))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [*options_of.SHAPES, MANY_QUERIES], ids=str)
def test_sizes(shape: tuple[int, ...], causal: bool) -> None:
    names = ("batch", "kv_heads", "group", "queries", "keys", "size", "value_size")
    hold(Case(causal=causal, bottom_right=causal, **dict(zip(names, shape, strict=True))))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 30.0}], ids=str)
def test_large_logits(options: dict[str, Any]) -> None:
    hold(Case(magnitude=3e4, **{**SHAPE, "size": 16, "value_size": 16}, **options))


# Several options at once, past one block of keys and one panel of queries.
TOGETHER: list[dict[str, Any]] = [
    {"causal": True, "bias": "hqk", "dropout": 0.2, "sinks": True, "group": 2},
    {"window": (40, 3), "mask": "bqk", "alibi": "bh", "softcap": 4.0, "bottom_right": True},
    {"padding": True, "bias": "bk", "lengths": "qk", "weights": "mean", "dropout": 0.1},
    {"layout": "varlen", "causal": True, "bottom_right": True, "sinks": True, "dropout": 0.3},
    {"mask": "bhqk", "bias": "", "strides": "transposed", "value_size": 40, "group": 3},
]


@pytest.mark.parametrize("options", TOGETHER, ids=str)
def test_options_together(options: dict[str, Any]) -> None:
    hold(Case(**{"queries": 70, "keys": 300, "size": 24, "value_size": 24, **options}))


@needs_extension
@pytest.mark.parametrize("options", TOGETHER, ids=str)
def test_against_the_compiled_kernels(options: dict[str, Any]) -> None:
    case = Case(**{"dtype": "float64", "queries": 70, "keys": 300, **options})
    theirs = run(case, "cpu", torch.float64)
    for name, ours in run(case, "numba", torch.float64).items():
        unit = torch.finfo(torch.float64).eps * max(
            1.0, float(theirs[name].nan_to_num().abs().max())
        )
        assert distance(ours, theirs[name]) < 2000 * unit, name


@needs_extension
@pytest.mark.parametrize("options", [{}, {"bias": "hqk", "sinks": True}], ids=str)
@pytest.mark.parametrize("first", ["cpu", "numba"])
def test_forward_on_one_backend_and_backward_on_the_other(
    first: str, options: dict[str, Any]
) -> None:
    case = Case(**{"dtype": "float64", **SHAPE, **options})
    truth = run(case, "reference", torch.float64)
    leaves, others, generator = arguments(case, torch.float64)
    with fastseq.backend(first):
        outputs = outputs_of(case, leaves, others)
    weights = [
        torch.randn(output.shape, generator=generator, dtype=torch.float64)
        for output in outputs.values()
    ]
    with fastseq.backend("numba" if first == "cpu" else "cpu"):
        grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), weights)
    for name, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(grad, truth[f"grad_{name}"], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_which_weights_are_dropped(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator's bits are those of the reference, and so of the compiled kernels."""
    sizes = (2, 3, 33, 141)
    q, k = torch.zeros(2, 3, 33, 4), torch.zeros(2, 3, 141, 4)
    for seed in ([1, 2], [-(2**63), -1], [2**62 + 17, 2**33 + 5]):
        drawn = torch.tensor(seed)
        # The package has a function of the module's name.
        module = sys.modules["fastseq.functional.attention"]
        monkeypatch.setattr(module, "draw_seed", lambda _, drawn=drawn: drawn)
        keep = reference_attention.dropout_keep(drawn, p, *sizes)
        _, weights = functional.attention(q, k, k, dropout_p=p, return_weights=True)
        assert torch.equal(weights != 0, keep)


@pytest.mark.parametrize("extra", ["", "sinks", "dropout", "softcap"])
@pytest.mark.parametrize("way", list(masking.hidden_everything(torch.zeros(()))))
def test_a_row_that_sees_no_key(way: str, extra: str) -> None:
    masking.test_a_row_that_sees_no_key(way, extra)


@pytest.mark.parametrize("way", ["key_lengths", "causal", "mask", "bias", "padding"])
@pytest.mark.parametrize("which", ["key", "value", "both"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_what_nobody_sees_does_not_matter(way: str, which: str, softcap: float | None) -> None:
    masking.test_what_nobody_sees_does_not_matter(way, which, softcap)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_key_reaches_only_those_who_see_it(value: float) -> None:
    masking.test_a_key_reaches_only_those_who_see_it(5, value)


def test_a_query_reaches_only_the_keys_it_sees() -> None:
    """NaN in the first query of a causal sequence: only the first key's gradient meets it."""
    q, k, v = masking.leaves()
    dirty = q.detach().clone()
    dirty[:, :, 0] = math.nan
    output = functional.attention(dirty, k, v, causal=True)
    assert output[:, :, 1:].isfinite().all()
    for grad in torch.autograd.grad(output.sum(), (k, v)):
        assert not grad[:, :, 0].isfinite().any()
        assert grad[:, :, 1:].isfinite().all()


def test_padded_queries_do_not_matter() -> None:
    masking.test_padded_queries_do_not_matter()


@pytest.mark.parametrize("shape", masking.EMPTY.values(), ids=masking.EMPTY)
def test_empty(shape: tuple[int, ...]) -> None:
    masking.test_empty(shape, True)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_paged(dtype: torch.dtype, queries: int) -> None:
    options_of.test_paged(dtype, queries, {"window": (5, 0)})


def test_gradcheck() -> None:
    q, k, v = (torch.randn(1, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (3, 5, 5))
    bias = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> Any:
        return functional.attention(
            q, k, v, bias=bias, sinks=sinks, causal=True, bottom_right=True, return_lse=True
        )

    torch.autograd.gradcheck(call, (q, k, v, bias, sinks))
    # Double backward goes by way of the composite.
    torch.autograd.gradgradcheck(lambda q: functional.attention(q, k, v).sum(), (q,))


def test_memory_is_read_as_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of a packed projection, transposed: no copies, and the output is laid out likewise."""
    packed = torch.randn(2, 40, 9, 8).transpose(1, 2)
    q, k, v = packed.chunk(3, dim=1)
    seen: list[set[int]] = []
    inner = attention._threads.run

    def spy(compiled: Any, numbers: ctypes.Array[ctypes.c_int64], threads: int) -> None:
        seen.append(set(numbers))
        inner(compiled, numbers, threads)

    monkeypatch.setattr(attention._threads, "run", spy)
    output = functional.attention(q, k, v)
    assert {q.data_ptr(), k.data_ptr(), v.data_ptr(), output.data_ptr()} <= seen[0]
    assert output.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("save", [False, True])
def test_compile(save: bool) -> None:
    """The op in a graph of torch's compiler finds the backend when it runs."""
    torch._dynamo.reset()
    q = torch.randn(2, 2, 9, 8, requires_grad=save)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(q: Tensor) -> Tensor:
        return functional.attention(q, q, q, causal=True, window=(3, 0))

    output = call(q)
    expected_output = functional.attention(q, q, q, causal=True, window=(3, 0))
    assert torch.equal(output, expected_output)
    if save:
        (found,) = torch.autograd.grad(output.square().sum(), q)
        (wanted,) = torch.autograd.grad(expected_output.square().sum(), q)
        torch.testing.assert_close(found, wanted)


def test_nothing_of_numba_is_loaded_for_other_backends() -> None:
    code = (
        "import sys, torch, fastseq, fastseq.nn as nn\n"
        "with fastseq.backend('reference'):\n"
        "    nn.MultiheadAttention(8, 2)(*[torch.ones(1, 3, 8)] * 3)\n"
        "print('numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr
