"""Decoding with a cache: the same as without, whatever the steps."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from oracle import every_tier
from torch import Tensor
from transformers_pair import EMBED, FEED, HEADS, Case, build, sequence

import fastseq.nn as fast_nn
from fastseq.nn import DecoderCache, DecoderLayerCache, _decoding

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def decoder(cross_attention: bool = True, **options: Any) -> fast_nn.TransformerDecoder:
    torch.manual_seed(0)
    layer = fast_nn.TransformerDecoderLayer(
        EMBED,
        HEADS,
        FEED,
        **{"batch_first": True, "dtype": torch.float64, **options},
        cross_attention=cross_attention,
    )
    stack = fast_nn.TransformerDecoder(layer, 2, fast_nn.LayerNorm(EMBED, dtype=torch.float64))
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.normal_(std=0.5)
    return stack.eval()


def causal(steps: int) -> Tensor:
    return torch.ones(steps, steps, dtype=torch.bool).triu(1)


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions of every layer call that went the shortest way."""
    seen: list[int] = []
    original = _decoding._step

    def spy(layer: Any, x: Tensor, *args: Any) -> Tensor:
        seen.append(x.numel())
        return original(layer, x, *args)

    monkeypatch.setattr(_decoding, "_step", spy)
    return seen


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("pieces", [(1,) * 7, (4, 1, 1, 1), (3, 2, 2), (7,)], ids=str)
def test_cached_equals_uncached(
    pieces: tuple[int, ...],
    batch_first: bool,
    norm_first: bool,
    cross: bool,
    inference_mode: bool,
    steps_taken: list[int],
) -> None:
    stack = decoder(cross, batch_first=batch_first, norm_first=norm_first)
    at = 1 if batch_first else 0
    target, memory = sequence(3, 7), sequence(3, 5, seed=1)
    if not batch_first:
        target, memory = target.transpose(0, 1), memory.transpose(0, 1)
    given = memory if cross else None
    with torch.inference_mode() if inference_mode else torch.no_grad():
        expected = stack(target, given, tgt_mask=causal(7))
        cache = DecoderCache(2, capacity=2)
        found = [stack(one, given, cache=cache) for one in target.split(list(pieces), at)]
        assert cache.length == 7
        torch.testing.assert_close(torch.cat(found, at), expected, **CLOSE)
    assert len(steps_taken) == 2 * (len(pieces) - 1)


@pytest.mark.parametrize(
    "options", [{"bias": False}, {"activation": torch.tanh}], ids=["no_bias", "tanh"]
)
def test_options_of_layers(options: dict[str, Any]) -> None:
    stack = decoder(**options)
    target, memory = sequence(2, 4), sequence(2, 5, seed=1)
    cache = DecoderCache(2)
    with torch.no_grad():
        expected = stack(target, memory, tgt_mask=causal(4))
        found = [stack(one, memory, cache=cache) for one in target.split(1, 1)]
    torch.testing.assert_close(torch.cat(found, 1), expected, **CLOSE)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 8, 9, 16, 17, 33, 48, 64, 65, 100])
def test_any_number_of_sequences(rows: int, dtype: torch.dtype, norm_first: bool) -> None:
    """Products go one way or another by their number of rows: all sequences of the batch."""
    stack = decoder(norm_first=norm_first).to(dtype)
    target, memory = sequence(rows, 3).to(dtype), sequence(rows, 4, seed=1).to(dtype)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else CLOSE
    for _ in every_tier():
        cache = DecoderCache(2, capacity=2)
        with torch.no_grad():
            expected = stack(target, memory, tgt_mask=causal(3))
            found = [stack(one, memory, cache=cache) for one in target.split(1, 1)]
        torch.testing.assert_close(torch.cat(found, 1), expected, **close)


def test_attentions_with_different_numbers_of_heads() -> None:
    stack = decoder()
    for layer in stack.layers:
        layer.multihead_attn = fast_nn.MultiheadAttention(
            EMBED, 2 * HEADS, batch_first=True, dtype=torch.float64
        ).eval()
    target, memory = sequence(2, 4), sequence(2, 5, seed=1)
    cache = DecoderCache(2)
    with torch.no_grad():
        expected = stack(target, memory, tgt_mask=causal(4))
        found = [stack(one, memory, cache=cache) for one in target.split(1, 1)]
    torch.testing.assert_close(torch.cat(found, 1), expected, **CLOSE)


def test_float32_equals_to_the_digit_that_matters() -> None:
    stack = decoder().float()
    target, memory = sequence(2, 30).float(), sequence(2, 9, seed=1).float()
    cache = DecoderCache(2)
    with torch.no_grad():
        expected = stack(target, memory, tgt_mask=causal(30))
        found = [stack(one, memory, cache=cache) for one in target.split(1, 1)]
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-5, atol=1e-5)


def test_memory_is_projected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, cache = decoder(), DecoderCache(2)
    target, memory = sequence(2, 4), sequence(2, 5, seed=1)
    calls = []
    original = fast_nn.MultiheadAttention._project_memory

    def spy(self: Any, memory: Tensor) -> Any:
        calls.append(memory)
        return original(self, memory)

    with torch.no_grad():
        expected = stack(target, memory, tgt_mask=causal(4))
        monkeypatch.setattr(fast_nn.MultiheadAttention, "_project_memory", spy)
        first = stack(target[:, :2], memory, cache=cache)
        rest = [stack(one, None, cache=cache) for one in target[:, 2:].split(1, 1)]
    assert len(calls) == 2
    torch.testing.assert_close(torch.cat([first, *rest], 1), expected, **CLOSE)


@pytest.mark.parametrize("batch_first", [False, True])
def test_masks(batch_first: bool) -> None:
    """Of the target (prompts padded in front), of the memory, and of both."""
    stack = decoder(batch_first=batch_first)
    at = 1 if batch_first else 0
    target, memory = sequence(3, 6), sequence(3, 5, seed=1)
    hidden = torch.arange(6) < torch.tensor([0, 2, 1])[:, None]
    memory_hidden = torch.arange(5) >= torch.tensor([5, 3, 1])[:, None]
    window = torch.ones(6, 6, dtype=torch.bool).tril(-3)
    across = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.3
    across[:, 0] = False
    if not batch_first:
        target, memory = target.transpose(0, 1), memory.transpose(0, 1)
    for pads, windows, crosses in itertools.product((False, True), repeat=3):
        options: dict[str, Any] = {"memory_key_padding_mask": memory_hidden}
        mask = causal(6) | window if windows else causal(6)
        padding = {"tgt_key_padding_mask": hidden} if pads else {}
        crossing = {"memory_mask": across} if crosses else {}
        with torch.no_grad():
            expected = stack(target, memory, tgt_mask=mask, **padding, **crossing, **options)
            cache, found, start = DecoderCache(2), [], 0
            for one in target.split([3, 1, 2], at):
                end = start + one.size(at)
                if windows:
                    options["tgt_mask"] = window[start:end, :end]
                if pads:
                    options["tgt_key_padding_mask"] = hidden[:, :end]
                if crosses:
                    options["memory_mask"] = across[start:end]
                found.append(stack(one, memory, cache=cache, **options))
                start = end
        valid = ~hidden if pads else torch.ones_like(hidden)
        valid = valid if batch_first else valid.T
        torch.testing.assert_close(torch.cat(found, at)[valid], expected[valid], **CLOSE)


def test_one_sequence_without_a_batch() -> None:
    stack = decoder()
    target, memory = sequence(5), sequence(4, seed=1)
    cache = DecoderCache(2)
    with torch.no_grad():
        expected = stack(target, memory, tgt_mask=causal(5))
        found = [stack(one, memory, cache=cache) for one in target.split([2, 1, 2])]
    torch.testing.assert_close(torch.cat(found), expected, **CLOSE)


@pytest.mark.parametrize("cross", [False, True])
def test_module_by_module(cross: bool, steps_taken: list[int]) -> None:
    stack = decoder(cross)
    target, memory = sequence(2, 4), sequence(2, 5, seed=1) if cross else None
    calls = []
    with torch.no_grad():
        expected = stack(target, memory, tgt_mask=causal(4))
        stack.layers[1].linear1.register_forward_hook(lambda *_: calls.append(1))
        cache = DecoderCache(2)
        found = [stack(one, memory, cache=cache) for one in target.split(1, 1)]
    torch.testing.assert_close(torch.cat(found, 1), expected, **CLOSE)
    assert len(calls) == 4
    assert len(steps_taken) == 3


def test_dropout_left_on_by_the_caller(steps_taken: list[int]) -> None:
    stack, cache = decoder(), DecoderCache(2)
    memory = sequence(2, 5, seed=1)
    with torch.no_grad():
        stack(sequence(2, 2), memory, cache=cache)
        stack.layers[0].dropout1.train().p = 1.0
        x = sequence(2, 1, seed=2)
        layer = stack.layers[0]
        found = layer(x, memory, cache=copy.deepcopy(cache[0]))
        assert not steps_taken
        expected = layer.norm1(x)
    attended = layer.multihead_attn(expected, memory, memory, need_weights=False)[0].detach()
    expected = layer.norm2(expected + attended)
    torch.testing.assert_close(found, layer.norm3(expected + layer._ff_block(expected)), **CLOSE)


def test_crop_reset_and_copies() -> None:
    stack, cache = decoder(), DecoderCache(2, capacity=8)
    target, memory = sequence(2, 6), sequence(2, 5, seed=1)
    with torch.no_grad():
        expected = stack(target, memory, tgt_mask=causal(6))
        stack(sequence(2, 6, seed=3), memory, cache=cache)
        cache.reset()
        assert cache.length == 0
        stack(target[:, :3], memory, cache=cache)
        twin = copy.deepcopy(cache)
        stack(sequence(2, 2, seed=4), memory, cache=cache)
        cache.crop(3)
        for one in (cache, twin):
            found = stack(target[:, 3:4], memory, cache=one)
            torch.testing.assert_close(found, expected[:, 3:4], **CLOSE)
        found = stack(target[:, 4:], memory, cache=twin)
        torch.testing.assert_close(found, expected[:, 4:], **CLOSE)
        assert (cache.length, twin.length) == (4, 6)


@pytest.mark.parametrize("indices", [[1, 0, 2], [2, 2, 0, 1, 1], [1], [0, 1, 2]], ids=str)
def test_reorder(indices: list[int]) -> None:
    stack, cache = decoder(), DecoderCache(2, capacity=4)
    target, memory = sequence(3, 5), sequence(3, 4, seed=1)
    chosen = torch.tensor(indices)
    with torch.no_grad():
        expected = stack(target[chosen], memory[chosen], tgt_mask=causal(5))
        stack(target[:, :3], memory, cache=cache)
        cache.reorder(chosen)
        assert all(layer.self_attention.capacity == 4 for layer in cache)
        for step in (3, 4):
            found = stack(target[chosen, step : step + 1], memory[chosen], cache=cache)
            torch.testing.assert_close(found, expected[:, step : step + 1], **CLOSE)
        with pytest.raises((IndexError, RuntimeError)):
            cache.reorder(torch.tensor([7]))


def test_beams_of_one_sentence_share_their_memory() -> None:
    stack, cache = decoder(), DecoderCache(2)
    memory = sequence(2, 4, seed=1)
    with torch.no_grad():
        stack(sequence(2, 1), memory, cache=cache)
        cache.reorder(torch.tensor([0, 0, 1, 1]))
        held = [layer.memory_keys for layer in cache]
        cache.reorder(torch.tensor([1, 1, 3, 2]))
        assert all(layer.memory_keys is old for layer, old in zip(cache, held, strict=True))
        cache.reorder(torch.tensor([2, 1, 0, 3]))
        assert not any(layer.memory_keys is old for layer, old in zip(cache, held, strict=True))


def test_errors() -> None:
    stack = decoder()
    x, memory = sequence(2, 1), sequence(2, 5, seed=1)
    with pytest.raises(RuntimeError, match="must not require gradients"):
        stack(x, memory, cache=DecoderCache(2))
    with torch.no_grad():
        with pytest.raises(ValueError, match="expected 2, got 3"):
            stack(x, memory, cache=DecoderCache(3))
        with pytest.raises(ValueError, match="memory must be given"):
            stack(x, cache=DecoderCache(2))
        cache = DecoderCache(2)
        stack(x, memory, cache=cache)
        for wrong in (sequence(3, 1), sequence(1, 1)):
            with pytest.raises(ValueError, match="shape of what the cache holds"):
                stack(wrong, memory, cache=cache)
        theirs = build(torch.nn, Case("TransformerDecoder"))
        mixed = fast_nn.TransformerDecoder(theirs.layers[0], 2)
        with pytest.raises(TypeError, match="layers that take none"):
            mixed(x, memory, cache=DecoderCache(2))
        padding = torch.zeros(2, 5, dtype=torch.int64)
        with pytest.raises(AssertionError, match=r"memory_key_padding_mask.*int64"):
            stack(x, memory, cache=cache, memory_key_padding_mask=padding)
        with pytest.raises(TypeError, match="cache must be a DecoderCache, got DecoderLayerCache"):
            stack(x, memory, cache=DecoderLayerCache())
        with pytest.raises(TypeError, match="cache must be a DecoderLayerCache, got DecoderCache"):
            stack.layers[0](x, memory, cache=cache)
    with pytest.raises(ValueError, match="num_layers"):
        DecoderCache(-1)
    with pytest.raises(ValueError, match="capacity"):
        DecoderLayerCache(-1)
    with pytest.raises(ValueError, match="between 0 and 0"):
        DecoderCache(1).crop(1)


def test_text_and_length() -> None:
    cache = DecoderCache(3)
    assert len(cache) == 3
    assert list(cache) == [cache[0], cache[1], cache[2]]
    assert DecoderCache(0).length == 0
