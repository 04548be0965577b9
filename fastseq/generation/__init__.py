"""Generation of tokens: greedy, by sampling or by beam search, with or without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastseq.generation.beam import beam_search
from fastseq.generation.models import Cache, Embed, Model, Project, as_model, evaluating
from fastseq.generation.search import Ends, Steps, extend
from fastseq.generation.strategies import Beam, Greedy, Sample, Strategy, check_integer

__all__ = ["Beam", "Cache", "Greedy", "Model", "Sample", "generate"]

_BY_NAME: dict[str, Strategy] = {"greedy": Greedy(), "sample": Sample(), "beam": Beam()}

# Positions allocated ahead beyond the prompt; a cache doubles when they are used up.
_CAPACITY_AHEAD = 1024


@overload
def generate(
    model: Any,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    strategy: str | Strategy = ...,
    eos: int | Sequence[int] | None = ...,
    pad: int | None = ...,
    prompt_lengths: Tensor | Sequence[int] | None = ...,
    source: Tensor | None = ...,
    memory: Tensor | None = ...,
    source_key_padding_mask: Tensor | None = ...,
    embed: Embed | None = ...,
    project: Project | None = ...,
    source_embed: Embed | None = ...,
    use_cache: bool | None = ...,
    generator: torch.Generator | None = ...,
    return_scores: Literal[False] = ...,
) -> Tensor: ...


@overload
def generate(
    model: Any,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    strategy: str | Strategy = ...,
    eos: int | Sequence[int] | None = ...,
    pad: int | None = ...,
    prompt_lengths: Tensor | Sequence[int] | None = ...,
    source: Tensor | None = ...,
    memory: Tensor | None = ...,
    source_key_padding_mask: Tensor | None = ...,
    embed: Embed | None = ...,
    project: Project | None = ...,
    source_embed: Embed | None = ...,
    use_cache: bool | None = ...,
    generator: torch.Generator | None = ...,
    return_scores: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def generate(
    model: Any,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    strategy: str | Strategy = "greedy",
    eos: int | Sequence[int] | None = None,
    pad: int | None = None,
    prompt_lengths: Tensor | Sequence[int] | None = None,
    source: Tensor | None = None,
    memory: Tensor | None = None,
    source_key_padding_mask: Tensor | None = None,
    embed: Embed | None = None,
    project: Project | None = None,
    source_embed: Embed | None = None,
    use_cache: bool | None = None,
    generator: torch.Generator | None = None,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Continue sequences of tokens.

    ``model`` is one of

    * a stack of layers of ``fastseq.nn`` or ``torch.nn``, together with ``embed`` and ``project``:
      a ``Transformer`` translates ``source``; a ``TransformerDecoder`` attends to ``memory``, or,
      of layers without cross-attention, continues the prompt alone; so does a
      ``TransformerEncoder``, under a causal mask. Positions are computed once and cached in
      decoders of ``fastseq.nn``, in others anew for every token;
    * any object with a method ``decode``, and ``encode`` and ``new_cache`` if it has these:
      :class:`fastseq.generation.Model` says what they take and return.

    Runs without gradients and with the modules in eval mode, which is undone at the end: those of
    the model, and those that ``embed``, ``project`` and ``source_embed`` are, are methods of, or as
    plain functions refer to by name. Every
    sequence of a batch stops for itself; a batch stops with its last one.

    Args:
        model: what gives the logits of the next token.
        prompt: ``(B, S)`` or ``(S)`` integers, at least one per sequence; for an encoder-decoder
            usually the token that begins every sentence.
        max_new_tokens: for each sequence.
        strategy: ``"greedy"``, ``"sample"``, ``"beam"``, or one of :class:`fastseq.Greedy`,
            :class:`fastseq.Sample` and :class:`fastseq.Beam` with their options.
        eos: the token, or tokens, that end a sequence. They are part of the result. Default: only
            ``max_new_tokens`` does.
        pad: what follows the end in a batch. Default: the (first) ``eos``, or 0.
        prompt_lengths: ``(B)``, how many tokens of each row of ``prompt`` count; the results
            continue directly after them. Default: all.
        source: ``(B, S')`` tokens to encode, or vectors ``(B, S', E)``.
        memory: ``(B, S', E)``, encoded already, in place of ``source``.
        source_key_padding_mask: ``(B, S')`` bool, True hides a position of source or memory.
        embed: ``embed(tokens, start)`` gives the vectors of tokens, of which the first has the
            position ``start``. Tokens come as the layers want vectors: ``(B, S)`` with
            ``batch_first``, otherwise ``(S, B)``.
        project: ``project(vectors)`` gives logits ``(B, V)`` for vectors ``(B, E)``.
        source_embed: as ``embed``, for ``source``. Default: ``embed``.
        use_cache: whether to keep what was computed for past positions; the tokens are the same.
            Default: where the model can.
        generator: random numbers for sampling. Default: torch's own.
        return_scores: also return a score per sequence.

    Returns:
        Prompt and continuation, ``(B, S + new)`` with ``new`` as the longest continuation needs, or
        ``(S + new)``. With ``return_scores`` also ``(B)`` scores, or a scalar: the log-probability
        that the model (at temperature 1, all tokens) gives the continuation; for beam search
        divided as :class:`fastseq.Beam` says.

    Raises:
        TypeError: an argument is of the wrong type, or does not go with the kind of model.
        ValueError: a size or a token is out of range, or the model returns no logits.

    Example:
        >>> def embed(tokens, start):
        ...     return positions(embedding(tokens), start)
        >>> tokens = fastseq.generate(
        ...     transformer, begin, 50, source=sentence, embed=embed, project=linear, eos=2
        ... )
    """
    chosen = _strategy(strategy)
    check_integer("max_new_tokens", max_new_tokens)
    _check_tokens("prompt", prompt)
    batched = prompt.dim() == 2
    if generator is not None and not isinstance(chosen, Sample):
        raise TypeError(f"generator must be None for {type(chosen).__name__}, which draws nothing")
    inputs = {
        "source": source,
        "memory": memory,
        "source_key_padding_mask": source_key_padding_mask,
    }
    if not batched:
        prompt = prompt.unsqueeze(0)
        inputs = {name: None if t is None else t.unsqueeze(0) for name, t in inputs.items()}
    _check_inputs(inputs, prompt.size(0))
    prompt, lengths = _cut(prompt, prompt_lengths)
    end_tokens = _end_tokens(eos)
    if pad is None:
        pad = end_tokens[0] if end_tokens else 0
    check_integer("pad", pad)
    ends = Ends(lengths, max_new_tokens, end_tokens, pad)

    decoding = as_model(model, embed, project, source_embed)
    new_cache = getattr(decoding, "new_cache", None)
    if use_cache and new_cache is None:
        raise TypeError(f"use_cache must not be True for {type(model).__name__}: it has no cache")
    if inputs["source"] is not None and not hasattr(decoding, "encode"):
        raise TypeError(f"source must be None for {type(model).__name__}, which cannot encode it")
    if getattr(decoding, "needs_memory", False) and inputs["source"] is inputs["memory"] is None:
        either = "source or memory" if hasattr(decoding, "encode") else "memory"
        raise TypeError(f"{either} must be given for a {type(model).__name__}")

    with torch.no_grad(), evaluating(model, embed, project, source_embed):
        held, mask = inputs["memory"], inputs["source_key_padding_mask"]
        if inputs["source"] is not None:
            held = decoding.encode(inputs["source"], mask)
        cache = None
        if new_cache is not None and use_cache is not False:
            cache = new_cache(prompt.size(1) + min(max_new_tokens, _CAPACITY_AHEAD))
        steps = Steps(decoding, held, mask, cache, end_tokens)
        if max_new_tokens == 0:
            tokens = ends.padded(prompt, ends.limits(prompt))
            scores = torch.zeros(prompt.size(0), device=prompt.device)
        elif isinstance(chosen, Beam):
            tokens, scores = beam_search(steps, prompt, ends, chosen)
        else:
            tokens, scores = extend(steps, prompt, ends, chosen, generator, return_scores)
    if not batched:
        tokens, scores = tokens.squeeze(0), scores.squeeze(0)
    return (tokens, scores) if return_scores else tokens


def _strategy(strategy: str | Strategy) -> Strategy:
    if isinstance(strategy, str):
        if strategy not in _BY_NAME:
            names = ", ".join(map(repr, _BY_NAME))
            raise ValueError(f"strategy must be one of {names}, got {strategy!r}")
        return _BY_NAME[strategy]
    if not isinstance(strategy, (Greedy, Sample, Beam)):
        raise TypeError(
            f"strategy must be a name, Greedy, Sample or Beam, got {type(strategy).__name__}"
        )
    return strategy


def _check_tokens(name: str, tokens: Any) -> None:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tokens).__name__}")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be of dtype int64 or int32, got {tokens.dtype}")
    if tokens.dim() not in (1, 2) or tokens.numel() == 0:
        raise ValueError(
            f"{name} must have shape (B, S) or (S) and hold tokens, got {tuple(tokens.shape)}"
        )


def _check_inputs(inputs: dict[str, Tensor | None], batch: int) -> None:
    """Look at what the decoder attends to, batch in front."""
    source, memory, mask = inputs.values()
    if source is not None and memory is not None:
        raise ValueError("memory must be None where source is given")
    attended = memory if source is None else source
    for name, tensor in inputs.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor is not None and (tensor.dim() < 2 or tensor.size(0) != batch):
            raise ValueError(
                f"{name} must have the batch of prompt: expected ({batch}, ...), "
                f"got {tuple(tensor.shape)}"
            )
    if mask is not None:
        if attended is None:
            raise ValueError("source_key_padding_mask must be None without source and memory")
        if mask.dtype != torch.bool:
            raise TypeError(f"source_key_padding_mask must be of dtype bool, got {mask.dtype}")
        if mask.shape != attended.shape[:2]:
            raise ValueError(
                f"source_key_padding_mask must have shape {tuple(attended.shape[:2])}, "
                f"got {tuple(mask.shape)}"
            )


def _cut(
    prompt: Tensor, prompt_lengths: Tensor | Sequence[int] | None
) -> tuple[Tensor, Tensor | None]:
    """The prompt as wide as its longest row, and lengths only where they differ."""
    if prompt_lengths is None:
        return prompt, None
    lengths = torch.as_tensor(prompt_lengths, device=prompt.device)
    batch, width = prompt.shape
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"prompt_lengths must be integers, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(f"prompt_lengths must have shape ({batch},), got {tuple(lengths.shape)}")
    least, most = int(lengths.min()), int(lengths.max())
    if least < 1 or most > width:
        raise ValueError(
            f"prompt_lengths must lie between 1 and {width}, got {least if least < 1 else most}"
        )
    return prompt[:, :most], None if least == most else lengths


def _end_tokens(eos: int | Sequence[int] | None) -> tuple[int, ...]:
    if eos is None:
        return ()
    if not isinstance(eos, (Integral, Sequence)):
        raise TypeError(f"eos must be an integer or integers, got {type(eos).__name__}")
    tokens = tuple(eos) if isinstance(eos, Sequence) else (eos,)
    for token in tokens:
        check_integer("eos", token)
    return tokens
