"""What the linear layer must compute: torch's operators, in float64 on the same values.

A :class:`Case` describes one call. ``run(case, library, dtype)`` makes it with either library and
returns the output and every gradient by name, as float64 tensors; both meet the same arguments,
down to strides, the same dropout seed and the same weights for the loss. The bound is that of
``oracle.py``, with torch's operators in float32 as the peer.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import torch
import torch.nn.functional as F
from kernels import HAS_EXTENSION
from oracle import bound, compare, every_tier, largest, strided
from torch import Tensor

import fastseq
from fastseq import functional
from fastseq._dropout import draw_seed
from fastseq.backends.reference_dropout import element_keep

SEED = 11
ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")
TORCH = {
    None: lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the linear layer and of its backward."""

    batch: tuple[int, ...] = (7,)
    features: int = 65
    outputs: int = 63
    dtype: str = "float32"
    activation: str | None = None
    dropout: float = 0.0
    residual: str = ""  # or full, broadcast
    bias: bool = True
    strides: str = "contiguous"  # of input and residual: transposed, expanded, every_other, offset
    weight_strides: str = "contiguous"

    @property
    def rows(self) -> int:
        return math.prod(self.batch)

    def __str__(self) -> str:
        shape = f"{'x'.join(map(str, self.batch))}x{self.features}-{self.outputs}"
        parts = [shape, self.dtype, str(self.activation), f"p{self.dropout}"]
        parts += [self.residual or "alone", "bias" if self.bias else "no_bias"]
        return "-".join([*parts, self.strides, self.weight_strides])


def arguments(case: Case, dtype: torch.dtype, nudge: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Leaves by name and the weights of the loss; a nudge moves every value by one unit."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    moves = torch.Generator().manual_seed(nudge)

    def values(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        if nudge:
            signs = torch.randint(0, 2, shape, generator=moves) * 2 - 1
            drawn = drawn * (1 + signs * torch.finfo(torch.float32).eps)
        return drawn.float().double() if case.dtype == "float32" else drawn

    scale = max(case.features, 1) ** -0.5  # pre-activations of size one
    weight = values(case.outputs, case.features, scale=scale)
    leaves = {
        "input": strided(values(*case.batch, case.features), case.strides, dtype),
        "weight": strided(weight, case.weight_strides, dtype),
    }
    if case.bias:
        leaves["bias"] = strided(values(case.outputs), "contiguous", dtype)
    if case.residual == "full":
        residual = values(*case.batch, case.outputs)
        leaves["residual"] = strided(residual, case.strides, dtype)
    elif case.residual == "broadcast":
        leaves["residual"] = strided(values(case.outputs), "contiguous", dtype)
    return leaves, values(*case.batch, case.outputs).to(dtype)


def output_of(case: Case, library: str, leaves: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(SEED)
    input, weight = leaves["input"], leaves["weight"]
    bias, residual = leaves.get("bias"), leaves.get("residual")
    if library == "fastseq":
        return functional.linear(
            input, weight, bias, case.activation, residual, dropout_p=case.dropout
        )
    output = TORCH[case.activation](F.linear(input, weight, bias))
    seed = draw_seed(case.dropout)
    if seed is not None:
        keep = element_keep(seed, case.dropout, case.rows, case.outputs).view(output.shape)
        scale = 1 / (1 - case.dropout) if case.dropout < 1 else 0.0
        output = output * keep * scale
    return output if residual is None else output + residual


def run(
    case: Case, library: str, dtype: torch.dtype, nudge: int = 0, *, drawn: Any = None
) -> dict[str, Tensor]:
    """The output and every gradient of the case by name, in float64.

    ``drawn`` is what ``arguments`` returned, where it is needed more than once.
    """
    leaves, cotangent = drawn or arguments(case, dtype, nudge)
    output = output_of(case, library, leaves)
    gradients = torch.autograd.grad(output, list(leaves.values()), cotangent)
    assert all(tensor.dtype is dtype for tensor in (output, *gradients))
    results = {"output": output}
    results.update({f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)})
    return {name: tensor.detach().double() for name, tensor in results.items()}


def expected(case: Case) -> tuple[dict[str, Tensor], dict[str, float]]:
    """torch's float64 result and, by name, how far from it ours may be."""
    truth = run(case, "torch", torch.float64)
    sister = dataclasses.replace(case, dtype="float32")
    errors = dict.fromkeys(truth, 0.0)
    # The fewer elements the smallest tensor has, the more runs it takes to meet float32's usual
    # error instead of its luck.
    smallest = min(value.numel() for value in truth.values())
    for nudge in range(min(max(48 // max(smallest, 1), 3), 12)):
        exact = truth
        if nudge or case.dtype == "float64":
            exact = run(sister, "torch", torch.float64, nudge)
        rounded = run(sister, "torch", torch.float32, nudge)
        for name in errors:
            errors[name] = max(errors[name], largest(rounded[name] - exact[name]))
    dtype = getattr(torch, case.dtype)
    return truth, {
        name: bound(dtype, errors[name], largest(value))
        + _free_units(case, name) * torch.finfo(dtype).eps * largest(value)
        for name, value in truth.items()
    }


def _free_units(case: Case, name: str) -> float:
    """More units than the common bound's.

    For a single row or column, which torch sums as a dot product with many accumulators; and for
    the approximation of GELU, whose derivative may err twice as much (``test_activations.py``).
    """
    units = 8.0 if case.activation == "gelu_tanh" else 0.0
    if min(case.rows, case.features, case.outputs) == 1:
        terms = {"output": case.features, "grad_input": case.outputs, "grad_residual": 0}
        units += terms.get(name, case.rows) ** 0.5 / 4
    return units


def check(case: Case) -> None:
    """Run the case on every tier and hold it against :func:`expected`.

    The bits must not depend on the threads, nor on whether gradients are recorded. Composites
    promise the first of the two as little as torch's own products do.
    """
    truth, bounds = expected(case)
    dtype = getattr(torch, case.dtype)
    leaves, _ = drawn = arguments(case, dtype)
    before: dict[str, dict[str, Tensor]] = {}
    with fastseq.linear_product("fused"):
        for tier in every_tier():
            results = run(case, "fastseq", dtype, drawn=drawn)
            compare(results, truth, bounds, tier)
            with torch.no_grad():
                inferred = output_of(case, "fastseq", leaves).double()
            assert torch.equal(inferred, results["output"]), f"{tier}: no_grad differs"
            isa = tier.split(",")[0] if HAS_EXTENSION else tier
            for name, result in before.setdefault(isa, results).items():
                assert torch.equal(result, results[name]), f"{name} {tier}: threads differ"
