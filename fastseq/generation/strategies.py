"""How the next token is chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Beam",
    "Greedy",
    "Sample",
    "Strategy",
    "check_integer",
    "choose",
    "length_penalty",
    "widened",
]


def check_integer(name: str, value: Any, least: int = 0) -> None:
    """Raise TypeError or ValueError unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


@dataclass(frozen=True)
class Greedy:
    """The token of the largest logit; of equal ones the first."""


@dataclass(frozen=True)
class Sample:
    """A token drawn from ``softmax(logits / temperature)``, or from the likely part of it.

    Args:
        temperature: below 1 sharpens the distribution, above 1 flattens it.
        top_k: keep only the ``top_k`` most likely tokens. Default: all.
        top_p: of those, keep only the fewest most likely ones whose probabilities add up to
            ``top_p`` or more ("nucleus sampling", Holtzman et al.,
            https://arxiv.org/abs/1904.09751, section 3.1). Default: all.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``temperature`` is not positive and finite, ``top_k`` is less than 1, or
            ``top_p`` does not lie in (0, 1].
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        _number("temperature", self.temperature)
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature must be positive and finite, got {self.temperature}; "
                "for the most likely token take Greedy()"
            )
        if self.top_k is not None:
            check_integer("top_k", self.top_k, 1)
        if self.top_p is not None:
            _number("top_p", self.top_p)
            if not 0 < self.top_p <= 1:
                raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")


@dataclass(frozen=True)
class Beam:
    """Beam search: the ``n`` most likely continuations are kept at every step.

    Hypotheses are compared by ``log P / ((5 + length) / 6) ** length_penalty``, where ``length``
    counts the new tokens with the end token (Wu et al., "Google's Neural Machine Translation
    System", https://arxiv.org/abs/1609.08144, equation 14, without coverage). A sequence is done
    when ``n`` of its hypotheses have ended, or when no unfinished one can overtake the best ended
    one; what has not ended after ``max_new_tokens`` competes with its score at that length.

    Args:
        n: hypotheses kept per sequence; 1 is greedy search.
        length_penalty: 0 compares sums of log-probabilities, more favours longer results.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``n`` is less than 1 or ``length_penalty`` is not finite.
    """

    n: int = 4
    length_penalty: float = 0.6

    def __post_init__(self) -> None:
        check_integer("n", self.n, 1)
        _number("length_penalty", self.length_penalty)
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be finite, got {self.length_penalty}")


Strategy = Greedy | Sample | Beam


def length_penalty(length: Tensor, exponent: float) -> Tensor:
    """What a sum of ``length`` log-probabilities is divided by."""
    return ((length + 5.0) / 6.0) ** exponent


def widened(logits: Tensor) -> Tensor:
    """``logits`` in at least single precision."""
    return logits.float() if logits.itemsize < 4 else logits


def choose(
    logits: Tensor, strategy: Greedy | Sample, generator: torch.Generator | None = None
) -> Tensor:
    """One token (B) per row of ``logits`` (B, V)."""
    if isinstance(strategy, Greedy):
        return logits.argmax(-1)
    scaled = widened(logits)
    if strategy.temperature != 1:
        # The largest first: divided by a temperature near 0 it would overflow.
        largest = scaled.amax(-1, keepdim=True)
        least = torch.finfo(scaled.dtype).tiny
        scaled = (scaled - largest) / max(strategy.temperature, least)
    if strategy.top_k is None and strategy.top_p is None:
        return torch.multinomial(torch.softmax(scaled, -1), 1, generator=generator).squeeze(-1)

    if strategy.top_k is None:
        values, indices = scaled.sort(-1, descending=True)
    else:
        values, indices = scaled.topk(min(strategy.top_k, scaled.size(-1)))
    probabilities = torch.softmax(values, -1)
    if strategy.top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        # Never the first: rounding aside, what comes before it is 0.
        before[..., 0] = 0
        probabilities = probabilities.masked_fill(before >= strategy.top_p, 0)
    # Drawn in the order of the vocabulary: in the sorted one, a rounding error that swaps two
    # neighbours would draw another token from the same random numbers.
    if strategy.top_k is None:
        probabilities = torch.empty_like(scaled).scatter_(-1, indices, probabilities)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
    indices, order = indices.sort(-1)
    drawn = torch.multinomial(probabilities.gather(-1, order), 1, generator=generator)
    return indices.gather(-1, drawn).squeeze(-1)
