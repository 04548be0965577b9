"""A model to time with ``fastseq bench model examples/bench_model.py:build``.

A tagger: an LSTM reads the words, attention lets every word look at all others, an encoder layer
refines, a linear layer scores the tags. Nothing in this file knows of fastseq.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WORDS, TAGS, SIZE, HEADS = 1000, 17, 128, 4
BATCH, STEPS = 8, 32


class Tagger(nn.Module):
    """Scores ``(B, S, TAGS)`` of the tags of ``(B, S)`` words; padded words may be masked."""

    def __init__(self, size: int = SIZE, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, size)
        self.lstm = nn.LSTM(size, size // 2, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(size, HEADS, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(
            size, HEADS, 4 * size, dropout, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(size)
        self.output = nn.Linear(size, TAGS)

    def forward(self, words: Tensor, padding: Tensor | None = None) -> dict[str, Tensor]:
        """``padding`` ``(B, S)`` is true where there is no word."""
        x, _ = self.lstm(self.embedding(words))
        attended, _ = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)
        x = self.encoder(x + attended, src_key_padding_mask=padding)
        return {"scores": self.output(self.norm(x))}


def build() -> nn.Module:
    """The factory: called once for torch's model and once for the one that is converted."""
    return Tagger()


def example_input() -> dict[str, Tensor]:
    """What the model is called with: a tensor, a tuple of arguments or, as here, keywords."""
    lengths = torch.arange(STEPS, STEPS - BATCH, -1)
    return {
        "words": torch.randint(WORDS, (BATCH, STEPS)),
        "padding": torch.arange(STEPS) >= lengths[:, None],
    }
