"""Decoder layers with the API of :class:`torch.nn.TransformerDecoderLayer` and its stack."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.transformer import _detect_is_causal_mask

from fastseq.backends import fallback_reason
from fastseq.nn import _attention_arguments as arguments
from fastseq.nn import _decoding as decoding
from fastseq.nn import _transformer_parts as parts
from fastseq.nn.attention import MultiheadAttention
from fastseq.nn.decoder_cache import DecoderCache, DecoderLayerCache

__all__ = ["TransformerDecoder", "TransformerDecoderLayer"]


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """Self-attention, cross-attention and feed-forward; :class:`torch.nn.TransformerDecoderLayer`.

    (Vaswani et al., "Attention Is All You Need", section 3.1, https://arxiv.org/abs/1706.03762;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.TransformerDecoderLayer.html). What is
    said of :class:`fastseq.nn.TransformerEncoderLayer` holds here too.

    Args:
        d_model: features of input and output.
        nhead: heads of attention; divides ``d_model``.
        dim_feedforward: features between the two linear layers.
        dropout: probability of dropping an attention weight, or an element of the feed-forward part
            or of what is added to a residual, while training.
        activation: ``"relu"``, ``"gelu"`` or a callable.
        layer_norm_eps: ``eps`` of the norms.
        batch_first: input and output are ``(B, S, E)``, otherwise ``(S, B, E)``.
        norm_first: normalise in front of each part instead of behind it.
        bias: whether linear layers and norms have biases.
        device, dtype: of the parameters.
        cross_attention: ``False`` for a layer of a decoder-only model: there is no
            ``multihead_attn`` and no ``norm2``, and ``memory`` is ``None``. Not in
            :mod:`torch.nn`.

    Raises:
        RuntimeError: ``activation`` is another string.
        ValueError, AssertionError: ``d_model`` and ``nhead`` are not positive, or ``nhead`` does
            not divide ``d_model``.
    """

    # A class attribute, because a converted layer has none.
    cross_attention: bool = True

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        cross_attention: bool = True,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        if not cross_attention:
            self.cross_attention = False
            del self.multihead_attn, self.norm2, self.dropout2
        parts.adopt(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        cache: DecoderLayerCache | None = None,
    ) -> Tensor:
        """Pass a batch of targets through the layer.

        Args:
            tgt: ``(T, B, E)``, ``(B, T, E)`` with ``batch_first``, or ``(T, E)``.
            memory: likewise with ``S`` for ``T``, what the encoder made; ``None`` in a layer
                without cross-attention.
            tgt_mask: ``(T, T)`` or ``(B * nhead, T, T)``; bool, True hides, or floating, added to
                the scores.
            memory_mask: ``(T, S)`` or ``(B * nhead, T, S)``.
            tgt_key_padding_mask: ``(B, T)``, or ``(T)`` without a batch.
            memory_key_padding_mask: ``(B, S)``, or ``(S)`` without a batch.
            tgt_is_causal: a hint that ``tgt_mask`` is the causal mask.
            memory_is_causal: a hint that ``memory_mask`` is the causal mask.
            cache: what earlier calls have left, for inference. ``tgt`` are the positions that
                follow those held; each sees all up to its own, as with the causal mask over the
                whole target. Keys in the shapes of ``tgt_mask`` and ``tgt_key_padding_mask`` count
                all positions, and ``tgt_mask`` hides further ones. ``memory`` is projected in the
                first call only and may be ``None`` afterwards. Not in :mod:`torch.nn`.

        Returns:
            A tensor shaped as ``tgt``.

        Raises:
            AssertionError, RuntimeError: as :meth:`fastseq.nn.MultiheadAttention.forward` does.
            ValueError: ``memory`` is missing, or given to a layer without cross-attention, or
                ``cache`` does not fit the call.
        """
        if cache is not None:
            decoding.check_type(cache, DecoderLayerCache)
        self._check_memory(memory, cache)
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        hints = (tgt_is_causal, memory_is_causal)
        fuses = fallback_reason(tgt) is None and self._fuses()
        if cache is not None:
            if not fuses:
                return decoding.run_parts(self, tgt, memory, *masks, memory_is_causal, cache)
            return decoding.run(self, tgt, memory, *masks, memory_is_causal, cache)
        if not fuses:
            return self._run_parts(tgt, memory, *masks, *hints)
        return self._run(tgt, memory, *self._plans(tgt, memory, *masks, *hints))

    def _check_memory(self, memory: Tensor | None, cache: DecoderLayerCache | None) -> None:
        if not self.cross_attention:
            if memory is not None:
                raise ValueError("memory must be None in a layer without cross-attention")
        elif memory is None and (cache is None or cache.memory_keys is None):
            raise ValueError("memory must be given to a layer with cross-attention, got None")

    def _fuses(self) -> bool:
        """Whether no part of the layer, and no method of a subclass, wants to be called."""
        kind, base = type(self), nn.TransformerDecoderLayer
        crosses = self.cross_attention
        attentions = ("self_attn", "multihead_attn") if crosses else ("self_attn",)
        dropouts = ("dropout", "dropout1", "dropout2", "dropout3")
        return (
            kind._sa_block is base._sa_block
            and kind._mha_block is base._mha_block
            and kind._ff_block is base._ff_block
            and not any(name in self.__dict__ for name in ("_sa_block", "_mha_block", "_ff_block"))
            and parts.is_whole(
                self, attentions, dropouts if crosses else ("dropout", "dropout1", "dropout3")
            )
        )

    def _plans(
        self,
        tgt: Tensor,
        memory: Tensor | None,
        tgt_mask: Tensor | None,
        memory_mask: Tensor | None,
        tgt_key_padding_mask: Tensor | None,
        memory_key_padding_mask: Tensor | None,
        tgt_is_causal: bool | None,
        memory_is_causal: bool,
    ) -> tuple[arguments.Plan, arguments.Plan | None]:
        """Check the arguments of self-attention and cross-attention."""
        attention = cast(MultiheadAttention, self.self_attn)
        plan = attention._plan(tgt, tgt, tgt, tgt_key_padding_mask, tgt_mask, tgt_is_causal)
        if memory is None:
            return plan, None
        crossing = cast(MultiheadAttention, self.multihead_attn)
        memory_plan = crossing._plan(
            tgt, memory, memory, memory_key_padding_mask, memory_mask, memory_is_causal
        )
        return plan, memory_plan

    def _run(
        self,
        x: Tensor,
        memory: Tensor | None,
        plan: arguments.Plan,
        memory_plan: arguments.Plan | None,
    ) -> Tensor:
        """The layer on arguments that were checked."""
        first, attention = self.norm_first, cast(MultiheadAttention, self.self_attn)
        normed = self.norm1(x) if first else x
        dropped = parts.dropout_probability(self.dropout1)
        x = attention._attend_to(normed, normed, plan, x, dropped)
        x = x if first else self.norm1(x)
        if memory is not None and memory_plan is not None:
            crossing = cast(MultiheadAttention, self.multihead_attn)
            normed = self.norm2(x) if first else x
            dropped = parts.dropout_probability(self.dropout2)
            x = crossing._attend_to(normed, memory, memory_plan, x, dropped)
            x = x if first else self.norm2(x)
        dropped = parts.dropout_probability(self.dropout3)
        if first:
            return parts.feed_forward(self, self.norm3(x), x, dropped)
        return self.norm3(parts.feed_forward(self, x, x, dropped))

    def _run_parts(
        self,
        tgt: Tensor,
        memory: Tensor | None,
        tgt_mask: Tensor | None,
        memory_mask: Tensor | None,
        tgt_key_padding_mask: Tensor | None,
        memory_key_padding_mask: Tensor | None,
        tgt_is_causal: bool,
        memory_is_causal: bool,
    ) -> Tensor:
        """Module by module, as torch does."""
        x, first = tgt, self.norm_first
        terms = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        if first:
            x = x + self._sa_block(self.norm1(x), *terms)
        else:
            x = self.norm1(x + self._sa_block(x, *terms))
        if memory is not None:
            cross_terms = (memory, memory_mask, memory_key_padding_mask, memory_is_causal)
            if first:
                x = x + self._mha_block(self.norm2(x), *cross_terms)
            else:
                x = self.norm2(x + self._mha_block(x, *cross_terms))
        if first:
            return x + self._ff_block(self.norm3(x))
        return self.norm3(x + self._ff_block(x))

    def __prepare_scriptable__(self) -> nn.Module:
        if not self.cross_attention:
            raise TypeError("torch.jit.script has no decoder layer without cross-attention")
        return parts.scriptable_twin(self, nn.TransformerDecoderLayer)


class TransformerDecoder(nn.TransformerDecoder):
    """A stack of decoder layers; :class:`torch.nn.TransformerDecoder` to the parameters.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.TransformerDecoder.html. A decoder-only
    model is a stack of layers with ``cross_attention=False``, called without ``memory``.

    Args:
        decoder_layer: copied ``num_layers`` times; any module with the arguments of
            :class:`TransformerDecoderLayer`'s ``forward``.
        num_layers: how many.
        norm: applied at the end.
    """

    def __init__(
        self, decoder_layer: nn.TransformerDecoderLayer, num_layers: int, norm: Any = None
    ) -> None:
        nn.Module.__init__(self)
        forgotten = decoder_layer._modules.get("activation")
        lost = forgotten is not None and not isinstance(forgotten, nn.ReLU)
        if lost and isinstance(decoder_layer, nn.TransformerDecoderLayer):
            # torch's __setstate__ does not find it. Weights trained there were trained with ReLU.
            warnings.warn(
                f"{type(forgotten).__name__}, a module, as the activation of a decoder layer is "
                "replaced by ReLU in copies of the layer, as torch does: pass a function",
                stacklevel=2,
            )
        self.layers = nn.ModuleList(copy.deepcopy(decoder_layer) for _ in range(num_layers))
        self.num_layers = num_layers
        self.norm = norm

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """Pass a batch of targets through all layers.

        Args:
            tgt: see :meth:`TransformerDecoderLayer.forward`, as for the masks.
            memory: likewise.
            tgt_mask: likewise.
            memory_mask: likewise.
            tgt_key_padding_mask: likewise.
            memory_key_padding_mask: likewise.
            tgt_is_causal: a hint that ``tgt_mask`` is the causal mask. Default: find out.
            memory_is_causal: a hint that ``memory_mask`` is the causal mask.
            cache: what earlier calls have left; see :meth:`TransformerDecoderLayer.forward`.

        Returns:
            A tensor shaped as ``tgt``.

        Raises:
            AssertionError, RuntimeError: as :meth:`fastseq.nn.MultiheadAttention.forward` does.
            ValueError: ``memory`` is missing or superfluous, or ``cache`` does not fit the call.
        """
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        output = tgt
        if cache is not None:
            decoding.check_type(cache, DecoderCache)
            decoding.check_stack(self.layers, cache)
            hints = (False, memory_is_causal)
            for layer, entry in zip(self.layers, cache, strict=True):
                output = layer(output, memory, *masks, *hints, cache=entry)
        elif fallback_reason(tgt) is None and _runs_as_one(self.layers):
            first = cast(TransformerDecoderLayer, self.layers[0])
            first._check_memory(memory, None)
            plans = first._plans(tgt, memory, *masks, tgt_is_causal, memory_is_causal)
            for layer in self.layers:
                output = cast(TransformerDecoderLayer, layer)._run(output, memory, *plans)
        else:
            if tgt_is_causal is None and torch.compiler.is_compiling():
                tgt_is_causal = False
            steps_at = 1 if tgt.dim() == 3 and self.layers[0].self_attn.batch_first else 0
            causal = _detect_is_causal_mask(tgt_mask, tgt_is_causal, tgt.size(steps_at))
            for layer in self.layers:
                output = layer(
                    output,
                    memory,
                    tgt_mask=tgt_mask,
                    memory_mask=memory_mask,
                    tgt_key_padding_mask=tgt_key_padding_mask,
                    memory_key_padding_mask=memory_key_padding_mask,
                    tgt_is_causal=causal,
                    memory_is_causal=memory_is_causal,
                )
        return output if self.norm is None else self.norm(output)

    def __prepare_scriptable__(self) -> nn.Module:
        return parts.scriptable_twin(self, nn.TransformerDecoder)


def _runs_as_one(layers: nn.ModuleList) -> bool:
    """Whether the layers are all ours, unwatched, and one plan of attention fits them."""
    first: Any = None
    for layer in layers:
        if (
            not isinstance(layer, TransformerDecoderLayer)
            or type(layer).forward is not TransformerDecoderLayer.forward
            or "forward" in layer.__dict__
            or parts.is_hooked(layer)
            or not layer._fuses()
        ):
            return False
        first = layer if first is None else first
        if layer.cross_attention is not first.cross_attention:
            return False
        if not parts.fits_plan(layer.self_attn, first.self_attn):
            return False
        if layer.cross_attention and not parts.fits_plan(
            layer.multihead_attn, first.multihead_attn
        ):
            return False
    return True
