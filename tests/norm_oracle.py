"""What the norms must compute: torch's own functions, in float64 on the same values.

The bound is that of ``oracle.py``, with torch's float32 norm as the peer.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import torch
import torch.nn.functional as F
from oracle import bound, largest, strided
from torch import Tensor

from fastseq import functional
from fastseq._norm import NormOptions
from fastseq.backends import reference_norm

# The fewer elements there are, the more runs it takes to meet float32's usual error, not its luck.
NUDGES, NUDGES_OF_FEW, FEW = 3, 10, 512


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a norm and of its backward."""

    dtype: str = "float32"
    rms: bool = False
    shape: tuple[int, ...] = (5, 7)
    dims: int = 1
    weight: bool = True
    bias: bool = True
    residual: bool = False
    dropout: float = 0.0
    return_sum: bool = False
    eps: float | None = 1e-5
    strides: str = "contiguous"  # or transposed, expanded, every_other, offset, wide
    mean: float = 0.0  # of the input

    @property
    def normalized_shape(self) -> tuple[int, ...]:
        return self.shape[len(self.shape) - self.dims :]

    @property
    def options(self) -> NormOptions:
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        return NormOptions(self.dims, self.rms, eps, self.dropout)

    def __str__(self) -> str:
        plain = Case()
        changed = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != getattr(plain, field.name):
                changed.append(f"{field.name}={value}".replace(" ", ""))
        return "-".join(changed) or "plain"


def _laid_out(values: Tensor, strides: str, dtype: torch.dtype) -> Tensor:
    if strides == "wide":  # rows further apart than they are long
        leaf = torch.cat([values, values.new_full((*values.shape[:-1], 3), torch.nan)], -1)
        return leaf.to(dtype)[..., : values.shape[-1]].detach().requires_grad_()
    return strided(values, strides, dtype)


def arguments(
    case: Case, dtype: torch.dtype, nudge: int = 0
) -> tuple[dict[str, Tensor], torch.Generator]:
    """Leaves by name and the generator of the loss's weights.

    A ``nudge`` other than 0 moves every value by one float32 unit, up or down.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    moves = torch.Generator().manual_seed(nudge)

    def values(shape: tuple[int, ...], mean: float = 0.0) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64) + mean
        if nudge:
            signs = torch.randint(0, 2, shape, generator=moves) * 2 - 1
            drawn = drawn * (1 + signs * torch.finfo(torch.float32).eps)
        return drawn.float().double() if case.dtype == "float32" else drawn

    leaves = {"input": _laid_out(values(case.shape, case.mean), case.strides, dtype)}
    if case.residual:
        leaves["residual"] = _laid_out(values(case.shape), case.strides, dtype)
    kind = "contiguous" if case.strides in ("expanded", "wide", "transposed") else case.strides
    if case.weight:
        leaves["weight"] = strided(values(case.normalized_shape, 1.0), kind, dtype)
    if case.bias and not case.rms:
        leaves["bias"] = strided(values(case.normalized_shape), kind, dtype)
    return leaves, generator


def fastseq_outputs(case: Case, leaves: dict[str, Tensor]) -> list[Tensor]:
    """``[output]`` or ``[output, sum]`` of one forward."""
    torch.manual_seed(5)  # of the dropout
    shape, weight, bias = case.normalized_shape, leaves.get("weight"), leaves.get("bias")
    affine = (weight,) if case.rms else (weight, bias)
    if not case.residual:
        norm: Any = functional.rms_norm if case.rms else functional.layer_norm
        return [norm(leaves["input"], shape, *affine, case.eps)]
    norm = functional.add_rms_norm if case.rms else functional.add_layer_norm
    result = norm(
        leaves["input"],
        leaves["residual"],
        shape,
        *affine,
        case.eps,
        dropout_p=case.dropout,
        return_sum=case.return_sum,
    )
    return list(result) if case.return_sum else [result]


def torch_outputs(case: Case, leaves: dict[str, Tensor]) -> list[Tensor]:
    """The same by torch's function, behind the composite's addition."""
    torch.manual_seed(5)
    seed = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64) if case.dropout else None
    total = reference_norm.add(leaves["input"], leaves.get("residual"), seed, case.options)
    shape, weight = case.normalized_shape, leaves.get("weight")
    if case.rms:
        # The default eps is that of the case's dtype, in the truth as well.
        eps = torch.finfo(getattr(torch, case.dtype)).eps if case.eps is None else case.eps
        output = F.rms_norm(total, shape, weight, eps)
    else:
        output = F.layer_norm(total, shape, weight, leaves.get("bias"), case.options.eps)
    return [output, total] if case.return_sum else [output]


def run(
    case: Case, library: str, dtype: torch.dtype, nudge: int = 0, *, drawn: Any = None
) -> dict[str, Tensor]:
    """Every output and gradient of the case by name, in float64.

    ``drawn`` is what ``arguments`` returned, where it is needed more than once.
    """
    leaves, generator = drawn or arguments(case, dtype, nudge)
    state = generator.get_state()
    call = fastseq_outputs if library == "fastseq" else torch_outputs
    outputs = call(case, leaves)
    cotangents = [
        torch.randn(output.shape, generator=generator, dtype=torch.float64).to(dtype)
        for output in outputs
    ]
    generator.set_state(state)  # another run with these arguments has the same loss
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    assert all(tensor.dtype is dtype for tensor in (*outputs, *gradients))
    results = dict(zip(("output", "sum"), outputs, strict=False))
    results.update({f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)})
    return {name: tensor.detach().double() for name, tensor in results.items()}


def expected(case: Case) -> tuple[dict[str, Tensor], dict[str, float]]:
    """torch's float64 result and, by name, how far from it ours may be."""
    truth = run(case, "torch", torch.float64)
    sister = dataclasses.replace(case, dtype="float32")
    errors = dict.fromkeys(truth, 0.0)
    elements = truth["output"].numel()
    for nudge in range(NUDGES_OF_FEW if elements < FEW else NUDGES):
        exact = truth
        if nudge or case.dtype == "float64":
            exact = run(sister, "torch", torch.float64, nudge)
        rounded = run(sister, "torch", torch.float32, nudge)
        for name in errors:
            errors[name] = max(errors[name], largest(rounded[name] - exact[name]))
    return truth, {
        name: bound(getattr(torch, case.dtype), errors[name], largest(value))
        for name, value in truth.items()
    }
