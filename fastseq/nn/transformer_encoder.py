"""Encoder layers with the API of :class:`torch.nn.TransformerEncoderLayer` and its stack."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.transformer import _detect_is_causal_mask

from fastseq._ops.shared import PLAIN_TYPES, is_traced
from fastseq.backends import fallback_reason
from fastseq.nn import _attention_arguments as arguments
from fastseq.nn import _transformer_parts as parts
from fastseq.nn.attention import MultiheadAttention

__all__ = ["TransformerEncoder", "TransformerEncoderLayer"]

_DROPOUTS = ("dropout", "dropout1", "dropout2")


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Self-attention and feed-forward; :class:`torch.nn.TransformerEncoderLayer` to the parameters.

    (Vaswani et al., "Attention Is All You Need", section 3.1, https://arxiv.org/abs/1706.03762;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.TransformerEncoderLayer.html). Training
    and inference run the same way: activation, dropout and the addition of the residual are part of
    the matrix products. ReLU, GELU (both forms) and SiLU are activations of that kind, as functions
    of :mod:`torch.nn.functional` or as modules; another callable is called between the products.
    A layer one of whose parts has hooks or was replaced by another kind of module calls its parts
    one by one, as torch does.

    Two things differ from torch: a position that may see no key gets zeros from attention instead
    of NaN, and ``is_causal=True`` without ``src_mask`` is an error in eval mode too.

    Args:
        d_model: features of input and output.
        nhead: heads of attention; divides ``d_model``.
        dim_feedforward: features between the two linear layers.
        dropout: probability of dropping an attention weight, or an element of the feed-forward part
            or of what is added to a residual, while training.
        activation: ``"relu"``, ``"gelu"`` or a callable.
        layer_norm_eps: ``eps`` of the norms.
        batch_first: input and output are ``(B, S, E)``, otherwise ``(S, B, E)``.
        norm_first: normalise in front of each half instead of behind it.
        bias: whether linear layers and norms have biases.
        device, dtype: of the parameters.

    Raises:
        RuntimeError: ``activation`` is another string.
        ValueError, AssertionError: ``d_model`` and ``nhead`` are not positive, or ``nhead`` does
            not divide ``d_model``.
    """

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
        parts.adopt(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Pass a batch of sequences through the layer.

        Args:
            src: ``(S, B, E)``, ``(B, S, E)`` with ``batch_first``, or ``(S, E)``; or a nested
                tensor, without masks.
            src_mask: ``(S, S)`` or ``(B * nhead, S, S)``; bool, True hides, or floating, added to
                the scores.
            src_key_padding_mask: ``(B, S)``, or ``(S)`` without a batch; bool, True hides a key,
                or floating, added to the scores.
            is_causal: a hint that ``src_mask`` is the causal mask.

        Returns:
            A tensor shaped as ``src``; padded positions have results too.

        Raises:
            AssertionError, RuntimeError: as :meth:`fastseq.nn.MultiheadAttention.forward` does.
        """
        if src.is_nested:
            return self._run_nested(src, src_mask, src_key_padding_mask)
        if fallback_reason(src) is not None or not self._fuses():
            return self._run_parts(src, src_mask, src_key_padding_mask, is_causal)
        attention = cast(MultiheadAttention, self.self_attn)
        plan = attention._plan(src, src, src, src_key_padding_mask, src_mask, is_causal)
        return self._run(src, plan)

    def _fuses(self) -> bool:
        """Whether no part of the layer, and no method of a subclass, wants to be called."""
        kind = type(self)
        return (
            kind._sa_block is nn.TransformerEncoderLayer._sa_block
            and kind._ff_block is nn.TransformerEncoderLayer._ff_block
            and "_sa_block" not in self.__dict__
            and "_ff_block" not in self.__dict__
            and parts.is_whole(self, ("self_attn",), _DROPOUTS)
        )

    def _packs(self) -> bool:
        """Whether nothing of the layer can tell rows ``(N, E)`` from a padded batch."""
        return (
            parts.fused_activation(self.activation) is not None
            and parts.is_plain_norm(self.norm1)
            and parts.is_plain_norm(self.norm2)
            and cast(MultiheadAttention, self.self_attn)._packs()
        )

    def _run(self, x: Tensor, plan: arguments.Plan, packing: parts.Packing | None = None) -> Tensor:
        """The layer on arguments that were checked; with ``packing`` on the rows ``(N, E)``."""
        attention = cast(MultiheadAttention, self.self_attn)
        after_attention = parts.dropout_probability(self.dropout1)
        after_linear = parts.dropout_probability(self.dropout2)
        normed = self.norm1(x) if self.norm_first else x
        if packing is None:
            x = attention._attend_to(normed, normed, plan, x, after_attention)
        else:
            x = attention._attend_packed(normed, packing.starts, plan.masks.causal, x)
        if self.norm_first:
            return parts.feed_forward(self, self.norm2(x), x, after_linear)
        x = self.norm1(x)
        return self.norm2(parts.feed_forward(self, x, x, after_linear))

    def _run_parts(
        self,
        src: Tensor,
        src_mask: Tensor | None,
        src_key_padding_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """Module by module. Not by torch's ``forward``, which may read the weights instead."""
        mask, padding = _canonical_masks(src, src_mask, src_key_padding_mask, "src_mask")
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), mask, padding, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, mask, padding, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))

    def _run_nested(
        self, src: Tensor, src_mask: Tensor | None, src_key_padding_mask: Tensor | None
    ) -> Tensor:
        """Sequences of different lengths, as torch's encoder makes them of a padded batch."""
        masked = src_mask is not None or src_key_padding_mask is not None
        if masked or src.layout != torch.strided or not self.self_attn.batch_first:
            raise AssertionError(
                "nested tensors are supported with the strided layout, batch_first=True and "
                "without masks only"
            )
        lengths = src._nested_tensor_size()[:, 0]
        padded = src.to_padded_tensor(0.0)
        hidden = torch.arange(padded.size(1)) >= lengths.unsqueeze(1)
        output = self.forward(padded, None, hidden)
        return torch._nested_tensor_from_mask(output, ~hidden, mask_check=False)

    def __prepare_scriptable__(self) -> nn.Module:
        return parts.scriptable_twin(self, nn.TransformerEncoderLayer)


class TransformerEncoder(nn.TransformerEncoder):
    """A stack of encoder layers; :class:`torch.nn.TransformerEncoder` to the parameters.

    https://docs.pytorch.org/docs/stable/generated/torch.nn.TransformerEncoder.html

    In inference (eval mode, no gradients wanted) the rows that ``src_key_padding_mask`` hides are
    left out of all layers, and the result at these positions is that of zeros through ``norm``, as
    it is where torch takes its nested tensors. torch does so under more conditions
    (``batch_first``, no ``norm_first``, no causal mask, padding at the end); here padding may lie
    anywhere. Layers with an activation that is not fused, and those whose norms were replaced or
    have hooks, get the whole batch. ``enable_nested_tensor=False`` turns it off. In training every
    position has a result.

    Args:
        encoder_layer: copied ``num_layers`` times; any module with the arguments of
            :class:`TransformerEncoderLayer`'s ``forward``.
        num_layers: how many.
        norm: applied at the end.
        enable_nested_tensor: whether padded positions may be left out.
        mask_check: accepted, without effect: no mask is misread.
    """

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        # Not torch's constructor: it warns of what rules out its nested tensors.
        nn.Module.__init__(self)
        self.layers = nn.ModuleList(copy.deepcopy(encoder_layer) for _ in range(num_layers))
        self.num_layers = num_layers
        self.norm = norm
        self.enable_nested_tensor = enable_nested_tensor
        # Read by torch's forward only, once the stack is reverted.
        self.use_nested_tensor = False
        self.mask_check = mask_check

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Pass a batch of sequences through all layers.

        Args:
            src: see :meth:`TransformerEncoderLayer.forward`, as for the masks.
            mask: likewise.
            src_key_padding_mask: likewise.
            is_causal: a hint that ``mask`` is the causal mask. Default: find out.

        Returns:
            A tensor shaped as ``src``.

        Raises:
            AssertionError, RuntimeError: as :meth:`fastseq.nn.MultiheadAttention.forward` does.
        """
        first = self.layers[0]
        layers = [cast(TransformerEncoderLayer, layer) for layer in self.layers]
        if src.is_nested or fallback_reason(src) is not None or not _runs_as_one(layers):
            output = self._run_modules(src, mask, src_key_padding_mask, is_causal)
        else:
            attention = cast(MultiheadAttention, first.self_attn)
            plan = attention._plan(src, src, src, src_key_padding_mask, mask, is_causal)
            packing = self._packing(src, plan)
            output = src
            if packing is not None:
                output = src.flatten(0, 1).index_select(0, packing.rows)
            for layer in layers:
                output = layer._run(output, plan, packing)
            if packing is not None:
                padded = src.new_zeros((src.size(0) * src.size(1), src.size(2)))
                output = padded.index_copy_(0, packing.rows, output).view_as(src)
        return output if self.norm is None else self.norm(output)

    def _packing(self, src: Tensor, plan: arguments.Plan) -> parts.Packing | None:
        """Which rows to run, ``None`` for all."""
        masks = plan.masks
        hidden = masks.key_padding_mask
        if (
            hidden is None
            or not self.enable_nested_tensor
            or self.training
            or not plan.sizes.batched
            or masks.mask is not None
            or masks.bias is not None
            or type(src) not in PLAIN_TYPES
            or not arguments.is_readable(hidden)
            or is_traced()
        ):
            return None
        if torch.is_grad_enabled() and (
            src.requires_grad or any(one.requires_grad for one in self.layers.parameters())
        ):
            return None
        if any(not cast(TransformerEncoderLayer, layer)._packs() for layer in self.layers):
            return None
        valid = hidden.logical_not()
        sequence, step = valid.nonzero(as_tuple=True)
        if step.numel() == valid.numel():
            return None
        batch, steps = valid.shape
        batch_first = self.layers[0].self_attn.batch_first
        rows = sequence * steps + step if batch_first else step * batch + sequence
        return parts.Packing(rows, F.pad(valid.sum(1).cumsum(0), (1, 0)))

    def _run_modules(
        self,
        src: Tensor,
        mask: Tensor | None,
        src_key_padding_mask: Tensor | None,
        is_causal: bool | None,
    ) -> Tensor:
        """Layer by layer, each called as a module."""
        mask, padding = _canonical_masks(src, mask, src_key_padding_mask, "mask")
        if is_causal is None and torch.compiler.is_compiling():
            is_causal = False
        elif not src.is_nested:
            steps_at = 1 if src.dim() == 3 and self.layers[0].self_attn.batch_first else 0
            is_causal = _detect_is_causal_mask(mask, is_causal, src.size(steps_at))
        output = src
        for layer in self.layers:
            output = layer(
                output, src_mask=mask, is_causal=bool(is_causal), src_key_padding_mask=padding
            )
        return output

    def __prepare_scriptable__(self) -> nn.Module:
        return parts.scriptable_twin(self, nn.TransformerEncoder)


def _runs_as_one(layers: list[TransformerEncoderLayer]) -> bool:
    """Whether the layers are all ours, unwatched, and one plan of attention fits them."""
    first: Any = None
    for layer in layers:
        if (
            not isinstance(layer, TransformerEncoderLayer)
            or type(layer).forward is not TransformerEncoderLayer.forward
            or "forward" in layer.__dict__
            or parts.is_hooked(layer)
            or not layer._fuses()
        ):
            return False
        attention = layer.self_attn
        first = attention if first is None else first
        if not parts.fits_plan(attention, first):
            return False
    return True


def _canonical_masks(
    src: Tensor, mask: Tensor | None, padding: Tensor | None, name: str
) -> tuple[Tensor | None, Tensor | None]:
    """Both masks as torch's layers hand them on: floating, added to the scores."""
    padding = F._canonical_mask(
        mask=padding,
        mask_name="src_key_padding_mask",
        other_type=F._none_or_dtype(mask),
        other_name=name,
        target_type=src.dtype,
    )
    mask = F._canonical_mask(
        mask=mask,
        mask_name=name,
        other_type=None,
        other_name="",
        target_type=src.dtype,
        check_other=False,
    )
    return mask, padding
