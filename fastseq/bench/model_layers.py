"""The layers of a user's model, each timed on the input that it gets in the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastseq import backends
from fastseq.bench.model_source import MODULE_PREFIX, Example
from fastseq.bench.model_values import describe, floating, map_tensors, signature
from fastseq.bench.timing import Timing, interleave
from fastseq.convert import Report, Row

__all__ = ["Layer", "Whole", "find_layers", "time_layers", "time_whole"]

OURS, TORCH = "fastseq", "torch"
NO_SUCH_LAYER = "fastseq has no such layer"

# Both libraries run on the same OpenMP threads, so neither has to wait until those of the other
# sleep; and in a model nobody pauses between two layers.
_PAUSE_SECONDS = 0.0
_LAYER_VISITS = 21

# These only call their layers one after the other: the layers are what is worth a row.
_STACKS = ("Transformer", "TransformerEncoder", "TransformerDecoder")


@dataclass
class Layer:
    """One row: a layer at one shape, and all layers that are like it.

    Attributes:
        names: Fully qualified names of the layers that are alike at this shape.
        old: The type in the torch model.
        new: The type in the converted model; empty for a layer that stays.
        reason: Why it stays; what was noticed about it otherwise.
        shape: What it is called with.
        calls: How often one forward of the model calls them, all together.
        timings: Seconds per call, by library.
        problem: Why there are no timings.
        example: Its input.
        autocast: The dtype of the autocast around it, if there is one.
    """

    names: list[str]
    old: str
    new: str
    reason: str
    shape: str = ""
    calls: int = 0
    timings: dict[str, Timing] = field(default_factory=dict)
    problem: str = ""
    example: Example | None = field(default=None, repr=False)
    autocast: torch.dtype | None = None

    @property
    def converted(self) -> bool:
        """Whether fastseq runs it."""
        return bool(self.new)

    def seconds(self, library: str) -> float | None:
        """Seconds in one forward of the model; a layer that stays takes torch's time in both."""
        timing = self.timings.get(library if self.converted else TORCH)
        return None if timing is None else timing.median_s * self.calls

    @property
    def speedup(self) -> float | None:
        """Torch's time over ours."""
        if OURS not in self.timings or TORCH not in self.timings:
            return None
        return self.timings[TORCH].median_s / self.timings[OURS].median_s


@dataclass
class Whole:
    """One direction of the whole model: its timings and those of its layers."""

    direction: str
    timings: dict[str, Timing]
    layers: list[Layer]

    @property
    def speedup(self) -> float:
        """Torch's time over ours."""
        return self.timings[TORCH].median_s / self.timings[OURS].median_s

    def share(self, layer: Layer) -> float | None:
        """The layer's part of the torch model's time."""
        seconds = layer.seconds(TORCH)
        return None if seconds is None else seconds / self.timings[TORCH].median_s

    def total(self, library: str, converted: bool) -> float:
        """Seconds in all layers that were, or were not, converted."""
        chosen = (layer for layer in self.layers if layer.converted is converted)
        return sum(layer.seconds(library) or 0.0 for layer in chosen)

    def rest(self, library: str) -> float:
        """Seconds in the model's own code, between the layers; below zero within the noise."""
        timed = self.total(library, True) + self.total(library, False)
        return self.timings[library].median_s - timed


def _candidates(model: nn.Module, report: Report) -> Iterator[tuple[str, nn.Module, Row]]:
    """The outermost layers worth a row, each once: those converted, and all other leaves."""
    rows = {row.fqn: row for row in report.rows}
    changed = {row.fqn for row in report.converted}
    seen: set[int] = set()

    def visit(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, Row]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        row = rows.get(name)
        inside = any(other.startswith(f"{name}." if name else "") for other in changed - {name})
        children = list(module.named_children())
        if row is not None and row.status == "converted":
            whole = type(module).__name__ not in _STACKS
        else:
            whole = not children or (row is not None and not inside)
        if whole:
            kind = type(module)
            fallback = Row(name, f"{kind.__module__}.{kind.__qualname__}", "", "", NO_SUCH_LAYER)
            yield name, module, row or fallback
            return
        for child_name, child in children:
            yield from visit(f"{name}.{child_name}" if name else child_name, child)

    yield from visit("", model)


def find_layers(
    model: nn.Module, report: Report, example: Example, *, training: bool, seed: int
) -> list[Layer]:
    """Run the torch model once and note what each of its layers is called with.

    Args:
        model: The torch model, in the mode that is to be timed.
        report: What :func:`fastseq.convert` made of its twin.
        example: The model's input.
        training: Whether gradients are recorded.
        seed: For the random numbers in the model.

    Returns:
        A row per layer and distinct input shape, layers that are alike in one row, in the order of
        the first call; then the convertible layers that were never called.
    """
    found: dict[tuple[Any, ...], Layer] = {}
    uncalled: list[Layer] = []
    called: set[str] = set()

    def watch(name: str, module: nn.Module, row: Row) -> Callable[..., None]:
        identity = (type(module), repr(module), row.status, row.reason)
        shown = _short(row.old), _short(row.new), row.reason

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            called.add(name)
            key = (*identity, module.training, signature(args), signature(kwargs))
            layer = found.get(key)
            if layer is None:
                layer = found[key] = Layer([], *shown, describe(args, kwargs))
                layer.example = Example(*map_tensors((args, kwargs), _kept))
                if torch.is_autocast_enabled("cpu"):
                    layer.autocast = torch.get_autocast_dtype("cpu")
            layer.calls += 1
            if name not in layer.names:
                layer.names.append(name)

        return note

    candidates = list(_candidates(model, report))
    with ExitStack() as stack:
        for name, module, row in candidates:
            try:
                handle = module.register_forward_pre_hook(
                    watch(name, module, row), with_kwargs=True
                )
            except Exception:  # TorchScript modules take no such hooks
                uncalled.append(
                    Layer([name], _short(row.old), "", row.reason, problem="takes no hooks")
                )
                called.add(name)
            else:
                stack.callback(handle.remove)
        fresh = map_tensors((example.args, example.kwargs), _kept)
        torch.manual_seed(seed)
        with torch.set_grad_enabled(training):
            model(*fresh[0], **fresh[1])
    for name, _, row in candidates:
        if name not in called and row.reason != NO_SUCH_LAYER:
            old, new = _short(row.old), _short(row.new)
            uncalled.append(Layer([name], old, new, row.reason, problem="never called"))
    return [*found.values(), *uncalled]


def _short(name: str) -> str:
    """``torch.nn.modules.sparse.Embedding`` is known as ``torch.nn.Embedding``."""
    if name.startswith("torch.nn.modules."):
        return f"torch.nn.{name.rpartition('.')[2]}"
    return name.removeprefix(MODULE_PREFIX)


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _call(module: nn.Module, example: Example, training: bool) -> tuple[Callable[[], object], bool]:
    """Forward, or forward and backward, on a copy of the input; whether there is a backward."""
    args, kwargs = map_tensors((example.args, example.kwargs), _kept)
    if not training:
        return (lambda: module(*args, **kwargs)), False
    first = _outputs(module(*args, **kwargs))
    inputs = floating((args, kwargs)).values()
    sources = [
        *(tensor for tensor in inputs if tensor.requires_grad),
        *(parameter for parameter in module.parameters() if parameter.requires_grad),
    ]
    gradients = [torch.randn_like(tensor) for tensor in first]
    if not sources or not gradients:
        return (lambda: module(*args, **kwargs)), False
    gradient = torch.autograd.grad

    def step() -> object:
        return gradient(_outputs(module(*args, **kwargs)), sources, gradients, allow_unused=True)

    step()
    return step, True


def _outputs(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.requires_grad else []
    return [tensor for tensor in floating(value).values() if tensor.requires_grad]


def time_whole(
    models: Mapping[str, nn.Module], example: Example, direction: str, seconds: float
) -> dict[str, Timing]:
    """Time the models side by side."""
    training = direction == "training"
    with torch.set_grad_enabled(training):
        calls = {name: _call(model, example, training)[0] for name, model in models.items()}
        return interleave(calls, seconds=seconds, settle_seconds=_PAUSE_SECONDS)


def time_layers(
    layers: Sequence[Layer], models: Mapping[str, nn.Module], direction: str, seconds: float
) -> Iterator[Layer]:
    """Time each layer in both models, ours where it was converted; yields it before it is timed.

    What keeps a layer from being timed, and what makes a converted one fall back to torch, is noted
    in it.
    """
    training = direction == "training"
    for layer in layers:
        if layer.example is None:
            continue
        yield layer
        libraries = (TORCH, OURS) if layer.converted else (TORCH,)
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.set_grad_enabled(training))
                if layer.autocast is not None:
                    stack.enter_context(torch.autocast("cpu", layer.autocast))
                calls = {}
                for library in libraries:
                    module = models[library].get_submodule(layer.names[0])
                    with _Fallbacks() as fallbacks:
                        calls[library], backward = _call(module, layer.example, training)
                        if not training:
                            calls[library]()
                    if fallbacks.reasons:
                        layer.reason = f"falls back to torch: {'; '.join(fallbacks.reasons)}"
                if training and not backward:
                    layer.reason = layer.reason or "forward only: no gradient passes it"
                layer.timings = interleave(
                    calls,
                    seconds=seconds,
                    minimum_visits=_LAYER_VISITS,
                    settle_seconds=_PAUSE_SECONDS,
                )
        except Exception as error:
            layer.problem = f"{type(error).__name__}: {' '.join(str(error).split())}"


class _Fallbacks:
    """Collects why fastseq's layers handed their work to torch, in the block."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def __enter__(self) -> _Fallbacks:
        backends._warned_reasons.clear()  # each reason is told once, and here once per layer
        self._catch = warnings.catch_warnings(record=True)
        self._caught = self._catch.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, *exception: Any) -> None:
        self._catch.__exit__(*exception)
        for warning in self._caught or ():
            if issubclass(warning.category, backends.FastseqFallbackWarning):
                reason = str(warning.message).rpartition("here: ")[2]
                if reason not in self.reasons:
                    self.reasons.append(reason)
