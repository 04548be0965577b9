"""Argument checks of the linear layer.

As in :func:`torch.nn.functional.linear`, tensors that do not fit together raise
:class:`RuntimeError` and arguments of a wrong type :class:`TypeError`; a dropout probability out of
range raises :class:`ValueError` as in :func:`torch.nn.functional.dropout`, an unknown activation
too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastseq._linear import ACTIVATIONS


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def activation(name: Any) -> int:
    """The number of an activation."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"activation must be a string or None, got {type(name).__name__}")
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def probability(dropout_p: Any) -> float:
    """A dropout probability."""
    if not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be a probability between 0 and 1, got {dropout_p}")
    return float(dropout_p)


def tensors(input: Any, weight: Any, bias: Any, residual: Any) -> None:
    """Tensors, or None where that is allowed."""
    for name, value in (("input", input), ("weight", weight)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    for name, value in (("bias", bias), ("residual", residual)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {type(value).__name__}")


def shapes(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """``(..., K)``, ``(O, K)`` and ``(O,)``."""
    if weight.dim() != 2:
        raise RuntimeError(f"weight must be 2-D, got {weight.dim()}-D: shape {_shape(weight)}")
    if input.dim() == 0:
        raise RuntimeError("input must have at least one dimension, got none")
    outputs, features = weight.shape
    if input.shape[-1] != features:
        raise RuntimeError(
            f"input must have the features of weight: expected {features}, "
            f"got {input.shape[-1]}: input {_shape(input)}, weight {_shape(weight)}"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != outputs):
        raise RuntimeError(
            f"bias must have one entry per row of weight: expected shape ({outputs},), "
            f"got {_shape(bias)}"
        )


def same_kind(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """One dtype and one device."""
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is None:
            continue
        if tensor.dtype is not input.dtype:
            raise RuntimeError(
                f"{name} must have the dtype of input: expected {input.dtype}, got {tensor.dtype}"
            )
        if tensor.device != input.device:
            raise RuntimeError(
                f"{name} must be on the device of input: expected {input.device}, "
                f"got {tensor.device}"
            )


def residual_like(residual: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The residual as a view in the shape of the output."""
    if residual.shape == shape:
        return residual
    sizes = residual.shape[::-1]
    # Not left to expand(): its message names no argument.
    fits = len(sizes) <= len(shape) and all(
        size in (1, whole) for size, whole in zip(sizes, shape[::-1], strict=False)
    )
    if not fits:
        raise RuntimeError(
            f"residual must broadcast to the output: expected {tuple(shape)}, "
            f"got {_shape(residual)}"
        )
    return residual.expand(shape)
