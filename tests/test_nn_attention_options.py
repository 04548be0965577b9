"""What fastseq.nn.MultiheadAttention has beyond torch: shared heads, rotation, a cache."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq.nn import KeyValueCache, MultiheadAttention, RotaryEmbedding

EXACT = {"rtol": 1e-12, "atol": 1e-12}
F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def causal(steps: int) -> Tensor:
    return torch.ones(steps, steps, dtype=torch.bool).triu(1)


# --- shared key and value heads ----------------------------------------------------------------


def repeated(ours: MultiheadAttention) -> torch.nn.MultiheadAttention:
    """torch's layer with every key and value head written out once for each query head."""
    heads, kv_heads, size = ours.num_heads, ours.num_kv_heads, ours.head_dim
    assert kv_heads is not None
    theirs = torch.nn.MultiheadAttention(
        ours.embed_dim,
        heads,
        kdim=ours.kdim,
        vdim=ours.vdim,
        bias=ours.in_proj_bias is not None,
        add_bias_kv=ours.bias_k is not None,
        add_zero_attn=ours.add_zero_attn,
        dtype=F64,
    )

    def widen(rows: Tensor) -> Tensor:
        return (
            rows.unflatten(0, (kv_heads, size))
            .repeat_interleave(heads // kv_heads, 0)
            .flatten(0, 1)
        )

    parts = [ours.embed_dim, kv_heads * size, kv_heads * size]
    with torch.no_grad():
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
        if ours.in_proj_weight is not None:
            q, k, v = ours.in_proj_weight.split(parts)
            theirs.in_proj_weight.copy_(torch.cat([q, widen(k), widen(v)]))
        else:
            theirs.q_proj_weight.copy_(ours.q_proj_weight)
            theirs.k_proj_weight.copy_(widen(ours.k_proj_weight))
            theirs.v_proj_weight.copy_(widen(ours.v_proj_weight))
        if ours.in_proj_bias is not None:
            q, k, v = ours.in_proj_bias.split(parts)
            theirs.in_proj_bias.copy_(torch.cat([q, widen(k), widen(v)]))
        if ours.bias_k is not None:
            theirs.bias_k.copy_(widen(ours.bias_k.flatten()).view(1, 1, -1))
            theirs.bias_v.copy_(widen(ours.bias_v.flatten()).view(1, 1, -1))
    return theirs


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [{}, {"kdim": 5, "vdim": 3}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}],
    ids=str,
)
def test_shared_heads(kv_heads: int, options: dict[str, Any]) -> None:
    ours = MultiheadAttention(12, 4, num_kv_heads=kv_heads, dtype=F64, **options)
    if ours.in_proj_bias is not None:
        torch.nn.init.normal_(ours.in_proj_bias)
    theirs = repeated(ours)
    leaves = [
        torch.randn(steps, 3, features, dtype=F64, requires_grad=True)
        for steps, features in ((5, 12), (7, ours.kdim), (7, ours.vdim))
    ]
    for weights in ({"need_weights": False}, {"average_attn_weights": False}):
        expected, actual = theirs(*leaves, **weights), ours(*leaves, **weights)
        torch.testing.assert_close(actual, expected, **EXACT)
        gradients = [
            torch.autograd.grad(result[0].square().sum(), [*leaves, layer.out_proj.weight])
            for result, layer in ((expected, theirs), (actual, ours))
        ]
        torch.testing.assert_close(gradients[1], gradients[0], **EXACT)
    if not options:
        for result, layer in ((theirs, theirs), (ours, ours)):
            assert result is layer
        x = leaves[0]
        torch.testing.assert_close(ours(x, x, x), theirs(x, x, x), **EXACT)
        y = torch.randn(7, 3, 12, dtype=F64)
        torch.testing.assert_close(ours(x, y, y), theirs(x, y, y), **EXACT)
        rows = 12 + 2 * kv_heads * 3
        assert ours.in_proj_weight.shape == (rows, 12)
        assert f"num_kv_heads={kv_heads}" in repr(ours)
    assert pickle.loads(pickle.dumps(ours)).num_kv_heads == kv_heads


@pytest.mark.parametrize("kv_heads", [0, -1, 3, 8])
def test_bad_numbers_of_heads(kv_heads: int) -> None:
    with pytest.raises(ValueError, match=f"num_kv_heads={kv_heads} and num_heads=4"):
        MultiheadAttention(12, 4, num_kv_heads=kv_heads)


# --- rotary embedding --------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", [6, 9], ids=["whole", "part"])
def test_rotation_is_multiplication_by_complex_numbers(interleaved: bool, size: int) -> None:
    rope = RotaryEmbedding(6, base=100.0, interleaved=interleaved)
    x = torch.randn(2, 3, 5, size, dtype=F64, requires_grad=True)
    for positions in (None, torch.tensor([4, 0, 7, 7, 2]), torch.rand(2, 1, 5, dtype=F64)):
        actual = rope(x, positions)
        at = torch.arange(5) if positions is None else positions
        angles = at.to(F64)[..., None] * 100.0 ** (-torch.arange(3, dtype=F64) / 3)
        turns = torch.polar(torch.ones_like(angles), angles)
        head = x[..., :6]
        if interleaved:
            pairs = torch.complex(head[..., 0::2], head[..., 1::2]) * turns
            expected = torch.view_as_real(pairs).flatten(-2)
        else:
            pairs = torch.complex(head[..., :3], head[..., 3:]) * turns
            expected = torch.cat([pairs.real, pairs.imag], -1)
        torch.testing.assert_close(actual[..., :6], expected, **EXACT)
        assert torch.equal(actual[..., 6:], x[..., 6:])
        # A rotation: the gradient of half the squared norm is the vector itself.
        gradient = torch.autograd.grad(actual.square().sum() / 2, x)[0]
        torch.testing.assert_close(gradient, x.detach(), **EXACT)


def test_rotation_in_low_precision_and_without_state() -> None:
    rope = RotaryEmbedding(4)
    assert not rope.state_dict()
    assert repr(rope) == "RotaryEmbedding(4, base=10000.0, interleaved=False)"
    x = torch.randn(3, 1000, 4, dtype=F64)
    expected = rope(x)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 5e-2)):
        actual = copy.deepcopy(rope).to(dtype)(x.to(dtype))
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_rotation_errors() -> None:
    for dim in (0, 3, -2):
        with pytest.raises(ValueError, match=f"dim must be even and positive, got {dim}"):
            RotaryEmbedding(dim)
    with pytest.raises(ValueError, match="base must be positive, got 0"):
        RotaryEmbedding(4, base=0)
    rope = RotaryEmbedding(4)
    with pytest.raises(ValueError, match=r"E of at least 4, got shape \(5, 3\)"):
        rope(torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"positions must have 5 entries .* \(4,\)"):
        rope(torch.randn(5, 4), torch.arange(4))
    with pytest.raises(ValueError, match="at most the 3 features of a head, got one for 4"):
        MultiheadAttention(6, 2, rope=rope)


@pytest.mark.parametrize("interleaved", [False, True])
def test_attention_depends_on_distances_only(interleaved: bool) -> None:
    rope = RotaryEmbedding(4, interleaved=interleaved)
    ours = MultiheadAttention(12, 2, rope=rope, batch_first=True, dtype=F64)
    x = torch.randn(2, 5, 12, dtype=F64)
    positions = torch.tensor([3, 4, 9, 1, 2])
    expected = ours(x, x, x, positions=positions)
    torch.testing.assert_close(ours(x, x, x, positions=positions + 17), expected, **EXACT)
    shifted = torch.stack([positions + 1, positions + 30])
    torch.testing.assert_close(ours(x, x, x, positions=shifted), expected, **EXACT)
    torch.testing.assert_close(ours(x, x, x, positions=torch.arange(5)), ours(x, x, x), **EXACT)
    assert not torch.allclose(ours(x, x, x)[0], expected[0])
    order = positions.argsort()
    permuted = ours(x[:, order], x[:, order], x[:, order], positions=positions[order])[0]
    torch.testing.assert_close(permuted, expected[0][:, order], **EXACT)
    assert list(ours.state_dict()) == list(torch.nn.MultiheadAttention(12, 2).state_dict())
    assert type(pickle.loads(pickle.dumps(ours)).rope) is RotaryEmbedding


def test_positions_that_do_not_fit() -> None:
    x = torch.randn(5, 2, 8)
    with pytest.raises(ValueError, match="without rope"):
        MultiheadAttention(8, 2)(x, x, x, positions=torch.arange(5))
    layer = MultiheadAttention(8, 2, rope=RotaryEmbedding(4))
    with pytest.raises(ValueError, match=r"shape \(5,\) or \(2, 5\), got \(4,\)"):
        layer(x, x, x, positions=torch.arange(4))
    with pytest.raises(ValueError, match="different lengths: got 5 and 3"):
        layer(x, x[:3], x[:3], positions=torch.arange(5))


# --- cache -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["batch_first", "time_first", "unbatched"])
@pytest.mark.parametrize(
    "options", [{}, {"num_kv_heads": 2, "rope": RotaryEmbedding(2)}], ids=["", "gqa"]
)
def test_decoding_equals_the_causal_mask(layout: str, options: dict[str, Any]) -> None:
    layer = MultiheadAttention(12, 4, batch_first=layout == "batch_first", dtype=F64, **options)
    x = torch.randn(*((9,) if layout == "unbatched" else (9, 3)), 12, dtype=F64)
    at = 0
    if layout == "batch_first":
        x, at = x.transpose(0, 1), 1
    expected, expected_weights = layer(x, x, x, attn_mask=causal(9), is_causal=True)
    for capacity, pieces in ((0, [1] * 9), (9, [4, 1, 1, 3]), (2, [9]), (1, [2, 7])):
        cache = KeyValueCache(capacity)
        outputs = []
        with torch.no_grad():
            for piece in x.split(pieces, dim=at):
                output, weights = layer(piece, piece, piece, cache=cache)
                assert weights.size(-1) == cache.length
                outputs.append(output)
        torch.testing.assert_close(torch.cat(outputs, at), expected.detach(), **EXACT)
        rows = pieces[-1]
        torch.testing.assert_close(weights, expected_weights[..., -rows:, :].detach(), **EXACT)
        assert len(cache) == cache.length == 9
        assert cache.capacity >= 9


def test_decoding_with_masks() -> None:
    layer = MultiheadAttention(8, 2, batch_first=True, dtype=F64)
    x = torch.randn(2, 6, 8, dtype=F64)
    padding = torch.tensor([[True, True, False, False, False, False], [False] * 6])
    bias = torch.randn(6, 6, dtype=F64)
    mask = bias.masked_fill(causal(6), -torch.inf)
    expected = layer(x, x, x, padding, attn_mask=mask, need_weights=False)[0]
    cache = KeyValueCache()
    with torch.inference_mode():
        for start, end in ((0, 4), (4, 5), (5, 6)):
            piece = x[:, start:end]
            output, _ = layer(
                piece,
                piece,
                piece,
                padding[:, :end],
                need_weights=False,
                attn_mask=bias[start:end, :end],
                is_causal=True,
                cache=cache,
            )
            torch.testing.assert_close(output, expected[:, start:end], **EXACT)


def test_growth_copies_seldom() -> None:
    cache = KeyValueCache(4)
    assert cache.capacity == 4
    assert cache.keys is None
    step = torch.randn(2, 3, 1, 5)
    capacities = []
    for count in range(1, 40):
        keys, values = cache.append(step * count, -step * count)
        assert keys.shape == values.shape == (2, 3, count, 5)
        capacities.append(cache.capacity)
    assert sorted(set(capacities)) == [4, 8, 16, 32, 64]
    wanted = step * torch.arange(1, 40).view(1, 1, -1, 1)
    assert torch.equal(cache.keys, wanted)
    assert torch.equal(cache.values, -wanted)


def test_crop_reset_and_reorder() -> None:
    cache = KeyValueCache()
    kv = torch.randn(2, 1, 5, 3)
    cache.append(kv, kv)
    with pytest.raises(ValueError, match="between 0 and 5, got 6"):
        cache.crop(6)
    cache.crop(2)
    assert torch.equal(cache.append(kv[:, :, :1], kv[:, :, :1])[0], kv[:, :, [0, 1, 0]])
    cache.reorder(torch.tensor([1, 1, 0]))
    assert torch.equal(cache.keys, kv[[1, 1, 0]][:, :, [0, 1, 0]])
    cache.reset()
    assert len(cache) == 0
    with pytest.raises(ValueError, match=r"expected \(3, 1, 5, 3\), got \(2, 1, 5, 3\)"):
        cache.append(kv, kv)


def test_a_cache_of_inference_mode_goes_on_outside() -> None:
    cache = KeyValueCache(8)
    kv = torch.randn(2, 1, 2, 3)
    with torch.inference_mode():
        cache.append(kv, kv)
    with torch.no_grad():
        assert torch.equal(cache.append(kv, kv)[1], torch.cat([kv, kv], 2))
    assert cache.capacity == 8


def test_what_a_cache_refuses() -> None:
    cache = KeyValueCache()
    kv = torch.randn(2, 1, 2, 3)
    with pytest.raises(ValueError, match="capacity must not be negative, got -1"):
        KeyValueCache(-1)
    with pytest.raises(ValueError, match="must be 4-D"):
        cache.append(kv[0], kv[0])
    with pytest.raises(ValueError, match="same batch, heads and positions"):
        cache.append(kv, kv[:, :, :1])
    cache.append(kv, kv)
    with pytest.raises(RuntimeError, match=r"expected torch\.float32 on cpu, got torch\.float64"):
        cache.append(kv.double(), kv.double())
    x = torch.randn(3, 2, 8)
    layer = MultiheadAttention(8, 2)
    with pytest.raises(RuntimeError, match="must not require gradients"):
        layer(x, x, x, cache=KeyValueCache())
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"positions of query .* expected 3, got 2"):
            layer(x, x[:2], x[:2], cache=KeyValueCache())
        for option in ("add_bias_kv", "add_zero_attn"):
            with pytest.raises(ValueError, match=option):
                MultiheadAttention(8, 2, **{option: True})(x, x, x, cache=KeyValueCache())
