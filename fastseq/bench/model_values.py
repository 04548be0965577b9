"""Tensors inside whatever models take and return: tuples, dicts, dataclasses, packed sequences."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = ["describe", "floating", "map_tensors", "signature", "tensors_of"]


def tensors_of(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in ``value`` with the path to it, such as ``output.logits`` or ``output[0]``."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, PackedSequence):
        yield f"{name}.data", value.data
    elif isinstance(value, Mapping):
        for key, item in value.items():
            path = f"{name}.{key}" if str(key).isidentifier() else f"{name}[{key!r}]"
            yield from tensors_of(item, path)
    elif isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", None)
        for index, item in enumerate(value):
            path = f"{name}.{names[index]}" if names else f"{name}[{index}]"
            yield from tensors_of(item, path)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for one in dataclasses.fields(value):
            yield from tensors_of(getattr(value, one.name, None), f"{name}.{one.name}")


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor changed; a packed sequence keeps its batch sizes."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, PackedSequence):
        return value._replace(data=change(value.data))
    if isinstance(value, Mapping):
        changed: Any = copy.copy(value)
        for key, item in value.items():
            changed[key] = map_tensors(item, change)
        return changed
    if isinstance(value, (tuple, list)):
        items = [map_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = copy.copy(value)
        for one in dataclasses.fields(value):
            if hasattr(value, one.name):
                item = map_tensors(getattr(value, one.name), change)
                object.__setattr__(changed, one.name, item)
        return changed
    return value


def floating(value: Any, name: str = "") -> dict[str, Tensor]:
    """The floating-point tensors of ``value`` by path, those without elements left out."""
    return {
        path: tensor
        for path, tensor in tensors_of(value, name)
        if tensor.is_floating_point() and not tensor.is_nested and tensor.numel()
    }


def signature(value: Any) -> tuple[Any, ...]:
    """What decides about a layer's time: shapes, dtypes, layouts, plain options."""
    if isinstance(value, Tensor):
        shape = () if value.is_nested else tuple(value.shape)
        return ("tensor", shape, value.dtype, value.requires_grad)
    if isinstance(value, PackedSequence):
        return ("packed", tuple(value.data.shape), tuple(value.batch_sizes.tolist()))
    if isinstance(value, Mapping):
        return ("mapping", *((str(key), signature(item)) for key, item in value.items()))
    if isinstance(value, (tuple, list)):
        return ("sequence", *map(signature, value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return ("plain", value)
    return ("object", type(value).__qualname__)


def describe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """The shapes that a layer was called with, as ``(100, 16, 256)`` or ``(…), mask (…)``."""
    parts: list[str] = []
    for value in args:
        text = _shapes(value)
        if text and (not parts or parts[-1] != text):
            parts.append(text)
    for name, value in kwargs.items():
        text = _shapes(value)
        if text:
            parts.append(f"{name} {text}")
    return ", ".join(parts)


def _shapes(value: Any) -> str:
    if isinstance(value, PackedSequence):
        return f"packed {tuple(value.data.shape)}"
    return " ".join(
        "nested" if tensor.is_nested else str(tuple(tensor.shape))
        for _, tensor in tensors_of(value)
    )
