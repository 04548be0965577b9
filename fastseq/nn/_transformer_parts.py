"""What the Transformer layers share: which of them may run fused, and their feed-forward half."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastseq.functional.linear import linear
from fastseq.nn.attention import MultiheadAttention
from fastseq.nn.linear import Linear
from fastseq.nn.norm import LayerNorm

__all__ = [
    "Packing",
    "adopt",
    "dropout_probability",
    "feed_forward",
    "fits_plan",
    "fused_activation",
    "is_hooked",
    "is_plain_norm",
    "is_whole",
    "scriptable_twin",
]

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.Linear: Linear,
    nn.LayerNorm: LayerNorm,
}
_PARTS = ("self_attn", "multihead_attn", "linear1", "linear2", "norm1", "norm2", "norm3")
_LINEAR = (Linear, nn.Linear)
_DROPOUT = (nn.Dropout,)
_ATTENTION = (MultiheadAttention,)


class Packing(NamedTuple):
    """Where the rows of a padded batch lie that are no padding.

    Attributes:
        rows: their positions among all rows, sequence after sequence.
        starts: ``(B + 1,)`` int64, the first of each sequence among ``rows``.
    """

    rows: Tensor
    starts: Tensor


def adopt(layer: nn.Module) -> None:
    """Make the parts of a layer, which torch's constructor has built, fastseq's."""
    for name in _PARTS:
        part = layer._modules.get(name)
        if part is not None:
            part.__class__ = _OURS[type(part)]


def is_hooked(module: nn.Module) -> bool:
    """Whether someone wants to be told of a call of ``module``."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_whole(layer: nn.Module, attentions: Sequence[str], dropouts: Sequence[str]) -> bool:
    """Whether all parts are plain ones, so that nobody sees that they are not called one by one.

    A part of another type (a low-rank adapter, say), one with hooks and one whose ``forward`` was
    replaced want to be called. The norms always are.
    """
    if torch_module._has_any_global_hook():
        return False
    parts = layer._modules
    for names, kinds in ((attentions, _ATTENTION), (("linear1", "linear2"), _LINEAR)):
        for name in names:
            part = parts.get(name)
            if part is None or type(part) not in kinds or is_hooked(part):
                return False
            if "forward" in part.__dict__:
                return False
    for name in dropouts:
        part = parts.get(name)
        if part is None or type(part) not in _DROPOUT or is_hooked(part):
            return False
        if "forward" in part.__dict__:
            return False
    return True


def is_plain_norm(module: nn.Module) -> bool:
    """Whether all that a call of ``module`` does is a layer norm."""
    return (
        type(module) in (LayerNorm, nn.LayerNorm)
        and not is_hooked(module)
        and "forward" not in module.__dict__
    )


def fits_plan(attention: Any, other: Any) -> bool:
    """Whether what was checked for one attention module holds for the other."""
    if attention is other:
        return True
    options = ("embed_dim", "num_heads", "num_kv_heads", "kdim", "vdim", "batch_first")
    if any(getattr(attention, name) != getattr(other, name) for name in options):
        return False
    return all(
        (attention._parameters.get(name) is None) == (other._parameters.get(name) is None)
        for name in ("in_proj_weight", "bias_k")
    )


def dropout_probability(module: nn.Dropout) -> float:
    """What the module would apply now."""
    return module.p if module.training else 0.0


def fused_activation(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The name by which :func:`fastseq.functional.linear` knows an activation, if it does."""
    if activation is F.relu or activation is torch.relu:
        return "relu"
    if activation is F.gelu:
        return "gelu"
    if activation is F.silu:
        return "silu"
    if not isinstance(activation, nn.Module) or is_hooked(activation):
        return None
    kind = type(activation)
    if kind is nn.ReLU:
        return "relu"
    if kind is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    return "silu" if kind is nn.SiLU else None


def feed_forward(layer: Any, input: Tensor, residual: Tensor, dropout_p: float) -> Tensor:
    """``residual + dropout(linear2(dropout(activation(linear1(input)))))``."""
    first, second = layer.linear1, layer.linear2
    inner = dropout_probability(layer.dropout)
    activation = fused_activation(layer.activation)
    if activation is None:
        hidden = layer.activation(linear(input, first.weight, first.bias))
        hidden = F.dropout(hidden, inner) if inner else hidden
    else:
        hidden = linear(input, first.weight, first.bias, activation, dropout_p=inner)
    return linear(hidden, second.weight, second.bias, None, residual, dropout_p=dropout_p)


def scriptable_twin(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """torch.jit.script compiles source, not kernels: torch's module with the same contents."""
    twin = kind.__new__(kind)
    twin.__dict__.update(module.__dict__)
    return twin
