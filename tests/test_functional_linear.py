"""functional.linear against torch's operators in float64: outputs and every gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels import needs_extension
from linear_oracle import ACTIVATIONS, TORCH, Case, check
from oracle import every_tier

import fastseq
from fastseq import functional
from fastseq.backends import FastseqFallbackWarning

SIZES = (1, 7, 63, 65, 1000)
LARGEST_PRODUCT = 5_000_000


@pytest.fixture(autouse=True)
def _kernels_product() -> Any:
    """Whatever table this machine's user has measured."""
    with fastseq.linear_product("fused"):
        yield


def sized() -> list[Case]:
    """Every triple of sizes with few enough operations, every activation among them."""
    cases = []
    activations = itertools.cycle(ACTIVATIONS)
    for rows, features, outputs in itertools.product(SIZES, repeat=3):
        if rows * features * outputs <= LARGEST_PRODUCT:
            cases.append(Case((rows,), features, outputs, activation=next(activations)))
    return cases


@pytest.mark.parametrize("case", sized(), ids=str)
def test_sizes(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("rows", [1, 5, 130])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float64_sizes(activation: str | None, rows: int) -> None:
    check(Case((rows,), 37, 29, "float64", activation, residual="full"))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("residual", ["", "full", "broadcast"])
@pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues(activation: str | None, dropout: float, residual: str, bias: bool) -> None:
    for dtype in ("float32", "float64"):
        check(Case((3, 11), 17, 41, dtype, activation, dropout, residual, bias))


@pytest.mark.parametrize("weight_strides", ["contiguous", "transposed", "every_other", "offset"])
@pytest.mark.parametrize("strides", ["transposed", "every_other", "offset", "expanded"])
@pytest.mark.parametrize("batch", [(19,), (3, 7), (2, 3, 4)], ids=str)
def test_strides(batch: tuple[int, ...], strides: str, weight_strides: str) -> None:
    check(
        Case(
            batch,
            33,
            18,
            activation="gelu",
            dropout=0.2,
            residual="full",
            strides=strides,
            weight_strides=weight_strides,
        )
    )


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 40, 56, 57])
@pytest.mark.parametrize(("features", "outputs"), [(300, 1100), (1013, 1100), (4111, 70)])
def test_weights_from_memory(rows: int, features: int, outputs: int) -> None:
    """More than 1 MiB of weights: asked for ahead of the product, or read in several streams."""
    check(Case((rows,), features, outputs, activation="relu"))


@pytest.mark.parametrize("rows", [1, 5])
def test_weights_from_memory_float64(rows: int) -> None:
    check(Case((rows,), 333, 421, "float64", residual="full", strides="every_other"))


def test_one_vector() -> None:
    check(Case((), 33, 18, activation="silu", residual="full"))


@pytest.mark.parametrize("batch", [(0,), (3, 0, 2)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_rows(batch: tuple[int, ...], dropout: float) -> None:
    check(Case(batch, 5, 4, activation="gelu", dropout=dropout, residual="full"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_features(activation: str | None) -> None:
    """The sum of nothing: what is left is the bias."""
    check(Case((3,), 0, 4, activation=activation))
    check(Case((3,), 0, 4, activation=activation, bias=False, residual="full", dropout=0.5))
    bias = torch.randn(4)
    output = functional.linear(torch.empty(2, 0), torch.empty(4, 0), bias, activation)
    assert torch.equal(output, TORCH[activation](bias).expand(2, 4))


def test_no_outputs() -> None:
    check(Case((3,), 5, 0, activation="gelu", dropout=0.5))


def test_a_row_does_not_depend_on_the_others() -> None:
    """NaN and Inf stay in their row, or in the column of their row of weights."""
    x, weight = torch.randn(37, 20), torch.randn(45, 20)
    clean = functional.linear(x, weight)
    x[5, 3], x[20, 0], weight[9, 2] = float("nan"), float("inf"), float("nan")
    for tier in every_tier():
        output = functional.linear(x, weight)
        assert output[5].isnan().all(), tier
        assert output[:, 9].isnan().all(), tier
        assert not output[20].isfinite().any(), tier
        untouched = torch.ones_like(output, dtype=torch.bool)
        untouched[[5, 20]] = False
        untouched[:, 9] = False
        torch.testing.assert_close(output[untouched], clean[untouched], rtol=1e-5, atol=1e-5)


@needs_extension
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_nan_and_infinity_through_the_activation(activation: str) -> None:
    """The limits, where torch's own GELU of infinity is NaN."""
    x = torch.tensor([float("nan"), float("inf"), 0.0, 200.0, -200.0])
    limits = torch.tensor([float("nan"), float("inf"), 0.0, 200.0, 0.0])
    for dtype in (torch.float32, torch.float64):
        for tier in every_tier():
            one = torch.ones(1, 1, dtype=dtype)
            found = functional.linear(x.to(dtype).unsqueeze(1), one, None, activation).squeeze(1)
            torch.testing.assert_close(
                found, limits.to(dtype), rtol=0, atol=1e-80, equal_nan=True, msg=tier
            )


@needs_extension
def test_rows_inside_a_wider_tensor_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row stride and a unit last stride are all that the kernels ask for."""
    from fastseq.backends import cpu_linear

    wide = torch.randn(4, 6, 64)
    found: list[Any] = []
    inner = cpu_linear._dense_forward
    monkeypatch.setattr(
        cpu_linear, "_dense_forward", lambda *a: found.append(inner(*a)) or found[-1]
    )
    weight = torch.randn(8, 32).requires_grad_()
    for part in (wide[..., 16:48], wide[..., ::2]):
        torch.testing.assert_close(functional.linear(part, weight), F.linear(part, weight))
    assert found[0] is not None, "None is what it returns where a tensor has to be copied"
    assert found[1] is None, "no unit stride"


# --- arguments


def call(**changes: Any) -> Any:
    given: dict[str, Any] = {
        "input": torch.randn(3, 4),
        "weight": torch.randn(5, 4),
        "bias": torch.randn(5),
        "residual": torch.randn(3, 5),
    }
    return functional.linear(**{**given, **changes})


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "input no tensor": ({"input": [1.0]}, TypeError, "input must be a tensor, got list"),
    "weight no tensor": ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
    "bias no tensor": ({"bias": 1.0}, TypeError, "bias must be a tensor or None, got float"),
    "residual no tensor": ({"residual": 1}, TypeError, "residual must be a tensor or None"),
    "features": ({"input": torch.randn(3, 6)}, RuntimeError, "input .* expected 4, got 6"),
    "scalar": ({"input": torch.randn(())}, RuntimeError, "input must have at least one dimension"),
    "weight 3-D": ({"weight": torch.randn(1, 5, 4)}, RuntimeError, "weight must be 2-D, got 3-D"),
    "bias size": ({"bias": torch.randn(4)}, RuntimeError, r"bias .* expected shape \(5,\), got"),
    "residual size": ({"residual": torch.randn(2, 5)}, RuntimeError, r"residual .* \(3, 5\), got"),
    "residual rank": ({"residual": torch.randn(1, 3, 5)}, RuntimeError, "residual must broadcast"),
    "weight dtype": (
        {"weight": torch.randn(5, 4).double()},
        RuntimeError,
        "weight must have the dtype of input: expected torch.float32, got torch.float64",
    ),
    "bias dtype": ({"bias": torch.randn(5).double()}, RuntimeError, "bias must have the dtype"),
    "residual dtype": ({"residual": torch.randn(3, 5).half()}, RuntimeError, "residual must have"),
    "device": (
        {"weight": torch.randn(5, 4, device="meta")},
        RuntimeError,
        "weight must be on the device of input: expected cpu, got meta",
    ),
    "activation": ({"activation": "tanh"}, ValueError, "activation must be one of .*'tanh'"),
    "activation type": ({"activation": F.relu}, TypeError, "activation must be a string or None"),
    "probability": ({"dropout_p": 1.5}, ValueError, "dropout_p .* between 0 and 1, got 1.5"),
    "negative": ({"dropout_p": -0.1}, ValueError, "dropout_p .* got -0.1"),
    "no number": ({"dropout_p": float("nan")}, ValueError, "dropout_p .* got nan"),
    "probability type": ({"dropout_p": "half"}, TypeError, "dropout_p must be a number, got str"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors(what: str) -> None:
    changes, exception, message = ERRORS[what]
    with pytest.raises(exception, match=message):
        call(**changes)


def test_errors_are_torchs() -> None:
    """Where torch's function can be called at all."""
    for what in ("input no tensor", "features", "weight dtype", "bias size"):
        changes = ERRORS[what][0]
        arguments = {"input": torch.randn(3, 4), "weight": torch.randn(5, 4), **changes}
        with pytest.raises(ERRORS[what][1]):
            F.linear(**arguments)


# --- who answers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_other_dtypes_are_torchs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastseq import backends

    monkeypatch.setattr(backends, "_warned_reasons", set())
    x, weight, bias = torch.randn(3, 4).to(dtype), torch.randn(5, 4).to(dtype), torch.randn(5)
    with pytest.warns(FastseqFallbackWarning, match=str(dtype)):
        found = functional.linear(x, weight, bias.to(dtype))
    assert torch.equal(found, F.linear(x, weight, bias.to(dtype)))


def test_autocast() -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = functional.linear(x.bfloat16(), weight, None, "gelu")
        assert torch.equal(found, F.gelu(F.linear(x.bfloat16(), weight)))
    assert found.dtype is torch.bfloat16


def test_reference_backend() -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    with fastseq.backend("reference"):
        found = functional.linear(x, weight, None, "silu")
    assert torch.equal(found, F.silu(F.linear(x, weight)))


def test_nested_and_sparse_inputs() -> None:
    weight, bias = torch.randn(5, 4), torch.randn(5)
    rows = [torch.randn(3, 4), torch.randn(2, 4)]
    found = functional.linear(torch.nested.nested_tensor(rows), weight, bias)
    for one, row in zip(found.unbind(), rows, strict=True):
        torch.testing.assert_close(one, F.linear(row, weight, bias))
    sparse = torch.eye(4).to_sparse()
    torch.testing.assert_close(functional.linear(sparse, weight), F.linear(torch.eye(4), weight))


class Wrapped(torch.Tensor):
    """A type that knows torch's operators only, like weights quantized by other libraries."""

    seen = 0

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.linear:
            cls.seen += 1
        return super().__torch_function__(function, types, args, kwargs or {})


def test_weights_of_other_types_meet_torchs_function() -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    found = functional.linear(x, weight.as_subclass(Wrapped))
    assert Wrapped.seen == 1
    assert torch.equal(found.as_subclass(torch.Tensor), F.linear(x, weight))


def test_lazily_negated_memory() -> None:
    z = torch.randn(3, 4, dtype=torch.complex128)
    x, weight = z.conj().imag, torch.randn(5, 4, dtype=torch.float64)
    assert x.is_neg()
    torch.testing.assert_close(functional.linear(x, weight), F.linear(x.clone(), weight))
