"""Calls of Transformer modules by both libraries, and what must come out alike."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from hypothesis import strategies
from torch import Tensor

import fastseq.nn as fast_nn

EMBED, HEADS, FEED = 8, 2, 12
ACTIVATIONS: dict[str, Any] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_tanh": torch.nn.GELU(approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,  # no kernel has it inside
    "prelu": torch.nn.PReLU(dtype=torch.float64),  # has a parameter of its own
}
MASKS = ("none", "bool", "float", "bool3", "causal", "causal_float")
PADDINGS = ("none", "end", "anywhere", "float")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call and its backward."""

    kind: str = "TransformerEncoderLayer"
    activation: str = "relu"
    norm_first: bool = False
    batch_first: bool = True
    bias: bool = True
    training: bool = True
    batched: bool = True
    mask: str = "none"
    memory_mask: str = "none"
    padding: str = "none"
    memory_padding: str = "none"
    seed: int = 0


def cases(kind: str) -> strategies.SearchStrategy[Case]:
    """All combinations, drawn at random."""
    crosses = "Decoder" in kind or kind == "Transformer"
    flags = {
        name: strategies.booleans()
        for name in ("norm_first", "batch_first", "bias", "training", "batched")
    }
    return strategies.builds(
        Case,
        kind=strategies.just(kind),
        activation=strategies.sampled_from(sorted(ACTIVATIONS)),
        mask=strategies.sampled_from(MASKS),
        memory_mask=strategies.sampled_from(MASKS[:4] if crosses else MASKS[:1]),
        padding=strategies.sampled_from(PADDINGS),
        memory_padding=strategies.sampled_from(PADDINGS if crosses else PADDINGS[:1]),
        seed=strategies.integers(0, 99),
        **flags,
    )


def build(library: Any, case: Case, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """The module of one library, in weights the same for both."""
    torch.manual_seed(case.seed)
    options = {
        "dropout": 0.0,
        "activation": ACTIVATIONS[case.activation],
        "norm_first": case.norm_first,
        "batch_first": case.batch_first,
        "bias": case.bias,
        "dtype": dtype,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of what rules out its nested tensors
        if case.kind == "Transformer":
            module = library.Transformer(EMBED, HEADS, 2, 2, FEED, **options)
        elif case.kind.endswith("Layer"):
            module = getattr(library, case.kind)(EMBED, HEADS, FEED, **options)
        else:
            layer = getattr(library, f"{case.kind}Layer")(EMBED, HEADS, FEED, **options)
            norm = library.LayerNorm(EMBED, dtype=dtype)
            module = getattr(library, case.kind)(layer, 2, norm)
    with torch.no_grad():
        # Biases of zero and weights of one would hide what is done to them.
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(-1, 1)
    return module.train(case.training)


def arguments(
    case: Case, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Sequences and masks."""
    made = torch.Generator().manual_seed(case.seed)
    batch, targets, sources = 3, 5, 5 if "Encoder" in case.kind else 7

    def sequence(steps: int) -> Tensor:
        shape = (batch, steps) if case.batch_first else (steps, batch)
        shape = shape if case.batched else (steps,)
        return torch.randn(*shape, EMBED, generator=made, dtype=dtype)

    def mask(kind: str, queries: int, keys: int) -> Tensor | None:
        if kind == "none":
            return None
        if kind.startswith("causal"):
            hidden = torch.ones(queries, keys, dtype=torch.bool).triu(1)
        else:
            entries = (batch if case.batched else 1) * HEADS
            shape = (entries, queries, keys) if kind.endswith("3") else (queries, keys)
            hidden = torch.rand(shape, generator=made) < 0.3
            hidden[..., 0] = False
        if not kind.endswith("float"):
            return hidden
        base = torch.zeros(hidden.shape, dtype=dtype)
        if kind == "float":
            base = torch.randn(hidden.shape, generator=made, dtype=dtype)
        return base.masked_fill(hidden, -torch.inf)

    def padding(kind: str, keys: int) -> Tensor | None:
        if kind == "none":
            return None
        if kind == "anywhere":
            hidden = torch.rand(batch, keys, generator=made) < 0.4
            hidden[:, 0] = False
        else:
            hidden = torch.arange(keys) >= torch.tensor([keys, 2, keys - 1])[:, None]
        if kind == "float":
            hidden = torch.zeros(batch, keys, dtype=dtype).masked_fill(hidden, -torch.inf)
        return hidden if case.batched else hidden[1]

    # A mask that hides all that the padding leaves gives NaN in torch; key 0 is in neither.
    masks: dict[str, Tensor | None]
    if "Encoder" in case.kind:
        name = "mask" if case.kind == "TransformerEncoder" else "src_mask"
        masks = {
            name: mask(case.mask, sources, sources),
            "src_key_padding_mask": padding(case.padding, sources),
        }
        return [sequence(sources)], {name: m for name, m in masks.items() if m is not None}
    masks = {
        "tgt_mask": mask(case.mask, targets, targets),
        "memory_mask": mask(case.memory_mask, targets, sources),
        "tgt_key_padding_mask": padding(case.padding, targets),
        "memory_key_padding_mask": padding(case.memory_padding, sources),
    }
    given = {name: m for name, m in masks.items() if m is not None}
    if case.kind == "Transformer":
        return [sequence(sources), sequence(targets)], given
    return [sequence(targets), sequence(sources)], given


def train(
    module: torch.nn.Module, inputs: list[Tensor], masks: dict[str, Any], rows: Any = ...
) -> list[Tensor]:
    """Output and the gradients of inputs and parameters; only ``rows`` count."""
    leaves = [one.detach().clone().requires_grad_() for one in inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's: mixed kinds of masks
        output = module(*leaves, **masks)[rows]
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)
    wanted = [*leaves, *module.parameters()]
    # torch's copies of a decoder layer keep a module as activation, and use ReLU instead.
    grads = torch.autograd.grad((output * weights).sum(), wanted, allow_unused=True)
    return [output, *(torch.zeros(1) if grad is None else grad for grad in grads)]


def check(case: Case) -> None:
    """Both libraries agree with gradients and, at positions that are no padding, without."""
    theirs, ours = build(torch.nn, case), build(fast_nn, case)
    inputs, masks = arguments(case)
    expected, actual = (train(one, inputs, masks) for one in (theirs, ours))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    # Not torch without gradients: its fast path reads a floating mask as a boolean one.
    wanted = expected[0]
    with torch.no_grad():
        found = ours(*inputs, **masks)
    hidden = masks.get("src_key_padding_mask")
    if hidden is not None:
        valid = hidden == 0
        valid = valid if case.batch_first or not case.batched else valid.T
        wanted, found = wanted[valid], found[valid]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def pair(kind: str, **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same small module from both libraries."""
    case = Case(kind, **options)
    return build(torch.nn, case), build(fast_nn, case)


def sequence(*shape: int, seed: int = 0) -> Tensor:
    """Some numbers ``(*shape, EMBED)`` in float64."""
    made = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, EMBED, generator=made, dtype=torch.float64)
