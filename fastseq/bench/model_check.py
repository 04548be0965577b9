"""The gate of a user's model: outputs and every gradient against the torch model in float64.

The rule is that of :mod:`fastseq.bench.gate`: at most 1.5 times torch's own error plus 4 units in
the last place. A whole model is a long way for a rounding error, and the largest of a few numbers
is a matter of luck, so "torch's own error" of a result that fails at first is the largest of
several runs, in which every weight and input is moved by at most one unit in the last place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastseq.bench.gate import ERROR_RATIO, ERROR_ULPS, GateResult, TensorError
from fastseq.bench.model_source import Example, user_code
from fastseq.bench.model_values import floating, map_tensors

__all__ = ["Check", "Models", "check", "evaluate"]

Results = dict[str, Tensor]
State = Mapping[str, Any]

_RUNS = 4
# A float64 model's oracle has no spare digits: allow the rounding of a sum of this many terms.
_FLOAT64_TERMS = 1000
# Denormals are flushed inside our kernels; each summed value may lose one.
_FLUSHED = 10_000
# Where torch itself is further off than this (norm of the difference over norm), the model in
# float64 does something else, draws other random numbers say, and is no oracle.
_ORACLE_TOLERANCE = 1e-2
# Without an oracle ours is held against torch's result in the same dtype, in units of epsilon.
_ULPS_WITHOUT_ORACLE = {"output": 1e3, "gradient": 1e4}
_DROPOUT_NAMES = ("dropout", "dropout_p", "attn_dropout", "attention_dropout")


@dataclass(frozen=True)
class Models:
    """The same model three times: torch's, the converted one, and in float64 if that works."""

    torch: nn.Module
    fastseq: nn.Module
    exact: nn.Module | None
    path: Path


@dataclass(frozen=True)
class Check:
    """What the gate found, and under which circumstances."""

    gate: GateResult
    notes: tuple[str, ...] = ()
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Every result is within its limit and the converted model ran."""
        return not self.failure and self.gate.passed

    @property
    def failed(self) -> tuple[TensorError, ...]:
        """The results beyond their limits, the worst first."""
        beyond = [error for error in self.gate.errors if not error.passed]
        return tuple(sorted(beyond, key=lambda one: one.limit / max(one.ours, 1e-300)))


def evaluate(
    model: nn.Module,
    example: Example,
    *,
    training: bool,
    state: State | None = None,
    seed: int = 0,
) -> Results:
    """Outputs by name and, in training, the gradient of every input and parameter.

    Outputs receive random gradients, the same for the same names and shapes. The model's mode is
    the caller's business; random numbers in the model start from ``seed``.
    """
    if state is not None:
        model.load_state_dict(state)
    fresh = map_tensors(
        (example.args, example.kwargs),
        lambda t: t.detach().clone().requires_grad_(training and t.requires_grad),
    )
    args, kwargs = fresh
    torch.manual_seed(seed)
    with torch.set_grad_enabled(training):
        outputs = floating(model(*args, **kwargs), "output")
    results = {name: tensor.detach() for name, tensor in outputs.items()}
    if not training:
        return results
    sources = {name: t for name, t in floating(args, "input").items() if t.requires_grad}
    sources |= {name: t for name, t in floating(kwargs, "input").items() if t.requires_grad}
    sources |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    reached = [tensor for tensor in outputs.values() if tensor.requires_grad]
    if not reached or not sources:
        return results
    generator = torch.Generator().manual_seed(7)
    seeds = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in reached]
    found = torch.autograd.grad(reached, list(sources.values()), seeds, allow_unused=True)
    for (name, source), gradient in zip(sources.items(), found, strict=True):
        results[f"d_{name}"] = torch.zeros_like(source) if gradient is None else gradient
    return results


def check(models: Models, example: Example, directions: Sequence[str], seed: int) -> Check:
    """Hold the converted model against the oracle: ``eval()`` outputs, and gradients to train.

    Raises:
        UserCodeError: the torch model raises.
    """
    state = {name: _copy(one) for name, one in models.torch.state_dict().items()}
    errors: list[TensorError] = []
    notes: list[str] = []
    for training in (False, True):
        if training and "training" not in directions:
            continue
        kept = [model for model in (models.torch, models.fastseq, models.exact) if model]
        with _mode(kept, training), _without_dropout(kept) as silenced:
            if training:
                if silenced:
                    notes.append("gradients are checked with dropout off")
                if _is_random(models, example, state):
                    notes.append(
                        "gradients are checked in eval(): the model draws random numbers in train()"
                    )
                    for model in kept:
                        model.eval()
            found = _check_direction(models, example, training, state, seed, notes)
        if isinstance(found, str):
            return Check(GateResult(tuple(errors)), tuple(notes), found)
        errors += found
    for model in kept:
        model.load_state_dict(state)
    return Check(GateResult(tuple(errors)), tuple(dict.fromkeys(notes)))


def _check_direction(
    models: Models,
    example: Example,
    training: bool,
    state: State,
    seed: int,
    notes: list[str],
) -> list[TensorError] | str:
    options = {"training": training, "state": state, "seed": seed}
    with user_code(models.path, "running the torch model"):
        peer = evaluate(models.torch, example, **options)  # type: ignore[arg-type]
    try:
        ours = evaluate(models.fastseq, example, **options)  # type: ignore[arg-type]
    except Exception as error:
        reason = " ".join(str(error).split())
        return f"the converted model raised {type(error).__name__}: {reason}"
    mode = "training" if training else "inference"
    for name, expected in peer.items():
        if name not in ours or ours[name].shape != expected.shape:
            shape = tuple(ours[name].shape) if name in ours else "nothing"
            return f"{mode} {name}: expected {tuple(expected.shape)}, got {shape}"
    if training and not any(name.startswith("d_") for name in peer):
        notes.append("no output has a gradient: nothing to check in training")
    oracle, problem = _oracle(models, example, peer, options)
    if oracle is None:
        notes.append(f"no float64 oracle ({problem}): held against torch's own results instead")
        return [_without_oracle(mode, name, ours[name], peer[name]) for name in peer]
    pairs = {name: (ours[name], peer[name]) for name in peer}
    errors = [_with_oracle(mode, name, *pairs[name], oracle) for name in peer]
    if all(error.passed for error in errors):
        return errors
    notes.append(
        f"{mode}: torch's own error is the largest of {_RUNS + 1} runs, with weights and "
        "inputs moved by at most one unit in the last place"
    )
    for run in range(_RUNS):
        moved, moved_example = _moved(state, example, run)
        again = evaluate(models.torch, moved_example, training=training, state=moved, seed=seed)
        for index, (name, before) in enumerate(zip(peer, errors, strict=True)):
            after = _with_oracle(mode, name, ours[name], again[name], oracle)
            if after.torch > before.torch:
                errors[index] = after
    return errors


def _oracle(
    models: Models, example: Example, peer: Results, options: dict[str, object]
) -> tuple[Results | None, str]:
    if models.exact is None:
        return None, "the model does not convert to it"
    args, kwargs = map_tensors(
        (example.args, example.kwargs),
        lambda t: (
            t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        ),
    )
    try:
        oracle = evaluate(models.exact, Example(args, kwargs), **options)  # type: ignore[arg-type]
    except Exception as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())}"
    for name, found in peer.items():
        exact = oracle.get(name)
        if exact is None or exact.shape != found.shape:
            return None, f"{name} is missing or of another shape in it"
        if name.startswith("output"):
            usable = exact.isfinite() & found.isfinite()
            difference = (found.double() - exact)[usable].norm()
            scale = exact[usable].norm()
            if difference > _ORACLE_TOLERANCE * scale and difference > 1e-6:
                return None, f"{name} is another one in it, by {float(difference / scale):.0%}"
    return oracle, ""


def _with_oracle(mode: str, name: str, ours: Tensor, peer: Tensor, oracle: Results) -> TensorError:
    exact, info = oracle[name], torch.finfo(peer.dtype)
    # Sums that cancel, the gradient of a key's bias say, are rounded as their terms are: the
    # largest gradient of the same layer tells their size.
    family = [name]
    if name.startswith("d_"):
        parent = name.rpartition(".")[0]
        family += [other for other in oracle if other.rpartition(".")[0] == parent]
    largest = max(_largest(oracle[member]) for member in family)
    rounding = ERROR_ULPS * info.eps * largest
    if peer.dtype == torch.float64:
        rounding *= _FLOAT64_TERMS
    torch_error = _difference(peer, exact)
    limit = ERROR_RATIO * torch_error + rounding + _FLUSHED * info.tiny
    return TensorError(f"{mode} {name}", _difference(ours, exact), torch_error, limit)


def _without_oracle(mode: str, name: str, ours: Tensor, peer: Tensor) -> TensorError:
    ulps = _ULPS_WITHOUT_ORACLE["gradient" if name.startswith("d_") else "output"]
    limit = ulps * torch.finfo(peer.dtype).eps * max(_largest(peer), 1e-30)
    return TensorError(f"{mode} {name}", _difference(ours, peer), 0.0, limit)


def _largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def _difference(found: Tensor, exact: Tensor) -> float:
    """The largest absolute difference; infinities and NaN have to be where the oracle's are."""
    found, exact = found.double(), exact.double()
    finite = exact.isfinite()
    if not torch.equal(found[~finite].nan_to_num(0.5), exact[~finite].nan_to_num(0.5)):
        return float("inf")
    if not finite.any():
        return 0.0
    return (found - exact)[finite].abs().max().item()


def _moved(state: State, example: Example, run: int) -> tuple[State, Example]:
    """Every weight and input up or down by one unit in the last place, or as it was."""
    generator = torch.Generator().manual_seed(run)
    args, kwargs = map_tensors(
        (example.args, example.kwargs),
        lambda t: _move(t.detach(), generator).requires_grad_(t.requires_grad),
    )
    moved = {
        name: _move(one, generator) if isinstance(one, Tensor) else one
        for name, one in state.items()
    }
    return moved, Example(args, kwargs)


def _copy(value: Any) -> Any:
    """A state_dict may hold more than tensors."""
    return value.clone() if isinstance(value, Tensor) else value


def _move(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.clone()
    steps = torch.randint(-1, 2, tensor.shape, generator=generator).to(tensor.dtype)
    return tensor * (1 + steps * torch.finfo(tensor.dtype).eps)


@contextmanager
def _mode(models: Sequence[nn.Module], training: bool) -> Iterator[None]:
    for model in models:
        model.train(training)
    yield
    for model in models:
        model.eval()


@contextmanager
def _without_dropout(models: Sequence[nn.Module]) -> Iterator[bool]:
    """Set every dropout probability to 0 in the block; true if any was not."""
    changed: list[tuple[nn.Module, str, float]] = []
    for model in models:
        for module in model.modules():
            names = ("p",) if isinstance(module, nn.modules.dropout._DropoutNd) else _DROPOUT_NAMES
            for name in names:
                value = vars(module).get(name)
                if isinstance(value, float) and value > 0:
                    changed.append((module, name, value))
                    setattr(module, name, 0.0)
    try:
        yield bool(changed)
    finally:
        for module, name, value in changed:
            setattr(module, name, value)


def _is_random(models: Models, example: Example, state: State) -> bool:
    """Whether the torch model, as it is set now, gives another result from another seed."""
    runs = []
    for seed in (1, 2):
        with user_code(models.path, "running the torch model"), torch.no_grad():
            runs.append(evaluate(models.torch, example, training=False, state=state, seed=seed))
    return any(not torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
