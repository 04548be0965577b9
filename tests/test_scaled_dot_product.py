"""scaled_dot_product_attention: torch's results, shapes and exception classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recurrent import raised
from torch import Tensor

import fastseq
from fastseq import backends, functional

ours = functional.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _seed_and_forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(backends, "_warned_reasons", set())


def tensors(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> list[Tensor]:
    return [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in (query, key, value)
    ]


SHAPES = {
    "2d": ((5, 8), (7, 8), (7, 6)),
    "3d": ((4, 5, 8), (4, 7, 8), (4, 7, 6)),
    "4d": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "5d": ((3, 2, 4, 5, 8), (3, 2, 4, 7, 8), (3, 2, 4, 7, 6)),
    "6d": ((1, 3, 2, 4, 5, 8), (1, 3, 2, 4, 7, 8), (1, 3, 2, 4, 7, 6)),
    "fewer_key_dims": ((2, 4, 5, 8), (4, 7, 8), (4, 7, 6)),
    "fewer_query_dims": ((4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "broadcast_batch": ((2, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 6)),
    "broadcast_heads": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 6)),
    "broadcast_query": ((1, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "broadcast_5d": ((3, 2, 4, 5, 8), (1, 2, 4, 7, 8), (2, 4, 7, 6)),
    "one_query": ((2, 4, 1, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "one_key": ((2, 4, 5, 8), (2, 4, 1, 8), (2, 4, 1, 6)),
}
MASKS: dict[str, Callable[[tuple[int, ...]], dict[str, Any]]] = {
    "none": lambda shape: {},
    "causal": lambda shape: {"is_causal": True},
    "scale": lambda shape: {"scale": 0.3},
    "bool": lambda shape: {"attn_mask": torch.rand(shape[-2:]) < 0.7},
    "bool_full": lambda shape: {"attn_mask": torch.rand(shape) < 0.7},
    "float": lambda shape: {"attn_mask": torch.randn(shape[-2:], dtype=torch.float64)},
    "float_full": lambda shape: {
        "attn_mask": torch.randn(shape, dtype=torch.float64, requires_grad=True)
    },
    "float32": lambda shape: {"attn_mask": torch.randn(1, shape[-1])},
    "rows": lambda shape: {"attn_mask": torch.randn(shape[-2], 1, dtype=torch.float64)},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_torchs_results(shapes: Any, mask: str) -> None:
    q, k, v = tensors(*shapes)
    plain = F.scaled_dot_product_attention(q, k, v)
    options = MASKS[mask]((*plain.shape[:-1], k.shape[-2]))
    wanted = [q, k, v]
    attn_mask = options.get("attn_mask")
    if attn_mask is not None and attn_mask.requires_grad:
        wanted.append(attn_mask)
    results = []
    for function in (ours, F.scaled_dot_product_attention):
        output = function(q, k, v, **options)
        loss = (output * torch.linspace(0.5, 1.5, output.numel()).view(output.shape)).sum()
        results.append((output, *torch.autograd.grad(loss, wanted)))
        with torch.no_grad():
            results[-1] += (function(q, k, v, **options),)
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)),
        ((2, 4, 5, 8), (2, 2, 7, 8), (2, 1, 7, 6)),
        ((4, 5, 8), (1, 7, 8), (1, 7, 6)),
        ((2, 4, 5, 8), (1, 2, 7, 8), (1, 2, 7, 6)),
        ((3, 2, 4, 5, 8), (3, 2, 2, 7, 8), (3, 2, 2, 7, 6)),
    ],
    ids=str,
)
def test_grouped_queries(shapes: Any) -> None:
    q, k, v = tensors(*shapes)
    results = []
    for function in (ours, F.scaled_dot_product_attention):
        output = function(q, k, v, is_causal=True, enable_gqa=True)
        results.append((output, *torch.autograd.grad(output.square().sum(), (q, k, v))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-12)


def test_float32_is_as_near_as_torch() -> None:
    q, k, v = (torch.randn(2, 4, 65, 33) for _ in "qkv")
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    errors = [
        (function(q, k, v, is_causal=True) - exact).abs().max()
        for function in (ours, F.scaled_dot_product_attention)
    ]
    assert errors[0] <= 1.5 * errors[1] + 4 * torch.finfo(torch.float32).eps * exact.abs().max()


q4, k4, v4 = (torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 6))
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "one_dimension": ((q4[0, 0, 0], k4, v4), {}, "query.*2-D.*1-D"),
    "heads": ((q4, k4[:, :2], v4[:, :2]), {}, "broadcastable"),
    "batch": ((torch.randn(3, 4, 5, 8), k4, v4), {}, "broadcastable"),
    "groups": ((q4, k4[:, :3], v4[:, :3]), {"enable_gqa": True}, "4.*3"),
    "groups_of_matrices": ((q4[0, 0], k4[0, 0], v4[0, 0]), {"enable_gqa": True}, "3-D"),
    "key_size": ((q4, k4[..., :4], v4), {}, "key.*8.*4"),
    "value_rows": ((q4, k4, v4[:, :, :3]), {}, "value.*7.*3"),
    "dtype": ((q4, k4.double(), v4), {}, "key.*float32.*float64"),
    "device": ((q4, k4.to("meta"), v4), {}, "key.*cpu.*meta"),
    "integers": ((q4.int(), k4.int(), v4.int()), {}, ""),
    "mask_and_causal": (
        (q4, k4, v4, torch.ones(5, 7).bool()),
        {"is_causal": True},
        "attn_mask.*is_causal",
    ),
    "mask_shape": ((q4, k4, v4, torch.zeros(5, 6)), {}, r"attn_mask.*7.*\(5, 6\)"),
    "mask_heads": ((q4, k4, v4, torch.zeros(8, 5, 7)), {}, "attn_mask"),
    "mask_dims": ((q4, k4, v4, torch.zeros(1, 2, 4, 5, 7)), {}, "attn_mask"),
    "mask_vector": ((q4, k4, v4, torch.zeros(7)), {}, "attn_mask.*2-D.*1-D"),
    "mask_double": ((q4, k4, v4, torch.zeros(5, 7).double()), {}, "attn_mask.*float64"),
    "mask_int": ((q4, k4, v4, torch.zeros(5, 7).int()), {}, "attn_mask.*int32"),
    "dropout": ((q4, k4, v4, None, 1.5), {}, "dropout_p.*1.5|dropout.*1.5"),
    "no_tensor": ((q4, None, v4), {}, "key"),
    "mask_list": ((q4, k4, v4, [[1.0]]), {}, "attn_mask"),
    "scale": ((q4, k4, v4), {"scale": "a"}, "scale"),
    "scale_position": ((q4, k4, v4, None, 0.0, True, 0.5), {}, "positional"),
    "causal_number": ((q4, k4, v4), {"is_causal": 1}, "is_causal"),
    "causal_none": ((q4, k4, v4), {"is_causal": None}, "is_causal"),
    "gqa_number": ((q4, k4, v4), {"enable_gqa": 1}, "enable_gqa"),
    "dropout_type": ((q4, k4, v4, None, "a"), {}, "dropout_p"),
}


@pytest.mark.filterwarnings("ignore::fastseq.FastseqFallbackWarning")
@pytest.mark.parametrize("name", BAD)
def test_torchs_exceptions(name: str) -> None:
    arguments, options, message = BAD[name]
    kind = raised(lambda: F.scaled_dot_product_attention(*arguments, **options))
    assert kind is not None
    with pytest.raises(kind, match=f"(?s){message}"):
        ours(*arguments, **options)


def test_what_torch_accepts() -> None:
    """A negative dropout is none, as there; a mask of ones only; positional arguments."""
    assert torch.equal(ours(q4, k4, v4, None, -0.1), ours(q4, k4, v4))
    mask = torch.ones(1, 1, dtype=torch.bool)
    torch.testing.assert_close(ours(q4, k4, v4, mask, 0.0, False), ours(q4, k4, v4))
    assert ours(q4, k4, v4, dropout_p=1.0).abs().max() == 0


def test_rows_without_a_key_are_zero() -> None:
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    assert (ours(q4, k4, v4, mask)[:, :, 2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_torchs(dtype: torch.dtype) -> None:
    q = q4.to(dtype)
    with pytest.warns(fastseq.FastseqFallbackWarning, match=str(dtype)):
        found = ours(q, q, q)
    assert torch.equal(found, F.scaled_dot_product_attention(q, q, q))


def test_autocast_and_trace_are_torchs() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(fastseq.FastseqFallbackWarning):
        assert ours(q4, q4, q4).dtype is torch.bfloat16
    with pytest.warns(fastseq.FastseqFallbackWarning, match="jit.trace"):
        traced = torch.jit.trace(lambda q: ours(q, q, q), q4)
    longer = torch.randn(3, 4, 9, 8)
    torch.testing.assert_close(traced(longer), F.scaled_dot_product_attention(*[longer] * 3))


def test_nested_tensors_are_torchs() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 5, 8)])
    with pytest.warns(fastseq.FastseqFallbackWarning, match="nested"):
        assert ours(nested, nested, nested).is_nested


def test_a_subclass_that_overrides_torch_sees_torchs_function() -> None:
    class Logged(Tensor):
        seen: list[Any] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            cls.seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    q = q4.as_subclass(Logged)
    with pytest.warns(fastseq.FastseqFallbackWarning, match="Logged"):
        ours(q, q, q)
    assert F.scaled_dot_product_attention in Logged.seen


@pytest.mark.parametrize("grad", [False, True])
def test_lazily_negated_tensors(grad: bool) -> None:
    values = torch.randn(1, 2, 3, 4, dtype=torch.complex64).conj().imag
    assert values.is_neg()
    with torch.set_grad_enabled(grad):
        k = torch.randn(1, 2, 3, 4, requires_grad=grad)
        torch.testing.assert_close(
            ours(values, k, k), F.scaled_dot_product_attention(values.resolve_neg(), k, k)
        )
        torch.testing.assert_close(
            ours(k, values, values), F.scaled_dot_product_attention(k, *[values.resolve_neg()] * 2)
        )
