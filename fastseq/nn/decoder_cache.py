"""What a Transformer decoder remembers between the steps of generation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastseq.nn.cache import KeyValueCache

__all__ = ["DecoderCache", "DecoderLayerCache"]


class DecoderLayerCache:
    """The keys and values of one decoder layer, for inference.

    Args:
        capacity: positions to allocate for self-attention, as in :class:`KeyValueCache`.

    Attributes:
        self_attention: of the target's positions so far.
        memory_keys: ``(B, H, S, E)``, the projected memory; ``None`` before the first call. It is
            projected once: later calls do not look at ``memory`` and may pass ``None``.
        memory_values: likewise.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.self_attention = KeyValueCache(capacity)
        self.memory_keys: Tensor | None = None
        self.memory_values: Tensor | None = None
        # Which entry of the batch the memory of each entry came from.
        self._origin: Tensor | None = None

    @property
    def length(self) -> int:
        """Positions of the target held."""
        return self.self_attention.length

    def set_memory(self, keys: Tensor, values: Tensor) -> None:
        """Hold the projected keys and values ``(B, H, S, E)`` of the memory."""
        self.memory_keys, self.memory_values = keys, values
        self._origin = torch.arange(keys.size(0), device=keys.device)

    def reset(self) -> None:
        """Forget everything, the memory too; what was allocated for positions is kept."""
        self.self_attention.reset()
        self.memory_keys = self.memory_values = self._origin = None

    def crop(self, length: int) -> None:
        """Forget the positions from ``length`` on.

        Raises:
            ValueError: ``length`` is negative or more than is held.
        """
        self.self_attention.crop(length)

    def reorder(self, indices: Tensor) -> None:
        """Give batch entry ``i`` what entry ``indices[i]`` holds, for beam search.

        The memory is copied only if some entry gets that of another origin: beams of one sentence
        share theirs.

        Args:
            indices: ``(B',)`` integers; ``B'`` becomes the batch size.

        Raises:
            IndexError, RuntimeError: an index is out of range.
        """
        self.self_attention.reorder(indices)
        if self.memory_keys is None or self.memory_values is None or self._origin is None:
            return
        origin = self._origin.index_select(0, indices)
        if not torch.equal(origin, self._origin):
            self.memory_keys = self.memory_keys.index_select(0, indices)
            self.memory_values = self.memory_values.index_select(0, indices)
            self._origin = origin


class DecoderCache:
    """One :class:`DecoderLayerCache` per layer of a :class:`fastseq.nn.TransformerDecoder`.

    Args:
        num_layers: layers of the decoder.
        capacity: positions to allocate at the first call; the memory doubles when it is full.

    Raises:
        ValueError: ``num_layers`` or ``capacity`` is negative.

    Example:
        >>> cache = fastseq.nn.DecoderCache(decoder.num_layers, capacity=prompt.size(1) + 100)
        >>> with torch.no_grad():
        ...     y = decoder(prompt, memory, cache=cache)  # all positions of the prompt, causal
        ...     y = decoder(token, memory, cache=cache)  # one position more
    """

    def __init__(self, num_layers: int, capacity: int = 0) -> None:
        if num_layers < 0:
            raise ValueError(f"num_layers must not be negative, got {num_layers}")
        self.layers = tuple(DecoderLayerCache(capacity) for _ in range(num_layers))

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[DecoderLayerCache]:
        return iter(self.layers)

    def __getitem__(self, index: int) -> DecoderLayerCache:
        return self.layers[index]

    @property
    def length(self) -> int:
        """Positions of the target held."""
        return self.layers[0].length if self.layers else 0

    def reset(self) -> None:
        """Forget everything; what was allocated for positions is kept."""
        for layer in self.layers:
            layer.reset()

    def crop(self, length: int) -> None:
        """Forget the positions from ``length`` on.

        Raises:
            ValueError: ``length`` is negative or more than is held.
        """
        for layer in self.layers:
            layer.crop(length)

    def reorder(self, indices: Tensor) -> None:
        """Give batch entry ``i`` what entry ``indices[i]`` holds, for beam search.

        Args:
            indices: ``(B',)`` integers; ``B'`` becomes the batch size.

        Raises:
            IndexError, RuntimeError: an index is out of range.
        """
        for layer in self.layers:
            layer.reorder(indices)
