"""The CUDA kernels on a device: skipped where there is none, with the reason.

``FASTSEQ_CUDA=ON pip install .`` and ``FASTSEQ_CUDA_UNTESTED=1 make test ARGS="-m cuda"``. The
cases are those that run under emulation everywhere, the bounds those of the CPU kernels.
"""

from __future__ import annotations

from typing import Any

import attention_oracle
import oracle
import pytest
import torch
from test_cuda_attention import CASES as ATTENTION_CASES
from test_cuda_rnn import CASES as RNN_CASES
from torch import Tensor

import fastseq.nn
from fastseq import _cuda_library, functional
from fastseq.backends import cuda


def missing() -> str:
    """Why there is nothing to run on; empty where there is."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return _cuda_library.off_reason() or ""


pytestmark = [pytest.mark.cuda, pytest.mark.skipif(bool(missing()), reason=missing())]


def moved(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The leaves on the device, strides and all."""
    return {
        name: torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="cuda")
        .copy_(leaf.detach())
        .requires_grad_(leaf.requires_grad)
        if 0 not in leaf.stride()
        else leaf.detach().cuda().requires_grad_(leaf.requires_grad)
        for name, leaf in leaves.items()
    }


def gradients(outputs: list[Tensor], leaves: list[Tensor], generator: torch.Generator) -> list[Any]:
    cotangents = [
        torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in outputs
    ]
    return list(torch.autograd.grad(outputs, leaves, cotangents))


@pytest.mark.parametrize("mode", ["auto", "stepwise", "direct"])
@pytest.mark.parametrize("case", RNN_CASES, ids=str)
def test_run_layers(case: oracle.Case, mode: str) -> None:
    truth, bounds = oracle.expected(case)
    leaves, lengths, generator = oracle.arguments(case, getattr(torch, case.dtype))
    on_device = moved(leaves)
    with cuda.launch_mode(mode):
        outputs = oracle.outputs_of(case, "fastseq", on_device, lengths)
        grads = gradients(outputs, list(on_device.values()), generator)
    results = dict(zip(("output", "h_n", "c_n"), outputs, strict=False))
    results |= {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    oracle.compare({n: t.detach().cpu().double() for n, t in results.items()}, truth, bounds, mode)


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_attention(case: attention_oracle.Case) -> None:
    truth, bounds = attention_oracle.expected(case)
    leaves, others, generator = attention_oracle.arguments(case, getattr(torch, case.dtype))
    on_device = moved(leaves)
    tables = {"mask", "key_padding_mask", "alibi_slopes"}
    others = {name: value.cuda() if name in tables else value for name, value in others.items()}
    outputs = attention_oracle.outputs_of(case, on_device, others)
    # The loss takes its weights in this order, those of the returned weights between.
    cotangents = {
        name: torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
        for name, out in outputs.items()
    }
    scored = [name for name in outputs if name != "weights"]
    wanted = {name: leaf for name, leaf in on_device.items() if leaf.requires_grad}
    grads = torch.autograd.grad(
        [outputs[name] for name in scored],
        list(wanted.values()),
        [cotangents[name] for name in scored],
    )
    results = outputs | {f"grad_{n}": grad for n, grad in zip(wanted, grads, strict=True)}
    found = {name: tensor.detach().cpu().double() for name, tensor in results.items()}
    attention_oracle.compare(found, truth, bounds)


def layer_and_input() -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = fastseq.nn.LSTM(64, 512, bidirectional=True, device="cuda")
    return layer, torch.randn(20, 16, 64, device="cuda")


def test_repeated_calls_give_the_same_bits() -> None:
    """A race between blocks would show here, if only by chance."""
    layer, x = layer_and_input()
    first: list[Tensor] = []
    for _ in range(20):
        output, _ = layer(x)
        grads = torch.autograd.grad(output.square().sum(), list(layer.parameters()))
        if first:
            assert all(map(torch.equal, (output, *grads), first))
        first = [output.detach(), *grads]


def test_launch_modes_give_the_same_bits() -> None:
    layer, x = layer_and_input()
    with torch.no_grad():
        with cuda.launch_mode("stepwise"):
            stepwise, _ = layer(x)
        with cuda.launch_mode("persistent"):
            persistent, _ = layer(x)
    assert torch.equal(stepwise, persistent)


def test_runs_on_the_current_stream() -> None:
    layer, x = layer_and_input()
    with torch.no_grad():
        expected, _ = layer(x)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**7)
            late = x.clone()
            output, _ = layer(late)
        stream.synchronize()
    assert torch.equal(output, expected)


@pytest.mark.parametrize("kind", ["lstm", "attention"])
def test_graph_capture(kind: str) -> None:
    layer, x = layer_and_input()
    q = torch.randn(2, 4, 33, 64, device="cuda")

    def call() -> Tensor:
        if kind == "lstm":
            return layer(x)[0]
        return functional.attention(q, q, q, causal=True)

    with torch.no_grad():
        call()  # whatever is set up at a first call may not be captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        x.mul_(0.5)
        q.mul_(0.5)
        graph.replay()
        assert torch.equal(captured, call())


def test_no_synchronisation() -> None:
    layer, x = layer_and_input()
    layer(x)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, _ = layer(x)
        output.sum().backward()
        q = torch.randn(2, 4, 33, 64, device="cuda", requires_grad=True)
        functional.attention(q, q, q, dropout_p=0.1).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_weights_on_another_device_are_refused() -> None:
    x = torch.randn(2, 3, 4, device="cuda")
    weights = [torch.randn(shape) for shape in ((20, 4), (20, 5), (20,), (20,))]
    with pytest.raises(RuntimeError, match=r"weights\[0\] must be .* on cuda:0, got .* on cpu"):
        functional.lstm(x, None, weights)
