"""Models that tests of generation run, and what they all check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastseq
import fastseq.nn as fnn
from fastseq import Beam, Greedy, Sample

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


def chain(words: int = 6) -> Table:
    """Every token is followed by the next one."""
    return Table(torch.eye(words).roll(1, 1) * 50)
