"""convert() and revert() on linear layers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations, prune

import fastseq
import fastseq.nn as fast_nn


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_there_and_back() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3, bias=False)).double()
    twin, x = copy.deepcopy(model), torch.randn(4, 5, dtype=torch.float64)
    before = dict(model.named_parameters())
    report = fastseq.convert(model, verbose=False)
    assert [(row.fqn, row.old, row.new, row.status) for row in report] == [
        ("0", "torch.nn.Linear", "fastseq.nn.Linear", "converted"),
        ("2", "torch.nn.Linear", "fastseq.nn.Linear", "converted"),
    ]
    assert all(one is before[name] for name, one in model.named_parameters())
    for one in (model, twin):
        one(x).square().sum().backward()
    torch.testing.assert_close(model(x), twin(x), rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    fastseq.revert(model)
    assert type(model[0]) is type(model[2]) is nn.Linear
    assert vars(model[0]).keys() == vars(twin[0]).keys()
    assert torch.equal(model(x), twin(x))


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def sparse_linear() -> nn.Module:
    layer = nn.Linear(3, 3)
    weight = layer.weight.detach().relu().to_sparse_csr()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


UNFIT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: Scaled(3, 3), r"subclass of torch\.nn\.Linear"),
    "a part of torch's": (
        lambda: NonDynamicallyQuantizableLinear(3, 3),
        r"subclass of torch\.nn\.Linear",
    ),
    "lazy": (lambda: nn.LazyLinear(3), r"subclass of torch\.nn\.Linear"),
    "half": (lambda: nn.Linear(3, 3).half(), r"dtype torch\.float16"),
    "meta": (lambda: nn.Linear(3, 3, device="meta"), "device meta"),
    "sparse": (sparse_linear, r"layout torch\.sparse_csr"),
    "pruned": (
        lambda: prune.random_unstructured(nn.Linear(3, 3), "weight", 0.5),
        "weight is not a plain parameter: pruned",
    ),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), "parametrized: weight"),
    "hooked": (
        lambda: nn.utils.spectral_norm(nn.Linear(3, 3)),
        "weight is not a plain parameter: recomputed",
    ),
    "scripted": (lambda: torch.jit.script(nn.Linear(3, 3)), "TorchScript"),
    "quantization-aware": (
        lambda: torch.ao.nn.qat.Linear(3, 3, qconfig=torch.ao.quantization.default_qconfig),
        "quantized",
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:Lazy")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("what", UNFIT)
def test_unfit_layers_are_skipped_with_the_reason(what: str) -> None:
    build, reason = UNFIT[what]
    model = nn.ModuleDict({"bad": build(), "good": nn.Linear(3, 3)})
    kind = type(model["bad"])
    with pytest.raises(ValueError, match=f"bad: .*{reason}"):
        fastseq.convert(model, strict=True)
    fastseq.convert(model, verbose=False)
    assert type(model["bad"]) is kind
    assert type(model["good"]) is fast_nn.Linear


@pytest.mark.parametrize("library", [nn, fast_nn], ids=["torch", "fastseq"])
def test_the_output_projection_of_attention_is_no_layer_of_its_own(library: object) -> None:
    model = nn.ModuleList([library.MultiheadAttention(4, 2), nn.Linear(4, 4)])  # type: ignore[attr-defined]
    report = fastseq.convert(model, verbose=False, strict=True)
    assert "0.out_proj" not in {row.fqn for row in report}
    assert type(model[0].out_proj) is NonDynamicallyQuantizableLinear
