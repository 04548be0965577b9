"""The attention CUDA kernels, emulated on the host, against the composite in float64.

Outputs and every gradient, by way of the functional API, the ops' autograd formula and the C ABI;
see ``emulated_cuda.py``. Bounds are those of ``attention_oracle.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import attention_oracle as oracle
import pytest
import torch
from attention_oracle import Case
from emulated_cuda import device, half_bound, kernels
from kernels import KERNELS

import fastseq
from fastseq import functional
from fastseq._cuda_library import AttentionForward, Library
from fastseq.backends import cuda_attention, reference_attention


@pytest.fixture(autouse=True, scope="module")
def library() -> Iterator[Library]:
    with kernels() as found:
        yield found


# Tiles have 16 rows and 32 keys, or 16 keys and 32 queries: sizes on both sides of these.
PLAIN = Case(queries=20, keys=37, size=9, value_size=5)
CASES = [
    Case(queries=1, keys=1, size=1, value_size=1),
    dataclasses.replace(PLAIN, queries=33, keys=65, size=33, value_size=70),
    dataclasses.replace(PLAIN, causal=True, bottom_right=True, queries=40),
    dataclasses.replace(PLAIN, group=2, window=(5, 3), queries=40, keys=70),
    dataclasses.replace(PLAIN, group=3, window=(0, -1), kv_heads=1),
    dataclasses.replace(PLAIN, mask="bhqk", bias="bhqk"),
    dataclasses.replace(PLAIN, mask="k", bias="qk", queries=35, keys=66),
    dataclasses.replace(PLAIN, mask="q", bias="hk", keys=66),
    dataclasses.replace(PLAIN, bias="bq", queries=40),
    dataclasses.replace(PLAIN, bias="k", queries=35),
    dataclasses.replace(PLAIN, bias="h", group=2, bias_grad=False),
    dataclasses.replace(PLAIN, padding=True, lengths="qk", bias="b"),
    dataclasses.replace(PLAIN, alibi="bh", softcap=2.0, sinks=True, bottom_right=True),
    dataclasses.replace(PLAIN, alibi="h", lengths="k", causal=True),
    dataclasses.replace(PLAIN, dropout=0.3, weights="heads", group=2),
    dataclasses.replace(PLAIN, dropout=0.3, weights="mean", sinks=True, bias="qk"),
    dataclasses.replace(PLAIN, dropout=1.0),
    dataclasses.replace(PLAIN, layout="varlen", batch=3, causal=True, bottom_right=True),
    dataclasses.replace(PLAIN, layout="varlen", batch=3, dropout=0.2, sinks=True, group=2),
    dataclasses.replace(PLAIN, strides="transposed", group=2),
    dataclasses.replace(PLAIN, strides="expanded"),
    dataclasses.replace(PLAIN, strides="every_other", size=140, value_size=9),
    dataclasses.replace(PLAIN, size=3, value_size=300, queries=5),
    dataclasses.replace(PLAIN, magnitude=30.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: Case) -> None:
    for dtype in ("float32", "float64"):
        typed = dataclasses.replace(case, dtype=dtype)
        truth, bounds = oracle.expected(typed)
        oracle.compare(oracle.run(typed, KERNELS, getattr(torch, dtype)), truth, bounds, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    changes = {"causal": True, "sinks": True, "group": 2}, {"bias": "qk", "softcap": 3.0}
    for change in changes:
        case = dataclasses.replace(PLAIN, dtype="float64", **change)
        values, others, _ = oracle.arguments(case, torch.float64)
        rounded = {name: leaf.detach().to(dtype) for name, leaf in values.items()}
        ours, theirs, truth = (
            outputs_and_gradients(case, rounded, others, backend, dtype_of_run)
            for backend, dtype_of_run in (
                (KERNELS, dtype),
                ("reference", dtype),
                ("reference", torch.float64),
            )
        )
        for name, value in truth.items():
            bound = half_bound(dtype, oracle.distance(theirs[name], value), oracle.magnitude(value))
            assert oracle.distance(ours[name], value) <= bound, f"{name} {case}"


def outputs_and_gradients(
    case: Case, values: dict, others: dict, backend: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    leaves = {name: value.to(dtype).requires_grad_() for name, value in values.items()}
    with fastseq.backend(backend):
        outputs = oracle.outputs_of(case, leaves, others)
    assert outputs["output"].dtype is dtype
    assert outputs["lse"].dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs.values()
    ]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), weights)
    results = outputs | {f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {name: tensor.detach().double() for name, tensor in results.items()}


def test_bits_do_not_depend_on_order() -> None:
    """Threads run from the last to the first: a missing barrier would show."""
    for change in ({"dropout": 0.2, "bias": "qk"}, {"layout": "varlen", "sinks": True, "group": 2}):
        case = dataclasses.replace(PLAIN, queries=35, keys=66, **change)
        first = oracle.run(case, KERNELS, torch.float32)
        with device(descending=True):
            second = oracle.run(case, KERNELS, torch.float32)
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_hidden_keys_may_hold_anything(bad: float) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 6, dtype=torch.float64) for n in (5, 40, 40))
    mask = torch.rand(5, 40) < 0.6
    mask[:, 3], mask[:, 35], mask[2] = False, False, False
    k[:, :, 3], v[:, :, 3], v[:, :, 35] = bad, bad, bad
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    results = []
    for backend in (KERNELS, "reference"):
        with fastseq.backend(backend):
            output, lse = functional.attention(*leaves, mask=mask, return_lse=True)
        seen = torch.where(lse == -torch.inf, 0.0, lse)
        results.append([output, lse, *torch.autograd.grad(output.sum() + seen.sum(), leaves)])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)
    assert torch.equal(results[0][0][:, :, 2], torch.zeros(1, 2, 6, dtype=torch.float64))


def test_visible_nan_stays_in_its_rows() -> None:
    q, k, v = (torch.randn(1, 1, n, 4) for n in (3, 5, 5))
    k[0, 0, 1] = float("nan")
    output = functional.attention(q, k, v, causal=True)
    assert output[0, 0, 0].isfinite().all()
    assert output[0, 0, 1:].isnan().all()


def test_attention_paged() -> None:
    torch.manual_seed(0)
    blocks, size = 7, 4
    cache = [torch.randn(blocks, 2, size, 6, dtype=torch.float64) for _ in range(2)]
    query = torch.randn(2, 4, 3, 6, dtype=torch.float64)
    table, lengths = torch.tensor([[5, 0, 2, 99], [1, 6, 3, 4]]), [9, 16]
    results = []
    for backend in (KERNELS, "reference"):
        with fastseq.backend(backend):
            arguments = (query, *cache, table, lengths)
            results.append(functional.attention_paged(*arguments, return_lse=True))
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_dropout_bits_are_the_cpu_kernels() -> None:
    """The same seed drops the same weights on every processor."""
    q, k = torch.zeros(2, 2, 5, 4), torch.zeros(2, 2, 11, 4)
    torch.manual_seed(1)
    _, weights = functional.attention(q, k, k, dropout_p=0.4, return_weights=True)
    torch.manual_seed(1)
    seed = fastseq._dropout.draw_seed(0.4)  # type: ignore[attr-defined]
    assert torch.equal(weights > 0, reference_attention.dropout_keep(seed, 0.4, 2, 2, 5, 11))


def test_scaled_dot_product_attention() -> None:
    q, k, v = (torch.randn(3, 2, n, 8) for n in (5, 9, 9))
    mask = torch.rand(3, 1, 5, 9) < 0.7
    mask[..., 0] = True
    ours = functional.scaled_dot_product_attention(q, k, v, mask)
    truth = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(ours, truth)


def test_empty_sizes() -> None:
    q, k = torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(1, 2, 0, 4)
    output = functional.attention(q, k, k)
    assert torch.equal(output, torch.zeros(1, 2, 3, 4))
    (gradient,) = torch.autograd.grad(output.sum(), q)
    assert torch.equal(gradient, torch.zeros_like(q))


def test_wanted_gradients_only() -> None:
    tensors = [torch.randn(1, 2, n, 4) for n in (3, 5, 5)]

    def gradients(wanted: list[int]) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_(i in wanted) for i, tensor in enumerate(tensors)]
        output = functional.attention(*leaves)
        return list(torch.autograd.grad(output.square().sum(), [leaves[i] for i in wanted]))

    everything = gradients([0, 1, 2])
    for index in range(3):
        assert torch.equal(gradients([index])[0], everything[index])


def test_launch_error_names_kernel_and_shape(library: Library) -> None:
    call = AttentionForward()
    shape = call.shape
    shape.batch, shape.heads, shape.kv_heads, shape.queries, shape.keys = 2**20, 2**20, 1, 5, 7
    shape.key_size = shape.value_size = 4
    match = (
        r"attention_forward<float64>\(B 1048576, Hq 1048576, .* E 4, Ev 4\): launch of .* invalid"
    )
    with pytest.raises(RuntimeError, match=match):
        library.run_attention_forward("float64", call, 0)


def test_strides_of_results_follow_the_query() -> None:
    query = torch.randn(2, 3, 4, 8).transpose(1, 2)
    output = functional.attention(query, query, query)
    assert output.stride() == cuda_attention.empty_heads(query, 8).stride() == query.stride()
