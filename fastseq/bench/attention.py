"""Attention cases made concrete: inputs, what is called in either library, and the gate.

torch's peer is its own function with the equivalent mask, and for module cases
``torch.nn.MultiheadAttention``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import fastseq
from fastseq.bench.attention_cases import AttentionCase
from fastseq.bench.gate import GateResult, compare

Library = Literal["torch", "fastseq"]

_DROPOUT_SEED = 11


@dataclass
class BuiltAttention:
    """An attention case made concrete.

    Attributes:
        case: What was built.
        leaves: What gets a gradient in training, by name.
        mask: torch's equivalent of window and lengths, bool, or None.
        padding: Key padding mask (B, Skv), true is ignored, or None.
        output_gradient: Gradient that reaches the output in training.
        modules: For module cases, torch's and ours with equal weights.
    """

    case: AttentionCase
    leaves: dict[str, Tensor]
    mask: Tensor | None
    padding: Tensor | None
    output_gradient: Tensor
    modules: dict[Library, torch.nn.Module]


def build(case: AttentionCase, seed: int = 0) -> BuiltAttention:
    """Make the inputs of a case: the same bits on every call."""
    generator = torch.Generator().manual_seed(seed + zlib.crc32(case.name.encode()))
    dtype = getattr(torch, case.dtype)

    def sample(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    modules: dict[Library, torch.nn.Module] = {}
    if case.layer == "mha":
        width = case.Hq * case.E
        leaves = {"input": sample(case.B, case.Sq, width)}
        gradient = sample(case.B, case.Sq, width)
        modules = _modules(case, width, seed)
    else:
        leaves = {
            "query": sample(case.B, case.Hq, case.Sq, case.E),
            "key": sample(case.B, case.Hkv, case.Skv, case.E),
            "value": sample(case.B, case.Hkv, case.Skv, case.E),
        }
        gradient = sample(case.B, case.Hq, case.Sq, case.E)
    if case.options.bias:
        leaves["bias"] = sample(1, case.Hq, case.Sq, case.Skv)
    mask = padding = None
    if case.options.window is not None:
        left, right = case.options.window
        distance = torch.arange(case.Skv) - torch.arange(case.Sq).unsqueeze(-1)
        mask = (distance >= -left) & (distance <= right)
    if case.options.ragged:
        padding = torch.arange(case.Skv) >= torch.tensor(case.lengths()).unsqueeze(-1)
    return BuiltAttention(case, leaves, mask, padding, gradient, modules)


def _modules(case: AttentionCase, width: int, seed: int) -> dict[Library, torch.nn.Module]:
    import fastseq.nn

    arguments: dict[str, Any] = {
        "embed_dim": width,
        "num_heads": case.Hq,
        "dropout": case.options.dropout,
        "batch_first": True,
        "dtype": getattr(torch, case.dtype),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + zlib.crc32(case.name.encode()))
        theirs = torch.nn.MultiheadAttention(**arguments)
    ours: torch.nn.Module = getattr(fastseq.nn, "MultiheadAttention")(**arguments)  # noqa: B009
    ours.load_state_dict(theirs.state_dict())
    training = case.direction == "training"
    return {"torch": theirs.train(training), "fastseq": ours.train(training)}


def outputs(
    built: BuiltAttention,
    library: Library,
    leaves: dict[str, Tensor],
    callee: Callable[..., Any] | None = None,
) -> tuple[Tensor, ...]:
    """One forward: the output, and the weights where the case asks for them.

    Args:
        built: The case.
        library: Whose attention to run.
        leaves: Inputs by name.
        callee: The module of a module case; otherwise what to run in place of torch's function.
    """
    case = built.case
    options = case.options
    if built.modules and callee is not None:
        x = leaves["input"]
        result = callee(x, x, x, need_weights=options.need_weights)
        return tuple(part for part in result if part is not None)
    query, key, value = leaves["query"], leaves["key"], leaves["value"]
    grouped = case.Hq != case.Hkv
    if library == "fastseq" and (
        options.window is not None or options.bias or built.padding is not None
    ):
        output: Tensor = fastseq.functional.attention(
            query,
            key,
            value,
            causal=options.causal,
            window=options.window,
            bias=leaves.get("bias"),
            key_padding_mask=built.padding,
            dropout_p=options.dropout,
        )
        return (output,)
    mask = leaves.get("bias", built.mask)
    if built.padding is not None:
        mask = ~built.padding[:, None, None, :]
    function: Callable[..., Tensor]
    if library == "fastseq":
        function = fastseq.functional.scaled_dot_product_attention
    else:
        function = callee or F.scaled_dot_product_attention
    return (
        function(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=options.dropout,
            is_causal=options.causal and case.Sq > 1,
            enable_gqa=grouped,
        ),
    )


def torch_callee(built: BuiltAttention) -> Callable[..., Any]:
    """The module of a module case, otherwise the function, of torch: what can be compiled."""

    def function(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, **options)

    return built.modules.get("torch", function)


def timed_call(
    built: BuiltAttention, library: Library, callee: Callable[..., Any] | None = None
) -> Callable[[], object]:
    """What the case times: forward for inference, forward and backward for training.

    Args:
        built: The case.
        library: Whose attention to run.
        callee: What to run in place of ``torch_callee``, the same one compiled.
    """
    module = built.modules.get(library)
    run = module if callee is None else callee
    if built.case.direction == "inference":
        leaves = built.leaves
        return lambda: outputs(built, library, leaves, run)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in built.leaves.items()}
    wanted = [*leaves.values(), *(module.parameters() if module is not None else ())]
    gradient = built.output_gradient

    def call() -> object:
        return torch.autograd.grad(outputs(built, library, leaves, run)[0], wanted, gradient)

    return call


def _evaluate(built: BuiltAttention, library: Library, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and, in training, every gradient by name."""
    training = built.case.direction == "training"
    leaves = {
        name: leaf.detach().to(dtype, copy=True).requires_grad_(training)
        for name, leaf in built.leaves.items()
    }
    module = built.modules.get(library)
    if module is not None and dtype is not getattr(torch, built.case.dtype):
        exact = _modules(built.case, built.case.Hq * built.case.E, 0)[library]
        exact.load_state_dict(module.state_dict())
        module = exact.to(dtype)
    torch.manual_seed(_DROPOUT_SEED)
    with torch.set_grad_enabled(training):
        results = outputs(built, library, leaves, module)
    names = ("output", "weights")
    named = {name: result.detach() for name, result in zip(names, results, strict=False)}
    if training:
        wanted = dict(leaves)
        if module is not None:
            wanted |= dict(module.named_parameters())
        grads = torch.autograd.grad(
            results[0], list(wanted.values()), built.output_gradient.to(dtype)
        )
        named |= {f"d_{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return named


def check(built: BuiltAttention) -> GateResult:
    """Compare ours and torch's results of a case with the same computation in float64.

    With dropout the peer and the oracle are the composite of torch operators, which alone can draw
    the same mask.
    """
    dtype = getattr(torch, built.case.dtype)
    with torch.random.fork_rng(devices=[]):
        ours = _evaluate(built, "fastseq", dtype)
        if built.case.options.dropout:
            with fastseq.backend("reference"):
                peer = _evaluate(built, "fastseq", dtype)
                oracle = _evaluate(built, "fastseq", torch.float64)
        else:
            peer = _evaluate(built, "torch", dtype)
            oracle = _evaluate(built, "torch", torch.float64)
    return compare(built.case, ours, peer, oracle)
