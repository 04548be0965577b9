"""Attention needs memory that grows with the rows, not with the pairs."""

from __future__ import annotations

import os

import pytest
import torch

import fastseq.functional as fast
from fastseq.bench import memory

needs_peak = pytest.mark.skipif(
    not memory.available(), reason="a process can reset its peak memory on Linux only"
)


def extra_bytes(heads: int, rows: int, size: int, **options: object) -> float:
    """Peak of a training step above its inputs, over the size of query, key, value and output."""
    made = torch.Generator().manual_seed(0)
    shape = (1, heads, rows, size)
    inputs = [torch.randn(shape, generator=made).requires_grad_() for _ in range(3)]
    gradient = torch.randn(shape, generator=made)

    def step(*tensors: torch.Tensor) -> None:
        output = fast.attention(*tensors, **options)
        torch.autograd.grad(output, tensors, gradient[:, :, : output.size(2)])

    # Threads, code and the allocator's first arenas do not count.
    step(*(tensor.detach()[:, :, :64].requires_grad_() for tensor in inputs))
    with open("/proc/self/clear_refs", "w", encoding="ascii") as control:
        control.write("5")  # peak := current
    before = memory._status_bytes("VmRSS")
    step(*inputs)
    return (memory._status_bytes("VmHWM") - before) / (4 * inputs[0].nbytes)


@needs_peak
@pytest.mark.parametrize(("heads", "window"), [(1, None), (4, (512, 0))])
def test_training_memory(heads: int, window: tuple[int, int] | None) -> None:
    """At most three times query, key, value and output, gradients included.

    The scores alone would be 32 times that at 8192 rows of 64.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    try:
        ratio = extra_bytes(heads, 8192, 64, window=window)
    finally:
        torch.set_num_threads(threads)
    assert ratio <= 3


@needs_peak
def test_weights_take_no_second_buffer() -> None:
    """Averaged weights are made without the weights of the single heads."""
    made = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 8, 1024, 32, generator=made) for _ in range(3))
    fast.attention(query[:, :, :64], key, value, return_weights=True, average_weights=True)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as control:
        control.write("5")
    before = memory._status_bytes("VmRSS")
    _, weights = fast.attention(query, key, value, return_weights=True, average_weights=True)
    peak = memory._status_bytes("VmHWM") - before
    # Per head they would be eight times as large.
    assert peak < 2 * weights.nbytes + 8 * query.nbytes
