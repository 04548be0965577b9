"""How tokens are chosen and where sequences end: against searches and tables made by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from generation_models import (
    STRATEGIES,
    WORDS,
    Parts,
    Seen,
    Table,
    chain,
    history_logits,
    translator,
)
from torch import Tensor

import fastseq
from fastseq import Beam, Greedy, Sample
from fastseq.generation.strategies import choose


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


@pytest.mark.parametrize("temperature", [1e-320, 1e-40, 1e-6])
@pytest.mark.parametrize("top_k", [None, 3])
def test_a_temperature_near_zero_is_greedy(temperature: float, top_k: int | None) -> None:
    torch.manual_seed(0)
    logits = 1e3 * torch.randn(50, 7)
    strategy = Sample(temperature=temperature, top_k=top_k)
    assert torch.equal(choose(logits, strategy), logits.argmax(-1))


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


# --- ends


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
