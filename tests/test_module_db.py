"""torch's own module samples (``module_db``), run against torch.nn and fastseq.nn side by side."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch.testing._internal.common_modules import ModuleInfo, module_db
from torch.utils._pytree import tree_leaves, tree_map

import fastseq
import fastseq.nn as fast_nn

RECURRENT = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
TRANSFORMERS = (
    "TransformerEncoderLayer",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "Transformer",
)
NAMES = (*RECURRENT, "MultiheadAttention", "Linear", "LayerNorm", "RMSNorm", *TRANSFORMERS)
# These have dozens of samples, for masks that make no difference to what a module holds.
STRIDE = {name: 5 if name in TRANSFORMERS else 1 for name in NAMES}
INFOS = {
    info.module_cls.__name__: info
    for info in module_db
    if info.module_cls in {getattr(torch.nn, name) for name in NAMES}
}
DTYPES = (torch.float64, torch.float32)
# The two libraries sum in different orders. The samples have sums of some tens of terms of size
# one, so about a hundred units in the last place bound the difference in float32; float64 gets
# more of its far smaller units.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def samples(info: ModuleInfo, dtype: torch.dtype, training: bool) -> list[Any]:
    torch.manual_seed(0)
    return list(
        info.module_inputs_func(
            info, device="cpu", dtype=dtype, requires_grad=True, training=training
        )
    )


def build_pair(
    name: str, sample: Any, dtype: torch.dtype
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same module from both libraries, from the same seed."""
    arguments, keywords = sample.constructor_input.args, sample.constructor_input.kwargs
    modules: list[torch.nn.Module] = []
    if name == "TransformerEncoder":
        layer, *rest = arguments
        twin = copy.deepcopy(layer)
        fastseq.convert(twin, verbose=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's: no nested tensors for these options
            theirs = torch.nn.TransformerEncoder(layer, *rest, **keywords)
        return theirs, fast_nn.TransformerEncoder(twin, *rest, **keywords)
    keywords = {**keywords, "dtype": dtype}
    for library in (torch.nn, fast_nn):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            modules.append(getattr(library, name)(*arguments, **keywords))
    return modules[0], modules[1]


def detached(arguments: Any) -> Any:
    def copy_leaf(leaf: Any) -> Any:
        if not torch.is_tensor(leaf):
            return leaf
        return leaf.detach().clone().requires_grad_(leaf.is_floating_point())

    return tree_map(copy_leaf, arguments)


def outputs_and_gradients(module: torch.nn.Module, sample: Any) -> tuple[list[Any], list[Any]]:
    arguments = detached((sample.forward_input.args, sample.forward_input.kwargs))
    outputs = tree_leaves(module(*arguments[0], **arguments[1]))
    # Weights that differ per element, so that a permuted or repeated gradient is noticed.
    loss = sum(
        (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)).sum()
        for out in outputs
    )
    inputs = [
        leaf for leaf in tree_leaves(arguments) if torch.is_tensor(leaf) and leaf.requires_grad
    ]
    wanted = [*inputs, *module.parameters()]
    return outputs, list(torch.autograd.grad(loss, wanted, allow_unused=True))


def test_every_module_has_samples() -> None:
    assert set(INFOS) == set(NAMES)
    for info in INFOS.values():
        assert samples(info, torch.float64, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients(name: str, training: bool, dtype: torch.dtype) -> None:
    for sample in samples(INFOS[name], dtype, training):
        theirs, ours = build_pair(name, sample, dtype)
        theirs.train(training)
        ours.train(training)
        expected, expected_grads = outputs_and_gradients(theirs, sample)
        actual, actual_grads = outputs_and_gradients(ours, sample)
        tolerance = TOLERANCE[dtype]
        if name not in RECURRENT:
            # Samples go up to 9 and there is no tanh to bound what becomes of them.
            sized = [x.detach() for x in (*expected, *expected_grads) if x.numel()]
            tolerance *= max((float(x.abs().max()) for x in sized), default=1.0)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(actual_grads, expected_grads, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_state_and_text(name: str) -> None:
    for sample in samples(INFOS[name], torch.float64, True)[:: STRIDE[name]]:
        theirs, ours = build_pair(name, sample, torch.float64)
        assert repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for key, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[key], value), key
        assert [key for key, _ in ours.named_parameters()] == [
            key for key, _ in theirs.named_parameters()
        ]


@pytest.mark.parametrize("name", NAMES)
def test_pickle_and_deepcopy(name: str) -> None:
    for sample in samples(INFOS[name], torch.float64, True)[:: STRIDE[name]]:
        _, ours = build_pair(name, sample, torch.float64)
        expected, _ = outputs_and_gradients(ours, sample)
        for twin in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
            assert type(twin) is type(ours)
            actual, _ = outputs_and_gradients(twin, sample)
            assert all(map(torch.equal, actual, expected))


def error_samples(info: ModuleInfo) -> list[Any]:
    function = info.module_error_inputs_func
    if function is None:
        return []
    torch.manual_seed(0)
    keywords: dict[str, Any] = {
        "device": "cpu",
        "dtype": torch.float64,
        "requires_grad": False,
        "training": False,
    }
    accepted = inspect.signature(function).parameters
    keywords = {key: value for key, value in keywords.items() if key in accepted}
    return list(function(info, **keywords))


def raised(library: Any, name: str, error: Any) -> type[BaseException] | None:
    sample = error.module_error_input
    try:
        module = getattr(library, name)(
            *sample.constructor_input.args, **sample.constructor_input.kwargs
        )
        if sample.forward_input is not None:
            module(*sample.forward_input.args, **sample.forward_input.kwargs)
    except Exception as exception:
        return type(exception)
    return None


@pytest.mark.parametrize("name", RECURRENT)
def test_errors(name: str) -> None:
    errors = error_samples(INFOS[name])
    assert errors, "module_db has error samples for all of these modules"
    for error in errors:
        expected = raised(torch.nn, name, error)
        assert expected is not None
        assert raised(fast_nn, name, error) is expected
