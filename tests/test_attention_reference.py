"""The composite of torch operators: against attention pair by pair, torch's function, Philox."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_oracle import Case, arguments, outputs_of
from torch import Tensor

import fastseq
from fastseq._attention import Terms
from fastseq.backends import reference_attention

CASES = [
    Case(causal=True),
    Case(causal=True, bottom_right=True, queries=4, keys=7),
    Case(causal=True, bottom_right=True, queries=7, keys=4),
    Case(window=(2, 1)),
    Case(window=(0, -1), bottom_right=True, lengths="qk"),
    Case(mask="bhqk", bias="hqk"),
    Case(padding=True, lengths="k", causal=True),
    Case(alibi="bh", bottom_right=True, lengths="q"),
    Case(softcap=1.5, bias="k", group=3),
    Case(sinks=True, mask="bqk", group=2, value_size=3),
    Case(alibi="h", sinks=True, softcap=2.0, window=(3, 2), bias="bhqk", padding=True, group=2),
]


def pair_by_pair(case: Case, leaves: dict[str, Tensor], others: dict[str, Any]) -> list[Tensor]:
    """Output, log-sum-exp and weights with Python's own arithmetic, one row at a time."""
    q, k, v = (leaves[name].detach() for name in ("query", "key", "value"))
    output = torch.zeros(case.batch, case.heads, case.queries, case.value_size).double()
    lse = torch.full((case.batch, case.heads, case.queries), -math.inf).double()
    weights = torch.zeros(case.batch, case.heads, case.queries, case.keys).double()

    def at(table: Tensor, *place: int) -> float:
        spread = table.expand(case.batch, case.heads, case.queries, case.keys)
        return float(spread.detach()[place])

    left, right = others["window"] or (-1, -1)
    if others["causal"]:
        right = 0
    for b in range(case.batch):
        queries = others.get("query_lengths", [case.queries] * case.batch)[b]
        keys = others.get("key_lengths", [case.keys] * case.batch)[b]
        shift = keys - queries if case.bottom_right else 0
        for h in range(case.heads):
            kv = h // case.group
            for i in range(queries):
                scores = {}
                for j in range(keys):
                    d = j - (i + shift)
                    if (left >= 0 and d < -left) or (right >= 0 and d > right):
                        continue
                    if "mask" in others and not at(others["mask"], b, h, i, j):
                        continue
                    if case.padding and others["key_padding_mask"][b, j]:
                        continue
                    score = float(q[b, h, i] @ k[b, kv, j]) / math.sqrt(case.size)
                    if case.softcap:
                        score = case.softcap * math.tanh(score / case.softcap)
                    if case.bias:
                        score += at(leaves["bias"], b, h, i, j)
                    if case.alibi:
                        slopes = others["alibi_slopes"].expand(case.batch, case.heads)
                        score -= float(slopes[b, h]) * abs(d)
                    scores[j] = score
                if not scores:
                    continue
                total = sum(map(math.exp, scores.values()))
                if case.sinks:
                    total += math.exp(float(leaves["sinks"].detach()[h]))
                lse[b, h, i] = math.log(total)
                for j, score in scores.items():
                    weights[b, h, i, j] = math.exp(score) / total
                    output[b, h, i] += weights[b, h, i, j] * v[b, kv, j]
    return [output, lse, weights]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pair_by_pair(case: Case) -> None:
    leaves, others, _ = arguments(case, torch.float64)
    with fastseq.backend("reference"):
        found = outputs_of(case, leaves, others)
        _, weights = fastseq.functional.attention(**leaves, **others, return_weights=True)
    expected = pair_by_pair(case, leaves, others)
    torch.testing.assert_close(found["output"], expected[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found["lse"], expected[1], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(weights, expected[2], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"enable_gqa": True, "scale": 0.3}], ids=str
)
def test_torch_in_float64(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 6, 8, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    kv = (k[:, :2], v[:, :2]) if options.get("enable_gqa") else (k, v)
    theirs = F.scaled_dot_product_attention(q, *kv, **options)
    with fastseq.backend("reference"):
        ours = fastseq.functional.scaled_dot_product_attention(q, *kv, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    seed = torch.randn_like(theirs)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), seed),
        torch.autograd.grad(theirs, (q, k, v), seed),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


# The generator's published test vectors (Random123's known answers for philox4x32-10).
PHILOX = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (
        [0xFFFFFFFF] * 4,
        [0xFFFFFFFF] * 2,
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = reference_attention.philox(
        torch.tensor(key[0]), torch.tensor(key[1]), [torch.tensor(word) for word in counter]
    )
    assert [int(word) for word in words] == expected


def test_dropout_keep_reads_its_words_in_order() -> None:
    """Key ``4 j + n`` of a row is decided by word ``n`` of counter ``j``."""
    seed, p = torch.tensor([-(2**61) + 12345, 2**40 + 7]), 0.37
    keep = reference_attention.dropout_keep(seed, p, 2, 3, 5, 11)
    b, h, i, j = 1, 2, 4, 9
    words = reference_attention.philox(
        seed[0] & 0xFFFFFFFF,
        (seed[0] >> 32) & 0xFFFFFFFF,
        [torch.tensor(word) for word in (j // 4, i, b * 3 + h, 7)],
    )
    assert bool(keep[b, h, i, j]) == (int(words[j % 4]) >= round(p * 2**32))
    assert reference_attention.dropout_keep(seed, 0.0, 1, 1, 3, 3).all()
    assert not reference_attention.dropout_keep(seed, 1.0, 1, 1, 3, 3).any()


def test_alibi_bias_by_hand() -> None:
    bias = reference_attention.alibi_bias(torch.tensor([1.0, 0.5]), 2, 3, Terms(), True)
    assert bias.shape == (1, 2, 2, 3)
    assert torch.equal(bias[0, 0], -torch.tensor([[1.0, 0.0, 1.0], [2.0, 1.0, 0.0]]))
    assert torch.equal(bias[0, 1] * 2, bias[0, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_answered_with_a_warning(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastseq.backends, "_warned_reasons", set())
    q = torch.randn(1, 2, 5, 8)
    with pytest.warns(fastseq.FastseqFallbackWarning, match=str(dtype)):
        output, lse = fastseq.functional.attention(*[q.to(dtype)] * 3, return_lse=True)
    assert output.dtype is dtype
    assert lse.dtype is torch.float32
    # On the rounded inputs; what is left is the rounding of the output, half a unit, and float32's.
    rounded = q.to(dtype).float()
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(
        output.float(), F.scaled_dot_product_attention(*[rounded] * 3), atol=unit, rtol=unit
    )
