"""Calls of multi-head attention by both libraries: random ones, and how far apart they may be."""

from __future__ import annotations

import dataclasses
import random
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from oracle import FREE_UNITS, bound, largest
from torch import Tensor

import fastseq.nn as fast_nn

CONSTRUCTOR = ("bias", "add_bias_kv", "add_zero_attn", "batch_first")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a layer and of its backward."""

    embed_dim: int = 12
    num_heads: int = 3
    batch: int = 3
    queries: int = 5
    keys: int = 7
    inputs: str = "three"  # or self, pair (key is value)
    kdim: int | None = None
    vdim: int | None = None
    bias: bool = True
    add_bias_kv: bool = False
    add_zero_attn: bool = False
    batch_first: bool = False
    batched: bool = True
    attn_mask: str = "none"  # or bool, float, bool3, float3, causal, causal_float (with the hint)
    key_padding_mask: str = "none"  # or bool, float, hidden (of 0 and -inf)
    weights: str = "none"  # or mean, heads

    @property
    def causal(self) -> bool:
        return self.attn_mask.startswith("causal")

    def module(self, library: Any, dtype: torch.dtype) -> torch.nn.Module:
        torch.manual_seed(zlib.crc32(repr(self).encode()))
        options = {name: getattr(self, name) for name in CONSTRUCTOR}
        module = library.MultiheadAttention(
            self.embed_dim, self.num_heads, kdim=self.kdim, vdim=self.vdim, **options
        )
        with torch.no_grad():
            # torch starts with biases of zero, which would hide what is done to them.
            for parameter in module.parameters():
                if parameter.dim() == 1:
                    parameter.uniform_(-1, 1)
        return module.to(dtype)

    def arguments(
        self, dtype: torch.dtype, nudge: int = 0
    ) -> tuple[list[Tensor], dict[str, Any], dict[str, Tensor]]:
        """query, key and value, keyword arguments, and the leaves by name.

        A ``nudge`` other than 0 moves every value by one float32 unit, up or down.
        """
        generator = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))
        moves = torch.Generator().manual_seed(nudge)

        def values(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
            if nudge:
                signs = torch.randint(0, 2, shape, generator=moves) * 2 - 1
                drawn = drawn * (1 + signs * torch.finfo(torch.float32).eps)
            return drawn.float().to(dtype)

        def sequence(steps: int, features: int | None) -> Tensor:
            shape = (steps, self.batch) if not self.batch_first else (self.batch, steps)
            shape = shape if self.batched else (steps,)
            return values(*shape, features or self.embed_dim).requires_grad_()

        batch = self.batch if self.batched else 1
        keys = self.queries if self.inputs == "self" else self.keys
        leaves = {"query": sequence(self.queries, None)}
        inputs = [leaves["query"]] * 3
        if self.inputs != "self":
            leaves["key"] = inputs[1] = inputs[2] = sequence(keys, self.kdim)
        if self.inputs == "three":
            leaves["value"] = inputs[2] = sequence(keys, self.vdim)

        options: dict[str, Any] = {
            "need_weights": self.weights != "none",
            "average_attn_weights": self.weights != "heads",
        }
        shape = (self.queries, keys)
        if self.attn_mask.endswith("3"):
            shape = (batch * self.num_heads, *shape)
        hidden = torch.rand(shape, generator=generator) < 0.3
        # Key 0 stays visible: where none is, torch has NaN.
        hidden[..., 0] = False
        if self.causal:
            hidden = torch.ones(shape, dtype=torch.bool).triu(1)
            options["is_causal"] = True
        if self.attn_mask == "causal_float":
            options["attn_mask"] = torch.zeros(shape, dtype=dtype).masked_fill(hidden, -torch.inf)
        elif self.attn_mask.startswith("float"):
            leaves["attn_mask"] = values(*shape).masked_fill_(hidden, -torch.inf).requires_grad_()
            options["attn_mask"] = leaves["attn_mask"]
        elif self.attn_mask != "none":
            options["attn_mask"] = hidden
        shape = (batch, keys) if self.batched else (keys,)
        hidden = torch.rand(shape, generator=generator) < 0.4
        hidden[..., 0] = False
        if self.key_padding_mask == "bool":
            options["key_padding_mask"] = hidden
        elif self.key_padding_mask == "hidden":
            mask = torch.zeros(shape, dtype=dtype)
            options["key_padding_mask"] = mask.masked_fill_(hidden, -torch.inf)
        elif self.key_padding_mask == "float":
            mask = values(*shape).masked_fill_(hidden, -torch.inf)
            options["key_padding_mask"] = leaves["key_padding_mask"] = mask.requires_grad_()
        return inputs, options, leaves


def run(case: Case, library: Any, dtype: torch.dtype, nudge: int = 0) -> dict[str, Tensor]:
    """Every output and gradient of the case by name, in float64."""
    module = case.module(library, dtype)
    inputs, options, leaves = case.arguments(dtype, nudge)
    with warnings.catch_warnings():
        # torch deprecates a bool mask beside a float one.
        warnings.filterwarnings("ignore", message="Support for mismatched")
        output, weights = module(*inputs, **options)
    results = {"output": output}
    if case.weights == "none":
        assert weights is None
    else:
        results["weights"] = weights
    generator = torch.Generator().manual_seed(7)
    cotangents = [
        torch.randn(one.shape, generator=generator, dtype=torch.float64).to(dtype)
        for one in results.values()
    ]
    wanted = {**leaves, **dict(module.named_parameters())}
    gradients = torch.autograd.grad(list(results.values()), list(wanted.values()), cotangents)
    results.update({f"grad_{name}": g for name, g in zip(wanted, gradients, strict=True)})
    assert all(tensor.dtype is dtype for tensor in results.values())
    return {name: tensor.detach().double() for name, tensor in results.items()}


def check(case: Case) -> None:
    """float64 against torch's to the last digits, float32 as the top of ``oracle.py`` says."""
    truth = run(case, torch.nn, torch.float64)
    errors = dict.fromkeys(truth, 0.0)
    for nudge in range(3):
        exact = run(case, torch.nn, torch.float64, nudge) if nudge else truth
        rounded = run(case, torch.nn, torch.float32, nudge)
        for name in errors:
            errors[name] = max(errors[name], largest(rounded[name] - exact[name]))
    # Where a gradient is a difference of larger sums, its last digits are theirs; all of them are
    # where it is zero (a query that sees one key only), which torch's softmax gets exactly.
    scale = max(map(largest, truth.values()))
    for dtype in (torch.float64, torch.float32):
        results = run(case, fast_nn, dtype)
        assert results.keys() == truth.keys()
        for name, value in truth.items():
            assert results[name].shape == value.shape, name
            units = 1 if value.any() else FREE_UNITS
            limit = bound(dtype, errors[name], largest(value))
            limit += units * torch.finfo(dtype).eps * scale
            error = largest(results[name] - value)
            assert error <= limit, f"{name} {dtype}: error {error:.3e}, bound {limit:.3e}"


def random_cases(count: int) -> Iterator[Case]:
    """Different from each other, the same in every run."""
    choose = random.Random(5).choice
    flag = (False, True)
    for _ in range(count):
        inputs = choose(("self", "pair", "three"))
        attn_mask = choose(("none", "bool", "float", "bool3", "float3", "causal", "causal_float"))
        heads = choose((1, 2, 3))
        yield Case(
            embed_dim=heads * choose((1, 4, 7, 16)),
            num_heads=heads,
            batch=choose((1, 3)),
            queries=choose((1, 5, 33)),
            keys=choose((1, 7, 40)),
            inputs=inputs,
            kdim=choose((None, 5)) if inputs == "three" else None,
            vdim=choose((None, 6)) if inputs == "three" else None,
            bias=choose(flag),
            add_bias_kv=choose(flag),
            add_zero_attn=choose(flag),
            batch_first=choose(flag),
            batched=choose((True, True, False)),
            attn_mask=attn_mask,
            key_padding_mask=choose(("none", "bool", "float", "hidden")),
            weights=choose(("none", "mean", "heads")),
        )
