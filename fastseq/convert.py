"""Swap the layers of an existing model for fastseq's, and back.

A fastseq layer holds exactly the attributes of its :mod:`torch.nn` counterpart, so a layer is
swapped by giving that one instance the other class. Nothing else about it changes: parameters,
buffers, hooks, handles to those hooks, extra attributes and every other reference to the layer
stay valid, and so do optimizers, tied weights and ``state_dict``. Classes are never touched, and
the root of a model can be swapped like any other module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import nn as torch_nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastseq import nn as fast_nn
from fastseq._ops.shared import overrides_dispatch
from fastseq.backends import FUSED_DTYPES

__all__ = ["Report", "Row", "convert", "revert"]

# The one table of what can be swapped: a new layer is a new row.
REGISTRY: dict[type[torch_nn.Module], type[torch_nn.Module]] = {
    torch_nn.Transformer: fast_nn.Transformer,
    torch_nn.TransformerEncoder: fast_nn.TransformerEncoder,
    torch_nn.TransformerDecoder: fast_nn.TransformerDecoder,
    torch_nn.TransformerEncoderLayer: fast_nn.TransformerEncoderLayer,
    torch_nn.TransformerDecoderLayer: fast_nn.TransformerDecoderLayer,
    torch_nn.RNN: fast_nn.RNN,
    torch_nn.LSTM: fast_nn.LSTM,
    torch_nn.GRU: fast_nn.GRU,
    torch_nn.RNNCell: fast_nn.RNNCell,
    torch_nn.LSTMCell: fast_nn.LSTMCell,
    torch_nn.GRUCell: fast_nn.GRUCell,
    torch_nn.MultiheadAttention: fast_nn.MultiheadAttention,
    torch_nn.LayerNorm: fast_nn.LayerNorm,
    torch_nn.RMSNorm: fast_nn.RMSNorm,
    torch_nn.Linear: fast_nn.Linear,
}
_REVERSE = {fast: plain for plain, fast in REGISTRY.items()}
_NAMES = {plain.__name__ for plain in REGISTRY}

# All of whose parameters are those of their parts.
_STACKS = (
    torch_nn.Transformer,
    torch_nn.TransformerEncoder,
    torch_nn.TransformerDecoder,
    torch_nn.TransformerEncoderLayer,
    torch_nn.TransformerDecoderLayer,
)
_ATTENTION_WEIGHTS = (
    "in_proj_weight",
    "q_proj_weight",
    "k_proj_weight",
    "v_proj_weight",
    "in_proj_bias",
    "bias_k",
    "bias_v",
)

Predicate: TypeAlias = Callable[[str, torch_nn.Module], bool]
Filter: TypeAlias = str | Predicate | Sequence[str | Predicate]


@dataclass(frozen=True)
class Row:
    """What became of one layer, under one of its names.

    ``new`` is empty where the layer keeps its type.
    ``status`` is ``"converted"``, ``"reverted"``, ``"skipped"`` (it cannot be swapped) or
    ``"excluded"`` (a filter left it out); ``reason`` says why where there is something to say.
    """

    fqn: str
    old: str
    new: str
    status: str
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """The rows of one :func:`convert` or :func:`revert`, printable as a table.

    ``model`` is the model that was passed in.
    """

    model: torch_nn.Module
    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def converted(self) -> tuple[Row, ...]:
        """The rows of layers that were swapped."""
        return tuple(row for row in self.rows if row.status == "converted")

    @property
    def skipped(self) -> tuple[Row, ...]:
        """The rows of layers that cannot be swapped."""
        return tuple(row for row in self.rows if row.status == "skipped")

    def _cells(self) -> list[tuple[str, str, str, str]]:
        return [
            (
                row.fqn or "(root)",
                f"{row.old} -> {row.new}" if row.new else row.old,
                row.status,
                row.reason,
            )
            for row in self.rows
        ]

    def __str__(self) -> str:
        if not self.rows:
            return "no layers found that fastseq has"
        table = [_HEADER, *self._cells()]
        widths = [max(len(cells[column]) for cells in table) for column in range(len(_HEADER))]
        table.insert(1, ("-" * widths[0], "-" * widths[1], "-" * widths[2], "-" * widths[3]))
        lines = (
            " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            for cells in table
        )
        return "\n".join(line.rstrip() for line in lines)

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        if not self.rows:
            return str(self)
        table = Table(*_HEADER)
        colours = {"converted": "green", "reverted": "green", "skipped": "yellow"}
        for fqn, change, status, reason in self._cells():
            # Text keeps square brackets in names from being read as markup.
            table.add_row(
                Text(fqn), Text(change), Text(status, colours.get(status, "dim")), Text(reason)
            )
        return table


_HEADER = ("fqn", "old -> new", "status", "reason")


def convert(
    model: torch_nn.Module,
    *,
    include: Filter | None = None,
    exclude: Filter | None = None,
    strict: bool = False,
    verbose: bool = True,
) -> Report:
    """Make every :mod:`torch.nn` layer in ``model`` that fastseq has a fastseq layer, in place.

    Only instances of exactly the registered types are swapped, whole Transformer layers and stacks
    of them along with their parts. A layer that appears several times in the tree is swapped once.
    Layers that cannot be swapped are left as they are, each with its reason in the report:
    subclasses, parametrized, pruned or otherwise recomputed weights, quantized and TorchScript
    modules, dtypes and devices without fused kernels, instances whose ``forward`` was replaced. The
    output projection inside an attention layer is part of that layer, which reads its weights and
    never calls it, and is not listed.

    Args:
        model: the model; it may itself be such a layer.
        include: swap only layers whose fully qualified name matches: a glob
            (``"encoder.*"``), a predicate ``(fqn, module) -> bool``, or a list of those of
            which one must match. Default: all.
        exclude: leave out the layers that match, in the same notation; wins over ``include``.
        strict: raise if any layer has to be skipped. Excluded layers do not count.
        verbose: print the report, by means of ``rich`` where it is installed.

    Returns:
        The report; ``report.model`` is ``model``.

    Raises:
        ValueError: with ``strict``, listing what cannot be swapped; nothing was changed then.
        TypeError: ``model`` is not a module, or a filter is neither string nor predicate.
    """
    _check_model(model)
    rows: list[Row] = []
    chosen: list[torch_nn.Module] = []
    parts = _attention_parts(model)
    for module, fqns in _unique_modules(model):
        names = _old_and_new(module)
        if names is None or id(module) in parts:
            continue
        status, reason = "converted", ""
        if not any(_matches(include, fqn, module, default=True) for fqn in fqns):
            status, reason = "excluded", "not matched by include"
        elif any(_matches(exclude, fqn, module, default=False) for fqn in fqns):
            status, reason = "excluded", "matched by exclude"
        elif obstacle := _obstacle(module):
            status, reason = "skipped", obstacle
        else:
            chosen.append(module)
        old, new = names
        rows += _rows(fqns, old, new if status == "converted" else "", status, reason)
    report = Report(model, tuple(rows))
    if strict and report.skipped:
        listed = "\n".join(f"  {row.fqn or '(root)'}: {row.reason}" for row in report.skipped)
        raise ValueError(f"cannot convert {len(report.skipped)} layer(s):\n{listed}")
    for module in chosen:
        module.__class__ = REGISTRY[type(module)]
    if verbose:
        _print(report)
    return report


def revert(model: torch_nn.Module, *, verbose: bool = False) -> Report:
    """Give every fastseq layer in ``model`` back the type of its :mod:`torch.nn` counterpart.

    Undoes :func:`convert` exactly, at any later time: parameters, hooks and state are the layer's
    own and are not touched.

    Args:
        model: the model; it may itself be such a layer.
        verbose: print the report.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_model(model)
    rows: list[Row] = []
    for module, fqns in _unique_modules(model):
        plain = _REVERSE.get(type(module))
        if plain is not None and (reason := _without_counterpart(module)):
            rows += _rows(fqns, _name(type(module)), "", "skipped", reason)
        elif plain is not None:
            rows += _rows(fqns, _name(type(module)), _name(plain), "reverted", "")
            module.__class__ = plain
        elif isinstance(module, tuple(_REVERSE)):
            reason = "a subclass of the fastseq layer, or a parametrized one"
            rows += _rows(fqns, _name(type(module)), "", "skipped", reason)
    report = Report(model, tuple(rows))
    if verbose:
        _print(report)
    return report


def _without_counterpart(module: torch_nn.Module) -> str:
    """Which option of a fastseq layer torch's has not; empty where there is none."""
    if isinstance(module, fast_nn.MultiheadAttention):
        if module.num_kv_heads is not None:
            return "torch.nn.MultiheadAttention has no num_kv_heads"
        if "rope" in module._modules:
            return "torch.nn.MultiheadAttention has no rope"
    if isinstance(module, fast_nn.TransformerDecoderLayer) and not module.cross_attention:
        return "torch.nn.TransformerDecoderLayer has no cross_attention=False"
    return ""


def _check_model(model: object) -> None:
    if not isinstance(model, torch_nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _unique_modules(
    model: torch_nn.Module,
) -> Iterable[tuple[torch_nn.Module, list[str]]]:
    """Each module once, in tree order, with all of its names."""
    found: dict[int, tuple[torch_nn.Module, list[str]]] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), (module, []))[1].append(fqn)
    return found.values()


def _attention_parts(model: torch_nn.Module) -> set[int]:
    """The output projections of attention layers, by identity."""
    return {
        id(module.out_proj)
        for module in model.modules()
        if isinstance(module, torch_nn.MultiheadAttention)
        and isinstance(module.out_proj, NonDynamicallyQuantizableLinear)
    }


def _rows(fqns: Sequence[str], old: str, new: str, status: str, reason: str) -> Iterator[Row]:
    yield Row(fqns[0], old, new, status, reason)
    for fqn in fqns[1:]:
        yield Row(fqn, old, new, status, reason or f"the same module as {fqns[0] or '(root)'}")


def _name(kind: type[torch_nn.Module]) -> str:
    if kind in REGISTRY:
        return f"torch.nn.{kind.__name__}"
    if kind in _REVERSE:
        return f"fastseq.nn.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def _old_and_new(module: torch_nn.Module) -> tuple[str, str] | None:
    """The type's name and that of its fastseq layer, ``None`` where it resembles none of them."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        name = str(getattr(module, "original_name", ""))
        return (f"torch.jit:{name}", f"fastseq.nn.{name}") if name in _NAMES else None
    if issubclass(kind, tuple(_REVERSE)):
        return None
    for plain, fast in REGISTRY.items():
        if isinstance(module, plain):
            return _name(kind), _name(fast)
    if _is_quantized(kind) and kind.__name__ in _NAMES:
        return _name(kind), f"fastseq.nn.{kind.__name__}"
    return None


def _is_quantized(kind: type[torch_nn.Module]) -> bool:
    return kind.__module__.startswith(("torch.ao.", "torch.nn.quantiz"))


def _obstacle(module: torch_nn.Module) -> str:
    """Why ``module`` cannot be swapped; empty where it can."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript module"
    if _is_quantized(kind):
        return "quantized"
    if torch_nn.utils.parametrize.is_parametrized(module):
        return f"parametrized: {', '.join(module.parametrizations)}"  # type: ignore[arg-type]
    if kind not in REGISTRY:
        return f"subclass of torch.nn.{_base_name(kind)}, which may compute something else"
    for name in ("forward", "_sa_block", "_mha_block", "_ff_block"):
        if name in vars(module):
            return f"{name} was replaced on this instance"
    if getattr(module, "qconfig", None) is not None:
        return "prepared for quantization: it has a qconfig"
    return _weight_obstacle(module)


def _base_name(kind: type[torch_nn.Module]) -> str:
    return next(plain.__name__ for plain in REGISTRY if issubclass(kind, plain))


def _weight_obstacle(module: torch_nn.Module) -> str:
    for name in _weight_names(module):
        if name not in module._parameters and getattr(module, name, None) is not None:
            how = "pruned" if f"{name}_mask" in module._buffers else "recomputed by a hook"
            return f"{name} is not a plain parameter: {how}"
    # Not only the module's own: attention holds its output projection in a submodule.
    parameters = list(module.parameters())
    devices = {parameter.device.type for parameter in parameters}
    dtypes = {parameter.dtype for parameter in parameters}
    if devices - {"cpu"}:  # norms may have no parameters at all
        return f"no fused kernels for device {', '.join(sorted(devices))}"
    for parameter in parameters:
        if overrides_dispatch(parameter):
            return f"no fused kernels for parameters of type {type(parameter).__name__}"
    layouts = {parameter.layout for parameter in parameters}
    if layouts - {torch.strided}:
        return f"no fused kernels for layout {', '.join(sorted(map(str, layouts)))}"
    if len(dtypes) > 1 or not dtypes <= FUSED_DTYPES:
        return f"no fused kernels for dtype {', '.join(sorted(map(str, dtypes)))}"
    return ""


def _weight_names(module: torch_nn.Module) -> Sequence[str]:
    if isinstance(module, torch_nn.RNNBase):
        return module._flat_weights_names
    if isinstance(module, torch_nn.MultiheadAttention):
        return _ATTENTION_WEIGHTS
    if isinstance(module, _STACKS):
        return ()
    if isinstance(module, (torch_nn.Linear, torch_nn.LayerNorm, torch_nn.RMSNorm)):
        return ("weight", "bias")
    return ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _matches(chosen: Filter | None, fqn: str, module: torch_nn.Module, default: bool) -> bool:
    if chosen is None:
        return default
    if isinstance(chosen, str):
        return fnmatchcase(fqn, chosen)
    if callable(chosen):
        return bool(chosen(fqn, module))
    if isinstance(chosen, Sequence):
        return any(_matches(one, fqn, module, default) for one in chosen)
    raise TypeError(
        f"include and exclude take a glob, a predicate or a list of those, got {chosen!r}"
    )


def _print(report: Report) -> None:
    try:
        from rich.console import Console
    except ImportError:
        print(report)
    else:
        Console().print(report)
