"""What a profile is told of a call: its sizes, as ``profiler/models.py`` reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastseq import _recorder
from fastseq._attention import Options, Terms

__all__ = ["NOTHING", "attention_call", "recurrent_call"]

# Around a call while nobody records.
NOTHING: AbstractContextManager[None] = nullcontext()


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def recurrent_call(
    kernel: str,
    variant: str,
    input: Tensor,
    hidden_size: int,
    proj_size: int,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    more: Mapping[str, int],
) -> AbstractContextManager[None]:
    """A recurrent layer's call; ``more`` are sizes and flags that only some kernels have."""
    if batch_sizes is not None:
        steps, batch = batch_sizes.numel(), int(batch_sizes[0]) if batch_sizes.numel() else 0
        rows = input.size(0)
    else:
        batch, steps = input.size(0 if batch_first else 1), input.size(1 if batch_first else 0)
        rows = steps * batch if lengths is None else int(lengths.sum())
    shape = {
        "T": steps,
        "B": batch,
        "I": input.size(-1),
        "H": hidden_size,
        "P": proj_size,
        "D": 2 if bidirectional else 1,
        "rows": rows,
        "bias": int(has_biases),
        **more,
    }
    return _recorder.call(kernel, variant, _dtype(input), torch.get_num_threads(), shape)


def attention_call(
    kernel: str,
    query: Tensor,
    sizes: Sequence[int],
    terms: Terms,
    options: Options,
    **more: int,
) -> AbstractContextManager[None]:
    """A call of attention; ``sizes`` are ``(B, Hq, Hkv, Sq, Skv, E, Ev)``."""
    batch, heads, kv_heads, queries, keys, size, value_size = sizes
    of_queries = _rows_in_use(batch, queries, terms.query_lengths, terms.query_starts)
    of_keys = _rows_in_use(batch, keys, terms.key_lengths, terms.key_starts)
    pairs = sum(_visible(q, k, options) for q, k in zip(of_queries, of_keys, strict=True))
    shape = {
        "B": batch,
        "Hq": heads,
        "Hkv": kv_heads,
        "Sq": queries,
        "Skv": keys,
        "E": size,
        "Ev": value_size,
        "pairs": pairs,
        "query_rows": sum(of_queries),
        "key_rows": sum(of_keys),
        **more,
    }
    return _recorder.call(kernel, "", _dtype(query), torch.get_num_threads(), shape)


def _rows_in_use(batch: int, rows: int, lengths: Tensor | None, starts: Tensor | None) -> list[int]:
    """How many rows each sequence has."""
    if starts is not None:
        found: list[int] = starts.diff().tolist()
        return found
    if lengths is not None:
        return [min(int(length), rows) for length in lengths]
    return [rows] * batch


def _visible(queries: int, keys: int, options: Options) -> int:
    """(query, key) pairs that a window leaves; what masks and biases hide is not looked at."""
    if options.window_left < 0 and options.window_right < 0:
        return queries * keys
    places = torch.arange(queries) + (keys - queries if options.bottom_right else 0)
    first, last = torch.zeros_like(places), torch.full_like(places, keys - 1)
    if options.window_left >= 0:
        first = (places - options.window_left).clamp_min(0)
    if options.window_right >= 0:
        last = (places + options.window_right).clamp_max(keys - 1)
    return int((last - first + 1).clamp_min(0).sum())
