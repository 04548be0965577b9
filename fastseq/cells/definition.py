"""``fastseq.cell``: a Python function becomes a recurrent cell."""

from __future__ import annotations

import builtins
import inspect
import types
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, overload

from fastseq.cells import vocabulary
from fastseq.cells.expression import CellTraceError, Expression, constant, leaf, topological
from fastseq.cells.plan import Plan, make_plan, regularised

__all__ = ["Cell", "cell", "find"]

_by_key: dict[str, Cell] = {}


class Cell:
    """A traced cell; made by :func:`cell`.

    Calling it calls the function it was made from, which works on tensors too.

    Attributes:
        name: the function's name.
        gates: number of gates G.
        states: number of states per unit.
        parameters: names of the learned values per unit.
        outputs: the traced formulas of the states after a step.
        plan: slots and derivative.
    """

    def __init__(
        self, function: Callable[..., Any], gates: int, states: int, parameters: tuple[str, ...]
    ) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        self.gates, self.states, self.parameters = gates, states, parameters
        self.outputs = _trace(self)
        self.plan = make_plan(self.outputs, gates, len(parameters), name=self.name)
        self.__doc__ = function.__doc__
        self.__module__ = getattr(function, "__module__", __name__)
        self.__wrapped__ = function
        self._plans = {(False, False): self.plan}
        _by_key[self.key] = self

    def __call__(self, *args: Any) -> Any:
        """The user's function, on tensors or whatever else it is given."""
        return _with_vocabulary(self.function)(*args)

    def __repr__(self) -> str:
        return f"<fastseq.cell {self.name}: {self.gates} gates, {self.states} states>"

    @cached_property
    def key(self) -> str:
        """Name and formulas: what ops and compiled graphs know the cell by."""
        return f"{self.name}.{self.plan.key}"

    @property
    def recurrent(self) -> bool:
        """Whether there is a recurrent matrix: some ``h[g]`` is used."""
        return bool(self.plan.hidden_gates)

    @cached_property
    def reads_hidden_state(self) -> bool:
        """Whether a formula reads ``s[0]``, which otherwise only the recurrent product does."""
        hidden = leaf("s", 0)
        return any(node is hidden for node in topological(self.outputs))

    def regularised(self, recurrent_dropout: bool, zoneout: bool) -> Plan:
        """The plan with masks in its formulas, see :func:`fastseq.cells.plan.regularised`."""
        recurrent_dropout = recurrent_dropout and self.recurrent
        chosen = (recurrent_dropout, zoneout)
        if chosen not in self._plans:
            outputs, masks, state = regularised(self.outputs, *chosen)
            self._plans[chosen] = make_plan(
                outputs, self.gates, len(self.parameters), masks, state, self.name
            )
        return self._plans[chosen]

    def __reduce__(self) -> Any:
        # By name, as functions are pickled: the module's attribute is this object.
        return self.function.__qualname__

    def __deepcopy__(self, memo: Any) -> Cell:
        return self


def find(key: str) -> Cell:
    """The cell of that key, defined earlier in this process.

    Raises:
        KeyError: there is none: the module that defines it has not been imported.
    """
    try:
        return _by_key[key]
    except KeyError:
        name = key.split(".")[0]
        raise KeyError(f"cell {name!r} is not defined yet: import the module with it") from None


@overload
def cell(
    function: Callable[..., Any],
    *,
    gates: int,
    states: int = ...,
    parameters: Sequence[str] = ...,
) -> Cell: ...


@overload
def cell(
    function: None = None, *, gates: int, states: int = ..., parameters: Sequence[str] = ...
) -> Callable[[Callable[..., Any]], Cell]: ...


def cell(
    function: Callable[..., Any] | None = None,
    *,
    gates: int,
    states: int = 1,
    parameters: Sequence[str] = (),
) -> Cell | Callable[[Callable[..., Any]], Cell]:
    """Make a recurrent cell out of a function that computes one step of one unit.

    The function is called once, with values that stand for numbers, as ``function(x, h, s)``, or
    ``function(x, h, s, p)`` with ``parameters``:

    - ``x[g]``: gate g of ``W_ih x_t + b_ih``,
    - ``h[g]``: gate g of ``W_hh s[0] + b_hh``,
    - ``s[i]``: state i before the step; ``s[0]`` is the hidden state, which is also the output,
    - ``p[i]`` or ``p.name``: a learned value per unit.

    It returns the states after the step, a tuple if there are several. It may use arithmetic
    (``+ - * /``, ``**`` with whole and half exponents), comparisons inside ``where``, and the
    functions of :mod:`fastseq.cells`, which it finds without importing them.

    Where a formula needs ``x[g]`` and ``h[g]`` only as ``x[g] + h[g]``, written next to each other,
    the two share their memory. A gate whose ``x`` or ``h`` is never used has no rows in the matrix
    that would make it; where no ``h`` is used there is no recurrent matrix at all.

    Args:
        function: the cell; without it a decorator is returned.
        gates: number of gates.
        states: number of states, at least 1.
        parameters: names of the learned values per unit.

    Raises:
        CellTraceError: (a ``TypeError``) the function does something that cannot be traced, or
            returns another number of states. The message has the line and what to write instead.
        ValueError: ``gates`` or ``states`` is below 1, or ``parameters`` holds a name twice or one
            that is no identifier.
    """
    if function is None:
        return lambda found: cell(found, gates=gates, states=states, parameters=parameters)
    for name, count in (("gates", gates), ("states", states)):
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{name} must be an int, got {type(count).__name__}")
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    names = (parameters,) if isinstance(parameters, str) else tuple(parameters)
    if len(set(names)) != len(names):
        raise ValueError(f"parameters must be different names, got {names}")
    for parameter in names:
        if not isinstance(parameter, str) or not parameter.isidentifier():
            raise ValueError(f"parameters must be identifiers, got {parameter!r}")
        if parameter.startswith(_LAYERS_OWN) or hasattr(_Group, parameter) or parameter in _TAKEN:
            raise ValueError(f"parameters must not have names that are taken, got {parameter!r}")
    return Cell(function, gates, states, names)


# Names that a layer gives its own weights, and those of a group besides a tuple's methods.
_LAYERS_OWN = ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh")
_TAKEN = frozenset({"label", "names"})


class _Group(tuple[Expression, ...]):
    """Gates, states or parameters; an index that does not exist is the cell's mistake."""

    label: str
    names: tuple[str, ...]

    def __new__(cls, kind: str, count: int, label: str, names: tuple[str, ...] = ()) -> _Group:
        group = super().__new__(cls, (leaf(kind, index) for index in range(count)))
        group.label, group.names = label, names
        return group

    def __getitem__(self, index: Any) -> Any:
        try:
            return super().__getitem__(index)
        except IndexError:
            raise IndexError(
                f"{self.label} has {len(self)} entries, index {index} is none of them: raise "
                f"the number in fastseq.cell(...) or lower the index"
            ) from None

    def __getattr__(self, name: str) -> Expression:
        if name in self.names:
            return self[self.names.index(name)]
        raise AttributeError(f"no parameter {name!r}: parameters={self.names}")


def _trace(cell: Cell) -> tuple[Expression, ...]:
    """The formulas of the states after a step."""
    arguments = [
        _Group("x", cell.gates, "x (gates of the input)"),
        _Group("h", cell.gates, "h (gates of the hidden state)"),
        _Group("s", cell.states, "s (states)"),
    ]
    if cell.parameters:
        arguments.append(_Group("p", len(cell.parameters), "p (parameters)", cell.parameters))
    function = _with_vocabulary(cell.function)
    _check_signature(cell, len(arguments))
    returned = function(*arguments)
    found = (returned,) if isinstance(returned, (Expression, int, float)) else returned
    if not isinstance(found, (tuple, list)) or len(found) != cell.states:
        what = f"{len(found)} values" if isinstance(found, (tuple, list)) else f"{returned!r}"
        raise CellTraceError(
            f"cell {cell.name!r} must return {cell.states} state(s), got {what}"
            f"{_definition(cell)}\nReturn every state after the step, s[0] first, or change "
            f"states={cell.states}."
        )
    outputs = []
    for index, value in enumerate(found):
        if isinstance(value, (int, float)):
            value = constant(value)
        if not isinstance(value, Expression) or value.operation in ("less", "less_equal"):
            # Not its formula, which written out may be longer than any screen.
            got = "a comparison" if isinstance(value, Expression) else repr(value)
            raise CellTraceError(
                f"cell {cell.name!r} must return numbers, got {got} as state {index}"
                f"{_definition(cell)}\nChoose with where(condition, a, b) what a comparison means."
            )
        outputs.append(value)
    used = {node.value[0] for node in topological(outputs) if node.operation == "leaf"}
    if not used & {"x", "h"}:
        raise CellTraceError(
            f"cell {cell.name!r} uses no gate: neither x nor h{_definition(cell)}\n"
            "Without a gate no input reaches the states."
        )
    return tuple(outputs)


def _check_signature(cell: Cell, count: int) -> None:
    try:
        inspect.signature(cell.function).bind(*range(count))
    except TypeError as error:
        expected = "(x, h, s, p)" if count == 4 else "(x, h, s)"
        raise CellTraceError(
            f"cell {cell.name!r} must take {expected}: {error}{_definition(cell)}"
        ) from None
    except ValueError:
        pass  # a callable without a signature; calling it will tell


def _definition(cell: Cell) -> str:
    code = getattr(cell.function, "__code__", None)
    return "" if code is None else f"\n  File {code.co_filename!r}, line {code.co_firstlineno}"


def _with_vocabulary(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with the vocabulary's names visible where it has no names of its own."""
    if not isinstance(function, types.FunctionType):
        return function
    words = {name: getattr(vocabulary, name) for name in vocabulary.__all__}
    known = {**words, "__builtins__": builtins, **function.__globals__}
    twin = types.FunctionType(
        function.__code__, known, function.__name__, function.__defaults__, function.__closure__
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin
