"""fastseq under other libraries' interfaces. Nothing is imported before it is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq import functional

__all__ = ["register_transformers"]

NAME = "fastseq"


def register_transformers() -> None:
    """Make ``attn_implementation="fastseq"`` known to Hugging Face ``transformers``.

    ::

        fastseq.integrations.register_transformers()
        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastseq")
        model.set_attn_implementation("fastseq")  # or, for a model that exists already

    Registers the attention function and the masks that go with it, by the interfaces that the
    library has for this (https://huggingface.co/docs/transformers/attention_interface). Grouped
    heads, soft-capping, attention sinks and position biases are the kernel's own, and so are the
    weights, where a model hands ``output_attentions`` on. May be called again.
    Before version 5 some models, BERT among them, do not look the attention function up.

    Raises:
        ImportError: ``transformers`` is not installed, or too old to have those interfaces.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "register_transformers needs the transformers package, at version 4.53 or later "
            "(pip install 'transformers>=4.53')"
        ) from error
    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The library's boolean mask ``(B, 1, Sq or 1, Skv)``, ``None`` where nothing is to be hidden.

    Where only padding is hidden, every row of queries has the same mask and one is enough: the
    kernel then rules out whole tiles of keys, and no memory grows with ``Sq * Skv``.
    """
    from transformers import masking_utils

    everything = getattr(masking_utils, "bidirectional_mask_function", None)
    if (
        everything is not None
        and kwargs.get("mask_function") is everything
        and "q_length" in kwargs
    ):
        kwargs["q_length"] = 1
    return masking_utils.sdpa_mask(*args, **kwargs)


def _attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """What a model of ``transformers`` calls.

    Args:
        module: the attention layer; its ``is_causal`` counts where there is no mask.
        query: ``(B, Hq, Sq, E)``.
        key: ``(B, Hkv, Skv, E)``.
        value: ``(B, Hkv, Skv, Ev)``.
        attention_mask: ``(1 or B, 1 or Hq, 1 or Sq, Skv)``, bool (True takes part) or floating
            (added); sliding windows and the like are in it already.
        dropout: probability of dropping a weight.
        scaling: of the logits. Default: ``1 / sqrt(E)``.
        is_causal: overrides the layer's attribute.
        position_bias: ``(1 or B, Hq, Sq, Skv)``, added to the logits.
        softcap: bound of the logits.
        s_aux: ``(Hq)``, logits of the attention sinks.
        output_attentions: also return the weights.
        **others: what other implementations need; ignored, but for what would change the result.

    Returns:
        The output ``(B, Sq, Hq, Ev)`` and the weights ``(B, Hq, Sq, Skv)`` or ``None``.

    Raises:
        ValueError: ``others`` asks for a paged cache or a head mask.
    """
    for name in ("cache", "head_mask"):
        if others.get(name) is not None:
            raise ValueError(
                f"{name} must be None with attn_implementation='fastseq', "
                f"got a {type(others[name]).__name__}"
            )
    queries, keys = query.size(2), key.size(2)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    mask = bias = padding = None
    causal = False
    if attention_mask is None:
        # A single query comes last and sees all keys. More of them without a mask start at key 0,
        # be it that the cache already has room for keys to come.
        causal = queries > 1 and bool(is_causal)
    elif attention_mask.dtype != torch.bool:
        bias = attention_mask[..., :keys]
    elif attention_mask.size(1) == 1 and attention_mask.size(2) == 1:
        padding = ~attention_mask[:, 0, 0, :keys].expand(query.size(0), -1)
    else:
        mask = attention_mask[..., :keys]
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    result = functional.attention(
        query,
        key,
        value,
        causal=causal,
        mask=mask,
        bias=bias,
        key_padding_mask=padding,
        softcap=softcap,
        sinks=s_aux,
        dropout_p=dropout,
        scale=scaling,
        return_weights=output_attentions,
    )
    output, weights = result if output_attentions else (result, None)
    return output.transpose(1, 2).contiguous(), weights
