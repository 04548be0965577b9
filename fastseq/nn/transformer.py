"""Encoder and decoder in one, with the API of :class:`torch.nn.Transformer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseq.nn import _transformer_parts as parts
from fastseq.nn.norm import LayerNorm
from fastseq.nn.transformer_decoder import TransformerDecoder, TransformerDecoderLayer
from fastseq.nn.transformer_encoder import TransformerEncoder, TransformerEncoderLayer

__all__ = ["Transformer"]


class Transformer(nn.Transformer):
    """Encoder and decoder; :class:`torch.nn.Transformer` to the parameters.

    (Vaswani et al., "Attention Is All You Need", https://arxiv.org/abs/1706.03762;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Transformer.html). ``forward`` is
    torch's; ``encoder`` and ``decoder`` are :class:`fastseq.nn.TransformerEncoder` and
    :class:`fastseq.nn.TransformerDecoder`, which see for what is theirs (padding, caches).

    Args:
        d_model: features of source and target.
        nhead: heads of attention; divides ``d_model``.
        num_encoder_layers, num_decoder_layers: how many.
        dim_feedforward: features between the two linear layers of a layer.
        dropout: see :class:`fastseq.nn.TransformerEncoderLayer`.
        activation: ``"relu"``, ``"gelu"`` or a callable.
        custom_encoder, custom_decoder: modules to use instead.
        layer_norm_eps: ``eps`` of the norms.
        batch_first: input and output are ``(B, S, E)``, otherwise ``(S, B, E)``.
        norm_first: normalise in front of each part of a layer instead of behind it.
        bias: whether linear layers and norms have biases.
        device, dtype: of the parameters.

    Raises:
        RuntimeError: ``activation`` is another string.
        ValueError, AssertionError: ``d_model`` and ``nhead`` are not positive, or ``nhead`` does
            not divide ``d_model``.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        options: tuple[Any, ...] = (
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

        def norm() -> LayerNorm:
            return LayerNorm(d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)

        # In torch's order, so that one seed draws the same weights.
        if custom_encoder is None:
            custom_encoder = TransformerEncoder(
                TransformerEncoderLayer(*options), num_encoder_layers, norm()
            )
        self.encoder = custom_encoder
        if custom_decoder is None:
            custom_decoder = TransformerDecoder(
                TransformerDecoderLayer(*options), num_decoder_layers, norm()
            )
        self.decoder = custom_decoder
        self._reset_parameters()
        self.d_model = d_model
        self.nhead = nhead
        self.batch_first = batch_first

    def __prepare_scriptable__(self) -> nn.Module:
        return parts.scriptable_twin(self, nn.Transformer)
