"""From arguments that were checked to the output projection: what runs inside attention's module.

:class:`fastseq.nn.MultiheadAttention` and the Transformer layers, which hand their residual and
dropout to the output projection, share this one way.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from torch import Tensor

from fastseq import functional
from fastseq._attention import WEIGHTS_NONE, Options, Terms
from fastseq.functional import linear
from fastseq.functional.attention import default_scale, run_attention
from fastseq.nn import _attention_arguments as arguments
from fastseq.nn.cache import KeyValueCache

__all__ = ["ProjectedAttention"]


class ProjectedAttention(torch.nn.MultiheadAttention):
    """The parts of a call of multi-head attention; for arguments and shapes see the subclass."""

    # None stands for as many as num_heads. A class attribute, because a converted layer has none.
    num_kv_heads: int | None = None

    def _projection_weights(self) -> tuple[Tensor, ...]:
        """The packed weight, or those of query, key and value."""
        packed = cast("Tensor | None", self.in_proj_weight)
        if packed is not None:
            return (packed,)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return tuple(weight for weight in weights if weight is not None)

    def _plan(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool | None,
        need_weights: bool = False,
        cache: KeyValueCache | None = None,
    ) -> arguments.Plan:
        """Check the arguments of a call; the answer fits every layer of a stack.

        ``is_causal`` may be ``None``: find out.
        """
        hint = bool(is_causal) and cache is None
        sizes = arguments.check_call(
            query,
            key,
            value,
            key_padding_mask,
            attn_mask,
            hint,
            0 if cache is None else cache.length,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight is not None,
            self.kdim,
            self.vdim,
            self.batch_first,
            self.out_proj.weight,
        )
        masks = arguments.masks(
            attn_mask,
            key_padding_mask,
            hint or (is_causal is None and attn_mask is not None),
            sizes,
            self.num_heads,
            # torch's rule, by which results stay those of torch even if the hint is wrong.
            obey_hint=hint and key_padding_mask is None and not need_weights,
            # Appended keys are for all queries; as the causal mask it would hide them.
            check_hint=self.bias_k is None and not self.add_zero_attn,
        )
        if cache is not None:
            masks.causal = masks.bottom_right = True
        return arguments.Plan(sizes, masks)

    def _attend_to(
        self,
        query: Tensor,
        memory: Tensor,
        plan: arguments.Plan,
        residual: Tensor,
        dropout_p: float,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """``residual + dropout(forward(query, memory, memory))``."""
        batched = plan.sizes.batched
        q, k, v = (
            self._split_heads(tensor, batched) for tensor in self._project(query, memory, memory)
        )
        rope = self._modules.get("rope")
        if rope is not None:
            q, k = self._rotate(rope, q, k, None, 0 if cache is None else cache.length)
        if cache is not None:
            k, v = cache.append(k, v)
        return self._attend(q, k, v, plan, residual=residual, dropout_p=dropout_p)[0]

    def _attend_packed(
        self, rows: Tensor, starts: Tensor, causal: bool, residual: Tensor
    ) -> Tensor:
        """``residual + forward(...)`` of sequences one after the other, for inference.

        Args:
            rows: ``(N, embed_dim)``.
            starts: ``(B + 1,)`` int64, the first row of each sequence.
            causal: whether a position sees only those up to itself.
            residual: ``(N, embed_dim)``.
        """
        q, k, v = (
            tensor.unflatten(-1, (-1, self.head_dim)) for tensor in self._project(rows, rows, rows)
        )
        options = Options(window_right=0 if causal else -1, scale=default_scale(q, None))
        terms = Terms(query_starts=starts, key_starts=starts)
        attended, _, _ = run_attention(q, k, v, terms, options, WEIGHTS_NONE)
        return linear(
            attended.flatten(-2), self.out_proj.weight, self.out_proj.bias, None, residual
        )

    def _packs(self) -> bool:
        """Whether :meth:`_attend_packed` can do what ``forward`` does."""
        extended = self.bias_k is not None or self.add_zero_attn or "rope" in self._modules
        return not extended and not (self.training and self.dropout)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: arguments.Plan,
        need_weights: bool = False,
        average_attn_weights: bool = True,
        residual: Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """From projected heads ``(B, H, S, E)`` on: attention and the output projection.

        ``dropout_p`` is the probability of dropping an element of the output before ``residual``
        is added.
        """
        sizes, masks = plan
        sinks = None
        if self.bias_k is not None or self.add_zero_attn:
            masks = dataclasses.replace(masks)
            k, v, sinks = self._append_keys(k, v, masks, need_weights)
        attention_dropout = self.dropout if self.training else 0.0
        if need_weights and attention_dropout > 1:
            raise ValueError(
                f"dropout must be a probability between 0 and 1, got {attention_dropout}"
            )
        result = functional.attention(
            q,
            k,
            v,
            causal=masks.causal,
            bottom_right=masks.bottom_right,
            mask=masks.mask,
            bias=masks.bias,
            key_padding_mask=masks.key_padding_mask,
            sinks=sinks,
            dropout_p=max(attention_dropout, 0.0),
            return_weights=need_weights,
            average_weights=average_attn_weights,
        )
        attended, weights = result if need_weights else (result, None)
        if weights is not None and not sizes.batched:
            weights = weights.squeeze(0)
        merged = self._merge_heads(attended, sizes.batched)
        out = self.out_proj
        return linear(merged, out.weight, out.bias, None, residual, dropout_p=dropout_p), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all heads, by as few products as there are inputs."""
        kv_dim = self.head_dim * (self.num_kv_heads or self.num_heads)
        parts = [self.embed_dim, kv_dim, kv_dim]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and key is value:
            if query is key:
                return linear(query, weight, bias).split(parts, dim=-1)
            return (self._project_query(query), *self._project_memory(key))
        weights = self._projection_weights() if weight is None else weight.split(parts)
        biases = (None, None, None) if bias is None else bias.split(parts)
        q, k, v = map(linear, (query, key, value), weights, biases)
        return q, k, v

    def _project_query(self, query: Tensor) -> Tensor:
        packed = cast("Tensor | None", self.in_proj_weight)
        bias, size = self.in_proj_bias, self.embed_dim
        weight = self._projection_weights()[0] if packed is None else packed[:size]
        return linear(query, weight, None if bias is None else bias[:size])

    def _project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one tensor, by one product if the weights are packed."""
        packed = cast("Tensor | None", self.in_proj_weight)
        size = self.embed_dim
        bias = None if self.in_proj_bias is None else self.in_proj_bias[size:]
        if packed is not None:
            k, v = linear(memory, packed[size:], bias).chunk(2, dim=-1)
            return k, v
        k_bias, v_bias = (None, None) if bias is None else bias.chunk(2)
        _, k_weight, v_weight = self._projection_weights()
        return linear(memory, k_weight, k_bias), linear(memory, v_weight, v_bias)

    def _split_heads(self, projected: Tensor, batched: bool) -> Tensor:
        """A view ``(B, H, S, E)``."""
        heads = projected.unflatten(-1, (-1, self.head_dim))
        if not batched:
            return heads.transpose(0, 1).unsqueeze(0)
        return heads.transpose(1, 2) if self.batch_first else heads.permute(1, 2, 0, 3)

    def _merge_heads(self, attended: Tensor, batched: bool) -> Tensor:
        """``(B, H, S, E)`` to the layout of the query."""
        if not batched:
            return attended.squeeze(0).transpose(0, 1).flatten(-2)
        order = (0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)
        return attended.permute(order).flatten(-2)

    def _rotate(
        self, rope: torch.nn.Module, q: Tensor, k: Tensor, positions: Tensor | None, held: int
    ) -> tuple[Tensor, Tensor]:
        if positions is None and held:
            positions = torch.arange(held, held + q.size(2), device=q.device)
        elif positions is not None and positions.dim() == 2:
            positions = positions.unsqueeze(1)
        return rope(q, positions), rope(k, positions)

    def _append_keys(
        self, k: Tensor, v: Tensor, masks: arguments.Masks, need_weights: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add what ``add_bias_kv`` and ``add_zero_attn`` ask for; also returns the sinks."""
        sinks = None
        added: list[tuple[Tensor, Tensor]] = []
        if self.bias_k is not None and self.bias_v is not None:
            shape = (k.size(0), k.size(1), 1, self.head_dim)
            heads = (1, k.size(1), 1, self.head_dim)
            added.append(
                (self.bias_k.view(heads).expand(shape), self.bias_v.view(heads).expand(shape))
            )
        if self.add_zero_attn:
            if need_weights or masks.causal:
                zero = k.new_zeros(k.size(0), k.size(1), 1, self.head_dim)
                added.append((zero, zero))
            else:
                # A key and value of zeros add 1 to the denominator and nothing else.
                sinks = k.new_zeros(self.num_heads)
        if added:
            k = torch.cat([k, *(key for key, _ in added)], dim=2)
            v = torch.cat([v, *(value for _, value in added)], dim=2)
            masks.append_visible_keys(len(added))
        return k, v, sinks
