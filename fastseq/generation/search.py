"""What the loops over positions share, and the one that continues each sequence once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastseq.generation.strategies import Greedy, Sample, choose, widened

__all__ = ["Ends", "Steps", "extend"]


@dataclass(frozen=True)
class Ends:
    """Where sequences start being continued and where they end.

    Args:
        lengths: ``(B)``, the tokens of each row of the prompt, or ``None`` for all of them.
        max_new_tokens: for each row.
        eos: tokens that end a sequence; may be empty.
        pad: fills a row behind its end.
    """

    lengths: Tensor | None
    max_new_tokens: int
    eos: tuple[int, ...]
    pad: int

    def begin(self, prompt: Tensor) -> tuple[Tensor, int]:
        """Room for the longest possible results, and the first position that some row lacks."""
        batch, width = prompt.shape
        # Not filled with padding, which need not be a token that the model knows.
        tokens = prompt.new_zeros((batch, width + self.max_new_tokens))
        tokens[:, :width] = prompt
        return tokens, width if self.lengths is None else int(self.lengths.min())

    def limits(self, prompt: Tensor) -> Tensor:
        """Where each row ends at the latest, (B)."""
        if self.lengths is not None:
            return self.lengths + self.max_new_tokens
        batch, width = prompt.shape
        return torch.full((batch,), width + self.max_new_tokens, device=prompt.device)

    def padded(self, tokens: Tensor, stops: Tensor) -> Tensor:
        """``tokens`` with row ``i`` filled up from ``stops[i]`` on, as wide as the longest."""
        tokens = tokens[:, : int(stops.max())]
        behind = torch.arange(tokens.size(1), device=tokens.device) >= stops.unsqueeze(1)
        return tokens.masked_fill(behind, self.pad)

    def is_end(self, tokens: Tensor) -> Tensor:
        """Whether each of ``tokens`` ends a sequence; there must be tokens that do."""
        ends = tokens == self.eos[0]
        for token in self.eos[1:]:
            ends |= tokens == token
        return ends


class Steps:
    """Logits of the next token, with or without a cache."""

    def __init__(
        self,
        model: Any,
        memory: Tensor | None,
        mask: Tensor | None,
        cache: Any,
        eos: tuple[int, ...],
    ) -> None:
        self._decode = model.decode
        self._memory = memory
        self._mask = mask
        self._cache = cache
        self._eos = eos
        self._seen = 0
        self._checked = False

    def __call__(self, tokens: Tensor, position: int) -> Tensor:
        """Logits ``(B, V)`` for ``position`` of ``tokens``, all before which are known."""
        new = tokens[:, self._seen : position]
        if self._cache is not None:
            self._seen = position
        logits = self._decode(new, self._memory, self._mask, self._cache)
        if not self._checked:
            self._check(logits, tokens.size(0))
        return logits

    def _check(self, logits: Any, batch: int) -> None:
        """Look at the first logits of a model.

        Raises:
            ValueError: they have another shape than agreed, or no end token among them.
        """
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.size(0) != batch:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the model must return logits of shape ({batch}, V), got {got}")
        for token in self._eos:
            if token >= logits.size(1):
                raise ValueError(
                    f"eos must be below {logits.size(1)}, the tokens of the model, got {token}"
                )
        self._checked = True

    def repeat(self, count: int, batch: int, device: torch.device) -> None:
        """Give every sequence ``count`` hypotheses, next to each other."""
        if self._memory is not None:
            self._memory = self._memory.repeat_interleave(count, 0)
        if self._mask is not None:
            self._mask = self._mask.repeat_interleave(count, 0)
        self.reorder(torch.arange(batch, device=device).repeat_interleave(count))

    def reorder(self, indices: Tensor) -> None:
        """Let hypotheses go on from others of the same sequence."""
        if self._cache is not None:
            self._cache.reorder(indices)


def extend(
    steps: Steps,
    prompt: Tensor,
    ends: Ends,
    strategy: Greedy | Sample,
    generator: torch.Generator | None,
    scored: bool,
) -> tuple[Tensor, Tensor]:
    """Continue each row of ``prompt`` (B, S) by one token at a time.

    Returns:
        Tokens ``(B, S + new)``, and the sums (B) of the log-probabilities of the new ones, which
        are added up only if ``scored``.
    """
    tokens, first = ends.begin(prompt)
    batch, width = prompt.shape
    scores = torch.zeros(batch, device=prompt.device)
    stops = ends.limits(prompt)
    # A single row stops with the loop. There every operation counts, so it is spared what a batch
    # needs of which rows stop one after the other.
    may_stop = batch > 1 and (bool(ends.eos) or ends.lengths is not None)
    for position in range(first, tokens.size(1)):
        logits = steps(tokens, position)
        choice = choose(logits, strategy, generator)
        extended = None
        if may_stop:
            extended = stops > position
        if ends.lengths is not None and position < width:
            given = position < ends.lengths
            choice = torch.where(given, tokens[:, position], choice)
            extended = ~given if extended is None else extended & ~given
        if scored:
            likely = torch.log_softmax(widened(logits), -1).gather(-1, choice.unsqueeze(-1))
            gain = likely.squeeze(-1)
            scores = scores + (gain if extended is None else gain.masked_fill(~extended, 0))
        tokens[:, position] = choice
        if batch == 1 and ends.eos and int(choice) in ends.eos:
            stops.fill_(position + 1)
            break
        if extended is not None:
            if ends.eos:
                stops = stops.masked_fill(ends.is_end(choice) & extended, position + 1)
            if bool((stops <= position + 1).all()):
                break
    return ends.padded(tokens, stops), scores
