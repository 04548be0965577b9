"""Modules and functions of ``torch.nn`` in terms of ``Operators``, in evaluation mode."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseq.bench.attention import BuiltAttention
from fastseq.bench.peers.operators import Operators, Value
from fastseq.bench.transformer import EPS, BuiltTransformer

_ACTIVATION_NAMES: dict[Any, str] = {F.relu: "relu", F.gelu: "gelu", F.silu: "silu"}


def has_choice(built: BuiltAttention | BuiltTransformer) -> bool:
    """Whether a case has attention that may be one operator or several."""
    if isinstance(built, BuiltAttention):
        return not built.case.options.need_weights
    return isinstance(built.callees["torch"], nn.Module)


def build(operators: Operators, built: BuiltAttention | BuiltTransformer) -> dict[str, Value]:
    """Write a case of a linear layer, a norm or a module; its results by name.

    Weights become constants: these libraries lay them out once, when they load a model.
    """
    if isinstance(built, BuiltAttention):
        x = operators.input("input", built.leaves["input"])
        module: Any = built.modules["torch"]
        weighted = built.case.options.need_weights
        output, weights = multihead(operators, module, x, x, weights=weighted)
        return {"output": output} | ({"weights": weights} if weighted else {})
    if isinstance(built.callees["torch"], nn.Module):
        return {"output": _module(operators, built)}
    leaves, case = built.leaves, built.case
    x = operators.input("input", leaves["input"])
    residual = operators.input("residual", leaves["residual"]) if "residual" in leaves else None
    if case.layer == "layer_norm":
        parameters = (leaves["weight"], leaves["bias"])
        return {"output": operators.layer_norm(x, residual, *parameters, EPS)}
    if case.layer == "rms_norm":
        return {"output": operators.rms_norm(x, residual, leaves["weight"], EPS)}
    y = operators.linear(x, leaves["weight"], leaves["bias"], case.options.activation)
    return {"output": y if residual is None else operators.add(y, residual)}


def _module(operators: Operators, built: BuiltTransformer) -> Value:
    values = [operators.input(name, leaf) for name, leaf in built.leaves.items()]
    module: Any = built.callees["torch"]
    mask = None
    if "src_key_padding_mask" in built.masks:
        mask = operators.input("mask", padding_bias(built.masks["src_key_padding_mask"], built))
    if built.case.layer == "encoder":
        return encoder_layer(operators, module, values[0], mask)
    if built.case.layer == "decoder":
        return decoder_layer(operators, module, values[0], values[1])
    memory, target = values
    for layer in module.encoder.layers:
        memory = encoder_layer(operators, layer, memory, mask)
    memory = _layer_norm(operators, module.encoder.norm, memory, None)
    for layer in module.decoder.layers:
        target = decoder_layer(operators, layer, target, memory)
    return _layer_norm(operators, module.decoder.norm, target, None)


def padding_bias(padding: Tensor, built: BuiltTransformer) -> Tensor:
    """What to add to scores (B, 1, S, S) so that padded keys are ignored."""
    rows = built.case.S
    bias = torch.zeros(padding.shape, dtype=getattr(torch, built.case.dtype))
    bias.masked_fill_(padding, float("-inf"))
    return bias[:, None, None, :].expand(-1, 1, rows, -1).contiguous()


def multihead(
    operators: Operators,
    module: nn.MultiheadAttention,
    x: Value,
    memory: Value,
    *,
    mask: Value | None = None,
    causal: bool = False,
    weights: bool = False,
) -> tuple[Value, Value | None]:
    """``torch.nn.MultiheadAttention`` of x to memory, both (B, S, E)."""
    matrices = module.in_proj_weight.detach().chunk(3)
    biases = module.in_proj_bias.detach().chunk(3)
    query, key, value = (
        operators.linear(source, matrix, bias)
        for source, matrix, bias in zip((x, memory, memory), matrices, biases, strict=True)
    )
    heads, averages = operators.attention(
        query, key, value, module.num_heads, mask=mask, causal=causal, weights=weights
    )
    out = module.out_proj
    return operators.linear(heads, out.weight.detach(), out.bias.detach()), averages


def _layer_norm(
    operators: Operators, module: nn.LayerNorm, x: Value, residual: Value | None
) -> Value:
    weight, bias = module.weight.detach(), module.bias.detach()
    return operators.layer_norm(x, residual, weight, bias, module.eps)


def _feed_forward(operators: Operators, layer: Any, x: Value) -> Value:
    name = _ACTIVATION_NAMES[layer.activation]
    first, second = layer.linear1, layer.linear2
    hidden = operators.linear(x, first.weight.detach(), first.bias.detach(), name)
    return operators.linear(hidden, second.weight.detach(), second.bias.detach())


def encoder_layer(operators: Operators, layer: Any, x: Value, mask: Value | None) -> Value:
    """``torch.nn.TransformerEncoderLayer``, post-norm."""
    attended, _ = multihead(operators, layer.self_attn, x, x, mask=mask)
    x = _layer_norm(operators, layer.norm1, attended, x)
    return _layer_norm(operators, layer.norm2, _feed_forward(operators, layer, x), x)


def decoder_layer(operators: Operators, layer: Any, x: Value, memory: Value) -> Value:
    """``torch.nn.TransformerDecoderLayer``, post-norm, with the causal mask."""
    attended, _ = multihead(operators, layer.self_attn, x, x, causal=True)
    x = _layer_norm(operators, layer.norm1, attended, x)
    attended, _ = multihead(operators, layer.multihead_attn, x, memory)
    x = _layer_norm(operators, layer.norm2, attended, x)
    return _layer_norm(operators, layer.norm3, _feed_forward(operators, layer, x), x)
