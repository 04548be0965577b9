"""Argument checks of the norms: torch's exception classes, argument, expected and actual value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastseq._checks.scalars import number


def tensor(name: str, value: Any) -> None:
    """The argument is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def floating(input: Tensor) -> None:
    """Integers have no norm."""
    if not input.is_floating_point():
        raise NotImplementedError(f"input must be floating point, got {input.dtype}")


def normalized_shape(value: Any, input: Tensor, too_long: type[Exception]) -> int:
    """How many of ``input``'s last dimensions ``value`` names; it must be their sizes."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"normalized_shape must be a sequence of ints, got {value!r}")
    for size in value:
        if isinstance(size, int):  # not hasattr: see scalars.number
            continue
        if isinstance(size, (float, str)) or not hasattr(size, "__index__"):
            raise TypeError(f"normalized_shape must be a sequence of ints, got {value!r}")
    dims = len(value)
    if dims == 0:
        raise RuntimeError("normalized_shape must have at least one dimension, got ()")
    shape = tuple(input.shape)
    if dims > len(shape):
        raise too_long(
            f"input must have at least the {dims} dimensions of normalized_shape "
            f"{tuple(value)}, got shape {shape}"
        )
    if shape[len(shape) - dims :] != tuple(value):
        raise RuntimeError(
            f"input must end in the sizes of normalized_shape: expected (*, "
            f"{', '.join(map(str, value))}), got {shape}"
        )
    return dims


def affine(name: str, parameter: Any, input: Tensor, dims: int, same_dtype: bool) -> None:
    """Weight or bias: ``normalized_shape``, with ``same_dtype`` in the dtype of ``input``."""
    if parameter is None:
        return
    tensor(name, parameter)
    expected = tuple(input.shape[input.dim() - dims :])
    if tuple(parameter.shape) != expected:
        raise RuntimeError(
            f"{name} must have the shape of normalized_shape: expected {expected}, "
            f"got {tuple(parameter.shape)}"
        )
    if parameter.device != input.device:
        raise RuntimeError(
            f"{name} must be on the device of input: expected {input.device}, "
            f"got {parameter.device}"
        )
    if same_dtype and parameter.dtype is not input.dtype:
        raise RuntimeError(
            f"{name} must have the dtype of input: expected {input.dtype}, got {parameter.dtype}"
        )


def residual(value: Any, input: Tensor) -> Tensor:
    """The residual as a view of the shape of ``input``."""
    tensor("residual", value)
    if value.dtype is not input.dtype:
        raise RuntimeError(
            f"residual must have the dtype of input: expected {input.dtype}, got {value.dtype}"
        )
    if value.device != input.device:
        raise RuntimeError(
            f"residual must be on the device of input: expected {input.device}, got {value.device}"
        )
    if value.shape == input.shape:
        return value
    try:
        return value.expand(input.shape)
    except RuntimeError:
        raise RuntimeError(
            f"residual must be broadcastable to the shape of input: expected "
            f"{tuple(input.shape)}, got {tuple(value.shape)}"
        ) from None


def probability(value: Any) -> float:
    """A dropout probability; torch raises ``ValueError`` for one that is none."""
    p = number("dropout_p", value)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p must be a probability between 0 and 1, got {value}")
    return p
