"""Dropout inside attention: how much, which, the same forward and backward, reproducible."""

from __future__ import annotations

import pytest
import torch
from kernels import needs_extension
from oracle import every_tier

import fastseq
from fastseq import functional
from fastseq.backends import reference_attention


def kernels_keep(seed: torch.Tensor, p: float, *sizes: int) -> torch.Tensor:
    """Which weights the compiled kernels keep."""
    from fastseq.backends import cpu_attention

    return cpu_attention.dropout_keep(seed, p, *sizes)


def inputs(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).requires_grad_() for _ in "qkv"]


@needs_extension
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 3, 17, 41), (1, 2, 70, 130)], ids=str)
def test_the_kernels_draw_the_references_mask(sizes: tuple[int, ...], p: float) -> None:
    for seed in ([1, 2], [-(2**63), -1], [2**62 + 17, 2**33 + 5]):
        expected = reference_attention.dropout_keep(torch.tensor(seed), p, *sizes)
        for tier in every_tier():
            found = kernels_keep(torch.tensor(seed), p, *sizes)
            assert torch.equal(found, expected), tier


@needs_extension
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_how_many_are_dropped(p: float) -> None:
    """Overall, in each row, each column and between neighbours, within five deviations."""
    size = 256
    keep = kernels_keep(torch.tensor([7, 0]), p, 2, 2, size, size).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(keep.mean() - (1 - p)) < 5 * deviation / keep.numel() ** 0.5
    for dim in (-1, -2):
        means = keep.mean(dim)
        assert (means - (1 - p)).abs().max() < 5 * deviation / size**0.5
    centred = keep - (1 - p)
    for shift, dim in ((1, -1), (2, -1), (4, -1), (1, -2), (1, 1), (1, 0)):
        together = (centred * centred.roll(shift, dim)).mean() / deviation**2
        assert together.abs() < 5 / keep.numel() ** 0.5


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_weights_output_and_gradients_have_one_mask(p: float) -> None:
    q, k, v = inputs(2, 3, 33, 16)
    for tier in every_tier():
        torch.manual_seed(5)
        output, weights = functional.attention(q, k, v, dropout_p=p, return_weights=True)
        torch.testing.assert_close(output, weights @ v, rtol=1e-5, atol=1e-6)
        plain = functional.attention(q, k, v, return_weights=True)[1]
        kept = weights != 0
        torch.testing.assert_close(weights[kept], plain[kept] / (1 - p) if p < 1 else plain[kept])
        grads = torch.autograd.grad(output.square().sum(), (q, k, v))
        with fastseq.backend("reference"):
            torch.manual_seed(5)
            expected = functional.attention(q, k, v, dropout_p=p)
            expected_grads = torch.autograd.grad(expected.square().sum(), (q, k, v))
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6, msg=tier)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5, msg=tier)


def test_the_seed_is_torchs() -> None:
    q, k, v = inputs(1, 2, 16, 8)

    def call() -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    torch.manual_seed(1)
    first, second = call(), call()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(call(), first)
    with torch.random.fork_rng():
        before = torch.get_rng_state()
        functional.attention(q, k, v)
        assert torch.equal(torch.get_rng_state(), before), "without dropout nothing is drawn"


def test_the_average_is_the_call_without() -> None:
    q, k, v = inputs(1, 1, 4, 8)
    torch.manual_seed(0)
    with torch.no_grad():
        exact = functional.attention(q, k, v)
        mean = torch.stack([functional.attention(q, k, v, dropout_p=0.25) for _ in range(4000)])
        error = mean.mean(0) - exact
        assert (error.abs() < 5 * mean.std(0) / 4000**0.5).all()
