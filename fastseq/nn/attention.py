"""Multi-head attention with the API of :class:`torch.nn.MultiheadAttention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, init
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastseq.backends import fallback_reason, warn_fallback
from fastseq.nn import _attention_arguments as arguments
from fastseq.nn._attention_fallback import run_nested, run_torch
from fastseq.nn._projected_attention import ProjectedAttention
from fastseq.nn.cache import KeyValueCache
from fastseq.nn.rotary import RotaryEmbedding

__all__ = ["MultiheadAttention"]


class MultiheadAttention(ProjectedAttention):
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
