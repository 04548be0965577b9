"""What generation asks of a model, and layer stacks dressed up to answer it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor

import fastseq.nn as fast_nn

__all__ = ["Cache", "Embed", "Model", "Project", "as_model", "evaluating"]

Embed = Callable[[Tensor, int], Tensor]
Project = Callable[[Tensor], Tensor]


class Cache(Protocol):
    """What a model remembers between steps."""

    def reorder(self, indices: Tensor) -> None:
        """Give batch entry ``i`` what entry ``indices[i]`` holds; the batch may change its size."""


class Model(Protocol):
    """A model that tokens can be generated with. Everything has the batch in front.

    Two more methods are optional::

        def encode(self, source, source_key_padding_mask): ...  # memory, where source= is given
        def new_cache(self, capacity): ...  # an empty Cache; capacity: positions to come, a guess
    """

    def decode(
        self,
        tokens: Tensor,
        memory: Tensor | None,
        memory_key_padding_mask: Tensor | None,
        cache: Any,
    ) -> Tensor:
        """Logits ``(B, V)`` of the token after ``tokens``.

        Args:
            tokens: ``(B, S)``: with a cache those it has not seen yet, otherwise all.
            memory: ``(B, ...)``, what ``encode`` returned or the caller gave, or ``None``.
            memory_key_padding_mask: ``(B, K)`` bool, True hides a position of memory, or ``None``.
            cache: what ``new_cache`` returned, to be updated, or ``None``.
        """


def as_model(
    model: Any, embed: Embed | None, project: Project | None, source_embed: Embed | None
) -> Any:
    """``model`` itself, or a bare stack of layers with what turns tokens into logits.

    Raises:
        TypeError: ``model`` is neither, or ``embed`` or ``project`` is missing or too much.
    """
    callables = {"embed": embed, "project": project, "source_embed": source_embed}
    for name, value in callables.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name} must be callable, got {type(value).__name__}")
    kind = type(model).__name__
    # Those of fastseq.nn derive from these.
    stacks = (torch.nn.Transformer, torch.nn.TransformerDecoder, torch.nn.TransformerEncoder)
    if isinstance(model, stacks):
        if embed is None or project is None:
            missing = "embed" if embed is None else "project"
            raise TypeError(
                f"{missing} must be given for a bare {kind}: embed(tokens, start) makes vectors "
                "of tokens, project(vectors) logits of vectors"
            )
        if isinstance(model, torch.nn.Transformer):
            return _EncoderDecoder(model, embed, project, source_embed or embed)
        if source_embed is not None:
            raise TypeError(f"source_embed must be None for a {kind}, which encodes no source")
        if isinstance(model, torch.nn.TransformerDecoder):
            return _Decoder(model, embed, project)
        return _Encoder(model, embed, project)
    if not callable(getattr(model, "decode", None)):
        raise TypeError(
            "model must be a Transformer, TransformerDecoder or TransformerEncoder of torch.nn or "
            f"fastseq.nn, or have a method decode, got {kind}"
        )
    for name, value in callables.items():
        if value is not None:
            raise TypeError(f"{name} must be None for a model with a method decode")
    return model


@contextmanager
def evaluating(*parts: Any) -> Iterator[None]:
    """The modules among ``parts``, and those that functions among them use, in eval mode."""
    modules = [module for part in parts for module in _modules_of(part)]
    training = [module for owner in modules for module in owner.modules() if module.training]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        # Each by itself: a frozen part of a model may have been in eval mode before.
        for module in training:
            module.training = True


def _modules_of(part: Any) -> list[torch.nn.Module]:
    """A module itself, that whose method it is, or those that a function refers to by name."""
    owner = getattr(part, "__self__", part)
    found = [owner]
    if inspect.isfunction(part):
        with suppress(ValueError):  # a name that has no value yet
            names = inspect.getclosurevars(part)
            found = [*names.nonlocals.values(), *names.globals.values()]
    return [value for value in found if isinstance(value, torch.nn.Module)]


class _Stack:
    """Calls a stack of layers in the layout its layers were built for."""

    def __init__(self, layers: Any, embed: Embed, project: Project) -> None:
        self.embed = embed
        self.project = project
        self.batch_first = bool(layers[0].self_attn.batch_first)
        self._mask: Tensor | None = None

    def _turned(self, tensor: Tensor) -> Tensor:
        """Batch in front to the layout of the layers, or back."""
        return tensor if self.batch_first else tensor.transpose(0, 1)

    def _causal_mask(self, vectors: Tensor) -> Tensor:
        length = vectors.size(1 if self.batch_first else 0)
        if self._mask is None or self._mask.size(0) < length:
            # Room to grow, so that a mask is not built anew for every token.
            self._mask = torch.nn.Transformer.generate_square_subsequent_mask(
                2 * length, device=vectors.device, dtype=vectors.dtype
            )
        return self._mask[:length, :length]

    def _logits(self, vectors: Tensor) -> Tensor:
        return self.project(vectors[:, -1] if self.batch_first else vectors[-1])


class _Encoder(_Stack):
    """A stack without cross-attention under a causal mask: how torch builds a language model."""

    def __init__(self, stack: Any, embed: Embed, project: Project) -> None:
        super().__init__(stack.layers, embed, project)
        self.stack = stack

    def decode(
        self,
        tokens: Tensor,
        memory: Tensor | None,
        memory_key_padding_mask: Tensor | None,
        cache: Any,
    ) -> Tensor:
        if memory is not None:
            raise ValueError(
                f"memory must be None for a {type(self.stack).__name__}, which cannot attend to it"
            )
        vectors = self.embed(self._turned(tokens), 0)
        mask = self._causal_mask(vectors)
        return self._logits(self.stack(vectors, mask=mask, is_causal=True))


class _Decoder(_Stack):
    def __init__(self, stack: Any, embed: Embed, project: Project) -> None:
        super().__init__(stack.layers, embed, project)
        self.stack = stack
        if isinstance(stack, fast_nn.TransformerDecoder) and all(
            isinstance(layer, fast_nn.TransformerDecoderLayer) for layer in stack.layers
        ):
            self.new_cache = self._new_cache
        # Only layers of fastseq.nn may be without.
        self.needs_memory = any(getattr(one, "cross_attention", True) for one in stack.layers)

    def _new_cache(self, capacity: int) -> fast_nn.DecoderCache:
        return fast_nn.DecoderCache(len(self.stack.layers), capacity)

    def decode(
        self,
        tokens: Tensor,
        memory: Tensor | None,
        memory_key_padding_mask: Tensor | None,
        cache: Any,
    ) -> Tensor:
        masked = {"memory_key_padding_mask": memory_key_padding_mask}
        if memory is not None:
            memory = self._turned(memory)
        if cache is not None:
            vectors = self.embed(self._turned(tokens), cache.length)
            return self._logits(self.stack(vectors, memory, **masked, cache=cache))
        vectors = self.embed(self._turned(tokens), 0)
        mask = self._causal_mask(vectors)
        return self._logits(
            self.stack(vectors, memory, tgt_mask=mask, tgt_is_causal=True, **masked)
        )


class _EncoderDecoder(_Decoder):
    def __init__(self, stack: Any, embed: Embed, project: Project, source_embed: Embed) -> None:
        super().__init__(stack.decoder, embed, project)
        self.encoder = stack.encoder
        self.source_embed = source_embed

    def encode(self, source: Tensor, source_key_padding_mask: Tensor | None) -> Tensor:
        source = self._turned(source)
        vectors = source if source.is_floating_point() else self.source_embed(source, 0)
        memory = self.encoder(vectors, src_key_padding_mask=source_key_padding_mask)
        return self._turned(memory)
