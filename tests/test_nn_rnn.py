"""fastseq.nn.RNN, LSTM and GRU against torch.nn's: results, gradients, errors, life cycle."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from recurrent import (
    EXACT,
    IN,
    NAMES,
    B,
    H,
    T,
    assert_same,
    build_pair,
    each_name,
    leaves,
    run,
    states,
)
from torch.nn.utils import prune
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

import fastseq.nn as fast_nn
from fastseq import backends, functional


@pytest.fixture(autouse=True)
def _seed_and_forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(backends, "_warned_reasons", set())


OPTIONS = [
    {},
    {"num_layers": 3},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"bias": False},
    {"bias": False, "num_layers": 2, "bidirectional": True},
    {"batch_first": True},
]
CASES = [(name, options) for name in NAMES for options in OPTIONS]
CASES += [("RNN", {"nonlinearity": "relu", "num_layers": 2, "bidirectional": True})]
CASES += [
    ("LSTM", {"proj_size": 3, **options})
    for options in ({}, {"num_layers": 2, "bidirectional": True, "bias": False})
]
CASE_IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for name, options in CASES]
each_case = pytest.mark.parametrize(("name", "options"), CASES, ids=CASE_IDS)


@each_case
@pytest.mark.parametrize("given", [True, False], ids=["hx", "no-hx"])
def test_padded(name: str, options: dict[str, Any], given: bool) -> None:
    theirs, ours = build_pair(name, IN, H, **options)
    shape = (B, T, IN) if options.get("batch_first") else (T, B, IN)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    hx = states(theirs) if given else None
    wanted = [x, *leaves(hx)] if given else [x]
    assert_same(theirs, ours, wanted, x, hx)


@each_case
def test_unbatched(name: str, options: dict[str, Any]) -> None:
    theirs, ours = build_pair(name, IN, H, **options)
    x = torch.randn(T, IN, dtype=torch.float64, requires_grad=True)
    assert_same(theirs, ours, [x], x)
    hx = states(theirs, None)
    assert_same(theirs, ours, [x, *leaves(hx)], x, hx)


@each_case
@pytest.mark.parametrize("is_sorted", [True, False], ids=["sorted", "unsorted"])
def test_packed(name: str, options: dict[str, Any], is_sorted: bool) -> None:
    theirs, ours = build_pair(name, IN, H, **options)
    lengths = [6, 4, 4, 1] if is_sorted else [4, 1, 6, 4]
    packed = pack_padded_sequence(
        torch.randn(T, B, IN, dtype=torch.float64), lengths, enforce_sorted=is_sorted
    )
    packed.data.requires_grad_()
    assert_same(theirs, ours, [packed.data], packed)
    hx = states(theirs)
    assert_same(theirs, ours, [packed.data, *leaves(hx)], packed, hx)
    output, expected = ours(packed)[0], theirs(packed)[0]
    assert isinstance(output, PackedSequence)
    for ours_part, theirs_part in zip(output[1:], expected[1:], strict=True):
        assert (ours_part is None) == (theirs_part is None)
        assert ours_part is None or torch.equal(ours_part, theirs_part)


@each_name
def test_packed_without_sorted_indices(name: str) -> None:
    theirs, ours = build_pair(name, IN, H)
    sequences = [torch.randn(n, IN, dtype=torch.float64) for n in (5, 3, 2)]
    packed = pack_sequence(sequences)
    plain = PackedSequence(packed.data, packed.batch_sizes)
    torch.testing.assert_close(leaves(ours(plain)), leaves(theirs(plain)), **EXACT)


@each_case
@pytest.mark.parametrize("given", [True, False], ids=["hx", "no-hx"])
def test_lengths_equal_packing(name: str, options: dict[str, Any], given: bool) -> None:
    """``lengths=`` on padded input gives what packing, running and padding again gives."""
    theirs, ours = build_pair(name, IN, H, **options)
    batch_first = bool(options.get("batch_first"))
    x = torch.randn(*((B, T, IN) if batch_first else (T, B, IN)), dtype=torch.float64)
    x.requires_grad_()
    lengths = [4, 1, 6, 4]
    hx = states(theirs) if given else None
    wanted = [x, *leaves(hx)] if given else [x]

    class Packing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = theirs

        def forward(self, x: torch.Tensor, hx: Any) -> Any:
            packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
            output, final = self.layers(packed, hx)
            return pad_packed_sequence(output, batch_first, total_length=T)[0], final

    expected = run(Packing(), wanted, x, hx)
    for form in (lengths, torch.tensor(lengths), torch.tensor(lengths, dtype=torch.int32)):
        actual = run(ours, wanted, x, hx, lengths=form)
        torch.testing.assert_close(actual, expected, **EXACT)


@each_name
@pytest.mark.parametrize("bidirectional", [False, True])
def test_length_zero(name: str, bidirectional: bool) -> None:
    _, ours = build_pair(name, IN, H, bidirectional=bidirectional)
    hx = states(ours)
    output, final = ours(torch.randn(T, B, IN, dtype=torch.float64), hx, lengths=[3, 0, 0, T])
    assert not output[:, 1:3].any()
    assert not output[3:, 0].any()
    assert output[:3, 0].all()
    assert output[:, 3].all()
    for before, after in zip(leaves(hx), leaves(final), strict=True):
        assert torch.equal(before[:, 1:3], after[:, 1:3])
        assert not torch.equal(before[:, 0], after[:, 0])


@each_name
@pytest.mark.parametrize("batch_first", [False, True])
def test_dropout_draws_torch_masks(name: str, batch_first: bool) -> None:
    """The same seed drops the same elements between layers; ``eval()`` drops none."""
    theirs, ours = build_pair(name, IN, H, 3, dropout=0.4, batch_first=batch_first)
    x = torch.randn(T, B, IN, dtype=torch.float64)
    results = []
    for module in (theirs, ours):
        torch.manual_seed(5)
        results.append(leaves(module(x)))
    torch.testing.assert_close(results[1], results[0], **EXACT)
    assert not torch.equal(leaves(ours(x))[0], results[1][0])
    torch.testing.assert_close(leaves(ours.eval()(x)), leaves(theirs.eval()(x)), **EXACT)


@each_name
@pytest.mark.parametrize("full", [0.0, 1.0])
def test_dropout_of_none_and_all(name: str, full: float) -> None:
    theirs, ours = build_pair(name, IN, H, 2, dropout=full)
    x = torch.randn(T, B, IN, dtype=torch.float64)
    torch.testing.assert_close(leaves(ours(x)), leaves(theirs(x)), **EXACT)


@each_name
def test_strided_input_and_expanded_states(name: str) -> None:
    theirs, ours = build_pair(name, IN, H, 2)
    x = torch.randn(IN, B, 2 * T, dtype=torch.float64)[:, :, ::2].permute(2, 1, 0)
    hx = torch.randn(1, 1, H, dtype=torch.float64).expand(2, B, H)
    state = (hx, hx) if name == "LSTM" else hx
    torch.testing.assert_close(leaves(ours(x, state)), leaves(theirs(x, state)), **EXACT)


@each_name
def test_empty_batch(name: str) -> None:
    theirs, ours = build_pair(name, IN, H, 2, bidirectional=True)
    x = torch.randn(T, 0, IN, dtype=torch.float64)
    assert [out.shape for out in leaves(ours(x))] == [out.shape for out in leaves(theirs(x))]


POSITIONAL = {
    "RNN": (IN, H, 2, "relu", False, True, 0.25, True, 0, "cpu", torch.float64),
    "LSTM": (IN, H, 2, False, True, 0.25, True, 3, "cpu", torch.float64),
    "GRU": (IN, H, 2, False, True, 0.25, True, 0, "cpu", torch.float64),
}


@each_name
def test_positional_construction_and_attributes(name: str) -> None:
    theirs, ours = (getattr(library, name)(*POSITIONAL[name]) for library in (torch.nn, fast_nn))
    assert repr(ours) == repr(theirs)
    assert set(vars(ours)) == set(vars(theirs))
    for attribute, value in vars(theirs).items():
        if isinstance(value, (int, float, str, bool)):
            assert getattr(ours, attribute) == value, attribute
    assert [[w.shape for w in layer] for layer in ours.all_weights] == [
        [w.shape for w in layer] for layer in theirs.all_weights
    ]
    missing = {
        attribute
        for attribute in dir(type(theirs))
        if not attribute.startswith("__") and not hasattr(type(ours), attribute)
    }
    assert not missing
    assert ours.flatten_parameters() is None


@each_name
def test_constructor_draws_the_same_numbers(name: str) -> None:
    modules = []
    for library in (torch.nn, fast_nn):
        torch.manual_seed(3)
        modules.append(getattr(library, name)(IN, H, 2))
    for (key, expected), (other, actual) in zip(
        modules[0].named_parameters(), modules[1].named_parameters(), strict=True
    ):
        assert key == other
        assert torch.equal(expected, actual)


@each_name
def test_dropout_warning_of_a_single_layer(name: str) -> None:
    with pytest.warns(UserWarning, match="dropout"):
        getattr(fast_nn, name)(IN, H, dropout=0.5)


@each_name
def test_save_and_load_both_ways(name: str) -> None:
    theirs, ours = build_pair(name, IN, H, 2, bidirectional=True)
    x = torch.randn(T, B, IN, dtype=torch.float64)
    for source, target in itertools.permutations((theirs, ours)):
        buffer = io.BytesIO()
        with torch.no_grad():
            source.weight_ih_l0.add_(1.0)
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        target.load_state_dict(torch.load(buffer))
        torch.testing.assert_close(leaves(target(x)), leaves(source(x)), **EXACT)
    for revive in (
        lambda m: pickle.loads(pickle.dumps(m)),
        copy.deepcopy,
        lambda m: _through_torch_save(m),
    ):
        twin = revive(ours)
        assert type(twin) is type(ours)
        assert twin.weight_ih_l0 is not ours.weight_ih_l0
        assert all(map(torch.equal, leaves(twin(x)), leaves(ours(x))))
        with torch.no_grad():  # the copy computes with its own weights
            twin.weight_hh_l1.zero_()
        assert not torch.equal(leaves(twin(x))[0], leaves(ours(x))[0])


def _through_torch_save(module: torch.nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _change(module: Any, how: str) -> None:
    new = torch.randn_like(module.weight_hh_l0)
    if how == "parameter":
        module.weight_hh_l0 = torch.nn.Parameter(new)
    elif how == "data":
        module.weight_hh_l0.data = new
    elif how == "copy_":
        with torch.no_grad():
            module.weight_hh_l0.copy_(new)
    elif how == "load_state_dict":
        module.load_state_dict({**module.state_dict(), "weight_hh_l0": new})
    elif how == "assign":
        module.load_state_dict({**module.state_dict(), "weight_hh_l0": new}, assign=True)
    elif how == "optimizer":
        module.weight_hh_l0.grad = new
        torch.optim.SGD([module.weight_hh_l0], lr=1.0).step()
    elif how == "to":
        with torch.no_grad():
            module.weight_hh_l0.add_(0.1)
        module.to(torch.float32).to(torch.float64)


@each_name
@pytest.mark.parametrize(
    "how", ["parameter", "data", "copy_", "load_state_dict", "assign", "optimizer", "to"]
)
def test_changed_weights_are_never_missed(name: str, how: str) -> None:
    theirs, ours = build_pair(name, IN, H)
    x, hx = torch.randn(1, 1, IN, dtype=torch.float64), states(ours, 1)
    with torch.no_grad():
        before = leaves(ours(x, hx))
        _change(ours, how)
        after = leaves(ours(x, hx))
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(after, leaves(theirs(x, hx)), **EXACT)
        assert not torch.equal(after[0], before[0])


@each_name
def test_functional_call_grad_and_vmap(name: str) -> None:
    theirs, ours = build_pair(name, 3, 4)
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    parameters = {key: torch.randn_like(value) for key, value in ours.named_parameters()}

    def loss(module: Any, parameters: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, parameters, (x,))[0].square().sum()

    theirs.load_state_dict(parameters)
    expected = torch.autograd.grad(theirs(x)[0].square().sum(), list(theirs.parameters()))
    grads = torch.func.grad(lambda p: loss(ours, p, x))(parameters)
    torch.testing.assert_close([grads[key] for key in parameters], list(expected), **EXACT)

    many = torch.randn(5, 3, 2, 3, dtype=torch.float64)
    actual = torch.func.vmap(lambda one: loss(ours, parameters, one))(many)
    torch.testing.assert_close(actual, torch.stack([loss(theirs, {}, one) for one in many]))


@each_name
def test_double_backward(name: str) -> None:
    _, ours = build_pair(name, 2, 2)
    x = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: ours(x)[0], (x,))


@each_name
def test_parametrized_and_pruned_weights(name: str) -> None:
    """Weights that are not parameters are found; a fastseq layer takes both of torch's ways."""
    theirs, ours = build_pair(name, IN, H)
    x = torch.randn(T, B, IN, dtype=torch.float64)
    for module in (theirs, ours):
        prune.l1_unstructured(module, "weight_hh_l0", 0.5)
        torch.nn.utils.parametrizations.weight_norm(module, "weight_ih_l0")
    for module in (theirs, ours):
        with torch.no_grad():
            module.parametrizations.weight_ih_l0.original0.mul_(2.0)
    torch.testing.assert_close(leaves(ours(x)), leaves(theirs(x)), **EXACT)


@each_name
def test_functional_equals_module(name: str) -> None:
    _, ours = build_pair(name, IN, H, 2, bidirectional=True)
    function = getattr(functional, name.lower())
    x, hx = torch.randn(T, B, IN, dtype=torch.float64), states(ours)
    weights = list(ours.parameters())
    result = function(x, hx, weights, num_layers=2, bidirectional=True)
    assert all(map(torch.equal, leaves(result), leaves(ours(x, hx))))
    with pytest.raises(RuntimeError, match="expected 16, got 15"):
        function(x, hx, weights[:-1], num_layers=2, bidirectional=True)


def test_subclass_of_rnn_base_not_of_torch_layers() -> None:
    """torch.compile breaks the graph at every instance of torch's own layers."""
    assert issubclass(fast_nn.LSTM, torch.nn.RNNBase)
    assert not issubclass(fast_nn.LSTM, torch.nn.LSTM)
    assert "lengths" in inspect.signature(fast_nn.LSTM.forward).parameters
