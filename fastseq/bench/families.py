"""What the runner asks of each kind of case; nothing else branches on kinds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fastseq.bench import attention, build, gate, generation, transformer
from fastseq.bench.cases import AnyCase, Case
from fastseq.bench.compiled import agrees as tensors_agree
from fastseq.bench.gate import GateResult
from fastseq.bench.transformer_cases import TransformerCase

Library = Literal["torch", "fastseq"]
Call = Callable[[], object]


@dataclass(frozen=True)
class Family:
    """One kind of case.

    Attributes:
        build: Makes a case concrete: inputs, layers of both libraries with equal weights.
        check: Holds our results and gradients of a built case against the oracle's.
        timed_call: What is timed, of a built case and a library; a third argument runs in place
            of the library's layer.
        callee: Layer or function of torch that ``torch.compile`` takes.
        small: The same kind of case at a size that takes no memory.
        agrees: Whether a compiled call's result is torch's, of a built case and the two results.
        functional: A call of a built case without a module around it, or None.
        minimum_visits: How often each call is timed at least.
        dynamic: ``torch.compile``'s argument of that name.
    """

    build: Callable[[Any], Any]
    check: Callable[[Any], GateResult]
    timed_call: Callable[..., Call]
    callee: Callable[[Any], Callable[..., Any]]
    small: Callable[[Any], AnyCase]
    agrees: Callable[[Any, object, object], bool]
    functional: Callable[[Any], Call | None] = lambda built: None
    minimum_visits: int = 7
    dynamic: bool | None = None


def _tensors_agree(built: Any, found: object, expected: object) -> bool:
    case = built.case
    return tensors_agree(
        found,
        expected,
        training=case.direction == "training",
        random=bool(getattr(case.options, "dropout", 0)),
    )


_RECURRENT = Family(
    build=build.build,
    check=gate.check,
    timed_call=build.timed_call,
    callee=lambda built: built.torch_layer,
    small=lambda case: dataclasses.replace(case, T=2, B=1),
    agrees=_tensors_agree,
    functional=lambda built: build.functional_call(built) if built.case.streaming else None,
)
_ATTENTION = Family(
    build=attention.build,
    check=attention.check,
    timed_call=attention.timed_call,
    callee=attention.torch_callee,
    small=lambda case: dataclasses.replace(case, B=1, Sq=16, Skv=16),
    agrees=_tensors_agree,
)
_TRANSFORMER = Family(
    build=transformer.build,
    check=transformer.check,
    timed_call=transformer.timed_call,
    callee=lambda built: built.callees["torch"],
    small=lambda case: dataclasses.replace(case, B=1, S=16),
    agrees=_tensors_agree,
)
_GENERATION = Family(
    build=generation.build,
    check=generation.check,
    timed_call=generation.timed_call,
    callee=lambda built: built.callees["torch"],
    small=lambda case: dataclasses.replace(case, S=2),
    agrees=lambda built, found, expected: generation.check_tokens(built, found).passed,
    # One call of torch's generation takes seconds.
    minimum_visits=3,
    # Every token is a new shape.
    dynamic=True,
)


def family_of(case: AnyCase) -> Family:
    """The kind that a case is of."""
    if isinstance(case, Case):
        return _RECURRENT
    if not isinstance(case, TransformerCase):
        return _ATTENTION
    return _GENERATION if case.layer == "generation" else _TRANSFORMER
