"""What attention must compute: the composite of torch operators, in float64 on the same values.

A :class:`Case` describes one call. ``run(case, backend, dtype)`` makes that call on either backend
and returns every output and every gradient by name, as float64 tensors; both meet the same
arguments, down to strides, the same dropout seed and the same weights for the loss.

The bound is that of ``oracle.py``, with the composite in float32 (torch's own products,
exponentials and sums) as the peer: at most 1.5 times its distance from the float64 result plus 4
units. That the composite is right is another test's business: ``test_attention_reference.py`` holds
it against torch's function and against attention written out pair by pair.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from typing import Any

import torch
from kernels import KERNELS
from oracle import FREE_UNITS, bound, every_tier, strided
from torch import Tensor

import fastseq
from fastseq import functional

# The fewer rows there are, the more runs it takes to meet float32's usual error, not its luck.
NUDGES, NUDGES_OF_FEW_ROWS, FEW_ROWS = 3, 8, 16


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of attention and of its backward."""

    dtype: str = "float32"
    layout: str = "padded"  # or varlen
    batch: int = 2
    kv_heads: int = 2
    group: int = 1
    queries: int = 7
    keys: int = 9
    size: int = 8
    value_size: int = 8
    causal: bool = False
    bottom_right: bool = False
    window: tuple[int, int] | None = None
    mask: str = ""  # which of the four dimensions are not broadcast, as in "bhqk", "qk", "k"
    bias: str = ""
    bias_grad: bool = True
    padding: bool = False
    lengths: str = ""  # "q", "k" or "qk"
    alibi: str = ""  # "h" or "bh"
    softcap: float | None = None
    sinks: bool = False
    dropout: float = 0.0
    weights: str = ""  # "heads" or "mean": also returned
    strides: str = "contiguous"  # or transposed, expanded, every_other, offset
    magnitude: float = 1.0  # of the queries

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def __str__(self) -> str:
        plain = Case()
        changed = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != getattr(plain, field.name):
                changed.append(f"{field.name}={value}".replace(" ", ""))
        return "-".join(changed) or "plain"


def _sequence_lengths(generator: torch.Generator, count: int, most: int) -> list[int]:
    """From none to all, both of them met where there are sequences enough."""
    lengths = torch.randint(0, most + 1, (count,), generator=generator).tolist()
    lengths[0] = most
    return lengths


def _table(case: Case, dims: str, draw: Any) -> Tensor:
    sizes = {"b": case.batch, "h": case.heads, "q": case.queries, "k": case.keys}
    return draw(*(size if name in dims else 1 for name, size in sizes.items()))


Drawn = tuple[dict[str, Tensor], dict[str, Any], Tensor | None, Tensor]


# An oracle asks for the same values in both dtypes, and for those of the case itself once more.
@functools.lru_cache(maxsize=4)
def _draw(case: Case, nudge: int) -> Drawn:
    """In float64 and not to be written to: leaves by name, other arguments, slopes for ALiBi.

    Last the state of the generator behind all of it.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    moves = torch.Generator().manual_seed(nudge)

    def values(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        if nudge:
            signs = torch.randint(0, 2, shape, generator=moves) * 2 - 1
            drawn = drawn * (1 + signs * torch.finfo(torch.float32).eps)
        return drawn.float().double() if case.dtype == "float32" else drawn

    def bools(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) < 0.7

    others: dict[str, Any] = {
        "causal": case.causal,
        "bottom_right": case.bottom_right,
        "window": case.window,
        "softcap": case.softcap,
        "dropout_p": case.dropout,
    }
    if case.layout == "varlen":
        totals, starts = _rows(case, generator)
        others |= starts
        queries, keys = (totals["query"], case.heads), (totals["key"], case.kv_heads)
    else:
        queries = (case.batch, case.heads, case.queries)
        keys = (case.batch, case.kv_heads, case.keys)
    leaves = {
        "query": values(*queries, case.size, scale=case.magnitude),
        "key": values(*keys, case.size),
        "value": values(*keys, case.value_size),
    }
    if case.bias:
        leaves["bias"] = _table(case, case.bias, values)
    if case.sinks:
        leaves["sinks"] = values(case.heads)
    if case.mask:
        others["mask"] = _table(case, case.mask, bools)
    if case.padding:
        others["key_padding_mask"] = ~bools(case.batch, case.keys)
    for name, letter, most in (("query", "q", case.queries), ("key", "k", case.keys)):
        if letter in case.lengths:
            others[f"{name}_lengths"] = _sequence_lengths(generator, case.batch, most)
    slopes = None
    if case.alibi:
        shape = (case.heads,) if case.alibi == "h" else (case.batch, case.heads)
        slopes = values(*shape).abs()
    if case.weights:
        others |= {"return_weights": True, "average_weights": case.weights == "mean"}
    return leaves, others, slopes, generator.get_state()


def _rows(case: Case, generator: torch.Generator) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Of sequences of several lengths: how many rows they have together, where each starts."""
    starts, totals = {}, {}
    for name, most in (("query", case.queries), ("key", case.keys)):
        lengths = torch.tensor(_sequence_lengths(generator, case.batch, most))
        starts[f"{name}_starts"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        totals[name] = int(lengths.sum())
    return totals, starts


def _laid_out(case: Case, name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """A leaf with a copy of the values, in memory as the case's strides want it."""
    values = values.clone()
    if name == "bias":
        return values.to(dtype).requires_grad_(case.bias_grad)
    if name == "sinks":
        return values.to(dtype).requires_grad_()
    if case.layout == "padded" and case.strides == "transposed":
        # As torch.nn.MultiheadAttention holds them.
        values = values.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    elif case.layout == "padded" and case.strides == "expanded":
        values = values[:, :1].to(dtype).expand(values.shape)
    else:
        return strided(values, case.strides, dtype)
    return values.detach().requires_grad_()


def arguments(
    case: Case, dtype: torch.dtype, nudge: int = 0
) -> tuple[dict[str, Tensor], dict[str, Any], torch.Generator]:
    """Leaves by name, the call's other arguments, the generator of the loss's weights.

    A ``nudge`` other than 0 moves every value by one float32 unit, up or down.
    """
    drawn, others, slopes, state = _draw(case, nudge)
    leaves = {name: _laid_out(case, name, values, dtype) for name, values in drawn.items()}
    others = dict(others)
    if slopes is not None:
        others["alibi_slopes"] = slopes.to(dtype)
    generator = torch.Generator()
    generator.set_state(state)
    return leaves, others, generator


def outputs_of(case: Case, leaves: dict[str, Tensor], others: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(3)  # the dropout's seed is drawn from torch's generator
    function = functional.attention_varlen if case.layout == "varlen" else functional.attention
    names = ["output", "lse", *(["weights"] if case.weights else [])]
    return dict(zip(names, function(**leaves, **others, return_lse=True), strict=True))


def run(
    case: Case, backend: str, dtype: torch.dtype, nudge: int = 0, *, drawn: Any = None
) -> dict[str, Tensor]:
    """Every output and gradient of the case by name, in float64.

    ``drawn`` is what ``arguments`` returned, where it is needed more than once.
    """
    leaves, others, generator = drawn or arguments(case, dtype, nudge)
    state = generator.get_state()
    with fastseq.backend(backend):
        outputs = outputs_of(case, leaves, others)
        # The weights' gradient goes by way of the composite; it is tested where it is the subject.
        scored = [name for name in outputs if name != "weights"]
        cotangents = {
            name: torch.randn(outputs[name].shape, generator=generator, dtype=torch.float64).to(
                dtype
            )
            for name in scored
        }
        generator.set_state(state)  # another run with these arguments has the same loss
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        gradients = torch.autograd.grad(
            [outputs[name] for name in scored],
            list(wanted.values()),
            [cotangents[name] for name in scored],
        )
    assert all(t.dtype is dtype for t in (*outputs.values(), *gradients))
    results = outputs | {f"grad_{name}": g for name, g in zip(wanted, gradients, strict=True)}
    return {name: tensor.detach().double() for name, tensor in results.items()}


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference; equal infinities are no difference, a lone NaN is all of it."""
    if torch.equal(a, b):
        return 0.0
    apart = torch.where(a == b, 0.0, (a - b).abs())
    return math.inf if bool(apart.isnan().any()) else float(apart.max())


def magnitude(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def expected(case: Case) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The float64 result and, by name, how far from it the kernels may be."""
    truth = run(case, "reference", torch.float64)
    sister = dataclasses.replace(case, dtype="float32")
    errors = dict.fromkeys(truth, 0.0)
    few = case.batch * case.heads * case.queries < FEW_ROWS
    for nudge in range(NUDGES_OF_FEW_ROWS if few else NUDGES):
        exact = truth
        if nudge or case.dtype == "float64":
            exact = run(sister, "reference", torch.float64, nudge)
        rounded = run(sister, "reference", torch.float32, nudge)
        for name in errors:
            errors[name] = max(errors[name], distance(rounded[name], exact[name]))
    unit = torch.finfo(getattr(torch, case.dtype)).eps
    leaves, _, _ = arguments(sister, torch.float64)
    return truth, {
        name: bound(getattr(torch, case.dtype), errors[name], magnitude(value))
        + (unit * score_units(case, name, leaves) if name.startswith("grad_") else 0.0)
        for name, value in truth.items()
    }


def score_units(case: Case, name: str, leaves: dict[str, Tensor]) -> float:
    """What a unit of the gradient of a weight amounts to in a gradient behind the softmax.

    The gradient of a score is ``P (dP - mean of dP)``. Where a row sees one key only, or one score
    is far above the others, both terms are the same number; the composite, which averages the very
    dP it subtracts from, then finds exactly zero. The kernels find the mean as ``output . dO``,
    which is as exact but rounded elsewhere: what is left is a unit of ``dP``.
    """
    # Sums over Ev of products of two values of size one.
    value = float(leaves["value"].detach().square().mean().sqrt())
    grad_weight = FREE_UNITS * case.value_size**0.5 * value / (1 - min(case.dropout, 0.9))
    # Such units add up over the rows that share a key or an element of the bias.
    if name == "grad_bias":
        pairs = case.batch * case.heads * case.queries * case.keys
        return grad_weight * (pairs / max(leaves["bias"].numel(), 1)) ** 0.5
    factor = {"grad_query": "key", "grad_key": "query"}.get(name)
    if factor is None:
        return 0.0
    rows = case.group * case.queries if name == "grad_key" else 1
    largest = float(leaves[factor].detach().abs().max())
    return grad_weight * rows**0.5 * largest / case.size**0.5


def check(case: Case) -> None:
    """Run the case on every tier with 1 and 2 threads and hold it against :func:`expected`.

    The bits must not depend on the number of threads, nor on whether autograd records.
    """
    truth, bounds = expected(case)
    dtype = getattr(torch, case.dtype)
    leaves, others, _ = drawn = arguments(case, dtype)
    before: tuple[str, dict[str, Tensor]] = ("", {})
    for tier in every_tier():
        results = run(case, KERNELS, dtype, drawn=drawn)
        compare(results, truth, bounds, tier)
        with torch.no_grad():
            inferred = outputs_of(case, leaves, others)
        for name, output in inferred.items():
            assert distance(output.double(), results[name]) == 0, f"{name} {tier}: no_grad differs"
        isa = tier.split(",")[0]
        if isa == before[0]:
            for name, value in results.items():
                same = torch.equal(value, before[1][name])
                assert same, f"{name} {tier}: bits depend on the threads"
        before = isa, results


def compare(
    actual: dict[str, Tensor], truth: dict[str, Tensor], bounds: dict[str, float], tier: str = ""
) -> None:
    assert actual.keys() == truth.keys()
    for name, value in truth.items():
        assert actual[name].shape == value.shape, name
        error = distance(actual[name], value)
        # NaN fails here, too.
        assert error <= bounds[name], f"{name} {tier}: error {error:.3e}, bound {bounds[name]:.3e}"
