"""The attention ops: opcheck, gradcheck, compilers, transforms, flop counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_oracle import Case, arguments, outputs_of
from kernels import needs_extension
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from fastseq import functional
from fastseq._attention import Options, Terms

SMALL: dict[str, Any] = {
    "dtype": "float64",
    "queries": 3,
    "keys": 4,
    "size": 3,
    "value_size": 2,
    "kv_heads": 1,
    "group": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "bottom_right": True},
    "window": {"window": (1, 1)},
    "mask": {"mask": "qk", "padding": True},
    "bias": {"bias": "hqk"},
    "bias_broadcast": {"bias": "bk"},
    "lengths": {"lengths": "qk"},
    "alibi": {"alibi": "h"},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "dropout": {"dropout": 0.4},
    "transposed": {"strides": "transposed"},
    "varlen": {"layout": "varlen", "causal": True},
    "everything": {
        "causal": True,
        "mask": "qk",
        "bias": "hqk",
        "lengths": "k",
        "alibi": "h",
        "softcap": 3.0,
        "sinks": True,
        "dropout": 0.2,
    },
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def op_arguments(options: dict[str, Any], save: bool = True, weights: int = 0) -> tuple[Any, ...]:
    """Arguments of ``fastseq::attention_forward`` for a case."""
    case = Case(**{**SMALL, **options})
    leaves, others, _ = arguments(case, torch.float64)

    def integers(name: str) -> Tensor | None:
        return torch.as_tensor(others[name]) if name in others else None

    left, right = case.window or (-1, -1)
    terms = Terms(
        bias=leaves.get("bias"),
        mask=others.get("mask"),
        key_padding_mask=others.get("key_padding_mask"),
        query_lengths=integers("query_lengths"),
        key_lengths=integers("key_lengths"),
        query_starts=integers("query_starts"),
        key_starts=integers("key_starts"),
        alibi_slopes=others.get("alibi_slopes"),
        sinks=leaves.get("sinks"),
        seed=torch.tensor([5, 6]) if case.dropout else None,
    )
    numbers = Options(
        left,
        0 if case.causal else right,
        case.bottom_right,
        case.softcap or 0.0,
        case.dropout,
        0.5,
    )
    tensors = (leaves["query"], leaves["key"], leaves["value"])
    return (*tensors, *terms, *numbers, save, weights)


@each_variant
def test_opcheck_forward(options: dict[str, Any]) -> None:
    torch.library.opcheck(torch.ops.fastseq.attention_forward.default, op_arguments(options))


@pytest.mark.parametrize("weights", [0, 1, 2])
@pytest.mark.parametrize("save", [False, True])
def test_opcheck_forward_weights(save: bool, weights: int) -> None:
    given = [
        value.detach() if isinstance(value, Tensor) else value
        for value in op_arguments({}, save, weights)
    ]
    torch.library.opcheck(torch.ops.fastseq.attention_forward.default, given)


@each_variant
def test_opcheck_backward(options: dict[str, Any]) -> None:
    given = [
        value.detach() if isinstance(value, Tensor) else value for value in op_arguments(options)
    ]
    query, key, value, *rest = given
    output, lse, *saved, _ = torch.ops.fastseq.attention_forward(*given)
    terms, numbers = rest[: len(Terms._fields)], rest[len(Terms._fields) : -2]
    grad_output = torch.randn_like(output)
    existing = [True] * 3 + [terms[0] is not None, terms[9] is not None]
    for grad_lse, needs in ((torch.randn_like(lse), existing), (None, [True] + [False] * 4)):
        torch.library.opcheck(
            torch.ops.fastseq.attention_backward.default,
            (grad_output, grad_lse, query, key, value, *terms, output, *saved, *numbers, needs),
            # There is no formula for its own gradient: double backward goes another way.
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


def differentiable(options: dict[str, Any], weights: bool = False) -> Any:
    case = Case(**{**SMALL, "weights": "heads" if weights else "", **options})
    leaves, others, _ = arguments(case, torch.float64)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(leaves, tensors, strict=True))
        outputs = outputs_of(case, named, others)
        # Rows without a key have -Inf there, which has no finite difference.
        outputs["lse"] = outputs["lse"].masked_fill(outputs["lse"].isinf(), 0.0)
        return tuple(outputs.values())

    return call, tuple(leaves.values())


@each_variant
def test_gradcheck(options: dict[str, Any]) -> None:
    call, leaves = differentiable(options)
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("options", [{}, {"weights": "mean"}, {"dropout": 0.4}], ids=str)
def test_gradcheck_through_the_weights(options: dict[str, Any]) -> None:
    call, leaves = differentiable(options, weights=True)
    assert torch.autograd.gradcheck(call, leaves)


@each_variant
def test_gradgradcheck(options: dict[str, Any]) -> None:
    call, leaves = differentiable(options)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_in_place_change_of_a_saved_tensor_is_an_error() -> None:
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    k = torch.randn(1, 2, 3, 4)
    output = functional.attention(q, k, k)
    k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@needs_extension
def test_gradients_that_nobody_asked_for_are_not_computed(monkeypatch: Any) -> None:
    from fastseq.backends import cpu_attention

    asked: list[Any] = []
    inner = cpu_attention.attention_backward

    def spy(*arguments: Any) -> Any:
        asked.append(list(arguments[-1]))
        return inner(*arguments)

    monkeypatch.setattr(cpu_attention, "attention_backward", spy)
    q, k = torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(1, 2, 3, 4)
    functional.attention(q, k, k).sum().backward()
    assert asked == [[True, False, False, False, False]]


# --- compilers


def compiled_and_eager(function: Any, leaves: list[Tensor], backend: str = "aot_eager") -> None:
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    results = []
    for call in (compiled, function):
        torch.manual_seed(1)
        outputs = call(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum(output.square().sum() for output in outputs)
        results.append((*outputs, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves), function(*leaves), rtol=1e-11, atol=1e-12)


def qkv(*shape: int) -> list[Tensor]:
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for _ in "qkv"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "return_lse": True},
        {"window": (2, 0), "softcap": 2.0, "return_weights": True},
        {"key_lengths": torch.tensor([3, 5]), "alibi_slopes": torch.rand(3).double()},
        {"mask": torch.rand(5, 5) < 0.8, "key_padding_mask": torch.rand(2, 5) < 0.2},
        {"bias": torch.randn(3, 5, 5).double(), "sinks": torch.randn(3).double()},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_compile(options: dict[str, Any]) -> None:
    compiled_and_eager(lambda q, k, v: functional.attention(q, k, v, **options), qkv(2, 3, 5, 4))


def test_compile_with_symbolic_numbers() -> None:
    """A number that changes from call to call becomes a symbol of the graph."""
    (q,) = qkv(1, 2, 5, 8)[:1]

    def call(q: Any, size: float) -> Any:
        window = (int(size * 10), 0)
        return functional.attention(q, q, q, scale=size, softcap=size * 10, window=window)

    torch._dynamo.reset()
    compiled: Any = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (0.3, 0.5, 0.7):
        torch.testing.assert_close(compiled(q, size), call(q, size))
    torch._dynamo.reset()


def test_compile_inductor() -> None:
    compiled_and_eager(
        lambda q, k, v: functional.attention(q, k, v * 2, causal=True) + 1,
        qkv(2, 3, 5, 4),
        backend="inductor",
    )


def test_compile_torchs_signature() -> None:
    mask = torch.rand(2, 1, 5, 5) < 0.8
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}, {"enable_gqa": True}):
        compiled_and_eager(
            lambda q, k, v, options=options: functional.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options
            ).transpose(1, 2),
            qkv(2, 5, 3, 4),
        )


def test_compile_varlen() -> None:
    starts = torch.tensor([0, 2, 2, 6])
    compiled_and_eager(
        lambda q, k, v: functional.attention_varlen(q, k, v, starts, starts, causal=True),
        qkv(6, 3, 4),
    )


def test_compile_dropout_differs_from_call_to_call() -> None:
    compiled = torch.compile(
        lambda q: functional.attention(q, q, q, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    q = torch.randn(2, 3, 8, 4)
    assert not torch.equal(compiled(q), compiled(q))


def test_sizes_do_not_recompile_forever() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    function = functional.scaled_dot_product_attention
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for batch, length in ((2, 5), (3, 6), (4, 7), (9, 20), (5, 11)):
        q, k, v = qkv(batch, 2, length, 4)
        torch.testing.assert_close(compiled(q, k, v), function(q, k, v), rtol=1e-12, atol=1e-13)
    assert counter.frame_count <= 2


def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return functional.attention(q, k, v, causal=True, bottom_right=True)

    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    dims = {0: batch, 2: length}
    with torch.no_grad():
        program = torch.export.export(
            Model(), tuple(qkv(3, 2, 5, 4)), dynamic_shapes={"q": dims, "k": dims, "v": dims}
        )
        targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert "fastseq.attention_forward.default" in targets
        exported = program.module()
        for shape in ((3, 2, 5, 4), (7, 2, 33, 4)):
            q, k, v = qkv(*shape)
            torch.testing.assert_close(exported(q, k, v), Model()(q, k, v), rtol=1e-12, atol=0)


def test_fake_tensors_have_the_kernels_layout() -> None:
    for transposed in (False, True):
        tensors = [t.detach() for t in qkv(2, 5, 3, 4)]
        if transposed:
            tensors = [t.transpose(1, 2) for t in tensors]
        given = (*tensors, *Terms(), *Options(), True, 2)
        expected = torch.ops.fastseq.attention_forward(*given)
        mode = FakeTensorMode()
        with mode:
            fakes = [mode.from_tensor(t) for t in tensors]
            found = torch.ops.fastseq.attention_forward(*fakes, *given[3:])
        for a, b in zip(found, expected, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_meta_device() -> None:
    q = torch.empty(2, 3, 5, 4, device="meta")
    assert functional.attention(q, q, q, causal=True).shape == q.shape
    assert functional.scaled_dot_product_attention(q, q, q).shape == q.shape


# --- transforms


def test_vmap_and_func_grad() -> None:
    q, k, v = (t.detach() for t in qkv(4, 2, 3, 5, 4))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.attention(q, k, v, causal=True, softcap=2.0)

    mapped = torch.func.vmap(call)(q, k, v)
    for index in range(4):
        torch.testing.assert_close(mapped[index], call(q[index], k[index], v[index]))
    per_sample = torch.func.vmap(torch.func.grad(lambda *t: call(*t).square().sum()))(q, k, v)
    leaf = q[1].clone().requires_grad_()
    (expected,) = torch.autograd.grad(call(leaf, k[1], v[1]).square().sum(), leaf)
    torch.testing.assert_close(per_sample[1], expected, rtol=1e-11, atol=1e-12)


def test_forward_mode() -> None:
    q, k, v = (t.detach() for t in qkv(2, 3, 5, 4))
    tangent, step = torch.randn_like(q), 1e-6

    def call(q: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    _, found = torch.func.jvp(call, (q,), (tangent,))
    numeric = (call(q + step * tangent) - call(q - step * tangent)) / (2 * step)
    torch.testing.assert_close(found, numeric, rtol=1e-7, atol=1e-8)


# --- work


def test_flops_are_those_of_torchs_formula() -> None:
    """The formula for its fused functions on other devices; the one for the CPU has none."""
    q, k, v = (t.float().detach().requires_grad_() for t in qkv(2, 3, 7, 8))
    with FlopCounterMode(display=False) as forward:
        output = functional.scaled_dot_product_attention(q, k, v)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    shapes = (q.shape, k.shape, v.shape)
    assert forward.get_total_flops() == sdpa_flop_count(*shapes)
    assert backward.get_total_flops() == sdpa_backward_flop_count(output.shape, *shapes)


def test_flops_of_groups_and_rows() -> None:
    q, k = torch.randn(2, 6, 7, 8), torch.randn(2, 2, 9, 8)
    with FlopCounterMode(display=False) as counter:
        functional.attention(q, k, k)
    assert counter.get_total_flops() == 2 * 2 * 6 * 7 * 9 * 16
    rows = torch.randn(7, 3, 8)
    with FlopCounterMode(display=False) as counter:
        functional.attention_varlen(rows, rows, rows, [0, 2, 7], [0, 4, 7])
    assert counter.get_total_flops() == 2 * 3 * (2 * 4 + 5 * 3) * 16
