"""Whose matrix product runs: FASTSEQ_LINEAR, linear_product() and the measured table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels import skip_without_extension

import fastseq
from fastseq import _config, _products, functional, info

skip_without_extension()

from fastseq.backends import cpu_linear  # noqa: E402


@pytest.fixture(autouse=True)
def _own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTSEQ_LINEAR", raising=False)
    monkeypatch.setattr(_config, "_linear_product", None)
    monkeypatch.setattr(_config, "fused_everywhere", False)
    monkeypatch.setattr(_products, "_table", None)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directions in which the kernels ran."""
    seen: list[str] = []
    for name in ("_dense_forward", "_dense_backward"):
        inner = getattr(cpu_linear, name)
        monkeypatch.setattr(
            cpu_linear, name, lambda *a, inner=inner, name=name: seen.append(name) or inner(*a)
        )
    return seen


def train(rows: int = 3, features: int = 4) -> None:
    weight = torch.randn(5, features, requires_grad=True)
    functional.linear(torch.randn(rows, features), weight, None, "gelu").sum().backward()


def write_table(torchs: list[str], **build: str) -> None:
    path = _products.table_path()
    assert path is not None
    path.parent.mkdir(parents=True)
    products = dict.fromkeys(torchs, "torch")
    path.write_text(json.dumps({"build": {**_products._build(), **build}, "products": products}))


def test_the_kernels_are_the_default(kernels: list[str]) -> None:
    train()
    assert kernels == ["_dense_forward", "_dense_backward"]
    assert _config.fused_everywhere


@pytest.mark.parametrize("product", ["torch", "fused"])
def test_environment(product: str, kernels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSEQ_LINEAR", product)
    write_table(["training float32 rows 2-15 small"])
    train()
    assert len(kernels) == (2 if product == "fused" else 0)


def test_wrong_names() -> None:
    message = r"linear_product must be one of .*'auto'.*, got 'mkl'"
    with pytest.raises(ValueError, match=message), fastseq.linear_product("mkl"):
        pass


def test_wrong_name_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSEQ_LINEAR", "mkl")
    with pytest.raises(ValueError, match=r"FASTSEQ_LINEAR must be one of .*, got 'mkl'"):
        train()


def test_context_manager_nests(kernels: list[str]) -> None:
    with fastseq.linear_product("torch"):
        train()
        assert not kernels
        with fastseq.linear_product("fused"):
            train()
        assert len(kernels) == 2
        train()
    assert len(kernels) == 2
    train()
    assert len(kernels) == 4


def test_inference_obeys_too(kernels: list[str]) -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    with fastseq.linear_product("torch"):
        assert torch.equal(functional.linear(x, weight), F.linear(x, weight))
        assert torch.equal(functional.linear(x, weight), F.linear(x, weight))
    assert not kernels


def test_the_table_decides_by_class(kernels: list[str]) -> None:
    write_table(["training float32 rows 2-15 small", "inference float32 rows 1 small"])
    train(rows=3)
    assert not kernels
    train(rows=1)
    train(rows=16)
    assert kernels == ["_dense_forward", "_dense_backward"] * 2


def test_where_torchs_product_runs_nothing_stands_before_it(kernels: list[str]) -> None:
    """Gradients are torch's own; what does not fit together is still found by the checks."""
    write_table(["training float32 rows 2-15 small"])
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True), torch.randn(5)
    residual = torch.randn(3, 5)
    plain = functional.linear(x, weight, bias)
    assert type(plain.grad_fn) is type(F.linear(x, weight, bias).grad_fn)
    added = functional.linear(x, weight, bias, None, residual)
    torch.testing.assert_close(added, F.linear(x, weight, bias) + residual)
    with torch.no_grad():
        ours = functional.linear(x, weight, bias)
    assert not kernels, "the short way"
    torch.testing.assert_close(ours, F.linear(x, weight, bias))
    with pytest.raises(RuntimeError, match=r"input must have the features of weight: expected 4"):
        functional.linear(torch.randn(3, 3), weight)
    with pytest.raises(RuntimeError, match="weight must have the dtype of input"):
        functional.linear(x.double(), weight)


def test_classes() -> None:
    def name(rows: int, elements: int = 1, dtype: torch.dtype = torch.float32) -> str:
        return _products._class(False, dtype, rows, elements)

    found = [name(rows) for rows in (1, 2, 15, 16, 255, 256, 10**6)]
    blocks = ["1", "2-15", "2-15", "16-255", "16-255", "256-", "256-"]
    assert found == [f"inference float32 rows {block} small" for block in blocks]
    assert name(1, 512 * 512) == "inference float32 rows 1 large"
    assert _products._class(True, torch.float32, 1, 1) == "training float32 rows 1 small"
    assert name(1, dtype=torch.float64) == "inference float64 rows 1 small"


def test_the_table_of_another_build_says_nothing(kernels: list[str]) -> None:
    write_table(["training float32 rows 2-15 small"], torch="0.1")
    train()
    assert len(kernels) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"build": 1}', '{"products": {}}'])
def test_a_broken_table_says_nothing(text: str, kernels: list[str]) -> None:
    path = _products.table_path()
    assert path is not None
    path.parent.mkdir(parents=True)
    path.write_text(text)
    train()
    assert len(kernels) == 2


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_both_products_give_the_same(activation: str | None, dropout: float) -> None:
    given = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 4), (5, 4), (5,), (2, 3, 5))
    ]
    results = []
    for product in ("fused", "torch"):
        with fastseq.linear_product(product):
            torch.manual_seed(0)
            output = functional.linear(*given[:3], activation, given[3], dropout_p=dropout)
            results.append((output, *torch.autograd.grad(output.square().sum(), given)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_tune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_products, "_ROWS", (1, 8))
    monkeypatch.setattr(_products, "_WEIGHTS", ((16, 16), (512, 512)))
    monkeypatch.setattr(_products, "_ROUNDS", 1)
    monkeypatch.setattr(_products, "_SAMPLE_SECONDS", 1e-4)
    # The decision is as measured; the test's is made up, or it would depend on the machine.
    monkeypatch.setattr(_products, "_GAIN", 0.0)
    assert info.main(["--tune"]) == 0
    printed = capsys.readouterr().out
    assert "inference float32 rows 2-15 large" in printed
    path = _products.table_path()
    assert path is not None
    assert str(path) in printed
    held = json.loads(path.read_text())
    assert len(held["products"]) == 2 * 2 * 2 * 2
    assert set(held["products"].values()) == {"torch"}
    assert not _products.fused(False, torch.float32, 8, 16, 16)
    assert _products.fused(False, torch.float32, 64, 16, 16), "not measured"
    with fastseq.linear_product("fused"):
        assert _products.fused(False, torch.float32, 8, 16, 16)


def test_winner_needs_a_clear_gain() -> None:
    assert _products.winner(1.02, 1.0) == "fused"
    assert _products.winner(1.05, 1.0) == "torch"


def test_tune_without_a_place_to_write(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_products, "table_path", lambda: None)
    assert info.main(["--tune"]) == 2
    assert "XDG_CACHE_HOME" in capsys.readouterr().err
