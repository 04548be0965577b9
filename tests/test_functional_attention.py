"""fastseq.functional.attention and attention_varlen: every option, alone and combined.

Outputs and every gradient on every instruction-set tier, with 1 and 2 threads, against the float64
composite; see ``attention_oracle.py``.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from attention_oracle import Case, arguments, check, outputs_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import every_tier

from fastseq import functional

# Each option alone, at sizes that are no multiple of any tile or vector.
ALONE: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"causal": True, "bottom_right": True},
    {"window": (3, 2)},
    {"window": (5, 0), "bottom_right": True},
    {"window": (-1, 4)},
    {"window": (0, 0)},
    {"mask": "bhqk"},
    {"mask": "qk"},
    {"mask": "bk"},
    {"bias": "bhqk"},
    {"bias": "qk"},
    {"bias": "hqk"},
    {"bias": "bk"},
    {"bias": "q"},
    {"bias": ""},
    {"bias": "hqk", "bias_grad": False},
    {"padding": True},
    {"lengths": "q"},
    {"lengths": "k"},
    {"lengths": "qk", "causal": True, "bottom_right": True},
    {"alibi": "h"},
    {"alibi": "bh", "bottom_right": True},
    {"softcap": 1.5},
    {"sinks": True},
    {"dropout": 0.3},
    {"dropout": 1.0},
    {"weights": "heads"},
    {"weights": "mean"},
    {"weights": "heads", "dropout": 0.3},
    {"group": 3},
    {"group": 4, "kv_heads": 1},
    {"value_size": 5},
    {"layout": "varlen"},
    {"layout": "varlen", "causal": True},
    {"layout": "varlen", "causal": True, "bottom_right": True, "group": 2},
    {"layout": "varlen", "window": (4, 1), "alibi": "h", "softcap": 2.0, "sinks": True},
    {"layout": "varlen", "dropout": 0.2, "batch": 4},
    *({"strides": kind} for kind in ("transposed", "expanded", "every_other", "offset")),
]
SHAPE = {"queries": 21, "keys": 37, "size": 13, "value_size": 13}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", ALONE, ids=str)
def test_one_option(options: dict[str, Any], dtype: str) -> None:
    check(Case(**{"dtype": dtype, **SHAPE, **options}))


# (B, Hkv, group, Sq, Skv, E, Ev): one of everything; one row or key; past tiles; single heads of
# which a thread gets a part; decoding against a cache long enough to be split.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (1, 2, 1, 1, 1, 64, 64),
    (3, 1, 2, 1, 70, 7, 9),
    (2, 2, 1, 65, 1, 33, 31),
    (1, 1, 1, 130, 131, 64, 64),
    (1, 2, 2, 63, 193, 17, 65),
    (1, 1, 1, 260, 100, 129, 128),
    (1, 2, 4, 1, 1500, 64, 64),
    (1, 2, 1, 1, 1501, 63, 70),
    (2, 1, 8, 3, 700, 40, 24),
    (1, 1, 3, 5, 257, 200, 3),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(shape: tuple[int, ...], causal: bool) -> None:
    names = ("batch", "kv_heads", "group", "queries", "keys", "size", "value_size")
    check(Case(causal=causal, bottom_right=causal, **dict(zip(names, shape, strict=True))))


@pytest.mark.parametrize("magnitude", [1e3, 3e4])
@pytest.mark.parametrize(
    ("queries", "options"),
    [
        *itertools.product([1, 5], [{}, {"causal": True}]),
        *itertools.product([21], [{}, {"causal": True}, {"softcap": 30.0}]),
    ],
    ids=str,
)
def test_large_logits(queries: int, options: dict[str, Any], magnitude: float) -> None:
    """Scores of some 5e4: the softmax picks one key, and nothing overflows."""
    # Of few rows the bound, too, says little.
    many = {"batch": 8, "kv_heads": 4} if queries < 9 else {}
    sizes = {"queries": queries, "keys": 37, "size": 16, "value_size": 16, **many}
    check(Case(magnitude=magnitude, **sizes, **options))


@pytest.mark.parametrize("queries", [1, 8, 9])
def test_weights_of_backward_are_those_of_forward(queries: int) -> None:
    """Scores of 5e4 that backward computes in another order are off by more than a weight is."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(1, 1, rows, 64, generator=generator) for rows in (queries, 40, 40))
        q *= 5e4 / (q @ k.mT / 8).abs().max()
        v.requires_grad_()
        weights = torch.softmax((q.double() @ k.double().mT) / 8, -1)
        expected = weights.sum(-2).unsqueeze(-1).expand_as(v)
        for tier in every_tier():
            (found,) = torch.autograd.grad(functional.attention(q, k, v).sum(), v)
            error = (found - expected).abs().max().item()
            # Where two keys are equally near, the digits of the scores themselves decide.
            assert error < 1e-5, f"seed {seed} {tier}: {error}"


def one_of(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


def combined() -> st.SearchStrategy[Case]:
    sizes = one_of(1, 2, 7, 31, 33, 64, 65, 100)
    return st.builds(
        Case,
        dtype=one_of("float32", "float32", "float64"),
        batch=one_of(1, 2, 3),
        kv_heads=one_of(1, 2),
        group=one_of(1, 2, 3),
        queries=sizes,
        keys=sizes,
        size=one_of(1, 7, 16, 33, 64),
        value_size=one_of(1, 8, 17, 64),
        causal=st.booleans(),
        bottom_right=st.booleans(),
        window=one_of(None, None, (0, 0), (5, -1), (-1, 3), (16, 2), (40, 40)),
        mask=one_of("", "", "qk", "bhqk", "bk", "hq"),
        bias=one_of("", "", "qk", "bhqk", "hk", "bq"),
        bias_grad=st.booleans(),
        padding=st.booleans(),
        lengths=one_of("", "", "q", "k", "qk"),
        alibi=one_of("", "h", "bh"),
        softcap=one_of(None, None, 2.0),
        sinks=st.booleans(),
        dropout=one_of(0.0, 0.0, 0.25),
        weights=one_of("", "", "heads", "mean"),
        strides=one_of("contiguous", "transposed", "expanded", "every_other", "offset"),
    )


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(combined())
def test_combinations(case: Case) -> None:
    check(case)


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(combined())
def test_varlen_combinations(case: Case) -> None:
    check(
        dataclasses.replace(
            case,
            layout="varlen",
            batch=case.batch + 2,
            mask="",
            bias="",
            padding=False,
            lengths="",
            weights="",
            strides="contiguous" if case.strides == "expanded" else case.strides,
        )
    )


# --- what a call returns and where its arguments may lie


def test_results_in_order() -> None:
    q = torch.randn(2, 3, 5, 8)
    output, lse, weights = functional.attention(q, q, q, return_lse=True, return_weights=True)
    assert (output.shape, lse.shape, weights.shape) == ((2, 3, 5, 8), (2, 3, 5), (2, 3, 5, 5))
    alone = functional.attention(q, q, q)
    with_lse = functional.attention(q, q, q, return_lse=True)
    _, mean = functional.attention(q, q, q, return_weights=True, average_weights=True)
    # Which results are asked for may decide between two ways through the kernel.
    torch.testing.assert_close(alone, output)
    torch.testing.assert_close(with_lse[1], lse)
    torch.testing.assert_close(mean, weights.mean(1))


def test_one_sequence_without_a_batch() -> None:
    q, mask = torch.randn(3, 5, 8), torch.rand(3, 5, 5) < 0.7
    single = functional.attention(q, q, q, mask=mask, return_lse=True, return_weights=True)
    batched = functional.attention(q[None], q[None], q[None], mask=mask, return_lse=True)
    torch.testing.assert_close(single[0], batched[0][0])
    torch.testing.assert_close(single[1], batched[1][0])
    assert single[2].shape == (3, 5, 5)
    padding = torch.tensor([False, False, True, False, True])
    found = functional.attention(q, q, q, key_padding_mask=padding)
    assert torch.equal(found, functional.attention(q, q, q, mask=~padding))


def test_outputs_are_laid_out_as_the_query() -> None:
    """A query of (B, S, heads, E) in memory gets an output that flattens without a copy."""
    rows_outside = torch.randn(2, 5, 3, 8).transpose(1, 2)
    for call in (functional.attention, functional.scaled_dot_product_attention):
        output = call(rows_outside, rows_outside, rows_outside)
        assert output.transpose(1, 2).is_contiguous()
        with torch.no_grad():
            packed = torch.randn(2, 5, 9, 8).transpose(1, 2)
            q, k, v = packed.chunk(3, dim=1)
            assert call(q, k, v).transpose(1, 2).is_contiguous()
        dense = torch.randn(2, 3, 5, 8)
        assert call(dense, dense, dense).is_contiguous()


@pytest.mark.parametrize("bias_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_bias_of_another_dtype(bias_dtype: torch.dtype) -> None:
    q = torch.randn(2, 3, 5, 8)
    bias = torch.randn(1, 3, 5, 1).to(bias_dtype).requires_grad_()
    output = functional.attention(q, q, q, bias=bias)
    assert torch.equal(output, functional.attention(q, q, q, bias=bias.float()))
    (found,) = torch.autograd.grad(output.square().sum(), bias)
    assert found.dtype is bias_dtype
    expanded = bias.detach().expand(2, 3, 5, 5)
    assert torch.equal(functional.attention(q, q, q, bias=expanded), output)


def test_slopes_with_a_gradient() -> None:
    """They become an explicit bias, with the same result."""
    q = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    slopes = torch.rand(3, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"causal": True, "bottom_right": True}
    found = functional.attention(q, q, q, alibi_slopes=slopes, **options)
    fixed = functional.attention(q, q, q, alibi_slopes=slopes.detach(), **options)
    torch.testing.assert_close(found, fixed, rtol=1e-12, atol=1e-13)
    torch.autograd.gradcheck(
        lambda s: functional.attention(q, q, q, alibi_slopes=s, bias=q[..., :5], **options), slopes
    )
    rows, starts = torch.randn(6, 3, 8, dtype=torch.float64), [0, 2, 6]
    torch.autograd.gradcheck(
        lambda s: functional.attention_varlen(rows, rows, rows, starts, starts, alibi_slopes=s),
        slopes,
    )


def test_varlen_is_attention_of_each_sequence() -> None:
    q, k = torch.randn(9, 4, 8), torch.randn(12, 2, 8)
    query_starts, key_starts = [0, 4, 4, 9], torch.tensor([0, 3, 5, 12], dtype=torch.int32)
    output, lse = functional.attention_varlen(
        q, k, k, query_starts, key_starts, causal=True, bottom_right=True, return_lse=True
    )
    for b in range(3):
        rows = slice(query_starts[b], query_starts[b + 1])
        others = slice(int(key_starts[b]), int(key_starts[b + 1]))
        one = [t.transpose(0, 1) for t in (q[rows], k[others], k[others])]
        expected = functional.attention(*one, causal=True, bottom_right=True, return_lse=True)
        torch.testing.assert_close(output[rows].transpose(0, 1), expected[0])
        torch.testing.assert_close(lse[:, rows], expected[1])


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"window": (5, 0)}, {"softcap": 2.0, "causal": False}], ids=str
)
def test_paged(dtype: torch.dtype, queries: int, options: dict[str, Any]) -> None:
    """A cache in blocks gives what the same keys give in one piece, whatever else it holds."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, kv_heads, block_size, size = 3, 4, 2, 4, 8
    lengths = [10, 4, 17]
    # Blocks in rows of another order than heads, and NaN wherever no key lies.
    cache = torch.full((12, block_size, kv_heads, size), float("nan"), dtype=dtype)
    key_cache, value_cache = cache.transpose(1, 2), cache.clone().transpose(1, 2)
    table = torch.full((batch, 5), -7)
    free = torch.randperm(12, generator=generator).tolist()
    keys, values = [], []
    for b, length in enumerate(lengths):
        keys.append(torch.randn(kv_heads, length, size, generator=generator, dtype=dtype))
        values.append(torch.randn(kv_heads, length, size, generator=generator, dtype=dtype))
        for begin in range(0, length, block_size):
            block = free.pop()
            table[b, begin // block_size] = block
            part = keys[b][:, begin : begin + block_size]
            key_cache[block, :, : part.shape[1]] = part
            value_cache[block, :, : part.shape[1]] = values[b][:, begin : begin + block_size]
    q = torch.randn(batch, heads, queries, size, generator=generator, dtype=dtype)
    slopes = torch.rand(heads, generator=generator, dtype=dtype)
    found, lse = functional.attention_paged(
        q, key_cache, value_cache, table, lengths, alibi_slopes=slopes, return_lse=True, **options
    )
    for b in range(batch):
        whole = {"causal": True, "bottom_right": True, "return_lse": True, **options}
        expected = functional.attention(q[b], keys[b], values[b], alibi_slopes=slopes, **whole)
        torch.testing.assert_close(found[b], expected[0])
        torch.testing.assert_close(lse[b], expected[1])


def test_no_grad_makes_nothing_to_keep() -> None:
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    with torch.no_grad():
        assert not functional.attention(q, q, q).requires_grad
    leaves, others, _ = arguments(Case(), torch.float32)
    assert outputs_of(Case(), leaves, others)["lse"].requires_grad
