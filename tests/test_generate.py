"""fastseq.generate: cached against uncached, torch.nn's layers, and searches done by hand."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastseq
import fastseq.nn as fnn
from fastseq import Beam, Greedy, Sample
from fastseq.generation.strategies import choose

WORDS, SIZE, HEADS = 13, 16, 4

STRATEGIES = [
    Greedy(),
    Sample(),
    Sample(temperature=0.7, top_k=5),
    Sample(temperature=1.3, top_p=0.8),
    Sample(top_k=6, top_p=0.9),
    Beam(3),
    Beam(4, length_penalty=0.0),
    Beam(2, length_penalty=-0.5),
]


class Parts:
    """Embedding, positions and output around a stack."""

    def __init__(self, batch_first: bool = True) -> None:
        torch.manual_seed(2)
        self.embedding = nn.Embedding(WORDS, SIZE)
        self.positions = fnn.PositionalEncoding(SIZE, batch_first=batch_first).eval()
        self.output = nn.Linear(SIZE, WORDS)
        with torch.no_grad():
            self.output.weight.mul_(3)  # so that probabilities differ

    def embed(self, tokens: Tensor, start: int) -> Tensor:
        return self.positions(self.embedding(tokens), start)

    @property
    def callables(self) -> dict[str, Any]:
        return {"embed": self.embed, "project": self.output}


def translator(layers: Any = fnn, batch_first: bool = True, norm_first: bool = False) -> Any:
    torch.manual_seed(1)
    # Without dropout=0 the test of eval mode would have nothing to find.
    model = layers.Transformer(
        SIZE, HEADS, 2, 2, 32, 0.3, batch_first=batch_first, norm_first=norm_first
    )
    return model.eval()


def language_model(batch_first: bool = True) -> fnn.TransformerDecoder:
    torch.manual_seed(1)
    layer = fnn.TransformerDecoderLayer(
        SIZE, HEADS, 32, batch_first=batch_first, cross_attention=False
    )
    return fnn.TransformerDecoder(layer, 2).eval()


class Table:
    """A model whose logits depend on the last token alone: ``logits[last]``."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.calls: list[tuple[int, ...]] = []

    def decode(self, tokens: Tensor, memory: Any, mask: Any, cache: Any) -> Tensor:
        self.calls.append(tuple(tokens.shape))
        return self.logits[tokens[:, -1]]


class Seen:
    """A model with a cache of its own: the tokens themselves."""

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        self.logits = logits
        self.tokens: Tensor | None = None

    def new_cache(self, capacity: int) -> Seen:
        self.tokens = None
        return self

    def reorder(self, indices: Tensor) -> None:
        assert self.tokens is not None
        self.tokens = self.tokens[indices]

    def decode(self, tokens: Tensor, memory: Any, mask: Any, cache: Any) -> Tensor:
        if cache is None:
            return self.logits(tokens)
        known = [] if self.tokens is None else [self.tokens]
        self.tokens = torch.cat([*known, tokens], 1)
        return self.logits(self.tokens)


def history_logits(tokens: Tensor) -> Tensor:
    """Logits that depend on every token and its position, so that a mixed up cache shows."""
    weights = torch.arange(1, tokens.size(1) + 1)
    state = ((tokens + 1) * weights).sum(1, keepdim=True)
    return 3 * torch.sin(state * torch.arange(1.0, WORDS + 1) * 0.7)


def both(model: Any, *arguments: Any, seed: int = 5, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens with the cache, after making sure that they are those without it."""
    results = []
    for use_cache in (True, False):
        if isinstance(options.get("strategy"), Sample):
            options["generator"] = torch.Generator().manual_seed(seed)
        results.append(
            fastseq.generate(model, *arguments, **options, use_cache=use_cache, return_scores=True)
        )
    (tokens, scores), (expected, expected_scores) = results
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-4, atol=1e-4)
    return tokens, scores


# --- cached, uncached, torch ---------------------------------------------------------------------


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


# --- strategies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [-0.7, 0.0, 0.6, 1.5])
def test_wide_beam_finds_the_best_of_all(penalty: float) -> None:
    """With more hypotheses than there are sequences nothing is lost."""
    words, eos, steps = 3, 0, 4
    for seed in range(10):
        torch.manual_seed(seed)
        logits = torch.randn(words, words)
        likely = logits.log_softmax(-1)
        best, best_score = (), float("-inf")
        for length in range(1, steps + 1):
            for tail in itertools.product(range(words), repeat=length):
                if eos in tail[:-1] or (length < steps and tail[-1] != eos):
                    continue
                pairs = zip((1, *tail), tail, strict=False)
                score = sum(likely[a, b].item() for a, b in pairs) / ((5 + length) / 6) ** penalty
                if score > best_score:
                    best, best_score = tail, score
        tokens, score = fastseq.generate(
            Table(logits),
            torch.tensor([1]),
            steps,
            strategy=Beam(100, penalty),
            eos=eos,
            return_scores=True,
        )
        assert tokens[1:].tolist() == list(best)
        torch.testing.assert_close(score.item(), best_score, rtol=1e-5, atol=1e-5)


def test_beam_of_one_is_greedy() -> None:
    prompt = torch.arange(6).reshape(6, 1)
    model = Seen(history_logits)
    for eos in (None, 3):
        expected = fastseq.generate(model, prompt, 12, eos=eos)
        tokens = fastseq.generate(model, prompt, 12, eos=eos, strategy=Beam(1))
        assert torch.equal(tokens, expected)


def test_beam_looks_further_than_greedy() -> None:
    """Greedy takes 1 and then has nothing good; 2 leads to a certain end."""
    p = torch.full((4, 4), 0.25)
    p[0] = torch.tensor([0.0, 0.6, 0.4, 0.0])
    p[2] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    model, prompt = Table(p.log()), torch.tensor([0])
    assert fastseq.generate(model, prompt, 2, eos=3).tolist() == [0, 1, 0]
    tokens, score = fastseq.generate(
        model, prompt, 2, eos=3, strategy=Beam(2, 0.0), return_scores=True
    )
    assert tokens.tolist() == [0, 2, 3]
    torch.testing.assert_close(score.exp().item(), 0.4)


def test_beam_where_nothing_is_possible_keeps_the_prompt() -> None:
    model = Table(torch.full((3, 3), float("-inf")))
    tokens = fastseq.generate(model, torch.tensor([[1, 2]]), 3, eos=0, strategy=Beam(2))
    assert tokens.tolist() == [[1, 2]]


def test_length_penalty_favours_longer_results() -> None:
    p = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.8, 0.2], [1.0, 0.0, 0.0]])
    # From 0: end (2) at once, or on; each step on costs a factor of two.
    lengths = [
        fastseq.generate(
            Table(p.log()), torch.tensor([0]), 8, eos=2, strategy=Beam(4, penalty)
        ).numel()
        for penalty in (0.0, 4.0)
    ]
    assert lengths[0] == 2
    assert lengths[1] > 4


def test_sampling_follows_the_distribution() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5])
    rows = logits.expand(20000, 5)

    def frequencies(strategy: Sample) -> Tensor:
        return torch.bincount(choose(rows, strategy), minlength=5) / len(rows)

    near = {"rtol": 0, "atol": 0.015}
    torch.testing.assert_close(frequencies(Sample()), logits.softmax(0), **near)
    torch.testing.assert_close(frequencies(Sample(2.0)), (logits / 2).softmax(0), **near)
    likely = logits.clone()
    likely[[1, 3, 4]] = float("-inf")
    torch.testing.assert_close(frequencies(Sample(top_k=2)), likely.softmax(0), **near)
    # The probabilities are .21 .08 .56 .03 .13: 0.7 needs the first two, 0.56 only one.
    torch.testing.assert_close(frequencies(Sample(top_p=0.7)), likely.softmax(0), **near)
    assert frequencies(Sample(top_p=0.5)).tolist() == [0, 0, 1, 0, 0]
    assert frequencies(Sample(top_p=1e-9)).tolist() == [0, 0, 1, 0, 0]
    torch.testing.assert_close(frequencies(Sample(top_p=1.0)), logits.softmax(0), **near)
    torch.testing.assert_close(frequencies(Sample(top_k=100)), logits.softmax(0), **near)
    # top_p counts what top_k has left: .73 and .27.
    assert frequencies(Sample(top_k=2, top_p=0.7)).tolist() == [0, 0, 1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_of_logits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Table(torch.randn(5, 5).to(dtype))
    for strategy in STRATEGIES:
        tokens, scores = fastseq.generate(
            model, torch.zeros(2, 1, dtype=torch.long), 4, strategy=strategy, return_scores=True
        )
        assert tokens.shape == (2, 5)
        assert scores.isfinite().all()


def test_sampling_with_a_generator_repeats() -> None:
    model, prompt = Seen(history_logits), torch.ones(4, 2, dtype=torch.long)

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return fastseq.generate(model, prompt, 20, strategy="sample", generator=generator)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_score_of_a_sample_is_that_of_the_model() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 5)
    tokens, scores = fastseq.generate(
        Table(logits),
        torch.zeros(3, 1, dtype=torch.long),
        6,
        strategy=Sample(0.5, 3),
        return_scores=True,
    )
    likely = logits.log_softmax(-1)
    expected = likely[tokens[:, :-1], tokens[:, 1:]].sum(1)
    torch.testing.assert_close(scores, expected)


# --- ends ----------------------------------------------------------------------------------------


def chain(words: int = 6) -> Table:
    """Every token is followed by the next one."""
    return Table(torch.eye(words).roll(1, 1) * 50)


@pytest.mark.parametrize("strategy", [Greedy(), Sample(), Beam(2)], ids=repr)
def test_rows_stop_at_their_ends(strategy: Any) -> None:
    model = chain()
    tokens = fastseq.generate(
        model, torch.tensor([[1], [3], [4]]), 10, strategy=strategy, eos=5, pad=0
    )
    assert tokens.tolist() == [[1, 2, 3, 4, 5], [3, 4, 5, 0, 0], [4, 5, 0, 0, 0]]
    assert len(model.calls) == 4
    # An end token in the prompt ends nothing, and eos fills up by default.
    tokens = fastseq.generate(model, torch.tensor([[5, 1], [5, 4]]), 3, strategy=strategy, eos=5)
    assert tokens.tolist() == [[5, 1, 2, 3, 4], [5, 4, 5, 5, 5]]
    tokens = fastseq.generate(model, torch.tensor([[1], [3]]), 9, strategy=strategy, eos=[5, 3])
    assert tokens.tolist() == [[1, 2, 3], [3, 4, 5]]
    tokens = fastseq.generate(model, torch.tensor([[1], [3]]), 3, strategy=strategy)
    assert tokens.tolist() == [[1, 2, 3, 4], [3, 4, 5, 0]]


@pytest.mark.parametrize("strategy", [Greedy(), Sample(), Beam(2)], ids=repr)
def test_prompts_of_different_lengths(strategy: Any) -> None:
    prompt = torch.tensor([[1, 9, 9, 9], [0, 4, 2, 9], [5, 9, 9, 9]])
    tokens = fastseq.generate(
        chain(), prompt, 2, strategy=strategy, prompt_lengths=[1, 3, 1], pad=7
    )
    assert tokens.tolist() == [[1, 2, 3, 7, 7], [0, 4, 2, 3, 4], [5, 0, 1, 7, 7]]
    tokens = fastseq.generate(
        chain(), prompt, 0, strategy=strategy, prompt_lengths=[1, 3, 1], pad=7
    )
    assert tokens.tolist() == [[1, 7, 7], [0, 4, 2], [5, 7, 7]]
    tokens = fastseq.generate(
        chain(), prompt, 9, strategy=strategy, prompt_lengths=[1, 3, 1], pad=7, eos=4
    )
    assert tokens.tolist() == [[1, 2, 3, 4, 7, 7], [0, 4, 2, 3, 4, 7], [5, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize("strategy", [Greedy(), Sample(top_k=2), Beam(2)], ids=repr)
def test_int32_tokens(strategy: Any) -> None:
    prompt = torch.tensor([[1, 0], [2, 3]], dtype=torch.int32)
    tokens = fastseq.generate(
        chain(), prompt, 2, strategy=strategy, prompt_lengths=[1, 2], return_scores=True
    )[0]
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == [[1, 2, 3, 0], [2, 3, 4, 5]]


def test_scores_of_prompts_of_different_lengths() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 5)
    likely = logits.log_softmax(-1)
    tokens, scores = fastseq.generate(
        Table(logits),
        torch.tensor([[1, 0, 0], [2, 3, 1]]),
        2,
        prompt_lengths=torch.tensor([1, 3]),
        return_scores=True,
    )
    rows = [tokens[0, :3], tokens[1, 2:]]
    expected = torch.stack([likely[row[:-1], row[1:]].sum() for row in rows])
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("strategy", ["greedy", "sample", "beam"])
def test_one_sequence_and_nothing_new(strategy: str) -> None:
    model = chain()
    tokens, score = fastseq.generate(
        model, torch.tensor([1, 2]), 2, strategy=strategy, return_scores=True
    )
    assert tokens.tolist() == [1, 2, 3, 4]
    assert score.shape == ()
    prompt = torch.tensor([[1, 2]])
    tokens, score = fastseq.generate(model, prompt, 0, strategy=strategy, return_scores=True)
    assert torch.equal(tokens, prompt)
    assert score.tolist() == [0]
    parts, source = Parts(), torch.randint(WORDS, (1, 4))
    options = {"strategy": strategy, **parts.callables}
    if strategy != "sample":
        tokens = fastseq.generate(translator(), prompt, 4, source=source, **options)
        assert torch.equal(
            fastseq.generate(translator(), prompt[0], 4, source=source[0], **options), tokens[0]
        )


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


# --- errors --------------------------------------------------------------------------------------

PROMPT = torch.tensor([[1, 2]])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([[1]], 2), {}, TypeError, "prompt must be a tensor, got list"),
        ((PROMPT.float(), 2), {}, TypeError, "prompt must be of dtype int64 or int32, got torch.f"),
        ((PROMPT[:, :0], 2), {}, ValueError, r"prompt must have shape .* got \(1, 0\)"),
        ((PROMPT[None], 2), {}, ValueError, r"prompt must have shape .* got \(1, 1, 2\)"),
        ((PROMPT, 2.0), {}, TypeError, "max_new_tokens must be an integer, got float"),
        ((PROMPT, -1), {}, ValueError, "max_new_tokens must be at least 0, got -1"),
        ((PROMPT, 2), {"strategy": "best"}, ValueError, "strategy must be one of 'greedy', 'sam"),
        ((PROMPT, 2), {"strategy": 3}, TypeError, "strategy must be a name, Greedy, Sample or"),
        ((PROMPT, 2), {"strategy": Beam}, TypeError, "strategy must be a name, Greedy, Sample or"),
        ((PROMPT, 2), {"eos": 2.0}, TypeError, "eos must be an integer or integers, got float"),
        ((PROMPT, 2), {"eos": -1}, ValueError, "eos must be at least 0, got -1"),
        ((PROMPT, 2), {"eos": [1, 2.0]}, TypeError, "eos must be an integer, got float"),
        ((PROMPT, 2), {"eos": 6}, ValueError, "eos must be below 6, the tokens of the model, got"),
        ((PROMPT, 2), {"pad": -3}, ValueError, "pad must be at least 0, got -3"),
        (
            (PROMPT, 2),
            {"generator": torch.Generator()},
            TypeError,
            "generator must be None for Greedy",
        ),
        ((PROMPT, 2), {"prompt_lengths": [1, 2]}, ValueError, r"prompt_lengths .* \(1,\), got"),
        ((PROMPT, 2), {"prompt_lengths": [3]}, ValueError, "between 1 and 2, got 3"),
        ((PROMPT, 2), {"prompt_lengths": [0]}, ValueError, "between 1 and 2, got 0"),
        ((PROMPT, 2), {"prompt_lengths": [1.5]}, TypeError, "prompt_lengths must be integers"),
        ((PROMPT, 2), {"source": PROMPT}, TypeError, "source must be None for Table"),
        ((PROMPT, 2), {"memory": torch.ones(2, 3)}, ValueError, r"memory .* expected \(1, ...\)"),
        ((PROMPT, 2), {"memory": [1]}, TypeError, "memory must be a tensor, got list"),
        (
            (PROMPT, 2),
            {"memory": torch.ones(1, 3), "source": PROMPT},
            ValueError,
            "memory must be None where source is given",
        ),
        (
            (PROMPT, 2),
            {"source_key_padding_mask": PROMPT > 3},
            ValueError,
            "must be None without source and memory",
        ),
        (
            (PROMPT, 2),
            {"memory": torch.ones(1, 3, 4), "source_key_padding_mask": PROMPT > 3},
            ValueError,
            r"source_key_padding_mask must have shape \(1, 3\), got \(1, 2\)",
        ),
        (
            (PROMPT, 2),
            {"memory": torch.ones(1, 2, 4), "source_key_padding_mask": PROMPT},
            TypeError,
            "source_key_padding_mask must be of dtype bool, got torch.int64",
        ),
        ((PROMPT, 2), {"embed": len}, TypeError, "embed must be None for a model with a method"),
        ((PROMPT, 2), {"project": 3}, TypeError, "project must be callable, got int"),
        ((PROMPT, 2), {"use_cache": True}, TypeError, "use_cache must not be True for Table"),
    ],
)
def test_bad_arguments(
    arguments: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fastseq.generate(chain(), *arguments, **options)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (nn.Linear(2, 2), {}, TypeError, "model must be a Transformer, .* got Linear"),
        (language_model, {}, TypeError, "model must be a Transformer, .* got function"),
        (language_model(), {}, TypeError, "embed must be given for a bare TransformerDecoder"),
        (language_model(), {"embed": len}, TypeError, "project must be given for a bare"),
        (
            language_model(),
            {"embed": len, "project": len, "source_embed": len},
            TypeError,
            "source_embed must be None for a TransformerDecoder",
        ),
        (
            translator(nn),
            {"use_cache": True, **Parts().callables},
            TypeError,
            "use_cache must not be True for Transformer",
        ),
        (
            translator().encoder,
            {"memory": torch.ones(1, 3, SIZE), **Parts().callables},
            ValueError,
            "memory must be None for a TransformerEncoder",
        ),
        (translator(), Parts().callables, TypeError, "source or memory must be given"),
        (translator(nn).decoder, Parts().callables, TypeError, "memory must be given"),
    ],
)
def test_bad_models(
    model: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fastseq.generate(model, PROMPT, 2, **options)


def test_bad_logits() -> None:
    class All(Table):
        def decode(self, tokens: Tensor, memory: Any, mask: Any, cache: Any) -> Tensor:
            return self.logits[tokens]

    with pytest.raises(ValueError, match=r"logits of shape \(1, V\), got \(1, 2, 6\)"):
        fastseq.generate(All(chain().logits), PROMPT, 2)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Sample(temperature=0), ValueError, "temperature must be positive and finite"),
        (lambda: Sample(temperature=float("nan")), ValueError, "temperature must be positive"),
        (lambda: Sample(temperature="1"), TypeError, "temperature must be a number, got str"),
        (lambda: Sample(top_k=0), ValueError, "top_k must be at least 1, got 0"),
        (lambda: Sample(top_k=1.0), TypeError, "top_k must be an integer, got float"),
        (lambda: Sample(top_p=0.0), ValueError, r"top_p must lie in \(0, 1\], got 0.0"),
        (lambda: Sample(top_p=1.1), ValueError, r"top_p must lie in \(0, 1\], got 1.1"),
        (lambda: Beam(0), ValueError, "n must be at least 1, got 0"),
        (lambda: Beam(True), TypeError, "n must be an integer, got bool"),
        (lambda: Beam(2, float("inf")), ValueError, "length_penalty must be finite"),
        (lambda: Beam(2, None), TypeError, "length_penalty must be a number, got NoneType"),
    ],
)
def test_bad_strategies(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_names_do_not_load_torch() -> None:
    code = (
        "import sys, fastseq; assert 'torch' not in sys.modules; "
        "from fastseq import Beam, Greedy, Sample, generate; assert callable(generate); "
        "import fastseq.generation; assert callable(fastseq.generate)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
