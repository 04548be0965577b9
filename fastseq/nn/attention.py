"""Multi-head attention with the API of :class:`torch.nn.MultiheadAttention`."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter, init
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastseq import functional
from fastseq.backends import fallback_reason, warn_fallback
from fastseq.functional import linear
from fastseq.nn import _attention_arguments as arguments
from fastseq.nn._attention_fallback import run_nested, run_torch
from fastseq.nn.cache import KeyValueCache
from fastseq.nn.rotary import RotaryEmbedding

__all__ = ["MultiheadAttention"]


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Multi-head attention as in :class:`torch.nn.MultiheadAttention`, down to the parameters.

    ``softmax(Q K^T / sqrt(E / H)) V`` per head between linear projections (Vaswani et al.,
    "Attention Is All You Need", section 3.2, https://arxiv.org/abs/1706.03762;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.MultiheadAttention.html). Two things
    differ from torch: a query that may see no key at all gets zeros (and zero gradients) instead of
    NaN, and a boolean mask may be combined with a float one.

    Inside a :class:`torch.nn.TransformerEncoderLayer` in eval mode, torch would read the weights of
    this layer and never call it. ``_qkv_same_embed_dim``, one of the attributes that it asks
    before, is therefore False here; :attr:`in_proj_weight` says how the weights lie.

    Args:
        embed_dim: features of queries and of the output.
        num_heads: heads; divides ``embed_dim``.
        dropout: probability of dropping an attention weight while training.
        bias: whether the projections have biases.
        add_bias_kv: append a learned key and value to those of every sequence.
        add_zero_attn: append a key and a value of zeros.
        kdim, vdim: features of keys and values. Default: ``embed_dim``.
        batch_first: input and output are ``(B, S, ...)``, otherwise ``(S, B, ...)``.
        device, dtype: of the parameters.
        num_kv_heads: heads of keys and values; divides ``num_heads``, and each serves
            ``num_heads / num_kv_heads`` heads of queries (Ainslie et al., "GQA",
            https://arxiv.org/abs/2305.13245). The rows of the key and value projections shrink
            accordingly. Default: ``num_heads``. Not in :mod:`torch.nn`.
        rope: rotates the projected queries and keys by their positions. Not in :mod:`torch.nn`.

    Raises:
        ValueError: ``embed_dim`` or a number of heads is not positive, ``num_kv_heads`` does not
            divide ``num_heads``, or ``rope`` rotates more features than a head has.
        AssertionError: ``num_heads`` does not divide ``embed_dim``.
    """

    # None stands for as many as num_heads. A class attribute, because a converted layer has none.
    num_kv_heads: int | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        rope: RotaryEmbedding | None = None,
    ) -> None:
        arguments.check_sizes(embed_dim, num_heads, num_kv_heads)
        # Not torch's constructor: it asks _qkv_same_embed_dim, and knows no num_kv_heads.
        torch.nn.Module.__init__(self)
        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        same = self.kdim == embed_dim and self.vdim == embed_dim
        self._qkv_same_embed_dim = same
        self.num_heads = num_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self.head_dim = embed_dim // num_heads
        if num_kv_heads is not None:
            self.num_kv_heads = num_kv_heads
        if rope is not None:
            if rope.dim > self.head_dim:
                raise ValueError(
                    f"rope must rotate at most the {self.head_dim} features of a head, "
                    f"got one for {rope.dim}"
                )
            self.rope = rope

        def parameter(*sizes: int) -> Parameter:
            return Parameter(torch.empty(sizes, device=device, dtype=dtype))

        kv_dim = self.head_dim * (num_kv_heads or num_heads)
        rows = embed_dim + 2 * kv_dim
        weights = {
            "q_proj_weight": None if same else parameter(embed_dim, embed_dim),
            "k_proj_weight": None if same else parameter(kv_dim, self.kdim),
            "v_proj_weight": None if same else parameter(kv_dim, self.vdim),
            "in_proj_weight": parameter(rows, embed_dim) if same else None,
            "in_proj_bias": parameter(rows) if bias else None,
        }
        for name, weight in weights.items():
            self.register_parameter(name, weight)
        self.out_proj = NonDynamicallyQuantizableLinear(
            embed_dim, embed_dim, bias=bias, device=device, dtype=dtype
        )
        self.bias_k = parameter(1, 1, kv_dim) if add_bias_kv else None
        self.bias_v = parameter(1, 1, kv_dim) if add_bias_kv else None
        self.add_zero_attn = add_zero_attn
        self._reset_parameters()

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return False

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        # Where torch's own class finds it, once the layer is reverted or scripted.
        self.__dict__["_qkv_same_embed_dim"] = value

    def _reset_parameters(self) -> None:
        """Draw new weights in the order in which torch draws them."""
        for weight in self._projection_weights():
            init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            init.constant_(self.in_proj_bias, 0.0)
            init.constant_(self.out_proj.bias, 0.0)
        if self.bias_k is not None and self.bias_v is not None:
            init.xavier_normal_(self.bias_k)
            init.xavier_normal_(self.bias_v)

    def _projection_weights(self) -> tuple[Tensor, ...]:
        """The packed weight, or those of query, key and value."""
        packed = cast("Tensor | None", self.in_proj_weight)
        if packed is not None:
            return (packed,)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return tuple(weight for weight in weights if weight is not None)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: KeyValueCache | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with ``query`` to ``key`` and ``value``.

        ``N`` is ``B * num_heads``, ``S`` queries, ``K`` keys. The fused CPU kernels take float32
        and float64; torch answers for every other dtype and device.

        Args:
            query: ``(S, B, embed_dim)``, ``(B, S, embed_dim)`` with ``batch_first``, or
                ``(S, embed_dim)``. One tensor passed as all three is projected by one product.
            key: likewise, ``K`` for ``S`` and ``kdim`` features.
            value: likewise, ``K`` for ``S`` and ``vdim`` features.
            key_padding_mask: ``(B, K)``, or ``(K)`` without a batch; bool, True hides the key; or
                floating, added to the logits.
            need_weights: also return the attention weights.
            attn_mask: ``(S, K)`` or ``(N, S, K)``; bool, True hides the key from the query; or
                floating, added to the logits.
            average_attn_weights: return the mean of the weights over heads.
            is_causal: a hint that ``attn_mask`` is the causal mask.
            cache: keys and values of the positions before; those of this call are appended to it,
                and each query sees all positions up to its own, as with the causal mask over the
                whole sequence. Then ``K`` in the shapes of masks and weights counts all positions,
                and ``attn_mask`` hides further ones.
            positions: of the queries and keys, for ``rope``: ``(S)`` or ``(B, S)``. Default: from
                0, or from the length of ``cache``.

        Returns:
            The output, shaped as ``query``, and the weights: ``None``, ``(B, S, K)``, or
            ``(B, num_heads, S, K)`` per head, without ``B`` for one sequence. ``K`` counts the keys
            that the constructor's options append.

        Raises:
            AssertionError: ranks, feature counts or the shape or dtype of a mask do not fit.
            RuntimeError: batch sizes, dtypes or the shape of ``attn_mask`` do not fit, or
                ``is_causal`` without ``attn_mask``.
            ValueError: ``cache`` or ``positions`` do not fit the call.
        """
        if query.is_nested:
            return run_nested(
                self,
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
            )
        rope = self._modules.get("rope")
        extended = cache is not None or rope is not None or self.num_kv_heads is not None
        reason = None if extended else fallback_reason(query)
        if reason is not None:
            warn_fallback(reason)
            return run_torch(
                self,
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        held = 0 if cache is None else cache.length
        plan = self._plan(
            query, key, value, key_padding_mask, attn_mask, is_causal, need_weights, cache
        )
        if cache is not None or positions is not None:
            arguments.check_extras(self, query, key, cache, positions, plan.sizes)
        q, k, v = (
            self._split_heads(tensor, plan.sizes.batched)
            for tensor in self._project(query, key, value)
        )
        if rope is not None:
            q, k = self._rotate(rope, q, k, positions, held)
        if cache is not None:
            k, v = cache.append(k, v)
        return self._attend(q, k, v, plan, need_weights, average_attn_weights)

    def _plan(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        need_weights: bool = False,
        cache: KeyValueCache | None = None,
    ) -> arguments.Plan:
        """Check the arguments of a call; the answer fits every layer of a stack."""
        sizes = arguments.check_call(
            query,
            key,
            value,
            key_padding_mask,
            attn_mask,
            is_causal and cache is None,
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
            is_causal and cache is None,
            sizes,
            self.num_heads,
            # torch's rule, by which results stay those of torch even if the hint is wrong.
            obey_hint=key_padding_mask is None and not need_weights,
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
    ) -> Tensor:
        """``residual + dropout(forward(query, memory, memory))``."""
        batched = plan.sizes.batched
        q, k, v = (
            self._split_heads(tensor, batched) for tensor in self._project(query, memory, memory)
        )
        rope = self._modules.get("rope")
        if rope is not None:
            q, k = self._rotate(rope, q, k, None, 0)
        return self._attend(q, k, v, plan, residual=residual, dropout_p=dropout_p)[0]

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
            dropout_p=self.dropout if self.training else 0.0,
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
            both = [self.embed_dim, 2 * kv_dim]
            q_weight, kv_weight = weight.split(both)
            q_bias, kv_bias = (None, None) if bias is None else bias.split(both)
            k, v = linear(key, kv_weight, kv_bias).chunk(2, dim=-1)
            return linear(query, q_weight, q_bias), k, v
        weights = self._projection_weights() if weight is None else weight.split(parts)
        biases = (None, None, None) if bias is None else bias.split(parts)
        q, k, v = map(linear, (query, key, value), weights, biases)
        return q, k, v

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

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """torch.jit.script compiles source, not kernels: give it torch's layer, same parameters."""
        if self.num_kv_heads is not None or "rope" in self._modules:
            raise TypeError("torch.jit.script has no layer with num_kv_heads or rope")
        twin = torch.nn.MultiheadAttention.__new__(torch.nn.MultiheadAttention)
        twin.__dict__.update(self.__dict__)
        return twin

    def extra_repr(self) -> str:
        """Arguments that torch's layer does not have, for ``repr``."""
        return "" if self.num_kv_heads is None else f"num_kv_heads={self.num_kv_heads}"
