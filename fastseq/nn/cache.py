"""Keys and values of past positions, for decoding one or a few positions at a time."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["KeyValueCache"]


class KeyValueCache:
    """What one attention layer remembers of the positions it has seen.

    Storage is allocated ahead and doubles when it is full, so that a step of decoding copies only
    its own keys and values. A layer needs a cache of its own, and a cache is for inference: what is
    appended must not require gradients.

    Args:
        capacity: positions to allocate at the first ``append``; more are added when needed.

    Raises:
        ValueError: ``capacity`` is negative.

    Example:
        >>> cache = fastseq.nn.KeyValueCache(capacity=prompt.size(1) + 100)
        >>> with torch.no_grad():
        ...     y, _ = mha(prompt, prompt, prompt, need_weights=False, cache=cache)
        ...     y, _ = mha(token, token, token, need_weights=False, cache=cache)
    """

    def __init__(self, capacity: int = 0) -> None:
        if capacity < 0:
            raise ValueError(f"capacity must not be negative, got {capacity}")
        self._initial_capacity = capacity
        self._length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def __len__(self) -> int:
        return self._length

    @property
    def length(self) -> int:
        """Positions held."""
        return self._length

    @property
    def capacity(self) -> int:
        """Positions there is memory for; before the first ``append``, that will be allocated."""
        return self._initial_capacity if self._keys is None else self._keys.size(2)

    @property
    def keys(self) -> Tensor | None:
        """``(B, H, length, E)``, a view; ``None`` before the first ``append``."""
        return None if self._keys is None else self._keys[:, :, : self._length]

    @property
    def values(self) -> Tensor | None:
        """``(B, H, length, Ev)``, a view; ``None`` before the first ``append``."""
        return None if self._values is None else self._values[:, :, : self._length]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new positions.

        Args:
            key: ``(B, H, S, E)``, any strides; copied.
            value: ``(B, H, S, Ev)``.

        Returns:
            All keys ``(B, H, length, E)`` and values ``(B, H, length, Ev)``: views of the cache,
            valid until the next change to it.

        Raises:
            ValueError: not 4-D, or another batch, head count or head size than before.
            RuntimeError: gradients are enabled and asked for, or another dtype or device than
                before.
        """
        self._check(key, value)
        start, end = self._length, self._length + key.size(2)
        self._reserve(key, value, end)
        assert self._keys is not None
        assert self._values is not None
        self._keys[:, :, start:end] = key.detach()
        self._values[:, :, start:end] = value.detach()
        self._length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def _append_next(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`append` for a layer of which it was checked that nothing requires gradients."""
        keys, values = self._keys, self._values
        steps = key.size(2)
        start, end = self._length, self._length + steps
        if (
            keys is None
            or values is None
            or end > keys.size(2)
            or key.size(0) != keys.size(0)
            or key.dtype is not keys.dtype
            or self._frozen(keys)
        ):
            return self.append(key, value)
        keys, values = keys.narrow(2, 0, end), values.narrow(2, 0, end)
        keys.narrow(2, start, steps).copy_(key)
        values.narrow(2, start, steps).copy_(value)
        self._length = end
        return keys, values

    def reset(self) -> None:
        """Forget all positions; the memory is kept for the next sequence of the same shape."""
        self._length = 0

    def crop(self, length: int) -> None:
        """Forget the positions from ``length`` on.

        Raises:
            ValueError: ``length`` is negative or more than is held.
        """
        if not 0 <= length <= self._length:
            raise ValueError(f"length must lie between 0 and {self._length}, got {length}")
        self._length = length

    def reorder(self, indices: Tensor) -> None:
        """Give batch entry ``i`` what entry ``indices[i]`` holds, for beam search.

        Args:
            indices: ``(B',)`` integers; ``B'`` becomes the batch size.

        Raises:
            IndexError, RuntimeError: an index is out of range.
        """
        if self._keys is None or self._values is None:
            return
        # Only what is in use is copied, and nothing where every entry stays where it is.
        if torch.equal(indices, torch.arange(self._keys.size(0)).to(indices)):
            return
        keys = self._keys[:, :, : self._length].index_select(0, indices)
        values = self._values[:, :, : self._length].index_select(0, indices)
        if indices.numel() != self._keys.size(0) or self._frozen(self._keys):
            self._allocate(keys, values, indices.numel(), self.capacity)
        self._keys[:, :, : self._length] = keys
        self._values[:, :, : self._length] = values

    @staticmethod
    def _frozen(held: Tensor) -> bool:
        """Whether ``held`` was made in inference mode and must not be written to outside of it."""
        return held.is_inference() and not torch.is_inference_mode_enabled()

    def _reserve(self, key: Tensor, value: Tensor, length: int) -> None:
        """Memory for ``length`` positions of tensors like these."""
        old_keys, old_values = self._keys, self._values
        if old_keys is not None and length <= old_keys.size(2) and not self._frozen(old_keys):
            return
        # Doubling makes the copies of all growth together cost as much as one last copy.
        full = old_keys is not None and length > self.capacity
        capacity = max(length, 2 * self.capacity if full else self.capacity)
        self._allocate(key, value, key.size(0), capacity)
        if old_keys is not None and old_values is not None:
            assert self._keys is not None
            assert self._values is not None
            self._keys[:, :, : self._length] = old_keys[:, :, : self._length]
            self._values[:, :, : self._length] = old_values[:, :, : self._length]

    def _allocate(self, key: Tensor, value: Tensor, batch: int, capacity: int) -> None:
        self._keys = key.new_empty((batch, key.size(1), capacity, key.size(3)))
        self._values = value.new_empty((batch, value.size(1), capacity, value.size(3)))

    def _check(self, key: Tensor, value: Tensor) -> None:
        if key.dim() != 4 or value.dim() != 4:
            raise ValueError(
                "key and value must be 4-D (B, H, S, E), "
                f"got shapes {tuple(key.shape)} and {tuple(value.shape)}"
            )
        if key.shape[:3] != value.shape[:3]:
            raise ValueError(
                "key and value must have the same batch, heads and positions: "
                f"got {tuple(key.shape[:3])} and {tuple(value.shape[:3])}"
            )
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise RuntimeError(
                "a cache is for inference: key and value must not require gradients; "
                "call the layer under torch.no_grad() or torch.inference_mode()"
            )
        for name, new, held in (("key", key, self._keys), ("value", value, self._values)):
            if held is None:
                continue
            if (*new.shape[:2], new.size(3)) != (*held.shape[:2], held.size(3)):
                expected = (*held.shape[:2], new.size(2), held.size(3))
                raise ValueError(
                    f"{name} must have the shape of what the cache holds: expected {expected}, "
                    f"got {tuple(new.shape)}"
                )
            if new.dtype != held.dtype or new.device != held.device:
                raise RuntimeError(
                    f"{name} must have the dtype and device of what the cache holds: expected "
                    f"{held.dtype} on {held.device}, got {new.dtype} on {new.device}"
                )
