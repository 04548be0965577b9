"""The options of attention, as everything below ``functional`` passes them on.

Shapes: ``B`` sequences, ``Hq`` query heads, ``Hkv`` key and value heads (``Hq`` a multiple), ``Sq``
queries, ``Skv`` keys, ``E`` size of a query or key, ``Ev`` of a value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["WEIGHTS_MEAN", "WEIGHTS_NONE", "WEIGHTS_PER_HEAD", "Options", "Terms", "empty_heads"]

# What a call hands out of the weights.
WEIGHTS_NONE, WEIGHTS_PER_HEAD, WEIGHTS_MEAN = 0, 1, 2


class Terms(NamedTuple):
    """The tensors of a call besides query, key and value, in the order of the op's schema.

    Attributes:
        bias: 4-D, broadcastable to ``(B, Hq, Sq, Skv)``, added to the scores.
        mask: likewise, bool, true takes part.
        key_padding_mask: ``(B, Skv)`` bool, true is ignored.
        query_lengths: ``(B,)`` int64, rows in use of each sequence.
        key_lengths: likewise.
        query_starts: ``(B + 1,)`` int64, first row of each sequence: the tensors are
            ``(rows, heads, size)``, all sequences one after the other.
        key_starts: likewise.
        block_table: ``(B, blocks)`` int64: key and value are blocks of a paged cache
            ``(blocks, Hkv, block_size, size)``.
        alibi_slopes: ``(Hq,)`` or ``(B, Hq)``.
        sinks: ``(Hq,)`` logits that only the denominator sees.
        seed: ``(2,)`` int64 key and offset of the dropout's generator.
    """

    bias: Tensor | None = None
    mask: Tensor | None = None
    key_padding_mask: Tensor | None = None
    query_lengths: Tensor | None = None
    key_lengths: Tensor | None = None
    query_starts: Tensor | None = None
    key_starts: Tensor | None = None
    block_table: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    seed: Tensor | None = None


class Options(NamedTuple):
    """What is not a tensor, in the order of the op's schema.

    ``window_left`` and ``window_right`` are -1 where unbounded (causal is a right of 0);
    ``softcap`` is 0 for none.
    """

    window_left: int = -1
    window_right: int = -1
    bottom_right: bool = False
    softcap: float = 0.0
    dropout_p: float = 0.0
    scale: float = 1.0


def empty_heads(like: Tensor, size: int) -> Tensor:
    """Memory for ``(B, heads, S, size)`` laid out as ``like`` is: heads or rows outside.

    torch.nn.MultiheadAttention and most models hold ``(B, S, heads, size)`` and pass it transposed;
    an output in the same layout spares the copy when the heads are put together again.
    """
    shape = like.shape
    if len(shape) == 4 and like.stride(1) < like.stride(2):
        return like.new_empty((shape[0], shape[2], shape[1], size)).transpose(1, 2)
    return like.new_empty((*shape[:-1], size))
