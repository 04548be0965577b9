"""A decoder layer with a cache: the positions that follow those held."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fastseq import _ops, functional
from fastseq._linear import ACTIVATIONS
from fastseq._ops.shared import PLAIN_TYPES, is_traced
from fastseq.functional import layer_norm, linear
from fastseq.nn import _attention_arguments as arguments
from fastseq.nn import _transformer_parts as parts
from fastseq.nn.attention import MultiheadAttention
from fastseq.nn.decoder_cache import DecoderCache, DecoderLayerCache

if TYPE_CHECKING:
    from fastseq.nn.transformer_decoder import TransformerDecoderLayer

__all__ = ["check_stack", "check_type", "run", "run_parts"]


def check_type(cache: object, expected: type) -> None:
    """The cache is one of a layer, or of a stack."""
    if not isinstance(cache, expected):
        raise TypeError(f"cache must be a {expected.__name__}, got {type(cache).__name__}")


def check_stack(layers: nn.ModuleList, cache: DecoderCache) -> None:
    """A cache for as many layers, all of them fastseq's."""
    if len(cache) != len(layers):
        raise ValueError(
            "cache must have as many layers as the decoder: "
            f"expected {len(layers)}, got {len(cache)}"
        )
    for layer in layers:
        if not hasattr(type(layer), "cross_attention"):
            raise TypeError(
                "cache must be None in a stack of layers that take none, "
                f"got one with {type(layer).__name__}"
            )


def run(
    layer: TransformerDecoderLayer,
    tgt: Tensor,
    memory: Tensor | None,
    tgt_mask: Tensor | None,
    memory_mask: Tensor | None,
    tgt_key_padding_mask: Tensor | None,
    memory_key_padding_mask: Tensor | None,
    memory_is_causal: bool,
    cache: DecoderLayerCache,
) -> Tensor:
    """The layer, all of whose parts are plain."""
    if (
        tgt_mask is None
        and memory_mask is None
        and tgt_key_padding_mask is None
        and (memory_key_padding_mask is None or memory_key_padding_mask.dtype is torch.bool)
        and (memory is None or cache.memory_keys is not None)
        and tgt.dim() == 3
        and cache.length
        and _is_plain(layer, tgt)
    ):
        return _step(layer, tgt, memory_key_padding_mask, cache)
    first, attention = layer.norm_first, cast(MultiheadAttention, layer.self_attn)
    own = cache.self_attention
    normed = layer.norm1(tgt) if first else tgt
    plan = attention._plan(normed, normed, normed, tgt_key_padding_mask, tgt_mask, False, cache=own)
    arguments.check_extras(attention, normed, normed, own, None, plan.sizes)
    dropped = parts.dropout_probability(layer.dropout1)
    x = attention._attend_to(normed, normed, plan, tgt, dropped, own)
    x = x if first else layer.norm1(x)
    if layer.cross_attention:
        crossing = cast(MultiheadAttention, layer.multihead_attn)
        normed = layer.norm2(x) if first else x
        plan = _memory_plan(
            crossing,
            normed,
            memory,
            memory_mask,
            memory_key_padding_mask,
            memory_is_causal,
            cache,
        )
        q = crossing._split_heads(crossing._project_query(normed), plan.sizes.batched)
        assert cache.memory_keys is not None
        assert cache.memory_values is not None
        x, _ = crossing._attend(
            q,
            cache.memory_keys,
            cache.memory_values,
            plan,
            residual=x,
            dropout_p=parts.dropout_probability(layer.dropout2),
        )
        x = x if first else layer.norm2(x)
    dropped = parts.dropout_probability(layer.dropout3)
    if first:
        return parts.feed_forward(layer, layer.norm3(x), x, dropped)
    return layer.norm3(parts.feed_forward(layer, x, x, dropped))


def _memory_plan(
    attention: MultiheadAttention,
    query: Tensor,
    memory: Tensor | None,
    mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
    cache: DecoderLayerCache,
) -> arguments.Plan:
    """Check the arguments of cross-attention; project the memory if that is still to be done."""
    if cache.memory_keys is None:
        assert memory is not None
        if "rope" in attention._modules:
            raise ValueError("cache cannot be combined with rope in cross-attention")
        plan = attention._plan(query, memory, memory, padding, mask, is_causal)
        if torch.is_grad_enabled() and (
            memory.requires_grad or any(one.requires_grad for one in attention.parameters())
        ):
            raise RuntimeError(
                "a cache is for inference: memory and parameters must not require gradients; "
                "call the layer under torch.no_grad() or torch.inference_mode()"
            )
        # Dense, because every step reads all of them.
        keys, values = (
            attention._split_heads(tensor, plan.sizes.batched).contiguous()
            for tensor in attention._project_memory(memory)
        )
        cache.set_memory(keys, values)
        return plan
    batch, _, held, _ = cache.memory_keys.shape
    batched = query.dim() == 3
    steps_at = 1 if batched and attention.batch_first else 0
    sizes = arguments.Sizes(batched, batch, query.size(steps_at), held)
    expected = (batch, held) if batched else (held,)
    arguments.check_mask_dtype("memory_key_padding_mask", padding)
    arguments.check_mask_dtype("memory_mask", mask)
    if padding is not None and padding.shape != expected:
        raise AssertionError(
            f"memory_key_padding_mask must have shape {expected}, got {tuple(padding.shape)}"
        )
    if mask is not None:
        arguments.check_attention_mask(mask, sizes, attention.num_heads)
    masks = arguments.masks(mask, padding, is_causal, sizes, attention.num_heads, False, True)
    return arguments.Plan(sizes, masks)


def _is_plain(layer: TransformerDecoderLayer, tgt: Tensor) -> bool:
    """Whether nothing but weights and tensors matters: no dropout, no gradient, no option."""
    if type(tgt) not in PLAIN_TYPES or is_traced() or torch.is_grad_enabled():
        return False
    for name, part in layer._modules.items():
        if part is None or part.training:
            return False
        if name in ("self_attn", "multihead_attn"):
            options = part._parameters
            if options["in_proj_weight"] is None or options.get("bias_k") is not None:
                return False
            if part.add_zero_attn or "rope" in part._modules:
                return False
            if cast(MultiheadAttention, part).num_kv_heads is not None:
                return False
            if part.num_heads != layer.self_attn.num_heads:
                return False
    return True


def _step(
    layer: TransformerDecoderLayer, x: Tensor, padding: Tensor | None, cache: DecoderLayerCache
) -> Tensor:
    """The shortest way, because at one position per call the way is most of the time."""
    # Past the slow attribute look-up of modules throughout.
    modules: dict[str, Any] = layer._modules
    first, attention = layer.norm_first, modules["self_attn"]
    heads, size, batch_first = attention.num_heads, attention.head_dim, attention.batch_first
    shape = x.shape
    batch, steps = shape[:2] if batch_first else (shape[1], shape[0])
    weights = attention._parameters
    if steps == 1 and padding is None:
        done = _one_position(layer, x, batch, cache)
        if done is not None:
            return done
    normed = _norm(modules["norm1"], x) if first else x
    projected = linear(normed, weights["in_proj_weight"], weights["in_proj_bias"])
    if steps == 1:
        # (B, 3, H, 1, size) whichever dimension comes first.
        split = projected.view(batch, 3, heads, 1, size)
    else:
        split = projected.view(*shape[:2], 3, heads, size)
        split = split.permute(0, 2, 3, 1, 4) if batch_first else split.permute(1, 2, 3, 0, 4)
    query, key, value = split.unbind(1)
    keys, values = cache.self_attention._append_next(key, value)
    x = _attend(query, keys, values, None, steps > 1, attention, x)
    if not first:
        x = _norm(modules["norm1"], x)
    if layer.cross_attention:
        attention = modules["multihead_attn"]
        weights, features = attention._parameters, attention.embed_dim
        weight, bias = weights["in_proj_weight"], weights["in_proj_bias"]
        normed = _norm(modules["norm2"], x) if first else x
        projected = linear(
            normed,
            weight.narrow(0, 0, features),
            None if bias is None else bias.narrow(0, 0, features),
        )
        if steps == 1:
            query = projected.view(batch, heads, 1, size)
        else:
            query = attention._split_heads(projected, True)
        keys, values = cast(Tensor, cache.memory_keys), cast(Tensor, cache.memory_values)
        if batch != keys.size(0):
            raise RuntimeError(
                "tgt must have the batch size of the memory in cache: "
                f"expected {keys.size(0)}, got {batch}"
            )
        x = _attend(query, keys, values, padding, False, attention, x)
        if not first:
            x = _norm(modules["norm2"], x)
    normed = _norm(modules["norm3"], x) if first else x
    inner, outer = modules["linear1"]._parameters, modules["linear2"]._parameters
    activation = parts.fused_activation(layer.activation)
    hidden = linear(normed, inner["weight"], inner["bias"], activation)
    if activation is None:
        hidden = layer.activation(hidden)
    x = linear(hidden, outer["weight"], outer["bias"], None, x)
    return x if first else _norm(modules["norm3"], x)


def _one_position(
    layer: TransformerDecoderLayer, x: Tensor, batch: int, cache: DecoderLayerCache
) -> Tensor | None:
    """:func:`_step` for one position, all in one call of the kernels' side; ``None`` if not so."""
    modules: dict[str, Any] = layer._modules
    activation = parts.fused_activation(layer.activation)
    own = cache.self_attention
    keys, values = own._keys, own._values
    if activation is None or keys is None or values is None or own._frozen(keys):
        return None
    norms = []
    for name in ("norm1", "norm2", "norm3"):
        norm = modules.get(name)
        if norm is None:
            norms.append((None, None, 0.0))
            continue
        options = norm._parameters
        if not parts.is_plain_norm(norm) or len(options) != 2 or options["weight"] is None:
            return None
        norms.append((options["weight"], options["bias"], norm.eps))
    output = _ops.plain_decoder_step(
        x,
        batch,
        modules["self_attn"].num_heads,
        layer.norm_first,
        ACTIVATIONS[activation],
        _projections(modules["self_attn"]),
        (*_weights(modules["linear1"]), *_weights(modules["linear2"])),
        tuple(norms),
        keys,
        values,
        own._length,
        _projections(modules["multihead_attn"]) if layer.cross_attention else None,
        cache.memory_keys,
        cache.memory_values,
    )
    if output is not None:
        own._length += 1
    return output


def _weights(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    options = module._parameters
    return options["weight"], options["bias"]


def _projections(attention: Any) -> tuple[Tensor | None, ...]:
    options = attention._parameters
    out = _weights(attention._modules["out_proj"])
    return options["in_proj_weight"], options["in_proj_bias"], *out


def _norm(module: nn.Module, input: Tensor) -> Tensor:
    """``module(input)``."""
    weights: dict[str, Any] = module._parameters
    if len(weights) < 2 or not parts.is_plain_norm(module):
        return module(input)
    norm = cast(nn.LayerNorm, module)
    return layer_norm(input, norm.normalized_shape, weights["weight"], weights["bias"], norm.eps)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    padding: Tensor | None,
    causal: bool,
    attention: MultiheadAttention,
    residual: Tensor,
) -> Tensor:
    """Attention of ``query`` ``(B, H, S, size)`` and the output projection."""
    attended = None
    if padding is None and not causal:
        attended = _ops.plain_attention(query, keys, values, False, False, None)
    if attended is None:
        attended = functional.attention(
            query, keys, values, causal=causal, bottom_right=causal, key_padding_mask=padding
        )
    if query.size(2) == 1:
        merged = attended.view(residual.shape)
    else:
        merged = attention._merge_heads(attended, True)
    out: dict[str, Any] = attention._modules["out_proj"]._parameters  # type: ignore[union-attr]
    return linear(merged, out["weight"], out["bias"], None, residual)


def run_parts(
    layer: TransformerDecoderLayer,
    tgt: Tensor,
    memory: Tensor | None,
    tgt_mask: Tensor | None,
    memory_mask: Tensor | None,
    tgt_key_padding_mask: Tensor | None,
    memory_key_padding_mask: Tensor | None,
    memory_is_causal: bool,
    cache: DecoderLayerCache,
) -> Tensor:
    """The layer, module by module: parts with hooks or of other kinds want to be called.

    Keys and values of the target are cached; cross-attention is computed anew.
    """
    attention = layer.self_attn
    if not isinstance(attention, MultiheadAttention):
        raise TypeError(
            "cache must be None in a layer whose self_attn takes none, "
            f"got one with {type(attention).__name__}"
        )

    def attend(x: Tensor) -> Tensor:
        output, _ = attention(
            x,
            x,
            x,
            tgt_key_padding_mask,
            False,
            tgt_mask,
            cache=cache.self_attention,
        )
        return layer.dropout1(output)

    x, first = tgt, layer.norm_first
    x = x + attend(layer.norm1(x)) if first else layer.norm1(x + attend(x))
    if layer.cross_attention:
        if memory is None:
            raise ValueError("memory must be given to a layer whose parts are called one by one")
        terms = (memory, memory_mask, memory_key_padding_mask, memory_is_causal)
        if first:
            x = x + layer._mha_block(layer.norm2(x), *terms)
        else:
            x = layer.norm2(x + layer._mha_block(x, *terms))
    if first:
        return x + layer._ff_block(layer.norm3(x))
    return layer.norm3(x + layer._ff_block(x))
