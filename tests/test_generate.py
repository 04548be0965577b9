"""fastseq.generate: cached against uncached, torch.nn's layers, what it leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation_models import (
    HEADS,
    SIZE,
    STRATEGIES,
    WORDS,
    Parts,
    Seen,
    Table,
    both,
    chain,
    history_logits,
    language_model,
    translator,
)
from torch import Tensor, nn

import fastseq
import fastseq.nn as fnn
from fastseq import Beam, Sample


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
@pytest.mark.parametrize("batch_first", [True, False])
def test_translation_with_and_without_cache(strategy: Any, batch_first: bool) -> None:
    model, parts = translator(batch_first=batch_first), Parts(batch_first)
    source = torch.randint(WORDS, (3, 7))
    hidden = torch.arange(7) >= torch.tensor([[7], [4], [1]])
    prompt = torch.tensor([[1], [1], [2]])
    options = {"source": source, "source_key_padding_mask": hidden, **parts.callables}
    for eos in (None, 4):
        tokens, _ = both(model, prompt, 12, strategy=strategy, eos=eos, **options)
        assert tokens.shape[0] == 3
        assert tokens.shape[1] <= 13
        assert torch.equal(tokens[:, :1], prompt)
        if eos is None:
            assert tokens.shape[1] == 13
        # torch's layers from the same seed, without a cache. They are given the same numbers.
        generator = None
        if isinstance(strategy, Sample):
            generator = torch.Generator().manual_seed(5)
        theirs = fastseq.generate(
            translator(nn, batch_first),
            prompt,
            12,
            strategy=strategy,
            eos=eos,
            generator=generator,
            **options,
        )
        assert torch.equal(tokens, theirs)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
@pytest.mark.parametrize("batch_first", [True, False])
def test_language_model_with_and_without_cache(strategy: Any, batch_first: bool) -> None:
    model, parts = language_model(batch_first), Parts(batch_first)
    prompt = torch.randint(WORDS, (3, 5))
    tokens, _ = both(model, prompt, 10, strategy=strategy, eos=[4, 7], **parts.callables)
    assert torch.equal(tokens[:, :5], prompt)
    # Rows of different lengths continue as each would alone (where no numbers are drawn).
    lengths = torch.tensor([2, 5, 3])
    tokens, scores = both(
        model,
        prompt,
        10,
        strategy=strategy,
        eos=[4, 7],
        pad=12,
        prompt_lengths=lengths,
        **parts.callables,
    )
    if isinstance(strategy, Sample):
        return
    for row, score, length, full in zip(tokens, scores, lengths.tolist(), prompt, strict=True):
        alone, alone_score = fastseq.generate(
            model,
            full[:length],
            10,
            strategy=strategy,
            eos=[4, 7],
            return_scores=True,
            **parts.callables,
        )
        assert torch.equal(row[: len(alone)], alone)
        assert (row[len(alone) :] == 12).all()
        torch.testing.assert_close(score, alone_score, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_any_model_with_a_cache(strategy: Any) -> None:
    prompt = torch.tensor([[1, 2], [3, 4], [5, 6]])
    for lengths in (None, [2, 1, 2]):
        tokens, _ = both(
            Seen(history_logits), prompt, 15, strategy=strategy, eos=3, prompt_lengths=lengths
        )
        assert torch.equal(tokens[0, :2], prompt[0])


def test_norm_first_and_memory_in_place_of_source() -> None:
    model, parts = translator(norm_first=True), Parts()
    source = torch.randint(WORDS, (2, 4))
    begin = torch.ones(2, 1, dtype=torch.long)
    tokens, _ = both(model, begin, 8, source=source, **parts.callables)
    with torch.no_grad():
        memory = model.encoder(parts.embed(source, 0))
    again, _ = both(model, begin, 8, memory=memory, **parts.callables)
    assert torch.equal(again, tokens)
    again, _ = both(model.decoder, begin, 8, memory=memory, **parts.callables)
    assert torch.equal(again, tokens)
    vectors = parts.embed(source, 0).detach()
    again, _ = both(model, begin, 8, source=vectors, **parts.callables)
    assert torch.equal(again, tokens)


def test_source_embed() -> None:
    model, parts = translator(), Parts()
    torch.manual_seed(3)
    other = nn.Embedding(WORDS, SIZE)

    def embed_source(tokens: Tensor, start: int) -> Tensor:
        assert start == 0
        return other(tokens)

    source, begin = torch.randint(WORDS, (2, 4)), torch.ones(2, 1, dtype=torch.long)
    tokens, _ = both(model, begin, 8, source=source, source_embed=embed_source, **parts.callables)
    expected, _ = both(model, begin, 8, source=other(source).detach(), **parts.callables)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("layers", [nn, fnn], ids=["torch", "fastseq"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_under_a_causal_mask(layers: Any, batch_first: bool) -> None:
    """It is what a decoder without cross-attention computes."""
    torch.manual_seed(1)
    layer = layers.TransformerEncoderLayer(SIZE, HEADS, 32, batch_first=batch_first)
    encoder = layers.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    decoder, parts = language_model(batch_first), Parts(batch_first)
    decoder.load_state_dict(
        {key.replace("norm2", "norm3"): value for key, value in encoder.state_dict().items()}
    )
    prompt = torch.randint(WORDS, (2, 3))
    expected = fastseq.generate(decoder, prompt, 9, **parts.callables)
    assert torch.equal(fastseq.generate(encoder, prompt, 9, **parts.callables), expected)


def test_converted_and_mixed_stacks() -> None:
    model, parts = translator(nn), Parts()
    source, begin = torch.randint(WORDS, (2, 4)), torch.ones(2, 1, dtype=torch.long)
    expected = fastseq.generate(model, begin, 8, source=source, **parts.callables)
    # One layer of torch's among fastseq's: no cache, but the same tokens.
    mixed = translator()
    mixed.decoder.layers[1] = model.decoder.layers[1]
    assert torch.equal(
        fastseq.generate(mixed, begin, 8, source=source, **parts.callables), expected
    )
    fastseq.convert(model)
    tokens, _ = both(model, begin, 8, source=source, **parts.callables)
    assert torch.equal(tokens, expected)


def test_greedy_by_hand() -> None:
    model, parts = language_model(), Parts()
    prompt = torch.randint(WORDS, (1, 4))
    expected, total = prompt, torch.zeros(())
    with torch.no_grad():
        for _ in range(6):
            vectors = parts.embed(expected, 0)
            mask = nn.Transformer.generate_square_subsequent_mask(vectors.size(1))
            likely = parts.output(model(vectors, tgt_mask=mask)[:, -1]).log_softmax(-1)
            total = total + likely.max()
            expected = torch.cat([expected, likely.argmax(-1, keepdim=True)], 1)
    tokens, scores = fastseq.generate(model, prompt, 6, return_scores=True, **parts.callables)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(scores, total.reshape(1), rtol=1e-4, atol=1e-4)


def test_a_cache_is_given_only_new_tokens() -> None:
    class Counting(Table):
        def new_cache(self, capacity: int) -> Any:
            assert capacity in (5, 6)
            return self

        def reorder(self, indices: Tensor) -> None: ...

    model = Counting(chain().logits)
    fastseq.generate(model, torch.tensor([[1, 2], [2, 3]]), 4)
    assert model.calls == [(2, 2), (2, 1), (2, 1), (2, 1)]
    model.calls.clear()
    fastseq.generate(model, torch.tensor([[1, 2]]), 3, strategy=Beam(2))
    assert model.calls == [(1, 2), (2, 1), (2, 1)]


def test_eval_mode_lasts_only_for_the_call() -> None:
    model, parts = translator(), Parts()
    expected = fastseq.generate(
        model, torch.tensor([1]), 8, source=torch.tensor([3, 4]), **parts.callables
    )
    model.train()
    model.encoder.layers[0].eval()
    parts.positions.train()
    parts.embed = Embedder(parts).embed  # type: ignore[method-assign]
    tokens = fastseq.generate(
        model, torch.tensor([1]), 8, source=torch.tensor([3, 4]), **parts.callables
    )
    assert torch.equal(tokens, expected)
    assert model.training
    assert model.decoder.training
    assert not model.encoder.layers[0].linear1.training
    assert parts.positions.training
    # The result is an ordinary tensor, and no gradient hangs on it.
    assert not tokens.is_inference()
    tokens.add_(1)


class Embedder(nn.Module):
    """A module whose method embeds: it has to be put in eval mode as well."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.embedding, self.positions = parts.embedding, parts.positions

    def embed(self, tokens: Tensor, start: int) -> Tensor:
        return self.positions(self.embedding(tokens), start)


def test_modules_that_plain_functions_use_are_in_eval_mode_too() -> None:
    model, parts = language_model(), Parts()
    expected = fastseq.generate(model, torch.tensor([[1]]), 8, **parts.callables)
    positions, embedding = parts.positions.train(), parts.embedding

    def embed(tokens: Tensor, start: int) -> Tensor:
        return positions(embedding(tokens), start)

    options = {**parts.callables, "embed": embed}
    for _ in range(3):
        assert torch.equal(fastseq.generate(model, torch.tensor([[1]]), 8, **options), expected)
    assert positions.training


def test_eval_mode_ends_with_an_error_too() -> None:
    model, parts = language_model().train(), Parts()
    with pytest.raises(IndexError):
        fastseq.generate(model, torch.tensor([WORDS + 1]), 2, **parts.callables)
    assert model.training
    assert model.layers[0].training


def test_long_generation_outgrows_the_first_allocation() -> None:
    cache_sizes: list[int] = []
    model, parts = language_model(), Parts()
    original = fnn.DecoderCache.__init__

    def small(self: Any, layers: int, capacity: int = 0) -> None:
        cache_sizes.append(capacity)
        original(self, layers, 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fnn.DecoderCache, "__init__", small)
        both(model, torch.tensor([[1, 2, 3]]), 30, strategy=Beam(3), **parts.callables)
    assert cache_sizes == [33]
