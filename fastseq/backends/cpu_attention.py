"""Attention: tensors to arguments of the compiled CPU kernels. No maths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq._attention import WEIGHTS_NONE, Options, Terms
from fastseq.backends import reference_attention

__all__ = ["attention_backward", "attention_forward", "empty_heads", "plain_attention"]

Forward = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def empty_heads(like: Tensor, size: int) -> Tensor:
    """Memory for ``(B, heads, S, size)`` laid out as ``like`` is: heads or rows outside.

    torch.nn.MultiheadAttention and most models hold ``(B, S, heads, size)`` and pass it transposed;
    an output in the same layout spares the copy when the heads are put together again.
    """
    shape = like.shape
    if len(shape) == 4 and like.stride(1) < like.stride(2):
        return like.new_empty((shape[0], shape[2], shape[1], size)).transpose(1, 2)
    return like.new_empty((*shape[:-1], size))


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    enable_gqa: bool,
    scale: float | None,
) -> Tensor | None:
    """Dense tensors without any option, checked and run in one go; ``None`` where it is not so."""
    return None


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
    options: Options,
    save: bool,
    weights: int = WEIGHTS_NONE,
) -> Forward:
    """Output, log-sum-exp, with ``save`` each row's maximum and scale, the weights asked for.

    Arguments as for :func:`fastseq.backends.reference_attention.attention`.
    """
    with torch.no_grad():
        output, lse, probabilities = reference_attention.attention(
            query, key, value, terms, options, weights
        )
    result = empty_heads(query, value.size(-1)).copy_(output)
    saved = (torch.zeros_like(lse), torch.zeros_like(lse)) if save else (None, None)
    return result, lse.contiguous(), *saved, probabilities


def attention_backward(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
    output: Tensor,
    row_maximum: Tensor,
    row_scale: Tensor,
    options: Options,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of query, key, value, bias and sinks; ``None`` where not asked for."""
    sources = (query, key, value, terms.bias, terms.sinks)
    leaves = [
        None if t is None else t.detach().requires_grad_(need)
        for t, need in zip(sources, needs, strict=True)
    ]
    with torch.enable_grad():
        terms = terms._replace(bias=leaves[3], sinks=leaves[4])
        results = reference_attention.attention(
            leaves[0],  # type: ignore[arg-type]
            leaves[1],  # type: ignore[arg-type]
            leaves[2],  # type: ignore[arg-type]
            terms,
            options,
        )
    pairs = [
        (result, grad)
        for result, grad in zip(results[:2], (grad_output, grad_lse), strict=True)
        if result is not None and grad is not None
    ]
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need and leaf is not None]
    found = iter(
        torch.autograd.grad(
            [result for result, _ in pairs],
            wanted,
            [grad for _, grad in pairs],
            materialize_grads=True,
        )
    )
    grads = [next(found).contiguous() if need else None for need in needs]
    for index in range(3):
        grad, source = grads[index], sources[index]
        if grad is not None and source is not None:
            grads[index] = empty_heads(source, source.size(-1)).copy_(grad)
    return tuple(grads)  # type: ignore[return-value]
