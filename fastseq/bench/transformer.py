"""Transformer cases made concrete: inputs, what is called in either library, and the gate.

torch's peers are its own functions and modules, as they are and compiled. Generation has a file of
its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastseq
import fastseq.nn
from fastseq.bench.gate import GateResult, TensorError, compare
from fastseq.bench.transformer_cases import NORMS, TransformerCase

Library = Literal["torch", "fastseq"]

EPS = 1e-5
# How far a gradient that went through ReLU may be from the oracle's, relative and on the whole:
# where rounding moves a value across zero, a whole term of a sum comes or goes.
_KINK_TOLERANCE = 1e-2

_ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@dataclass
class BuiltTransformer:
    """A Transformer case made concrete.

    Attributes:
        case: What was built.
        leaves: Inputs, and a function's weights: what gets a gradient in training, by name.
        masks: Keyword arguments of a module's call.
        valid: Rows of the output that are no padding (B, S), or None where all are.
        output_gradient: Gradient that reaches the output in training; zero for padding.
        callees: The function or module of either library, modules holding equal weights.
    """

    case: TransformerCase
    leaves: dict[str, Tensor]
    masks: dict[str, Any]
    valid: Tensor | None
    output_gradient: Tensor
    callees: dict[Library, Callable[..., Tensor]]


def build(case: TransformerCase, seed: int = 0) -> BuiltTransformer:
    """Make inputs and callees of a case: the same bits on every call.

    Raises:
        ValueError: The case is one of generation, see ``fastseq.bench.generation``.
    """
    if case.layer == "generation":
        raise ValueError(f"layer must not be 'generation' here, got {case.name!r}")
    generator = torch.Generator().manual_seed(seed + zlib.crc32(case.name.encode()))
    dtype = getattr(torch, case.dtype)

    def sample(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (values * scale).to(dtype)

    masks: dict[str, Any] = {}
    valid = None
    if case.layer == "linear" or case.layer in NORMS:
        features = case.F if case.layer == "linear" else case.E
        leaves = {"input": sample(case.S, case.E)}
        if case.layer == "linear":
            leaves["weight"] = sample(case.F, case.E, scale=case.E**-0.5)
            leaves["bias"] = sample(case.F)
        else:
            leaves["weight"] = 1 + sample(case.E, scale=0.1)
            if case.layer == "layer_norm":
                leaves["bias"] = sample(case.E, scale=0.1)
        if case.options.residual or case.layer in NORMS:
            leaves["residual"] = sample(case.S, features)
        gradient = sample(case.S, features)
        callees = {library: function(case, library) for library in _LIBRARIES}
    else:
        leaves = {"input": sample(case.B, case.S, case.E)}
        if case.layer != "encoder":
            leaves["memory" if case.layer == "decoder" else "target"] = sample(
                case.B, case.S, case.E
            )
            mask = nn.Transformer.generate_square_subsequent_mask(case.S, dtype=dtype)
            masks = {"tgt_mask": mask, "tgt_is_causal": True}
        gradient = sample(case.B, case.S, case.E)
        if case.options.ragged:
            valid = torch.arange(case.S) < torch.tensor(case.lengths()).unsqueeze(-1)
            masks["src_key_padding_mask"] = ~valid
            gradient *= valid.unsqueeze(-1)
        theirs = module(case, "torch", seed=seed)
        ours = module(case, "fastseq")
        ours.load_state_dict(theirs.state_dict())
        callees = {"torch": theirs, "fastseq": ours}
    return BuiltTransformer(case, leaves, masks, valid, gradient, callees)


_LIBRARIES: tuple[Library, ...] = ("torch", "fastseq")


def function(
    case: TransformerCase, library: Library, dropout: float | None = None
) -> Callable[..., Tensor]:
    """The function of a linear case or a norm, of the case's leaves by name."""
    shape = (case.E,)
    if case.layer in NORMS:
        if library == "fastseq":
            if case.layer == "rms_norm":
                return lambda input, weight, residual: fastseq.functional.add_rms_norm(
                    input, residual, shape, weight, EPS
                )
            return lambda input, weight, bias, residual: fastseq.functional.add_layer_norm(
                input, residual, shape, weight, bias, EPS
            )
        if case.layer == "rms_norm":
            return lambda input, weight, residual: F.rms_norm(input + residual, shape, weight, EPS)
        return lambda input, weight, bias, residual: F.layer_norm(
            input + residual, shape, weight, bias, EPS
        )
    name = case.options.activation
    probability = case.options.dropout if dropout is None else dropout
    if library == "fastseq":
        return lambda input, weight, bias, residual=None: fastseq.functional.linear(
            input, weight, bias, name, residual, dropout_p=probability
        )
    activation = _ACTIVATIONS.get(name)

    def linear(input: Tensor, weight: Tensor, bias: Tensor, residual: Any = None) -> Tensor:
        output = F.linear(input, weight, bias)
        if activation is not None:
            output = activation(output)
        if probability:
            output = F.dropout(output, probability)
        return output if residual is None else output + residual

    return linear


def module(
    case: TransformerCase,
    library: Library,
    *,
    activation: Callable[[Tensor], Tensor] = F.relu,
    dropout: float | None = None,
    seed: int = 0,
) -> nn.Module:
    """The module of a case, initialised from ``seed`` and the case's name."""
    layers: Any = torch.nn if library == "torch" else fastseq.nn
    arguments: dict[str, Any] = {
        "d_model": case.E,
        "nhead": case.heads,
        "dim_feedforward": case.F,
        "dropout": case.options.dropout if dropout is None else dropout,
        "activation": activation,
        "batch_first": True,
        "dtype": getattr(torch, case.dtype),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + zlib.crc32(case.name.encode()))
        built: nn.Module
        if case.layer == "encoder":
            built = layers.TransformerEncoderLayer(**arguments)
        elif case.layer == "decoder":
            built = layers.TransformerDecoderLayer(**arguments)
        else:
            depths = {"num_encoder_layers": case.depth, "num_decoder_layers": case.depth}
            built = layers.Transformer(**arguments, **depths)
    return built.train(case.direction == "training")


def timed_call(
    built: BuiltTransformer, library: Library, callee: Callable[..., Tensor] | None = None
) -> Callable[[], object]:
    """What the case times: forward for inference, forward and backward for training.

    Args:
        built: The case.
        library: Whose callee to run.
        callee: What to run in place of it, the same one compiled.
    """
    original = built.callees[library]
    run = original if callee is None else callee
    masks = built.masks
    if built.case.direction == "inference":
        leaves = built.leaves
        return lambda: _forward(built, run, leaves, masks)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in built.leaves.items()}
    wanted = [*leaves.values(), *_parameters(original).values()]
    gradient = built.output_gradient
    return lambda: torch.autograd.grad(_forward(built, run, leaves, masks), wanted, gradient)


def _forward(
    built: BuiltTransformer,
    callee: Callable[..., Tensor],
    leaves: dict[str, Tensor],
    masks: dict[str, Any],
) -> Tensor:
    # A compiled module is of a type of its own, hence the look at the original.
    if isinstance(built.callees["torch"], nn.Module):
        return callee(*leaves.values(), **masks)
    return callee(**leaves)


def _parameters(callee: Callable[..., Tensor]) -> dict[str, Tensor]:
    return dict(callee.named_parameters()) if isinstance(callee, nn.Module) else {}


def _evaluate(
    built: BuiltTransformer,
    library: Library,
    dtype: torch.dtype,
    activation: Callable[[Tensor], Tensor] = F.relu,
) -> dict[str, Tensor]:
    """The output and, in training, every gradient by name; without dropout."""
    case = built.case
    training = case.direction == "training"
    callee: Callable[..., Tensor]
    original = built.callees[library]
    if isinstance(original, nn.Module):
        fresh = module(case, library, activation=activation, dropout=0.0)
        fresh.load_state_dict(original.state_dict())
        callee = fresh.to(dtype)
    else:
        callee = function(case, library, dropout=0.0)
    leaves = {
        name: leaf.detach().to(dtype, copy=True).requires_grad_(training)
        for name, leaf in built.leaves.items()
    }
    masks = {
        name: mask.to(dtype) if isinstance(mask, Tensor) and mask.is_floating_point() else mask
        for name, mask in built.masks.items()
    }
    with torch.set_grad_enabled(training):
        result = _forward(built, callee, leaves, masks)
    shown = result.detach()
    named = {"output": shown if built.valid is None else shown[built.valid]}
    if training:
        wanted = leaves | _parameters(callee)
        gradient = built.output_gradient.to(dtype)
        grads = torch.autograd.grad(result, list(wanted.values()), gradient)
        named |= {f"d_{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return named


def check(built: BuiltTransformer) -> GateResult:
    """Compare ours and torch's results of a case with torch's in float64, dropout off.

    Gradients through ReLU jump where rounding moves a value across zero, in either library at
    other places, so that the largest error says nothing. Modules are therefore compared with GELU
    in the place of ReLU, value by value, and with ReLU on the whole (the norm of the difference).
    """
    dtype = getattr(torch, built.case.dtype)
    kinked = built.case.direction == "training" and isinstance(built.callees["torch"], nn.Module)
    activation = F.gelu if kinked else F.relu
    result = compare(
        built.case,
        _evaluate(built, "fastseq", dtype, activation),
        _evaluate(built, "torch", dtype, activation),
        _evaluate(built, "torch", torch.float64, activation),
    )
    if not kinked:
        return result
    ours, peer, oracle = (
        _evaluate(built, "fastseq", dtype),
        _evaluate(built, "torch", dtype),
        _evaluate(built, "torch", torch.float64),
    )
    errors = [
        TensorError(
            f"{name} with ReLU",
            _relative(ours[name], exact),
            _relative(peer[name], exact),
            _KINK_TOLERANCE,
        )
        for name, exact in oracle.items()
    ]
    return GateResult((*result.errors, *errors))


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-300))
