"""fastseq.nn.MultiheadAttention against torch.nn's: results, gradients, state, errors."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from multihead import Case, check, random_cases
from torch import Tensor

import fastseq
import fastseq.nn as fast_nn
from fastseq import backends, functional
from fastseq.nn import MultiheadAttention

EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _seed_and_forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(backends, "_warned_reasons", set())


def build_pair(*args: Any, **kwargs: Any) -> tuple[torch.nn.Module, MultiheadAttention]:
    """The same layer from both libraries, from the same seed."""
    modules = []
    for kind in (torch.nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(1)
        modules.append(kind(*args, **{"dtype": torch.float64, **kwargs}))
    return modules[0], modules[1]


# --- results and gradients ---------------------------------------------------------------------

EACH_OPTION = [
    Case(inputs="self"),
    Case(inputs="pair"),
    Case(),
    Case(bias=False, inputs="self"),
    Case(kdim=5, vdim=6),
    Case(kdim=5, vdim=6, bias=False, batched=False),
    Case(batch_first=True, inputs="self"),
    Case(batched=False, inputs="self"),
    Case(weights="mean"),
    Case(weights="heads", batched=False),
    *(Case(attn_mask=mask) for mask in ("bool", "float", "bool3", "float3")),
    *(Case(attn_mask="causal", inputs="self", weights=weights) for weights in ("none", "mean")),
    *(Case(key_padding_mask=mask) for mask in ("bool", "float", "hidden")),
    *(
        Case(add_bias_kv=a, add_zero_attn=b, attn_mask=mask, key_padding_mask="bool", weights=w)
        for (a, b), mask, w in itertools.product(
            ((True, False), (False, True), (True, True)),
            ("none", "bool", "causal"),
            ("none", "mean"),
        )
    ),
]


@pytest.mark.parametrize("case", EACH_OPTION, ids=repr)
def test_each_option(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("part", range(6))
def test_random_combinations(part: int) -> None:
    for case in list(random_cases(60))[part::6]:
        try:
            check(case)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def test_bool_and_float_masks_combine() -> None:
    theirs, ours = build_pair(6, 2)
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    hidden = torch.tensor([[0, 0, 1, 0, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    bias = torch.randn(5, 5, dtype=torch.float64)
    as_float = torch.zeros(3, 5, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    expected = theirs(x, x, x, key_padding_mask=as_float, attn_mask=bias)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = ours(x, x, x, key_padding_mask=hidden, attn_mask=bias)
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("need_weights", [False, True])
def test_rows_that_see_nothing_are_zero(need_weights: bool) -> None:
    """torch: NaN in the output and in every gradient."""
    _, ours = build_pair(6, 2, batch_first=True)
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    padding = torch.zeros(3, 4, dtype=torch.bool)
    padding[1] = True
    row = torch.zeros(4, 4, dtype=torch.bool)
    row[2] = True
    as_float = torch.zeros(4, 4, dtype=torch.float64).masked_fill(row, -torch.inf)
    for mask, first in ((None, 0), (row, 2), (as_float, 2)):
        output, weights = ours(
            x, x, x, padding, need_weights, attn_mask=mask, average_attn_weights=False
        )
        bias = ours.out_proj.bias.detach()
        assert torch.equal(output[1].detach(), bias.expand(4, 6))
        if mask is not None:
            assert torch.equal(output[:, first].detach(), bias.expand(3, 6))
        if weights is not None:
            assert not weights[1].any()
        gradients = torch.autograd.grad(output.square().sum(), [x, *ours.parameters()])
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert not gradients[0][1].any()


def test_nothing_leaks_out_of_hidden_keys() -> None:
    _, ours = build_pair(6, 2, batch_first=True)
    q = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 5, 6, dtype=torch.float64)
    hidden = torch.tensor([[False, False, True, True, True]] * 2)
    expected = ours(q, k, k, hidden, need_weights=False)[0]
    with torch.no_grad():
        k[:, 2:] = torch.tensor([torch.nan, torch.inf, -torch.inf])[:, None]
    actual = ours(q, k, k, hidden, need_weights=False)[0]
    assert torch.equal(actual, expected)
    assert torch.autograd.grad(actual.sum(), q)[0].isfinite().all()


def test_a_wrong_causal_hint_does_what_torch_does() -> None:
    """Without weights and padding torch obeys the hint, otherwise the mask."""
    theirs, ours = build_pair(6, 2)
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    mask = torch.rand(5, 5) < 0.3
    mask[:, 0] = False
    for options in (
        {"need_weights": False},
        {"need_weights": True},
        {"need_weights": False, "key_padding_mask": torch.zeros(3, 5, dtype=torch.bool)},
    ):
        expected = theirs(x, x, x, attn_mask=mask, is_causal=True, **options)
        actual = ours(x, x, x, attn_mask=mask, is_causal=True, **options)
        torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_true_causal_hint_replaces_the_mask(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy(monkeypatch)
    ours = MultiheadAttention(6, 2)
    x = torch.randn(5, 3, 6)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    if kind == "float":
        mask = torch.zeros(5, 5).masked_fill(mask, -torch.inf)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    for options in ({"need_weights": True}, {"key_padding_mask": padding}):
        ours(x, x, x, attn_mask=mask, is_causal=True, **options)
        assert seen[-1]["causal"]
        assert seen[-1]["mask"] is None
        assert seen[-1]["bias"] is None


# --- how the heads reach the kernel ------------------------------------------------------------


def spy(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every call of functional.attention from here on."""
    seen: list[dict[str, Any]] = []
    original = functional.attention

    def record(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        seen.append({"query": query, "key": key, "value": value, **options})
        return original(query, key, value, **options)

    monkeypatch.setattr(functional, "attention", record)
    return seen


@pytest.mark.parametrize("layout", ["batch_first", "time_first", "unbatched"])
def test_heads_are_views_of_one_projection(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy(monkeypatch)
    ours = MultiheadAttention(8, 2, batch_first=layout == "batch_first")
    x = torch.randn(*((5,) if layout == "unbatched" else (3, 5)), 8)
    ours(x, x, x, need_weights=False)
    q, k, v = (seen[0][name] for name in ("query", "key", "value"))
    assert q.stride(-1) == 1
    storage = q.untyped_storage()
    assert storage.nbytes() == 3 * x.numel() * x.element_size()
    assert k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() == storage.data_ptr()


def test_masks_are_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy(monkeypatch)
    ours = MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(3, 5, 8)
    padding, bias = torch.zeros(3, 5, dtype=torch.bool), torch.randn(5, 5)
    ours(x, x, x, padding, attn_mask=bias)
    assert seen[-1]["key_padding_mask"] is padding
    assert seen[-1]["bias"] is bias
    ours(x, x, x, attn_mask=bias > 0)
    assert seen[-1]["mask"].shape == (5, 5)
    deep = torch.randn(6, 5, 5)
    ours(x, x, x, attn_mask=deep)
    assert seen[-1]["bias"].data_ptr() == deep.data_ptr()
    # What torch's Transformer layers make of a boolean padding mask.
    numbers = torch.zeros(3, 5).masked_fill(padding, -torch.inf)
    ours(x, x, x, numbers)
    assert seen[-1]["key_padding_mask"].dtype == torch.bool
    assert seen[-1]["bias"] is None


# --- dropout -----------------------------------------------------------------------------------


def test_dropout_in_training_only() -> None:
    ours = MultiheadAttention(4, 2, dropout=0.25, batch_first=True)
    x = torch.randn(8, 64, 4)
    torch.manual_seed(3)
    _, weights = ours(x, x, x, average_attn_weights=False)
    dropped = float((weights == 0).double().mean())
    # 65536 independent draws: five standard deviations.
    assert abs(dropped - 0.25) < 5 * (0.25 * 0.75 / weights.numel()) ** 0.5
    torch.manual_seed(3)
    assert torch.equal(ours(x, x, x, average_attn_weights=False)[1], weights)
    ours.eval()
    kept = ours(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(weights[weights != 0] * 0.75, kept[weights != 0])
    plain = MultiheadAttention(4, 2, batch_first=True)
    plain.load_state_dict(ours.state_dict())
    assert torch.equal(plain(x, x, x)[0], ours(x, x, x)[0])


# --- constructor, state ------------------------------------------------------------------------

CONSTRUCTIONS = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"kdim": 5, "vdim": 3, "add_bias_kv": True, "add_zero_attn": True},
    {"dropout": 0.1, "batch_first": True, "kdim": 8},
]


@pytest.mark.parametrize("options", CONSTRUCTIONS, ids=str)
def test_parameters_and_state(options: dict[str, Any]) -> None:
    theirs, ours = build_pair(8, 2, **options)
    assert isinstance(ours, torch.nn.MultiheadAttention)
    expected, actual = dict(theirs.named_parameters()), dict(ours.named_parameters())
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    assert vars(ours).keys() >= vars(theirs).keys()
    for name in ("embed_dim", "kdim", "vdim", "num_heads", "dropout", "batch_first", "head_dim"):
        assert getattr(ours, name) == getattr(theirs, name)
    for module in (theirs, ours):
        torch.manual_seed(2)
        module._reset_parameters()
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("options", CONSTRUCTIONS, ids=str)
def test_pickle_deepcopy_and_script(options: dict[str, Any]) -> None:
    _, ours = build_pair(8, 2, **options)
    ours.eval()
    q = torch.randn(4, 3, 8, dtype=torch.float64)
    k = torch.randn(5, 3, ours.kdim, dtype=torch.float64)
    v = torch.randn(5, 3, ours.vdim, dtype=torch.float64)
    if ours.batch_first:
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    expected = ours(q, k, v)
    for twin in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert type(twin) is MultiheadAttention
        assert all(map(torch.equal, twin(q, k, v), expected))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(ours, (q, k, v), check_trace=False)
        torch.testing.assert_close(traced(q, k, v), expected, **EXACT)
        if "bias" not in options:  # without biases torch's own layer cannot be scripted
            torch.testing.assert_close(torch.jit.script(ours)(q, k, v), expected, **EXACT)


def test_device_and_dtype() -> None:
    meta = MultiheadAttention(8, 2, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in meta.parameters()} == {("meta", torch.float64)}
    x = torch.empty(3, 2, 8, device="meta", dtype=torch.float64)
    with pytest.warns(fastseq.FastseqFallbackWarning, match="device meta"):
        assert meta(x, x, x)[0].shape == (3, 2, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.filterwarnings("ignore::fastseq.FastseqFallbackWarning")
def test_other_dtypes_are_torchs_own(dtype: torch.dtype) -> None:
    theirs, ours = build_pair(8, 2, batch_first=True, dtype=dtype)
    x, y = torch.randn(3, 5, 8, dtype=dtype), torch.randn(3, 5, 8, dtype=dtype)
    for args in ((x, x, x), (x, y, y), (x, y, x), (x[0], x[0], x[0])):
        for options in ({}, {"need_weights": False}, {"average_attn_weights": False}):
            expected, actual = theirs(*args, **options), ours(*args, **options)
            assert torch.equal(actual[0], expected[0])
            assert actual[1] is expected[1] or torch.equal(actual[1], expected[1])


def test_fallback_warns_once_per_reason() -> None:
    layer = MultiheadAttention(4, 2).bfloat16()
    x = torch.randn(3, 1, 4, dtype=torch.bfloat16)
    with pytest.warns(fastseq.FastseqFallbackWarning, match="bfloat16"):
        layer(x, x, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x, x, x)


@pytest.mark.filterwarnings("ignore::fastseq.FastseqFallbackWarning")
def test_autocast() -> None:
    theirs, ours = build_pair(8, 2, dtype=torch.float32)
    x = torch.randn(3, 2, 8)
    with torch.autocast("cpu"):
        expected, actual = theirs(x, x, x), ours(x, x, x)
    assert actual[0].dtype == torch.bfloat16
    assert all(map(torch.equal, actual, expected))


@pytest.mark.filterwarnings("ignore::fastseq.FastseqFallbackWarning")
def test_functional_autocast() -> None:
    """As torch's function: inputs and output in lower precision; the log-sum-exp is not."""
    q = torch.randn(1, 2, 5, 8)
    expected, expected_lse = fastseq.functional.attention(*(q.bfloat16(),) * 3, return_lse=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, lse = fastseq.functional.attention(q, q, q, return_lse=True)
        assert output.dtype is F.scaled_dot_product_attention(q, q, q).dtype is torch.bfloat16
    assert torch.equal(output, expected)
    assert torch.equal(lse, expected_lse)
    assert lse.dtype is torch.float32


# --- errors ------------------------------------------------------------------------------------

R = torch.randn
BAD_CALLS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "mask list": (
        {},
        lambda: ((R(5, 3, 8),) * 3, {"attn_mask": [[0]]}),
        "attn_mask must be a tensor or None, got list|must be Tensor, not list",
    ),
    "dropout": ({"dropout": 2.0}, lambda: ((R(5, 3, 8),) * 3, {}), "between 0 and 1.* got 2.0"),
    "dropout without weights": (
        {"dropout": 2.0},
        lambda: ((R(5, 3, 8),) * 3, {"need_weights": False}),
        "between 0 and 1.* got 2",
    ),
    "query 4-D": ({}, lambda: ((R(1, 5, 3, 8),) * 3, {}), "query must be 2-D or 3-D, got 4-D"),
    "key 2-D": ({}, lambda: ((R(5, 3, 8), R(5, 8), R(5, 8)), {}), "key must be 3-D .* got 2-D"),
    "value 2-D": ({}, lambda: ((R(5, 3, 8), R(5, 3, 8), R(5, 8)), {}), "value must be 3-D"),
    "key 3-D": ({}, lambda: ((R(5, 8), R(5, 3, 8), R(5, 3, 8)), {}), "key must be 2-D"),
    "query features": ({}, lambda: ((R(5, 3, 7),) * 3, {}), "query must have 8 features, got 7"),
    "key features": (
        {},
        lambda: ((R(5, 3, 8), R(5, 3, 7), R(5, 3, 7)), {}),
        "key must have 8 features, got 7",
    ),
    "key features apart": (
        {"kdim": 6},
        lambda: ((R(5, 3, 8), R(5, 3, 7), R(5, 3, 8)), {}),
        "key must have 6 features, got 7",
    ),
    "value features apart": (
        {"vdim": 6},
        lambda: ((R(5, 3, 8), R(5, 3, 8), R(5, 3, 7)), {}),
        "value must have 6 features, got 7",
    ),
    "key and value": (
        {},
        lambda: ((R(5, 3, 8), R(5, 3, 8), R(4, 3, 8)), {}),
        r"key and value .* \(5, 3, 8\) and \(4, 3, 8\)",
    ),
    "key and value apart": (
        {"kdim": 6},
        lambda: ((R(5, 3, 8), R(5, 3, 6), R(4, 3, 8)), {}),
        r"key and value .* \(5, 3\) and \(4, 3\)",
    ),
    "batch": ({}, lambda: ((R(5, 3, 8), R(5, 2, 8), R(5, 2, 8)), {}), "batch size, got 3 and 2"),
    "dtype": ({}, lambda: ((R(5, 3, 8).double(),) * 3, {}), "torch.float32, got torch.float64"),
    "integer mask": (
        {},
        lambda: ((R(5, 3, 8),) * 3, {"attn_mask": torch.zeros(5, 5, dtype=torch.int64)}),
        "attn_mask must be bool or floating, got torch.int64",
    ),
    "integer padding": (
        {},
        lambda: ((R(5, 3, 8),) * 3, {"key_padding_mask": torch.zeros(3, 5, dtype=torch.int64)}),
        "key_padding_mask must be bool or floating, got torch.int64",
    ),
    "mask 4-D": ({}, lambda: ((R(5, 3, 8),) * 3, {"attn_mask": R(1, 1, 5, 5)}), "attn_mask must"),
    "mask 2-D": (
        {},
        lambda: ((R(5, 3, 8),) * 3, {"attn_mask": R(5, 4)}),
        r"attn_mask must have shape \(5, 5\) .*got \(5, 4\)",
    ),
    "mask 3-D": (
        {},
        lambda: ((R(5, 3, 8),) * 3, {"attn_mask": R(3, 5, 5)}),
        r"attn_mask must have shape \(6, 5, 5\) .*got \(3, 5, 5\)",
    ),
    "mask 3-D, no batch": (
        {},
        lambda: ((R(5, 8),) * 3, {"attn_mask": R(3, 5, 5)}),
        r"attn_mask must have shape \(2, 5, 5\)",
    ),
    "padding rank": (
        {},
        lambda: ((R(5, 3, 8),) * 3, {"key_padding_mask": R(5)}),
        "key_padding_mask must be 2-D .* got 1-D",
    ),
    "padding rank, no batch": (
        {},
        lambda: ((R(5, 8),) * 3, {"key_padding_mask": R(1, 5)}),
        "key_padding_mask must be 1-D .* got 2-D",
    ),
    "padding keys": (
        {},
        lambda: ((R(5, 3, 8),) * 3, {"key_padding_mask": R(3, 4)}),
        r"key_padding_mask must have shape \(3, 5\), got \(3, 4\)",
    ),
    "padding batch": (
        {},
        lambda: ((R(5, 3, 8),) * 3, {"key_padding_mask": R(2, 5)}),
        r"key_padding_mask must have shape \(3, 5\), got \(2, 5\)",
    ),
    "hint without mask": ({}, lambda: ((R(5, 3, 8),) * 3, {"is_causal": True}), "attn_mask must"),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_errors_of_calls(what: str) -> None:
    constructor, build, message = BAD_CALLS[what]
    theirs, ours = build_pair(8, 2, dtype=torch.float32, **constructor)
    args, options = build()
    with pytest.raises((AssertionError, RuntimeError, TypeError, ValueError)) as expected:
        theirs(*args, **options)
    with pytest.raises(expected.type, match=message):
        ours(*args, **options)


@pytest.mark.parametrize(
    ("args", "message"),
    [((0, 1), "embed_dim=0"), ((8, 0), "num_heads=0"), ((8, 3), "embed_dim=8 and num_heads=3")],
    ids=str,
)
def test_errors_of_the_constructor(args: tuple[int, int], message: str) -> None:
    with pytest.raises((AssertionError, ValueError)) as expected:
        torch.nn.MultiheadAttention(*args)
    with pytest.raises(expected.type, match=message):
        MultiheadAttention(*args)


def test_exported_names() -> None:
    for name in ("MultiheadAttention", "KeyValueCache", "RotaryEmbedding"):
        assert name in fast_nn.__all__
