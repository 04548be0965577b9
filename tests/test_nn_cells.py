"""fastseq.nn.RNNCell, LSTMCell and GRUCell against torch.nn's."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.utils import prune
from torch.utils._pytree import tree_leaves

import fastseq.nn as fast_nn
from fastseq import backends, functional

NAMES = ("RNNCell", "LSTMCell", "GRUCell")
B, IN, H = 4, 5, 7
# float64 sums of about a dozen terms of size one, in another order.
EXACT = {"rtol": 1e-13, "atol": 1e-13}
CASES = [(name, {"bias": bias}) for name in NAMES for bias in (True, False)]
CASES += [("RNNCell", {"nonlinearity": "relu"})]
each_case = pytest.mark.parametrize(("name", "options"), CASES, ids=str)
each_name = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def _seed_and_forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(backends, "_warned_reasons", set())


def build_pair(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    kwargs.setdefault("dtype", torch.float64)
    theirs = getattr(torch.nn, name)(*args, **kwargs)
    ours = getattr(fast_nn, name)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def states(name: str, *shape: int, **kwargs: Any) -> Any:
    kwargs.setdefault("dtype", torch.float64)
    hx = torch.randn(*shape, **kwargs)
    return (hx, torch.randn(*shape, **kwargs)) if name == "LSTMCell" else hx


def run(module: Any, wanted: list[torch.Tensor], *args: Any) -> Any:
    """Outputs and the gradients of a sum in which every element has a different weight."""
    outputs = tree_leaves(module(*args))
    loss = sum(
        (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)).sum()
        for out in outputs
    )
    return outputs, torch.autograd.grad(loss, [*wanted, *module.parameters()])


@each_case
@pytest.mark.parametrize("batch", [(B,), (1,), ()], ids=["batched", "one", "unbatched"])
def test_results(name: str, options: dict[str, Any], batch: tuple[int, ...]) -> None:
    theirs, ours = build_pair(name, IN, H, **options)
    x = torch.randn(*batch, IN, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(run(ours, [x], x), run(theirs, [x], x), **EXACT)
    hx = states(name, *batch, H, requires_grad=True)
    wanted = [x, *tree_leaves(hx)]
    torch.testing.assert_close(run(ours, wanted, x, hx), run(theirs, wanted, x, hx), **EXACT)


@each_name
def test_a_chain_of_steps(name: str) -> None:
    theirs, ours = build_pair(name, IN, H)

    def chain(cell: Any) -> Any:
        hx = None
        for x in inputs:
            hx = cell(x, hx)
        return tree_leaves(hx)

    inputs = torch.randn(5, B, IN, dtype=torch.float64)
    torch.testing.assert_close(chain(ours), chain(theirs), **EXACT)


@each_name
def test_strided_arguments(name: str) -> None:
    theirs, ours = build_pair(name, IN, H)
    x = torch.randn(IN, 2 * B, dtype=torch.float64)[:, ::2].t()
    hx = states(name, H, B)
    hx = tuple(h.t() for h in hx) if name == "LSTMCell" else hx.t()
    torch.testing.assert_close(tree_leaves(ours(x, hx)), tree_leaves(theirs(x, hx)), **EXACT)


@each_name
def test_empty_batch(name: str) -> None:
    theirs, ours = build_pair(name, IN, H)
    x = torch.randn(0, IN, dtype=torch.float64)
    shapes = [out.shape for out in tree_leaves(theirs(x))]
    assert [out.shape for out in tree_leaves(ours(x))] == shapes


@pytest.mark.parametrize("missing", ["b_ih", "b_hh"])
@each_name
def test_functional_with_one_bias(name: str, missing: str) -> None:
    function = {
        "RNNCell": (functional.rnn_cell, torch.rnn_tanh_cell),
        "LSTMCell": (functional.lstm_cell, torch.lstm_cell),
        "GRUCell": (functional.gru_cell, torch.gru_cell),
    }[name]
    theirs, _ = build_pair(name, IN, H)
    weights = {"b_ih": theirs.bias_ih, "b_hh": theirs.bias_hh, missing: None}
    full = {**weights, missing: torch.zeros_like(theirs.bias_ih)}
    x, hx = torch.randn(B, IN, dtype=torch.float64), states(name, B, H)
    actual = function[0](x, hx, theirs.weight_ih, theirs.weight_hh, **weights)
    expected = function[1](x, hx, theirs.weight_ih, theirs.weight_hh, **full)
    torch.testing.assert_close(tree_leaves(actual), tree_leaves(expected), **EXACT)


def zeros(name: str, *shape: int, **kwargs: Any) -> Any:
    return states(name, *shape, **{"dtype": torch.float32, **kwargs})


BAD_CALLS: dict[str, Callable[[Any, str], Any]] = {
    "0-D input": lambda m, n: m(torch.tensor(1.0)),
    "3-D input": lambda m, n: m(torch.randn(1, B, IN)),
    "input features": lambda m, n: m(torch.randn(B, IN + 1)),
    "unbatched input features": lambda m, n: m(torch.randn(IN + 1)),
    "float64 input": lambda m, n: m(torch.randn(B, IN).double()),
    "float64 input and hx": lambda m, n: m(
        torch.randn(B, IN).double(), zeros(n, B, H, dtype=torch.float64)
    ),
    "integer input": lambda m, n: m(torch.ones(B, IN, dtype=torch.int64)),
    "meta input": lambda m, n: m(torch.randn(B, IN, device="meta")),
    "list input": lambda m, n: m([1.0]),
    "None input": lambda m, n: m(None),
    "numpy input": lambda m, n: m(torch.randn(B, IN).numpy()),
    "hx batch": lambda m, n: m(torch.randn(B, IN), zeros(n, B + 1, H)),
    "hx size": lambda m, n: m(torch.randn(B, IN), zeros(n, B, H + 1)),
    "hx 1-D": lambda m, n: m(torch.randn(B, IN), zeros(n, H)),
    "hx 3-D": lambda m, n: m(torch.randn(B, IN), zeros(n, 1, B, H)),
    "hx 2-D, unbatched": lambda m, n: m(torch.randn(IN), zeros(n, 1, H)),
    "hx float64": lambda m, n: m(torch.randn(B, IN), zeros(n, B, H, dtype=torch.float64)),
    "hx on meta": lambda m, n: m(torch.randn(B, IN), zeros(n, B, H, device="meta")),
    "hx one-tuple": lambda m, n: m(torch.randn(B, IN), (torch.zeros(B, H),)),
    "hx three-tuple": lambda m, n: m(torch.randn(B, IN), (torch.zeros(B, H),) * 3),
    "hx pair of None": lambda m, n: m(torch.randn(B, IN), (None, None)),
}


def raised(call: Callable[[], Any]) -> type[BaseException] | None:
    try:
        call()
    except Exception as error:
        return type(error)
    return None


@each_name
@pytest.mark.parametrize("mistake", BAD_CALLS)
@pytest.mark.filterwarnings("ignore::fastseq.FastseqFallbackWarning")
def test_bad_calls_raise_what_torch_raises(name: str, mistake: str) -> None:
    theirs, ours = build_pair(name, IN, H, dtype=torch.float32)
    call = BAD_CALLS[mistake]
    expected = raised(lambda: call(theirs, name))
    assert expected is not None, "torch accepts this, so it is no mistake"
    assert raised(lambda: call(ours, name)) is expected


def test_one_tensor_for_a_pair() -> None:
    theirs, ours = build_pair("LSTMCell", IN, H, dtype=torch.float32)
    hx = torch.randn(2, B, H)
    expected = raised(lambda: theirs(torch.randn(B, IN), hx))
    assert expected is raised(lambda: ours(torch.randn(B, IN), hx)) is TypeError


def test_unknown_nonlinearity_raises_at_the_call() -> None:
    for library in (torch.nn, fast_nn):
        cell = library.RNNCell(IN, H, nonlinearity="sigmoid")
        with pytest.raises(RuntimeError):
            cell(torch.randn(B, IN))


@each_name
def test_messages_name_expected_and_actual(name: str) -> None:
    _, ours = build_pair(name, IN, H)
    with pytest.raises(RuntimeError, match=r"expected 5, got 6"):
        ours(torch.randn(B, IN + 1).double())
    with pytest.raises(RuntimeError, match=r"hx must have shape \(4, 7\), got \(3, 7\)"):
        ours(torch.randn(B, IN).double(), states(name, 3, H))


@each_name
@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("weight_hh", torch.zeros(3, 3)),
        ("weight_ih", torch.zeros(4 * H, IN + 1)),
        ("bias_hh", torch.zeros(1)),
        ("bias_ih", torch.zeros(4 * H, dtype=torch.float32)),
        ("weight_hh", torch.zeros(4 * H, H, device="meta")),
    ],
    ids=["hh-shape", "ih-shape", "bias-shape", "bias-dtype", "hh-device"],
)
def test_wrong_weights_raise(name: str, attribute: str, value: torch.Tensor) -> None:
    _, ours = build_pair(name, IN, H)
    setattr(ours, attribute, torch.nn.Parameter(value))
    for hx in (None, states(name, B, H)):
        with pytest.raises(RuntimeError):
            ours(torch.randn(B, IN).double(), hx)


@each_name
def test_construction(name: str) -> None:
    extra = ("relu",) if name == "RNNCell" else ()
    args = (IN, H, False, *extra, "cpu", torch.float64)
    modules = []
    for library in (torch.nn, fast_nn):
        torch.manual_seed(3)
        modules.append(getattr(library, name)(*args))
    theirs, ours = modules
    assert repr(ours) == repr(theirs)
    assert set(vars(ours)) == set(vars(theirs))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
    for bad in ((), (IN,), (1.5, H), (IN, -1)):
        expected = raised(lambda bad=bad: getattr(torch.nn, name)(*bad))
        assert expected is not None
        assert raised(lambda bad=bad: getattr(fast_nn, name)(*bad)) is expected


@each_name
def test_save_and_load_both_ways(name: str) -> None:
    theirs, ours = build_pair(name, IN, H)
    x = torch.randn(B, IN, dtype=torch.float64)
    for source, target in itertools.permutations((theirs, ours)):
        buffer = io.BytesIO()
        with torch.no_grad():
            source.weight_ih.add_(1.0)
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        target.load_state_dict(torch.load(buffer))
        torch.testing.assert_close(tree_leaves(target(x)), tree_leaves(source(x)), **EXACT)
    for twin in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert type(twin) is type(ours)
        assert all(map(torch.equal, tree_leaves(twin(x)), tree_leaves(ours(x))))


@each_name
def test_parametrized_and_pruned_weights(name: str) -> None:
    theirs, ours = build_pair(name, IN, H)
    for module in (theirs, ours):
        prune.l1_unstructured(module, "weight_hh", 0.5)
        torch.nn.utils.parametrizations.weight_norm(module, "weight_ih")
    x = torch.randn(B, IN, dtype=torch.float64)
    torch.testing.assert_close(tree_leaves(ours(x)), tree_leaves(theirs(x)), **EXACT)


@each_name
@pytest.mark.filterwarnings("ignore::fastseq.FastseqFallbackWarning")
def test_other_dtypes_and_autocast_are_torchs_own(name: str) -> None:
    theirs, ours = build_pair(name, IN, H, dtype=torch.bfloat16)
    x = torch.randn(B, IN)
    for args in ((x.bfloat16(),), (x[0].bfloat16(),)):
        assert all(map(torch.equal, tree_leaves(ours(*args)), tree_leaves(theirs(*args))))
    theirs, ours = theirs.float(), ours.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for actual, expected in zip(tree_leaves(ours(x)), tree_leaves(theirs(x)), strict=True):
            assert actual.dtype is expected.dtype
            assert torch.equal(actual, expected)


@each_name
def test_functional_call_grad_and_vmap(name: str) -> None:
    _, ours = build_pair(name, IN, H)
    parameters = {key: torch.randn_like(value) for key, value in ours.named_parameters()}
    x = torch.randn(6, B, IN, dtype=torch.float64)

    def loss(parameters: Any, x: torch.Tensor) -> torch.Tensor:
        return tree_leaves(torch.func.functional_call(ours, parameters, (x,)))[0].square().sum()

    losses = torch.func.vmap(loss, in_dims=(None, 0))(parameters, x)
    torch.testing.assert_close(losses, torch.stack([loss(parameters, one) for one in x]), **EXACT)
    grads = torch.func.grad(loss)(parameters, x[0])
    leaf = {key: value.clone().requires_grad_() for key, value in parameters.items()}
    expected = torch.autograd.grad(loss(leaf, x[0]), list(leaf.values()))
    torch.testing.assert_close(list(grads.values()), list(expected), **EXACT)


@each_name
@pytest.mark.filterwarnings("ignore")
def test_script_trace_compile_export(name: str) -> None:
    theirs, ours = build_pair(name, IN, H)
    x, longer = torch.randn(B, IN).double(), torch.randn(B + 2, IN).double()
    expected = tree_leaves(theirs(longer))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(ours, (x,), dynamic_shapes={"input": {0: batch}})
    for call in (
        torch.jit.trace(ours, (x,)),
        torch.jit.script(ours),
        torch.compile(ours, fullgraph=True, backend="aot_eager"),
        program.module(),
    ):
        torch.testing.assert_close(tree_leaves(call(longer)), expected, **EXACT)
