"""The loop over positions that keeps several hypotheses per sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq.generation.search import Ends, Steps
from fastseq.generation.strategies import Beam, length_penalty, widened

__all__ = ["beam_search"]

_NEVER = float("-inf")


class _Best:
    """Per sequence the best hypothesis among those that have ended."""

    def __init__(self, tokens: Tensor, starts: Tensor) -> None:
        # Where no hypothesis is possible at all, the prompt remains.
        self.tokens = tokens.clone()
        self.scores = torch.full((tokens.size(0),), _NEVER, device=tokens.device)
        self.ends = starts

    def offer(self, hypotheses: Tensor, scores: Tensor, end: int, allowed: Tensor) -> None:
        """Take those of the hypotheses (B, total) of length ``end`` that are better and allowed."""
        better = allowed & (scores > self.scores)
        self.tokens = torch.where(better.unsqueeze(1), hypotheses, self.tokens)
        self.scores = torch.where(better, scores, self.scores)
        self.ends = self.ends.masked_fill(better, end)


def beam_search(steps: Steps, prompt: Tensor, ends: Ends, strategy: Beam) -> tuple[Tensor, Tensor]:
    """Continue each row of ``prompt`` (B, S) by the best continuation that a beam finds.

    Returns:
        Tokens ``(B, S + new)``, and the penalised scores (B).
    """
    tokens, first = ends.begin(prompt)
    batch, width = prompt.shape
    total, n, device = tokens.size(1), strategy.n, prompt.device
    starts = ends.lengths
    if starts is None:
        starts = torch.full((batch,), width, device=device)
    rows = torch.arange(batch, device=device)
    offsets = (rows * n).unsqueeze(1)
    in_place = torch.arange(batch * n, device=device)

    best = _Best(tokens, starts)
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    ended_count = torch.zeros(batch, dtype=torch.long, device=device)
    # All hypotheses are the prompt at first; only one may go on, or all would do so alike.
    live = torch.full((batch, n), _NEVER, device=device)
    live[:, 0] = 0
    # The prompt is read once per sequence and not once per hypothesis.
    logits = steps(tokens, first).repeat_interleave(n, 0)
    steps.repeat(n, batch, device)
    tokens = tokens.unsqueeze(1).repeat(1, n, 1)

    for position in range(first, total):
        if position > first:
            logits = steps(tokens.view(batch * n, total), position)
        vocabulary = logits.size(-1)
        gains = torch.log_softmax(widened(logits), -1).view(batch, n, vocabulary)
        given = (position < starts).unsqueeze(1)
        if ends.lengths is not None and position < width:
            token = tokens[:, :, position].masked_fill(~given, 0).long()
            only = torch.full_like(gains, _NEVER).scatter(2, token.unsqueeze(2), 0)
            gains = torch.where(given.unsqueeze(2), only, gains)

        # So many that n go on even where every end token of n hypotheses is among them.
        wanted = min(n * (1 + len(ends.eos)), n * vocabulary)
        values, candidates = (live.unsqueeze(2) + gains).flatten(1).topk(wanted)
        parents = candidates.div(vocabulary, rounding_mode="floor")
        chosen = candidates - parents * vocabulary
        length = position + 1 - starts
        penalty = length_penalty(length.clamp(min=1), strategy.length_penalty)
        if ends.eos:
            ending = ends.is_end(chosen) & ~given
            # Only those that n hypotheses would have room for; so Beam(1) is greedy search.
            ended_values, which = values[:, :n].masked_fill(~ending[:, :n], _NEVER).max(1)
            hypotheses = tokens[rows, parents[rows, which]]
            hypotheses[:, position] = chosen[rows, which]
            best.offer(hypotheses, ended_values / penalty, position + 1, ~done)
            ended_count += (ending & (values > _NEVER))[:, :n].sum(1)
            values, order = values.masked_fill(ending, _NEVER).topk(n)
            parents, chosen = parents.gather(1, order), chosen.gather(1, order)

        live = values
        tokens = tokens[rows.unsqueeze(1), parents]
        tokens[:, :, position] = chosen
        last = length >= ends.max_new_tokens
        best.offer(tokens[:, 0], live[:, 0] / penalty, position + 1, ~done & last)
        done |= last
        if ends.eos:
            # A sum of log-probabilities only falls; what divides it changes in one direction.
            soonest = length_penalty(length.clamp(min=0) + 1, strategy.length_penalty)
            latest = length_penalty(
                torch.full_like(length, ends.max_new_tokens), strategy.length_penalty
            )
            attainable = live[:, 0] / torch.maximum(soonest, latest)
            done |= (ended_count >= n) | (best.scores >= attainable)
        if bool(done.all()):
            break
        source = (parents + offsets).view(-1)
        if not torch.equal(source, in_place):
            steps.reorder(source)
    return ends.padded(best.tokens, best.ends), best.scores
