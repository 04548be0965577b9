"""What :class:`fastseq.nn.MultiheadAttention` accepts, and its masks as ``functional`` takes them.

Bad arguments raise the class that torch's module raises for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastseq.nn.cache import KeyValueCache

__all__ = [
    "Masks",
    "Plan",
    "Sizes",
    "check_attention_mask",
    "check_call",
    "check_extras",
    "check_sizes",
    "is_readable",
    "masks",
]


class Sizes(NamedTuple):
    """Of one call; an unbatched one has ``batch`` 1."""

    batched: bool
    batch: int
    queries: int
    keys: int


@dataclass
class Masks:
    """Keyword arguments of :func:`fastseq.functional.attention`."""

    causal: bool = False
    bottom_right: bool = False
    mask: Tensor | None = None
    bias: Tensor | None = None
    key_padding_mask: Tensor | None = None

    def append_visible_keys(self, count: int) -> None:
        """Make room for ``count`` keys at the end that every query may see."""
        if self.mask is not None:
            self.mask = pad(self.mask, (0, count), value=True)
        if self.bias is not None:
            self.bias = pad(self.bias, (0, count))
        if self.key_padding_mask is not None:
            self.key_padding_mask = pad(self.key_padding_mask, (0, count), value=False)


class Plan(NamedTuple):
    """A call whose arguments have been checked."""

    sizes: Sizes
    masks: Masks


def check_sizes(embed_dim: int, num_heads: int, num_kv_heads: int | None) -> None:
    """Constructor arguments."""
    if embed_dim <= 0 or num_heads <= 0:
        raise ValueError(
            "embed_dim and num_heads must be greater than 0, "
            f"got embed_dim={embed_dim} and num_heads={num_heads}"
        )
    if embed_dim % num_heads:
        raise AssertionError(
            "embed_dim must be divisible by num_heads, "
            f"got embed_dim={embed_dim} and num_heads={num_heads}"
        )
    if num_kv_heads is not None and (num_kv_heads <= 0 or num_heads % num_kv_heads):
        raise ValueError(
            "num_kv_heads must be positive and divide num_heads, "
            f"got num_kv_heads={num_kv_heads} and num_heads={num_heads}"
        )


def check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    held: int,
    embed_dim: int,
    num_heads: int,
    packed: bool,
    kdim: int,
    vdim: int,
    batch_first: bool,
    weight: Tensor,
) -> Sizes:
    """Ranks, sizes and dtypes of a call; ``held`` keys more come from a cache."""
    batched = _check_ranks(query, key, value, key_padding_mask, attn_mask)
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        check_mask_dtype(name, mask)
    if is_causal and attn_mask is None:
        raise RuntimeError(
            "attn_mask must be given with is_causal=True, which is a hint that it is the causal "
            "mask: torch.nn.Transformer.generate_square_subsequent_mask makes one"
        )
    if query.size(-1) != embed_dim:
        raise AssertionError(f"query must have {embed_dim} features, got {query.size(-1)}")
    if packed:
        if key.shape != value.shape:
            raise AssertionError(
                f"key and value must have the same shape, got {tuple(key.shape)} and "
                f"{tuple(value.shape)}"
            )
    elif key.shape[:-1] != value.shape[:-1]:
        raise AssertionError(
            "key and value must have the same sequence and batch sizes, got "
            f"{tuple(key.shape[:-1])} and {tuple(value.shape[:-1])}"
        )
    # torch meets wrong sizes of packed weights in the matrix product only.
    kind = RuntimeError if packed else AssertionError
    for name, tensor, features in (("key", key, kdim), ("value", value, vdim)):
        if tensor.size(-1) != features:
            raise kind(f"{name} must have {features} features, got {tensor.size(-1)}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
            raise RuntimeError(
                f"{name} must have the dtype of the weights: expected {weight.dtype}, "
                f"got {tensor.dtype}"
            )

    if not batched:
        sizes = Sizes(False, 1, query.size(0), key.size(0) + held)
    else:
        batch_at, steps_at = (0, 1) if batch_first else (1, 0)
        batch = query.size(batch_at)
        if key.size(batch_at) != batch:
            raise RuntimeError(
                f"query and key must have the same batch size, got {batch} and {key.size(batch_at)}"
            )
        sizes = Sizes(True, batch, query.size(steps_at), key.size(steps_at) + held)
    if attn_mask is not None:
        check_attention_mask(attn_mask, sizes, num_heads)
    if key_padding_mask is not None:
        expected = (sizes.batch, sizes.keys) if batched else (sizes.keys,)
        if key_padding_mask.shape != expected:
            raise AssertionError(
                f"key_padding_mask must have shape {expected}, got {tuple(key_padding_mask.shape)}"
            )
    return sizes


def check_extras(
    module: torch.nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    cache: KeyValueCache | None,
    positions: Tensor | None,
    sizes: Sizes,
) -> None:
    """What torch's module has not: a cache, and positions for a rotary embedding."""
    new_keys = sizes.keys - (0 if cache is None else cache.length)
    if cache is not None:
        if module.bias_k is not None or module.add_zero_attn:
            raise ValueError("cache cannot be combined with add_bias_kv or add_zero_attn")
        if new_keys != sizes.queries:
            raise ValueError(
                "key must have the positions of query where a cache is given: "
                f"expected {sizes.queries}, got {new_keys}"
            )
    if positions is not None:
        if "rope" not in module._modules:
            raise ValueError("positions must be None in a layer without rope")
        if new_keys != sizes.queries:
            raise ValueError(
                "positions must be None where query and key have different lengths: "
                f"got {sizes.queries} and {new_keys}"
            )
        if positions.shape not in ((sizes.queries,), (sizes.batch, sizes.queries)):
            raise ValueError(
                f"positions must have shape {(sizes.queries,)} or "
                f"{(sizes.batch, sizes.queries)}, got {tuple(positions.shape)}"
            )


def _check_ranks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> bool:
    """Whether the call has a batch dimension."""
    rank = query.dim()
    if rank not in (2, 3):
        raise AssertionError(f"query must be 2-D or 3-D, got {rank}-D: shape {tuple(query.shape)}")
    for name, tensor, ranks in (
        ("key", key, (rank,)),
        ("value", value, (rank,)),
        ("key_padding_mask", key_padding_mask, (rank - 1,)),
        ("attn_mask", attn_mask, (2, 3)),
    ):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {type(tensor).__name__}")
        if tensor is not None and tensor.dim() not in ranks:
            raise AssertionError(
                f"{name} must be {' or '.join(f'{one}-D' for one in ranks)} for {rank}-D query, "
                f"got {tensor.dim()}-D: shape {tuple(tensor.shape)}"
            )
    return rank == 3


def check_mask_dtype(name: str, mask: Tensor | None) -> None:
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise AssertionError(f"{name} must be bool or floating, got {mask.dtype}")


def check_attention_mask(attn_mask: Tensor, sizes: Sizes, num_heads: int) -> None:
    expected: tuple[int, ...] = (sizes.queries, sizes.keys)
    if attn_mask.dim() == 3:
        expected = (sizes.batch * num_heads, *expected)
    if attn_mask.shape != expected:
        kind = RuntimeError if sizes.batched or attn_mask.dim() == 2 else AssertionError
        raise kind(
            f"attn_mask must have shape {expected} for {attn_mask.dim()}-D, "
            f"got {tuple(attn_mask.shape)}"
        )


def masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    sizes: Sizes,
    num_heads: int,
    obey_hint: bool,
    check_hint: bool,
) -> Masks:
    """Rewrite torch's masks, in which True and -inf hide, for ``functional.attention``.

    ``obey_hint``: take ``is_causal`` at its word, as torch does in some calls. In the others torch
    ignores the hint; with ``check_hint`` the mask is then compared with the causal one, which costs
    next to nothing beside the half of the attention that it saves.
    """
    result = Masks()
    if (
        is_causal
        and attn_mask is not None
        and (obey_hint or (check_hint and _is_causal(attn_mask)))
    ):
        result.causal = True
        attn_mask = None
    if attn_mask is not None:
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (sizes.batch, num_heads))
        if attn_mask.dtype == torch.bool:
            result.mask = ~attn_mask
        else:
            result.bias = attn_mask
    if key_padding_mask is not None:
        if not sizes.batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        if key_padding_mask.dtype == torch.bool:
            result.key_padding_mask = key_padding_mask
        elif _hides_or_shows(key_padding_mask):
            # How torch's Transformer layers hand on a boolean mask. As one, it rules out whole
            # tiles of keys; as numbers to add, it would not.
            result.key_padding_mask = key_padding_mask != 0
        else:
            columns = key_padding_mask[:, None, None, :]
            result.bias = columns if result.bias is None else result.bias + columns
    return result


def is_readable(mask: Tensor) -> bool:
    """Whether Python may look at the values without cost to a recording, compiler or gradient."""
    return (
        type(mask) is Tensor
        and mask.is_cpu
        and not mask.requires_grad
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _is_causal(mask: Tensor) -> bool:
    """Whether a 2-D mask hides exactly the keys after each query's own position."""
    if mask.dim() != 2 or not is_readable(mask):
        return False
    causal = torch.ones(mask.shape, dtype=torch.bool).triu_(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, causal)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill_(causal, float("-inf")))


def _hides_or_shows(mask: Tensor) -> bool:
    """Whether a float mask holds nothing but 0 and -inf."""
    return is_readable(mask) and bool(((mask == 0) | (mask == float("-inf"))).all())
