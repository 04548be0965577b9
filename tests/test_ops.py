"""The registered ops: opcheck, gradcheck, fake tensors, transforms, and what autograd promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels import HAS_EXTENSION
from oracle import CELLS, Case, arguments, outputs_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import fastseq.nn as fast_nn
from fastseq import _ops, functional
from fastseq._cells import NUMBA_RESERVE_LAYOUT, RESERVE_LAYOUT

LAYOUT = RESERVE_LAYOUT if HAS_EXTENSION else NUMBA_RESERVE_LAYOUT

LAYERS = ("RNN", "LSTM", "GRU")
SMALL = {"steps": 3, "batch": 2, "input_size": 3, "hidden_size": 4}

# Layouts and options of one layer that the ops see.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_states": {"states": False},
    "no_biases": {"has_biases": False},
    "bidirectional": {"bidirectional": True},
    "batch_first": {"batch_first": True},
    "lengths": {"layout": "lengths", "bidirectional": True},
    "packed": {"layout": "packed", "bidirectional": True},
    "projected": {"projected": True, "bidirectional": True},
    "projected_lengths": {"projected": True, "layout": "lengths"},
}


def variant_cases(dtype: str) -> list[Any]:
    cases = []
    for cell in CELLS:
        for name, options in VARIANTS.items():
            if options.get("projected") and cell != "lstm":
                continue
            cases.append(pytest.param(Case(cell, dtype, **SMALL, **options), id=f"{cell}-{name}"))
    return cases


def opcheck_cases() -> list[Any]:
    """Every variant of the LSTM, a third of them for each of the others: the ops do not branch."""
    cases = variant_cases("float64")
    names = [case.id for case in cases]
    plain = [name for name in VARIANTS if "projected" not in name]
    chosen = {f"{cell}-{name}" for i, cell in enumerate(CELLS) for name in plain[i % 3 :: 3]}
    return [c for c, name in zip(cases, names, strict=True) if "lstm" in name or name in chosen]


def op_arguments(case: Case, save: bool = True) -> tuple[Any, ...]:
    """Arguments of ``fastseq::rnn_forward`` for a case of one layer."""
    leaves, lengths, _ = arguments(case, getattr(torch, case.dtype))
    x, batch_sizes = leaves["x"], None
    if case.layout == "packed":
        x, batch_sizes, *_ = pack_padded_sequence(x.detach(), lengths, case.batch_first)
        x.requires_grad_()
        lengths = None
    weights = [leaf for name, leaf in leaves.items() if name[:2] in ("w_", "b_")]
    options = (case.cell, case.has_biases, case.proj_size, case.bidirectional, case.batch_first)
    states = (leaves.get("h_0"), leaves.get("c_0"))
    return (x, *states, weights, batch_sizes, lengths, *options, save, LAYOUT)


def detached(value: Any) -> Any:
    if isinstance(value, list):
        return [detached(item) for item in value]
    return value.detach() if isinstance(value, Tensor) else value


@pytest.fixture
def zeroed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """opcheck compares all elements of the reserve, those that pad rows included.

    They are neither written nor read, and so hold NaN here, which equals nothing.
    """
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)


@pytest.mark.parametrize("case", opcheck_cases())
@pytest.mark.usefixtures("zeroed_memory")
def test_opcheck_rnn_forward(case: Case) -> None:
    torch.library.opcheck(torch.ops.fastseq.rnn_forward.default, op_arguments(case))


@pytest.mark.parametrize("case", variant_cases("float32")[:2])
def test_opcheck_rnn_forward_without_save(case: Case) -> None:
    given = tuple(detached(value) for value in op_arguments(case, save=False))
    torch.library.opcheck(torch.ops.fastseq.rnn_forward.default, given)


@pytest.mark.parametrize("case", opcheck_cases())
def test_opcheck_rnn_backward(case: Case) -> None:
    given = tuple(detached(value) for value in op_arguments(case))
    x, hx, cx, weights, batch_sizes, lengths, *options, _, _ = given
    output, hy, cy, reserve = torch.ops.fastseq.rnn_forward(*given)
    grads = (
        torch.randn_like(output),
        torch.randn_like(hy),
        torch.randn_like(cy) if case.cell == "lstm" else None,
    )
    for needs in ([True] * (3 + len(weights)), [False, True, False] + [False] * len(weights)):
        needs = [n and t is not None for n, t in zip(needs, (x, hx, cx, *weights), strict=True)]
        torch.library.opcheck(
            torch.ops.fastseq.rnn_backward.default,
            (
                *grads,
                x,
                hx,
                cx,
                weights,
                reserve,
                batch_sizes,
                lengths,
                *options,
                needs,
                LAYOUT,
            ),
            # There is no formula for its own gradient: double backward goes another way.
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


# --- gradients in float64 against finite differences


def differentiable(case: Case) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    leaves, lengths, _ = arguments(case, torch.float64)
    names = list(leaves)

    def layer(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(outputs_of(case, "fastseq", dict(zip(names, tensors, strict=True)), lengths))

    return layer, tuple(leaves.values())


@pytest.mark.parametrize("case", variant_cases("float64"))
def test_gradcheck(case: Case) -> None:
    layer, inputs = differentiable(case)
    assert torch.autograd.gradcheck(layer, inputs)


@pytest.mark.parametrize("case", [*variant_cases("float64")[::4], *variant_cases("float64")[5::9]])
def test_gradgradcheck(case: Case) -> None:
    layer, inputs = differentiable(case)
    assert torch.autograd.gradgradcheck(layer, inputs, fast_mode=True)


@pytest.mark.parametrize("cell", CELLS)
def test_cell_gradcheck(cell: str) -> None:
    leaves, _, _ = arguments(Case(cell, "float64", **SMALL), torch.float64)
    inputs = [
        leaf[0].detach().requires_grad_() if name in ("x", "h_0", "c_0") else leaf
        for name, leaf in leaves.items()
    ]

    def step(x: Tensor, h: Tensor, *rest: Tensor) -> Any:
        if cell == "lstm":
            return functional.lstm_cell(x, (h, rest[0]), *rest[1:])
        if cell == "gru":
            return functional.gru_cell(x, h, *rest)
        return functional.rnn_cell(x, h, *rest, nonlinearity=cell[4:])

    assert torch.autograd.gradcheck(step, inputs)
    assert torch.autograd.gradgradcheck(step, inputs, fast_mode=True)


def test_hessian_vector_product() -> None:
    """A gradient penalty, the usual reason for double backward, equals torch's."""
    found = []
    for library in (torch.nn, fast_nn):
        torch.manual_seed(0)
        layer = library.LSTM(3, 4, 2, dtype=torch.float64)
        x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append([parameter.grad for parameter in (x, *layer.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-12)


# --- what autograd promises


@pytest.fixture
def layer() -> Any:
    torch.manual_seed(0)
    return fast_nn.LSTM(3, 4, dtype=torch.float64)


def test_in_place_change_of_a_saved_tensor_is_an_error(layer: Any) -> None:
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    for spoil in (
        lambda output: x.add_(1),
        lambda output: layer.weight_ih_l0.detach().add_(1),
    ):
        output, _ = layer(x)
        spoil(output)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("proj_size", [0, 4])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_outputs_may_be_changed_in_place(name: str, proj_size: int, compiled: bool) -> None:
    """``nn.ReLU(inplace=True)`` or ``output += x`` behind a layer, as behind torch's."""
    if proj_size and name != "LSTM":
        pytest.skip("only an LSTM has projections")
    torch.manual_seed(0)
    options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}
    if proj_size:
        options["proj_size"] = proj_size
    theirs = getattr(torch.nn, name)(3, 5, **options)
    ours = getattr(fast_nn, name)(3, 5, **options)
    ours.load_state_dict(theirs.state_dict())
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        torch.randn(4, 3, 3, dtype=torch.float64), [4, 2, 1]
    )
    results = []
    for layer in (theirs, ours):

        def loss(x: Any, layer: Any = layer) -> torch.Tensor:
            values = layer(x)[0]
            if isinstance(values, torch.nn.utils.rnn.PackedSequence):
                values = values.data
            values *= 3
            values.relu_()
            return values.square().sum()

        run = torch.compile(loss, backend="aot_eager") if compiled and layer is ours else loss
        found = []
        for x in (packed, torch.randn(4, 3, 3, dtype=torch.float64).fill_(0.5)):
            layer.zero_grad()
            run(x).backward()
            found += [parameter.grad.clone() for parameter in layer.parameters()]
        results.append(found)
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_transforms_inside_compiled_code(layer: Any) -> None:
    x = torch.randn(4, 3, 3, dtype=torch.float64)

    def gradient(x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda x: layer(x)[0].square().sum())(x)

    torch._dynamo.reset()
    compiled: Any = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), gradient(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_compile_packed_with_states(name: str, enforce_sorted: bool) -> None:
    lengths = [4, 2, 1] if enforce_sorted else [2, 4, 1]
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        torch.randn(4, 3, 3), lengths, enforce_sorted=enforce_sorted
    )
    module = getattr(fast_nn, name)(3, 5)

    def states(batch: int) -> Any:
        state = torch.randn(1, batch, 5)
        return (state, state) if name == "LSTM" else state

    torch._dynamo.reset()
    compiled: Any = torch.compile(module, fullgraph=True, backend="aot_eager")
    given = states(3)
    assert torch.equal(compiled(packed, given)[0].data, module(packed, given)[0].data)
    with pytest.raises(RuntimeError):
        compiled(packed, states(2))
    torch._dynamo.reset()


def test_backward_twice(layer: Any) -> None:
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    loss = layer(x)[0].square().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


def test_gradients_accumulate(layer: Any) -> None:
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    layer(x)[0].sum().backward()
    once = layer.weight_ih_l0.grad.clone()
    layer(x)[0].sum().backward()
    assert torch.equal(layer.weight_ih_l0.grad, 2 * once)


def test_checkpoint(layer: Any) -> None:
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    (plain,) = torch.autograd.grad(layer(x)[0].square().sum(), x)
    again = checkpoint(lambda value: layer(value)[0], x, use_reentrant=False)
    (saved,) = torch.autograd.grad(again.square().sum(), x)
    assert torch.equal(plain, saved)


def test_saved_tensor_hooks_see_the_reserve(layer: Any) -> None:
    """Offloading of saved tensors works: what goes through the hooks is what backward reads."""
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    (plain,) = torch.autograd.grad(layer(x)[0].sum(), x)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = layer(x)[0].sum()
    (hooked,) = torch.autograd.grad(loss, x)
    assert torch.equal(plain, hooked)
    assert len(packed) >= 6


def test_anomaly_mode(layer: Any) -> None:
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    with torch.autograd.detect_anomaly(check_nan=True):
        layer(x)[0].sum().backward()


# --- torch.func


def loss_of(module: torch.nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(module, parameters, (x,))[0].square().sum()


def pair(name: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(3, 4, 2, dtype=torch.float64)
    ours = getattr(fast_nn, name)(3, 4, 2, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("name", LAYERS)
def test_func_grad(name: str) -> None:
    theirs, ours = pair(name)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    parameters = {n: p.detach() for n, p in ours.named_parameters()}
    found = grad(lambda p: loss_of(ours, p, x))(parameters)
    loss_of(theirs, dict(theirs.named_parameters()), x).backward()
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_per_sample_gradients(name: str) -> None:
    _, ours = pair(name)
    samples = torch.randn(4, 5, 1, 3, dtype=torch.float64)
    parameters = {n: p.detach() for n, p in ours.named_parameters()}
    per_sample = vmap(grad(lambda p, x: loss_of(ours, p, x)), in_dims=(None, 0))(
        parameters, samples
    )
    for index, sample in enumerate(samples):
        expected = torch.autograd.grad(
            loss_of(ours, dict(ours.named_parameters()), sample), list(ours.parameters())
        )
        found = [per_sample[n][index] for n in parameters]
        torch.testing.assert_close(found, list(expected), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_vmap_over_sequences(name: str) -> None:
    _, ours = pair(name)
    batches = torch.randn(3, 5, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        mapped = vmap(lambda x: ours(x)[0])(batches)
        expected = torch.stack([ours(x)[0] for x in batches])
    torch.testing.assert_close(mapped, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", LAYERS)
def test_forward_mode(name: str) -> None:
    _, ours = pair(name)
    x, tangent = torch.randn(2, 5, 2, 3, dtype=torch.float64).unbind()
    _, by_jvp = torch.func.jvp(lambda value: ours(value)[0], (x,), (tangent,))
    with forward_ad.dual_level():
        dual = ours(forward_ad.make_dual(x, tangent))[0]
        by_dual = forward_ad.unpack_dual(dual).tangent
    step = 1e-6
    with torch.no_grad():
        numeric = (ours(x + step * tangent)[0] - ours(x - step * tangent)[0]) / (2 * step)
    assert by_dual is not None
    torch.testing.assert_close(by_dual, by_jvp, rtol=1e-12, atol=1e-13)
    # Central differences err by step^2 and by eps / step.
    torch.testing.assert_close(by_jvp, numeric, rtol=1e-7, atol=1e-8)


# --- fake tensors


@pytest.mark.parametrize("case", variant_cases("float32"))
def test_fake_tensors(case: Case) -> None:
    """Shapes, dtypes and strides without values, forward and backward."""
    if case.layout == "packed" and not case.states:
        pytest.skip("the widest step is a value of batch_sizes")
    real = op_arguments(case)
    expected = torch.ops.fastseq.rnn_forward(*real)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(value: Any) -> Any:
        if isinstance(value, list):
            return [fake(item) for item in value]
        return mode.from_tensor(value) if isinstance(value, Tensor) else value

    with mode:
        found = torch.ops.fastseq.rnn_forward(*(fake(value) for value in real))
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_fake_module_allocates_nothing() -> None:
    with FakeTensorMode():
        layer = fast_nn.GRU(1 << 14, 1 << 14)
        output, final = layer(torch.empty(1 << 10, 1 << 10, 1 << 14))
    assert output.shape == (1 << 10, 1 << 10, 1 << 14)
    assert final.shape == (1, 1 << 10, 1 << 14)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_meta_device(name: str, grad: bool) -> None:
    layer = getattr(fast_nn, name)(3, 4, device="meta")
    with torch.set_grad_enabled(grad):
        output, final = layer(torch.empty(5, 2, 3, device="meta"))
    assert output.shape == (5, 2, 4)
    assert output.device.type == "meta"
    for state in final if name == "LSTM" else (final,):
        assert state.shape == (1, 2, 4)
        assert state.device.type == "meta"


def test_the_schema_is_closed() -> None:
    """These ops are all that is registered; another one belongs into these tests."""
    assert _ops.library._op_defs == {
        f"fastseq::{stem}_{direction}"
        for stem in ("rnn", "attention", "linear", "norm", "cell")
        for direction in ("forward", "backward")
    }
