"""The correctness gate: no case is timed before its results are checked.

The oracle is the same torch layer in float64 on the same values. Our largest error may be at most
1.5 times torch's own float32 error plus a few units in the last place, for every output, state and
gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastseq.bench.build import (
    BuiltCase,
    LayerInput,
    State,
    build_state,
    input_tensor,
    torch_layer,
    with_data,
)
from fastseq.bench.cases import AnyCase, Case
from fastseq.bench.transformer_cases import TransformerCase

ERROR_RATIO = 1.5
# Units in the last place of the largest value, allowed on top: at the sizes where torch happens
# to round exactly right, its own error is zero and no other order of summation could match it.
ERROR_ULPS = 4.0


@dataclass(frozen=True)
class TensorError:
    """How far one result is from the oracle, as the largest absolute difference."""

    name: str
    ours: float
    torch: float
    limit: float

    @property
    def passed(self) -> bool:
        """Within the limit; a NaN is never within it."""
        return self.ours <= self.limit


@dataclass(frozen=True)
class GateResult:
    """Errors of all results of one case."""

    errors: tuple[TensorError, ...]

    @property
    def passed(self) -> bool:
        """Every result is within its limit, and there are results."""
        return bool(self.errors) and all(error.passed for error in self.errors)

    @property
    def worst(self) -> TensorError:
        """The result that uses most of its limit."""
        return max(self.errors, key=_share_of_limit)

    def summary(self) -> str:
        """One line for a table or an assertion message."""
        if not self.errors:
            return "FAILED: nothing was compared"
        worst = self.worst
        verdict = "passed" if self.passed else "FAILED"
        return (
            f"{verdict}: {worst.name} error {worst.ours:.2e}, torch {worst.torch:.2e}, "
            f"limit {worst.limit:.2e}"
        )


def _share_of_limit(error: TensorError) -> float:
    if not error.passed:
        return float("inf")
    return error.ours / error.limit if error.limit > 0 else 0.0


def _leaf(tensor: Tensor, dtype: torch.dtype, training: bool) -> Tensor:
    # Cloned in any case: converting to the same dtype would hand back the caller's own tensor.
    return tensor.detach().to(dtype, copy=True).requires_grad_(training)


def _states(state: State) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def evaluate(
    layer: torch.nn.Module,
    layer_input: LayerInput,
    state: State,
    gradients: tuple[Tensor, ...] | None,
) -> dict[str, Tensor]:
    """Outputs, final states and, given gradients for them, the gradient of everything.

    Args:
        layer: The layer, already in the wanted dtype.
        layer_input: Input values.
        state: Initial state.
        gradients: What reaches output and final states; None for inference.
    """
    dtype, training = next(layer.parameters()).dtype, gradients is not None
    data = _leaf(input_tensor(layer_input), dtype, training)
    leaves = tuple(_leaf(s, dtype, training) for s in _states(state))
    with torch.set_grad_enabled(training):
        initial = leaves if isinstance(state, tuple) else leaves[0]
        output, final = layer(with_data(layer_input, data), initial)
    results: tuple[Tensor, ...] = (input_tensor(output), *_states(final))
    names = ["output", "hidden", "cell", "state2", "state3"][: len(results)]
    named = {name: result.detach() for name, result in zip(names, results, strict=True)}
    if gradients is not None:
        weights = dict(layer.named_parameters())
        wanted = (data, *leaves, *weights.values())
        seeds = [g.to(dtype) for g in gradients]
        computed = torch.autograd.grad(results, wanted, seeds)
        labels = ["input", *names[1:], *weights]
        named |= {f"d_{label}": g for label, g in zip(labels, computed, strict=True)}
    return named


def _sum_lengths(case: AnyCase) -> tuple[int, ...]:
    if isinstance(case, Case):
        return case.I, case.H
    return (case.E, case.F) if isinstance(case, TransformerCase) else (case.E,)


def compare(
    case: AnyCase, ours: dict[str, Tensor], peer: dict[str, Tensor], oracle: dict[str, Tensor]
) -> GateResult:
    """Hold ours and the peer's results, by name, against the oracle's."""
    info = torch.finfo(getattr(torch, case.dtype))
    # Denormals are flushed inside our kernels; each of the summed rows may lose one.
    flushed = info.tiny * max(1, case.rows())
    errors = []
    for name, exact in oracle.items():
        if ours[name].shape != exact.shape:
            raise AssertionError(f"{name}: expected {exact.shape}, got {ours[name].shape}")
        if not exact.numel():
            continue
        ours_error = (ours[name].double() - exact).abs().max().item()
        torch_error = (peer[name].double() - exact).abs().max().item()
        rounding = ERROR_ULPS * info.eps * exact.abs().max().item()
        if case.dtype == "float64":
            # The oracle has no spare digits: allow the rounding of one long sum instead.
            rounding *= max(case.rows(), *_sum_lengths(case))
        limit = ERROR_RATIO * torch_error + rounding + flushed
        errors.append(TensorError(name, ours_error, torch_error, limit))
    return GateResult(tuple(errors))


def check(built: BuiltCase) -> GateResult:
    """Compare ours and torch's results of a case with the float64 oracle.

    Training cases check every gradient too, with gradients arriving at output and final states.
    """
    case = built.case
    generator = torch.Generator().manual_seed(7)

    def sample(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(getattr(torch, case.dtype))

    state = built.state if built.state is not None else build_state(case, sample)
    gradients: tuple[Tensor, ...] | None = None
    if case.direction == "training":
        gradients = (built.output_gradient, *_states(build_state(case, sample)))
    exact_layer = torch_layer(case).double()
    exact_layer.load_state_dict(built.torch_layer.state_dict())
    layers = (built.fastseq_layer, built.torch_layer, exact_layer)
    ours, peer, oracle = (evaluate(layer, built.input, state, gradients) for layer in layers)
    return compare(case, ours, peer, oracle)
