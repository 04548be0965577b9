"""fastseq.cell: tracing, its errors, the derivative, and every function a cell may use."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

import fastseq
import fastseq.nn as fast_nn
from fastseq import cells
from fastseq.cells import (
    CellTraceError,
    absolute,
    exp,
    log,
    maximum,
    minimum,
    relu,
    sigmoid,
    softplus,
    sqrt,
    tanh,
    where,
)
from fastseq.cells.builtin import BUILTIN
from fastseq.cells.expression import Expression, leaf, topological
from fastseq.cells.plan import Slot
from fastseq.cells.shipped import SHIPPED

ALL = {**BUILTIN, **SHIPPED}


# --- what cannot be traced


def branches(x: Any, h: Any, s: Any) -> Any:
    if x[0] > 0:
        return h[0]
    return s[0]


def calls_math(x: Any, h: Any, s: Any) -> Any:
    return math.tanh(x[0] + h[0])


def calls_unknown_torch(x: Any, h: Any, s: Any) -> Any:
    return torch.erf(x[0] + h[0])


def passes_options(x: Any, h: Any, s: Any) -> Any:
    return torch.nn.functional.softplus(x[0] + h[0], beta=2)


def calls_method(x: Any, h: Any, s: Any) -> Any:
    return (x[0] + h[0]).tanh()


def compares_for_equality(x: Any, h: Any, s: Any) -> Any:
    return h[0] if x[0] == 0 else s[0]


def adds_a_tensor(x: Any, h: Any, s: Any) -> Any:
    return x[0] + torch.ones(3)


def multiplies_by_a_tensor(x: Any, h: Any, s: Any) -> Any:
    return torch.ones(3) * x[0]


def chooses_by_a_value(x: Any, h: Any, s: Any) -> Any:
    return where(x[0], h[0], 0.0)


def multiplies_all_gates(x: Any, h: Any, s: Any) -> Any:
    return x[0] * s


def returns_too_many(x: Any, h: Any, s: Any) -> Any:
    return x[0], h[0]


def returns_nothing(x: Any, h: Any, s: Any) -> Any:
    x[0] + h[0]


def returns_a_comparison(x: Any, h: Any, s: Any) -> Any:
    return x[0] < h[0]


def counts_a_comparison(x: Any, h: Any, s: Any) -> Any:
    return (x[0] < h[0]) * s[0]


def uses_no_gate(x: Any, h: Any, s: Any) -> Any:
    return 0.5 * s[0]


def has_a_variable_exponent(x: Any, h: Any, s: Any) -> Any:
    return s[0] ** (x[0] + h[0])


def has_an_odd_exponent(x: Any, h: Any, s: Any) -> Any:
    return x[0] ** 0.3


def takes_neighbours(x: Any, h: Any, s: Any) -> Any:
    return s[0][1:] + x[0]


def takes_too_little(x: Any) -> Any:
    return x[0]


REFUSED: list[tuple[Callable[..., Any], str, str]] = [
    (branches, "if x[0] > 0:", "where(condition, a, b)"),
    (calls_math, "return math.tanh(x[0] + h[0])", "fastseq.cells: absolute, exp"),
    (calls_unknown_torch, "return torch.erf(x[0] + h[0])", "erf cannot be traced"),
    (passes_options, "beta=2", "softplus with ['beta'"),
    (calls_method, "return (x[0] + h[0]).tanh()", "no method or attribute 'tanh'"),
    (compares_for_equality, "if x[0] == 0", "< or <="),
    (adds_a_tensor, "return x[0] + torch.ones(3)", "parameters=(...)"),
    (multiplies_by_a_tensor, "return torch.ones(3) * x[0]", "parameters=(...)"),
    (chooses_by_a_value, "return where(x[0], h[0], 0.0)", "where(x[0] > 0, a, b)"),
    (multiplies_all_gates, "return x[0] * s", "x[0], h[0], s[0]"),
    (returns_too_many, "test_cells.py", "must return 1 state(s), got 2 values"),
    (returns_nothing, "test_cells.py", "must return 1 state(s), got None"),
    (returns_a_comparison, "test_cells.py", "must return numbers"),
    (counts_a_comparison, "return (x[0] < h[0]) * s[0]", "condition of where"),
    (uses_no_gate, "test_cells.py", "uses no gate"),
    (has_a_variable_exponent, "return s[0] ** (x[0] + h[0])", "exp(b * log(a))"),
    (has_an_odd_exponent, "return x[0] ** 0.3", "whole and half"),
    (takes_neighbours, "return s[0][1:] + x[0]", "cannot be indexed"),
    (takes_too_little, "test_cells.py", "must take (x, h, s)"),
]


@pytest.mark.parametrize(
    ("function", "line", "remedy"), REFUSED, ids=lambda v: getattr(v, "__name__", "")
)
def test_error_shows_line_and_remedy(function: Any, line: str, remedy: str) -> None:
    with pytest.raises(CellTraceError) as caught:
        fastseq.cell(gates=1)(function)
    message = str(caught.value)
    assert line in message, message
    assert remedy in message, message


def test_index_beyond_the_gates() -> None:
    with pytest.raises(IndexError, match=r"x \(gates of the input\) has 1 entries, index 1"):
        fastseq.cell(lambda x, h, s: x[1], gates=1)
    with pytest.raises(AttributeError, match="no parameter 'q'"):
        fastseq.cell(lambda x, h, s, p: x[0] * p.q, gates=1, parameters=("p",))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"gates": 0}, ValueError, "gates must be at least 1, got 0"),
        ({"gates": 1.0}, TypeError, "gates must be an int, got float"),
        ({"gates": 1, "states": 0}, ValueError, "states must be at least 1, got 0"),
        ({"gates": 1, "parameters": ("a", "a")}, ValueError, "different names"),
        ({"gates": 1, "parameters": ("a b",)}, ValueError, "identifiers, got 'a b'"),
        ({"gates": 1, "parameters": ("count",)}, ValueError, "taken, got 'count'"),
        ({"gates": 1, "parameters": ("names",)}, ValueError, "taken, got 'names'"),
        ({"gates": 1, "parameters": ("bias_ih",)}, ValueError, "taken, got 'bias_ih'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        fastseq.cell(lambda x, h, s: x[0], **options)


# --- tracing


def test_names_need_no_import() -> None:
    """The very text of the documentation, in a module that imports nothing."""
    source = (
        "def mgu(x, h, s):\n"
        "    f = sigmoid(x[0] + h[0])\n"
        "    n = tanh(x[1] + f * h[1])\n"
        "    return (1 - f) * s[0] + f * n\n"
    )
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    found = fastseq.cell(gates=2, states=1)(namespace["mgu"])
    assert found.plan.slots == (Slot("x", 1), Slot("b", 0), Slot("h", 1))


def test_a_name_of_ones_own_wins() -> None:
    namespace: dict[str, Any] = {"tanh": lambda value: 2 * value}
    exec("def cell(x, h, s):\n    return tanh(x[0] + h[0])", namespace)
    (output,) = fastseq.cell(gates=1)(namespace["cell"]).outputs
    assert output.operation == "multiply"


def test_torch_and_numpy_functions_are_understood() -> None:
    numpy = pytest.importorskip("numpy")
    ours = fastseq.cell(lambda x, h, s: tanh(x[0]) * exp(h[0]), gates=1)
    theirs = fastseq.cell(lambda x, h, s: torch.tanh(x[0]) * numpy.exp(h[0]), gates=1)
    assert ours.outputs == theirs.outputs


def test_numbers_may_stand_anywhere() -> None:
    """Numbers of Python, NumPy and torch, functions of numbers, on either side."""
    numpy = pytest.importorskip("numpy")
    pairs: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
        (lambda x, h, s: sqrt(2.0) * x[0], lambda x, h, s: math.sqrt(2) * x[0]),
        (lambda x, h, s: sqrt(-1.0) * x[0], lambda x, h, s: math.nan * x[0]),
        (lambda x, h, s: maximum(1, 2) * x[0], lambda x, h, s: 2.0 * x[0]),
        (lambda x, h, s: numpy.sqrt(0.25) * x[0], lambda x, h, s: 0.5 * x[0]),
        (lambda x, h, s: numpy.float32(2) + x[0], lambda x, h, s: 2.0 + x[0]),
        (lambda x, h, s: numpy.float64(1) - x[0], lambda x, h, s: 1.0 - x[0]),
        (lambda x, h, s: numpy.float64(1) / x[0], lambda x, h, s: 1.0 / x[0]),
        (lambda x, h, s: torch.tensor(2.0) * x[0], lambda x, h, s: 2.0 * x[0]),
        (
            lambda x, h, s: where(numpy.float64(1) > x[0], h[0], 0.0),
            lambda x, h, s: where(x[0] < 1, h[0], 0.0),
        ),
        (lambda x, h, s: where(True, x[0], 0.0), lambda x, h, s: x[0]),
        (lambda x, h, s: where(1 > 2, 0.0, x[0]), lambda x, h, s: x[0]),
    ]
    for ours, plain in pairs:
        assert fastseq.cell(ours, gates=1).outputs == fastseq.cell(plain, gates=1).outputs


def test_slots() -> None:
    """A gate used only as x + h is one slot, whichever comes first."""
    assert [s.kind for s in BUILTIN["lstm"].plan.slots] == ["b"] * 4
    assert BUILTIN["gru"].plan.slots == (Slot("x", 2), Slot("b", 0), Slot("b", 1), Slot("h", 2))
    swapped = fastseq.cell(lambda x, h, s: tanh(h[0] + x[0]), gates=1)
    assert swapped.plan.slots == (Slot("b", 0),)
    apart = fastseq.cell(lambda x, h, s: tanh(x[0] + h[0]) + x[0], gates=1)
    assert apart.plan.slots == (Slot("x", 0), Slot("h", 0))
    assert not SHIPPED["ind_rnn"].recurrent


def test_equal_formulas_are_equal_cells_in_any_process() -> None:
    code = "from fastseq.cells import gru, s_lstm; print(gru.key, s_lstm.key)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == [cells.gru.key, cells.s_lstm.key]


def test_tracing_needs_neither_torch_nor_numba() -> None:
    code = (
        "import sys, fastseq\n"
        "fastseq.cell(lambda x, h, s: fastseq.cells.tanh(x[0] + h[0]), gates=1)\n"
        "print(sorted({'torch', 'numba', 'sympy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_pickle_and_copy() -> None:
    assert pickle.loads(pickle.dumps(cells.janet)) is cells.janet
    assert copy.deepcopy(cells.janet) is cells.janet


def test_a_cell_is_still_its_function() -> None:
    x, h, s = (torch.randn(4, 3, dtype=torch.float64) for _ in range(3))
    found = cells.minimal_gated_unit((x, x), (h, h), (s,))
    f = torch.sigmoid(x + h)
    torch.testing.assert_close(found, s + f * (torch.tanh(x + f * h) - s))
    assert "Minimal Gated Unit" in (cells.minimal_gated_unit.__doc__ or "")
    # Also one whose names are imported nowhere.
    namespace: dict[str, Any] = {}
    exec("def cell(x, h, s):\n    return tanh(x[0] + h[0])", namespace)
    own = fastseq.cell(gates=1)(namespace["cell"])
    torch.testing.assert_close(own((x,), (h,), (s,)), torch.tanh(x + h))


# --- the derivative against sympy's

_TO_SYMPY: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "negate": lambda a: -a,
    "sigmoid": lambda a: 1 / (1 + sympy.exp(-a)),
    "tanh": sympy.tanh,
    "exp": sympy.exp,
    "softplus": lambda a: sympy.log(1 + sympy.exp(a)),
    "relu": lambda a: sympy.Piecewise((a, a > 0), (0, True)),
    "maximum": lambda a, b: sympy.Piecewise((a, a > b), (b, True)),
    "less": lambda a, b: a < b,
    "less_equal": lambda a, b: a <= b,
    "where": lambda c, a, b: sympy.Piecewise((a, c), (b, True)),
}


def to_sympy(outputs: Any, symbols: dict[Any, Any]) -> list[Any]:
    values: dict[Expression, Any] = {}
    for node in topological(outputs):
        if node.operation == "leaf":
            values[node] = symbols.setdefault(
                node.value, sympy.Symbol("".join(map(str, node.value)))
            )
        elif node.operation == "constant":
            values[node] = sympy.Float(node.value, 30)
        else:
            values[node] = _TO_SYMPY[node.operation](*(values[a] for a in node.arguments))
    return [values[output] for output in outputs]


@pytest.mark.parametrize("name", ALL)
def test_derivative_against_sympy(name: str) -> None:
    plan = ALL[name].plan
    symbols: dict[Any, Any] = {}
    ours = [*plan.slot_gradients, *plan.state_gradients, *plan.parameter_gradients]
    by = [
        *plan.slots,
        *(("s", index) for index in range(plan.states)),
        *(("p", index) for index in range(plan.parameters)),
    ]
    found = to_sympy(ours, symbols)
    outputs = to_sympy(plan.new_states, symbols)
    total = sum(
        output * symbols.setdefault(("g", index), sympy.Symbol(f"g{index}"))
        for index, output in enumerate(outputs)
    )
    generator = torch.Generator().manual_seed(len(name))
    for _ in range(3):
        values = torch.rand(len(symbols), generator=generator, dtype=torch.float64) + 0.25
        point = dict(zip(symbols.values(), values.tolist(), strict=True))
        for gradient, variable in zip(found, by, strict=True):
            symbol = symbols.get(tuple(variable), sympy.Symbol("unused"))
            expected = sympy.diff(total, symbol).subs(point)
            assert abs(float(sympy.sympify(gradient).subs(point)) - float(expected)) < 1e-12


def test_constants_are_folded() -> None:
    x = leaf("x", 0)
    assert x * 1 is x
    assert x + 0 is x
    assert 2 * (x * 3 - x * 3 + 1) is not x
    assert (sigmoid(x) * 0 + tanh(0.0)).operation == "multiply"  # 0 * NaN is NaN, not 0


# --- every function, in kernels


@fastseq.cell(gates=2, states=13)
def everything(x: Any, h: Any, s: Any) -> Any:
    a, b = x[0], x[1]
    return (
        sigmoid(a),
        tanh(a),
        exp(a),
        log(b),
        softplus(a),
        sqrt(b),
        relu(a),
        absolute(a),
        maximum(a, b),
        minimum(a, b),
        where(a < b, 2 * a, b / 3),
        b**3 / (1 + a**2) - b**-1.5,
        -(+a) + 1 - a / 2,
    )


# Not beyond where exp overflows: its infinite value times no gradient at all is NaN.
SPECIAL = (0.0, -0.0, 1.0, -1.0, 1e-30, -20.0, 30.0, 88.0, -88.0, 70.0, -200.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_every_function(dtype: torch.dtype) -> None:
    """Values and derivatives of kernels, a few units from torch's in float64."""
    pytest.importorskip("numba")
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor(SPECIAL, dtype=torch.float64)
    a = torch.cat([special, torch.randn(500, generator=generator, dtype=torch.float64) * 4])
    b = torch.cat([special.abs() + 1e-3, torch.rand(500, generator=generator).double() * 9 + 1e-3])
    b[7] = a[7]  # a tie
    a, b = a.to(dtype), b.to(dtype)
    layer = fast_nn.CellLayer(everything, 2, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(2))
    x = torch.stack([a, b], dim=1).unsqueeze(0).requires_grad_()
    _, found = layer(x)
    wide = [v.detach().double().requires_grad_() for v in (a, b)]
    expected = everything(tuple(wide), (), ())
    unit, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny  # below it results are flushed
    for index, (ours, truth) in enumerate(zip(found, expected, strict=True)):
        ours_grad = torch.autograd.grad(ours.sum(), x, retain_graph=True)[0][0].double()
        truth_grads = torch.autograd.grad(truth.sum(), wide, allow_unused=True, retain_graph=True)
        # A derivative such as 1 - y^2 is good to the last digits of 1, not of itself.
        # A sum, the last formulas, likewise.
        least_value = tiny / unit if index < 10 else 1.0
        triples = [(ours.flatten().double(), truth, least_value)]
        triples += [
            (ours_grad[:, i], grad, 1.0) for i, grad in enumerate(truth_grads) if grad is not None
        ]
        for actual, wanted, least in triples:
            narrowed = wanted.detach().to(dtype).double()
            finite = narrowed.isfinite()
            assert torch.equal(actual[~finite], narrowed[~finite]), everything.outputs[index]
            allowance = 6 * unit * narrowed.abs().clamp_min(least)
            error = (actual - wanted.detach()).abs()
            worst = int(torch.where(finite, error / allowance, 0.0).argmax())
            assert bool(error[worst] <= allowance[worst]), (
                f"{everything.outputs[index]} at a={float(a[worst])}, b={float(b[worst])}: "
                f"{float(actual[worst])}, expected {float(wanted[worst])}"
            )


def test_not_a_number_stays() -> None:
    pytest.importorskip("numba")
    layer = fast_nn.CellLayer(everything, 2, 1, bias=False)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(2))
        _, found = layer(torch.tensor([[[float("nan"), 1.0]], [[float("nan"), 1.0]]]))
        nan = torch.tensor(float("nan"))  # in both gates: 0 * NaN is NaN in the product
        truth = everything((nan, nan), (), ())
    for ours, theirs in zip(found, truth, strict=True):
        assert torch.equal(ours.isnan().flatten(), theirs.isnan().flatten())
    assert isinstance(found[0], Tensor)
