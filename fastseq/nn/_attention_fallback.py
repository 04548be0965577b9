"""Calls of :class:`fastseq.nn.MultiheadAttention` that do not go the way of plain tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import multi_head_attention_forward

__all__ = ["run_nested", "run_torch"]


def run_torch(
    module: torch.nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """The whole call by torch's function."""
    transposed = module.batch_first and query.dim() == 3
    if transposed:
        # torch tells inputs that are one tensor by identity, too.
        same_key, same_value = key is query, value is key
        query = query.transpose(0, 1)
        key = query if same_key else key.transpose(0, 1)
        value = key if same_value else value.transpose(0, 1)
    output, weights = multi_head_attention_forward(
        query,
        key,
        value,
        module.embed_dim,
        module.num_heads,
        module.in_proj_weight,
        module.in_proj_bias,
        module.bias_k,
        module.bias_v,
        module.add_zero_attn,
        module.dropout,
        module.out_proj.weight,
        module.out_proj.bias,
        training=module.training,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
        attn_mask=attn_mask,
        use_separate_proj_weight=module.in_proj_weight is None,
        q_proj_weight=module.q_proj_weight,
        k_proj_weight=module.k_proj_weight,
        v_proj_weight=module.v_proj_weight,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
    )
    return output.transpose(0, 1) if transposed else output, weights


def run_nested(
    module: torch.nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sequences of different lengths, as torch's encoder makes them of a padded batch."""
    masked = key_padding_mask is not None or attn_mask is not None
    wants_grad = torch.is_grad_enabled() and (
        query.requires_grad or any(one.requires_grad for one in module.parameters())
    )
    plain = query is key is value and query.layout == torch.strided and module.batch_first
    if masked or wants_grad or not plain:
        raise AssertionError(
            "nested tensors are supported for self-attention with batch_first=True, without "
            "masks and without gradients only"
        )
    lengths = query._nested_tensor_size()[:, 0]
    padded = query.to_padded_tensor(0.0)
    hidden = torch.arange(padded.size(1)) >= lengths.unsqueeze(1)
    output, weights = module.forward(
        padded,
        padded,
        padded,
        hidden,
        need_weights,
        average_attn_weights=average_attn_weights,
    )
    return torch._nested_tensor_from_mask(output, ~hidden, mask_check=False), weights
