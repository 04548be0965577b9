"""Rows that see nothing, NaN and Inf behind masks, and tensors without elements."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import every_tier
from torch import Tensor

from fastseq import functional

B, HEADS, SQ, SKV, E = 2, 3, 37, 45, 16


def leaves(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, HEADS, SQ, E), (B, HEADS, SKV, E), (B, HEADS, SKV, E))
    return [
        torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes
    ]


def hidden_everything(q: Tensor) -> dict[str, dict[str, Any]]:
    """Ways to mask all keys of the first sequence's row 3 (or of all its rows)."""
    mask = torch.ones(B, 1, SQ, SKV, dtype=torch.bool)
    mask[0, :, 3] = False
    bias = torch.zeros(B, 1, SQ, SKV, dtype=q.dtype).masked_fill(~mask, -math.inf)
    return {
        "mask": {"mask": mask},
        "bias": {"bias": bias},
        "bias_with_gradient": {"bias": bias.clone().requires_grad_()},
        "padding": {"key_padding_mask": torch.tensor([[True], [False]]).expand(B, SKV)},
        "key_lengths": {"key_lengths": [0, SKV]},
        "query_lengths": {"query_lengths": [3, SQ]},
        "window": {"window": (0, 0), "key_lengths": [3, SKV]},
    }


@pytest.mark.parametrize("extra", ["", "sinks", "dropout", "softcap"])
@pytest.mark.parametrize("way", list(hidden_everything(torch.zeros(()))))
def test_a_row_that_sees_no_key(way: str, extra: str) -> None:
    q, k, v = leaves()
    options = hidden_everything(q)[way]
    sinks = torch.randn(HEADS, requires_grad=True)
    options |= {
        "": {},
        "sinks": {"sinks": sinks},
        "dropout": {"dropout_p": 0.3},
        "softcap": {"softcap": 3.0},
    }[extra]
    wanted = [q, k, v, *(t for t in options.values() if getattr(t, "requires_grad", False))]
    for tier in every_tier():
        output, lse, weights = functional.attention(
            q, k, v, **options, return_lse=True, return_weights=True
        )
        assert (output[0, :, 3] == 0).all(), tier
        assert (weights[0, :, 3] == 0).all(), tier
        assert (lse[0, :, 3] == -math.inf).all(), tier
        seen = lse.detach() != -math.inf
        assert seen[1].all()
        loss = output.square().sum() + lse.masked_fill(~seen, 0.0).sum()
        grads = torch.autograd.grad(loss, wanted, retain_graph=True)
        assert all(grad.isfinite().all() for grad in grads), tier
        assert (grads[0][0, :, 3] == 0).all(), tier
        # Nothing else reaches such a row, so that it adds nothing to anybody's gradient.
        only = torch.autograd.grad(output[0, :, 3].sum() + lse[0, :, 3].sum() * 0, wanted)
        assert all((grad.nan_to_num() == 0).all() for grad in only), tier


def keys_hidden(way: str) -> tuple[dict[str, Any], Callable[[Tensor], None]]:
    """Options that hide some keys from everybody, and what spoils those keys."""

    def last(tensor: Tensor) -> None:
        tensor[0, :, 40:] = spoiled(tensor[0, :, 40:])

    def every_third(tensor: Tensor) -> None:
        tensor[:, :, ::3] = spoiled(tensor[:, :, ::3])

    third = torch.arange(SKV) % 3 == 0
    bias = torch.zeros(SKV).masked_fill(third, -math.inf)
    return {
        "key_lengths": ({"key_lengths": [40, SKV]}, last),
        "causal": ({"causal": True}, last),  # the keys past the last query
        "mask": ({"mask": ~third}, every_third),
        "bias": ({"bias": bias.expand(SQ, SKV)}, every_third),
        "padding": ({"key_padding_mask": third.expand(B, SKV)}, every_third),
    }[way]


def spoiled(like: Tensor) -> Tensor:
    values = torch.tensor([math.nan, math.inf, -math.inf, 3e38])
    return values.repeat(like.numel() // 4 + 1)[: like.numel()].view(like.shape)


@pytest.mark.parametrize("way", ["key_lengths", "causal", "mask", "bias", "padding"])
@pytest.mark.parametrize("which", ["key", "value", "both"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_what_nobody_sees_does_not_matter(way: str, which: str, softcap: float | None) -> None:
    q, k, v = leaves()
    options, spoil = keys_hidden(way)
    options["softcap"] = softcap
    dirty_k, dirty_v = k.detach().clone(), v.detach().clone()
    if which in ("key", "both"):
        spoil(dirty_k)
    if which in ("value", "both"):
        spoil(dirty_v)
    dirty_k.requires_grad_()
    dirty_v.requires_grad_()
    for tier in every_tier():
        clean = functional.attention(q, k, v, **options, return_lse=True)
        dirty = functional.attention(q, dirty_k, dirty_v, **options, return_lse=True)
        for a, b in zip(clean, dirty, strict=True):
            assert torch.equal(a, b), tier
        expected = torch.autograd.grad(clean[0].square().sum() + clean[1].sum(), (q, k, v))
        found = torch.autograd.grad(dirty[0].square().sum() + dirty[1].sum(), (q, dirty_k, dirty_v))
        for name, a, b in zip("qkv", expected, found, strict=True):
            assert torch.equal(a, b), f"grad_{name} {tier}"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("row", [5, 30])
def test_a_key_reaches_only_those_who_see_it(row: int, value: float) -> None:
    """Causal: rows before the spoiled key are untouched, in outputs and in their gradients."""
    q, k, v = leaves()
    dirty_k, dirty_v = (t.detach().clone().index_fill_(2, torch.tensor(row), value) for t in (k, v))
    for tier in every_tier():
        clean = functional.attention(q, k, v, causal=True)
        dirty = functional.attention(q, dirty_k, dirty_v, causal=True)
        assert torch.equal(clean[:, :, :row], dirty[:, :, :row]), tier
        assert not dirty[:, :, row:].isfinite().any(), tier
        (expected,) = torch.autograd.grad(clean[:, :, :row].sum(), q, retain_graph=True)
        (found,) = torch.autograd.grad(dirty[:, :, :row].sum(), q, retain_graph=True)
        assert torch.equal(expected[:, :, :row], found[:, :, :row]), tier


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_query_that_sees_no_key_may_be_anything(softcap: float | None) -> None:
    q, k, v = leaves()
    dirty = q.detach().clone().index_fill_(2, torch.tensor(3), math.nan).requires_grad_()
    mask = torch.ones(SQ, 1, dtype=torch.bool).index_fill_(0, torch.tensor(3), value=False)
    for tier in every_tier():
        found = []
        for query in (q, dirty):
            output = functional.attention(query, k, v, mask=mask, softcap=softcap)
            found.append((output, *torch.autograd.grad(output.square().sum(), (query, v))))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b), tier


def test_padded_queries_do_not_matter() -> None:
    q, k, v = leaves()
    dirty = q.detach().clone()
    dirty[0, :, 20:] = math.nan
    dirty.requires_grad_()
    for tier in every_tier():
        found = []
        for query in (q, dirty):
            output = functional.attention(query, k, v, query_lengths=[20, SQ])
            assert (output[0, :, 20:] == 0).all(), tier
            found.append((output, *torch.autograd.grad(output.square().sum(), (query, k, v))))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b), tier


EMPTY = {
    "no_queries": (2, 3, 0, 5, 8, 8),
    "no_keys": (2, 3, 5, 0, 8, 8),
    "no_batch": (0, 3, 5, 5, 8, 8),
    "no_heads": (2, 0, 5, 5, 8, 8),
    "no_key_size": (2, 3, 5, 4, 0, 8),
    "no_value_size": (2, 3, 5, 4, 8, 0),
    "nothing": (0, 0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("causal", [False, True])
def test_empty(shape: tuple[int, ...], causal: bool) -> None:
    batch, heads, queries, keys, size, value_size = shape
    q = torch.randn(batch, heads, queries, size, requires_grad=True)
    k = torch.randn(batch, heads, keys, size, requires_grad=True)
    v = torch.randn(batch, heads, keys, value_size, requires_grad=True)
    sinks = torch.randn(heads, requires_grad=True)
    output, lse, weights = functional.attention(
        q, k, v, causal=causal, sinks=sinks, return_lse=True, return_weights=True
    )
    assert output.shape == (batch, heads, queries, value_size)
    assert lse.shape == (batch, heads, queries)
    assert weights.shape == (batch, heads, queries, keys)
    if keys == 0:
        assert (output == 0).all()
        assert (lse == -math.inf).all()
    grads = torch.autograd.grad(output.sum() + weights.sum(), (q, k, v, sinks))
    for leaf, grad in zip((q, k, v, sinks), grads, strict=True):
        assert grad.shape == leaf.shape
        assert grad.isfinite().all()
    (only_output,) = torch.autograd.grad(functional.attention(q, k, v).sum(), v)
    assert only_output.shape == v.shape
    with torch.no_grad():
        plain = functional.scaled_dot_product_attention(q, k, v)
        theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert plain.shape == theirs.shape


def test_empty_varlen() -> None:
    q, k = torch.randn(3, 2, 8, requires_grad=True), torch.randn(0, 2, 8, requires_grad=True)
    output, lse = functional.attention_varlen(q, k, k, [0, 3], [0, 0], return_lse=True)
    assert (output == 0).all()
    assert (lse == -math.inf).all()
    grads = torch.autograd.grad(output.sum(), (q, k))
    assert (grads[0] == 0).all()
    none = functional.attention_varlen(k, q, q, [0, 0], [0, 3])
    assert none.shape == (0, 2, 8)
    assert functional.attention_varlen(k, k, k, [0], [0]).shape == (0, 2, 8)
