"""Greedy generation as a case: ours with a cache, torch's without, for it has none.

Without a memory the peer is ``torch.nn.TransformerEncoder`` under the causal mask, which is how a
model without cross-attention is built from ``torch.nn`` (and does less than a
``TransformerDecoder``, whose layers attend to a memory in any case); with one it is
``torch.nn.TransformerDecoder``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import fastseq
import fastseq.nn
from fastseq.bench.gate import ERROR_RATIO, ERROR_ULPS, GateResult, TensorError
from fastseq.bench.transformer_cases import VOCABULARY, TransformerCase

Library = Literal["torch", "fastseq"]


@dataclass
class BuiltGeneration:
    """A case of generation made concrete.

    Attributes:
        case: What was built.
        prompt: One token per sequence (B, 1).
        memory: What to attend to (B, S, E), or None.
        embedding: Vectors of tokens.
        positions: Vectors of positions (S + 1, E), added to them.
        project: Logits of vectors.
        callees: The stack of layers of either library, holding equal weights.
    """

    case: TransformerCase
    prompt: Tensor
    memory: Tensor | None
    embedding: nn.Embedding
    positions: Tensor
    project: nn.Linear
    callees: dict[Library, nn.Module]

    def embed(self, tokens: Tensor, start: int) -> Tensor:
        """Vectors of tokens, the first of them at position ``start``."""
        vectors: Tensor = self.embedding(tokens)
        return vectors + self.positions[start : start + tokens.size(1)]


def build(case: TransformerCase, seed: int = 0) -> BuiltGeneration:
    """Make model and prompt of a case: the same bits on every call."""
    if case.layer != "generation":
        raise ValueError(f"layer must be 'generation', got {case.layer!r}")
    dtype = getattr(torch, case.dtype)
    arguments: dict[str, Any] = {
        "d_model": case.E,
        "nhead": case.heads,
        "dim_feedforward": case.F,
        "batch_first": True,
        "dtype": dtype,
    }
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed + zlib.crc32(case.name.encode()))
        if case.options.memory:
            memory = torch.randn(case.B, case.S, case.E, dtype=dtype)
            theirs = torch.nn.TransformerDecoderLayer(**arguments)
            stack: nn.Module = torch.nn.TransformerDecoder(theirs, case.depth)
        else:
            memory = None
            layer = torch.nn.TransformerEncoderLayer(**arguments)
            stack = torch.nn.TransformerEncoder(layer, case.depth, enable_nested_tensor=False)
        # torch's stacks are copies of one layer; models are not.
        for parameter in stack.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        embedding = nn.Embedding(VOCABULARY, case.E, dtype=dtype)
        project = nn.Linear(case.E, VOCABULARY, dtype=dtype)
        positions = torch.randn(case.S + 1, case.E, dtype=dtype)
        prompt = torch.randint(VOCABULARY, (case.B, 1))
        ours = fastseq.nn.TransformerDecoder(
            fastseq.nn.TransformerDecoderLayer(**arguments, cross_attention=case.options.memory),
            case.depth,
        )
    state = stack.state_dict()
    if not case.options.memory:
        # A decoder's last norm is its third.
        state = {name.replace("norm2", "norm3"): value for name, value in state.items()}
    ours.load_state_dict(state)
    callees: dict[Library, nn.Module] = {"torch": stack.eval(), "fastseq": ours.eval()}
    return BuiltGeneration(case, prompt, memory, embedding, positions, project, callees)


def _hidden(stack: nn.Module, vectors: Tensor, memory: Tensor | None) -> Tensor:
    """Run torch's stack over all positions so far."""
    mask = nn.Transformer.generate_square_subsequent_mask(vectors.size(1), dtype=vectors.dtype)
    if memory is None:
        return stack(vectors, mask=mask, is_causal=True)
    return stack(vectors, memory, tgt_mask=mask, tgt_is_causal=True)


def torch_generate(built: BuiltGeneration, stack: nn.Module) -> Tensor:
    """The loop one writes around ``torch.nn``: all positions again for every token."""
    tokens = built.prompt
    for _ in range(built.case.S):
        hidden = _hidden(stack, built.embed(tokens, 0), built.memory)
        chosen = built.project(hidden[:, -1]).argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, chosen], dim=1)
    return tokens


def timed_call(
    built: BuiltGeneration, library: Library, stack: Callable[..., Tensor] | None = None
) -> Callable[[], Tensor]:
    """What the case times: S tokens after a prompt of one.

    Args:
        built: The case.
        library: Who generates.
        stack: torch's stack compiled, to run in place of it.
    """
    if library == "torch":
        running: Any = built.callees["torch"] if stack is None else stack
        return lambda: torch_generate(built, running)
    ours, count, memory = built.callees["fastseq"], built.case.S, built.memory
    return lambda: fastseq.generate(
        ours, built.prompt, count, memory=memory, embed=built.embed, project=built.project
    )


def check(built: BuiltGeneration) -> GateResult:
    """Hold every token we choose against torch's logits at its position in float64.

    A choice may fall behind the best one by no more than twice (each of the two may be off) 1.5
    times the error of torch's own float32 logits plus a few units in the last place.
    """
    with torch.no_grad():
        return check_tokens(built, timed_call(built, "fastseq")())


def check_tokens(built: BuiltGeneration, tokens: object) -> GateResult:
    """Hold somebody's tokens against torch's logits, as ``check`` holds ours."""
    expected = (built.case.B, 1 + built.case.S)
    if not isinstance(tokens, Tensor) or tokens.shape != expected:
        shown = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise AssertionError(f"tokens: expected {expected}, got {shown}")
    with torch.no_grad():
        logits = {}
        exact = build(built.case)
        _to_double(exact)
        for name, one in (("float32", built), ("float64", exact)):
            hidden = _hidden(one.callees["torch"], one.embed(tokens[:, :-1], 0), one.memory)
            logits[name] = one.project(hidden).double()
    best = logits["float64"].amax(-1)
    chosen = logits["float64"].gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
    error = (logits["float32"] - logits["float64"]).abs().max().item()
    info = torch.finfo(getattr(torch, built.case.dtype))
    rounding = ERROR_ULPS * info.eps * logits["float64"].abs().max().item()
    behind = (best - chosen).max().item()
    limit = 2 * (ERROR_RATIO * error + rounding)
    return GateResult((TensorError("greedy choice", behind, error, limit),))


def _to_double(built: BuiltGeneration) -> None:
    built.callees["torch"].double()
    built.embedding.double()
    built.project.double()
    built.positions = built.positions.double()
    built.memory = None if built.memory is None else built.memory.double()
