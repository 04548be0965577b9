"""patch_sdpa(): where it takes effect, and that nothing of it stays."""

from __future__ import annotations

import subprocess
import sys
import threading
import types
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left

import fastseq
from fastseq import backends, functional

ORIGINAL = F.scaled_dot_product_attention
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _nothing_stays(monkeypatch: pytest.MonkeyPatch) -> Any:
    torch.manual_seed(0)
    monkeypatch.setattr(backends, "_warned_reasons", set())
    fastpath = torch.backends.mha.get_fastpath_enabled()
    yield
    assert F.scaled_dot_product_attention is ORIGINAL
    assert torch._C._nn.scaled_dot_product_attention is ORIGINAL
    assert torch.backends.mha.get_fastpath_enabled() is fastpath


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of the query in every call that reaches fastseq."""
    seen: list[tuple[int, ...]] = []
    original = functional.scaled_dot_product_attention

    def record(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(tuple(query.shape))
        return original(query, *args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    return seen


def test_a_causal_bias_for_torchs_own_function() -> None:
    """It goes by the function's name; who kept the function from before has another one."""
    q = torch.randn(1, 2, 5, 8)
    before = CausalBias.__dict__["__torch_function__"]
    for mask in (causal_upper_left(5, 5), causal_lower_right(5, 5)):
        expected = ORIGINAL(q, q, q, attn_mask=mask)
        with fastseq.patch_sdpa():
            torch.testing.assert_close(ORIGINAL(q, q, q, attn_mask=mask), expected)
            assert torch.equal(mask._materialize(), mask._materialize())
            assert mask.clone().shape == mask.shape  # other functions are as before
    assert CausalBias.__dict__["__torch_function__"] is before


def qkv(*shape: int, count: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(count)]


def test_results_and_gradients(calls: list[Any]) -> None:
    inputs = qkv(2, 3, 5, 4)
    mask = torch.rand(5, 5) < 0.7
    mask[:, 0] = True
    bias = torch.randn(5, 5, dtype=torch.float64)
    for options in (
        {},
        {"is_causal": True},
        {"attn_mask": mask},
        {"attn_mask": bias, "scale": 0.3},
    ):
        expected = F.scaled_dot_product_attention(*inputs, **options)
        with fastseq.patch_sdpa():
            actual = F.scaled_dot_product_attention(*inputs, **options)
        torch.testing.assert_close(actual, expected, **CLOSE)
        torch.testing.assert_close(
            torch.autograd.grad(actual.square().sum(), inputs),
            torch.autograd.grad(expected.square().sum(), inputs),
            **CLOSE,
        )
    assert len(calls) == 4
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    with fastseq.patch_sdpa():
        torch.testing.assert_close(
            torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True), expected
        )


def test_restored_after_an_exception() -> None:
    with pytest.raises(KeyError), fastseq.patch_sdpa():
        raise KeyError
    assert F.scaled_dot_product_attention is ORIGINAL
    inputs = qkv(2, 3, 5, 4)
    with pytest.raises(RuntimeError), fastseq.patch_sdpa():
        F.scaled_dot_product_attention(inputs[0], inputs[1][..., :3], inputs[2])


def test_nested_blocks_and_decorator(calls: list[Any]) -> None:
    inputs = qkv(1, 2, 3, 4)
    with fastseq.patch_sdpa():
        with fastseq.patch_sdpa():
            F.scaled_dot_product_attention(*inputs)
        F.scaled_dot_product_attention(*inputs)
    F.scaled_dot_product_attention(*inputs)
    assert len(calls) == 2

    @fastseq.patch_sdpa()
    def run() -> Tensor:
        return F.scaled_dot_product_attention(*inputs)

    run()
    run()
    assert len(calls) == 4


def test_blocks_of_several_threads_overlap() -> None:
    """The second thread's block outlives the first one's."""
    entered, left = threading.Event(), threading.Event()
    during: list[bool] = []

    def other() -> None:
        with fastseq.patch_sdpa():
            entered.set()
            left.wait(10)
            during.append(F.scaled_dot_product_attention is not ORIGINAL)

    thread = threading.Thread(target=other)
    with fastseq.patch_sdpa():
        thread.start()
        assert entered.wait(10)
    assert F.scaled_dot_product_attention is not ORIGINAL
    left.set()
    thread.join()
    assert during == [True]
    assert F.scaled_dot_product_attention is ORIGINAL


def test_many_threads_leave_nothing_behind() -> None:
    inputs = [x.detach() for x in qkv(1, 2, 3, 4)]
    expected = F.scaled_dot_product_attention(*inputs)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(30):
                with fastseq.patch_sdpa():
                    found = F.scaled_dot_product_attention(*inputs)
                torch.testing.assert_close(found, expected, **CLOSE)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_modules_that_imported_the_name(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("some_model")
    exec("from torch.nn.functional import scaled_dot_product_attention", module.__dict__)
    monkeypatch.setitem(sys.modules, "some_model", module)
    inputs = qkv(1, 2, 3, 4)
    with fastseq.patch_sdpa():
        module.scaled_dot_product_attention(*inputs)
    assert module.scaled_dot_product_attention is ORIGINAL
    assert len(calls) == 1


def test_another_patch_on_top_is_left_alone(calls: list[Any]) -> None:
    """What someone else put over ours is theirs; ours below it then calls torch's again."""
    inputs = qkv(1, 2, 3, 4)
    with fastseq.patch_sdpa():
        below = F.scaled_dot_product_attention

        def on_top(*args: Any, **kwargs: Any) -> Tensor:
            return below(*args, **kwargs)

        F.scaled_dot_product_attention = on_top
    try:
        assert F.scaled_dot_product_attention is on_top
        expected = ORIGINAL(*inputs, is_causal=True, scale=0.2)
        found = F.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.2)
        assert torch.equal(found, expected)
        assert not calls
    finally:
        F.scaled_dot_product_attention = ORIGINAL


def test_what_was_there_before_comes_back() -> None:
    def before(*args: Any, **kwargs: Any) -> Tensor:
        return ORIGINAL(*args, **kwargs)

    F.scaled_dot_product_attention = before
    try:
        with fastseq.patch_sdpa():
            assert F.scaled_dot_product_attention is not before
        assert F.scaled_dot_product_attention is before
    finally:
        F.scaled_dot_product_attention = ORIGINAL


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_torchs_layers(training: bool, calls: list[Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attention = nn.MultiheadAttention(8, 2, batch_first=True).double().train(training)
        encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True).double()
        decoder = nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True).double()
        stack = nn.TransformerEncoder(encoder, 2)
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    hidden = torch.arange(6) >= torch.tensor([6, 2, 4])[:, None]
    for module, count, run in (
        (attention, 1, lambda: attention(x, x, x, hidden, need_weights=False)[0]),
        (encoder, 1, lambda: encoder(x, src_key_padding_mask=hidden)),
        (decoder, 2, lambda: decoder(x, x, tgt_is_causal=False)),
        (stack, 2, lambda: stack(x, src_key_padding_mask=hidden)),
    ):
        module.train(training)
        calls.clear()
        with torch.set_grad_enabled(training):
            expected = run()
            with fastseq.patch_sdpa():
                actual = run()
        assert len(calls) == count
        torch.testing.assert_close(actual[~hidden], expected[~hidden], **CLOSE)


@pytest.mark.parametrize("keys", [3, 5, 7])
def test_causal_biases_of_torch(keys: int, calls: list[Any]) -> None:
    q, k, v = (torch.randn(2, 3, steps, 8, dtype=torch.float64) for steps in (5, keys, keys))
    for make in (causal_upper_left, causal_lower_right):
        bias = make(5, keys)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).nan_to_num(0)
        with fastseq.patch_sdpa():
            actual = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        torch.testing.assert_close(actual, expected, **CLOSE)
        with pytest.raises(ValueError, match="is_causal"), fastseq.patch_sdpa():
            F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=True)
    assert calls


@pytest.mark.filterwarnings("ignore::fastseq.FastseqFallbackWarning")
def test_what_the_kernels_do_not_take_is_torchs_own() -> None:
    inputs = qkv(2, 3, 5, 4, dtype=torch.bfloat16)
    expected = F.scaled_dot_product_attention(*inputs)
    with fastseq.patch_sdpa():
        assert torch.equal(F.scaled_dot_product_attention(*inputs), expected)
    jagged = torch.nested.nested_tensor(
        [torch.randn(4, 2, 8), torch.randn(3, 2, 8)], layout=torch.jagged
    ).transpose(1, 2)
    expected = F.scaled_dot_product_attention(jagged, jagged, jagged)
    with fastseq.patch_sdpa():
        found = F.scaled_dot_product_attention(jagged, jagged, jagged)
    for one, other in zip(found.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(one, other)


def test_compiled_inside_the_block(calls: list[Any]) -> None:
    torch._dynamo.reset()

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) * 2

    inputs = qkv(1, 2, 3, 4)
    expected = model(*inputs)
    with fastseq.patch_sdpa():
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch._dynamo.reset()


def test_first_use_in_a_fresh_interpreter() -> None:
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, fastseq\n"
            "assert 'patch_sdpa' in dir(fastseq) and 'torch' not in sys.modules\n"
            "with fastseq.patch_sdpa():\n"
            "    import torch\n"
            "    import torch.nn.functional as F\n"
            "    x = torch.ones(1, 1, 2, 4)\n"
            "    assert F.scaled_dot_product_attention(x, x, x).equal(x)\n"
            "    assert type(F.scaled_dot_product_attention).__name__ == 'function'\n"
            "assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention\n",
        ],
        check=True,
    )
