"""``fastseq bench model``: what its check finds, and errors in the user's file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from user_model import EXAMPLE, MODEL, QUIET_TORCH, Bench

import fastseq.nn as fnn
from fastseq.bench import command

pytestmark = QUIET_TORCH


# --- the gate


def test_dropout_is_off_for_the_check_and_on_again(bench: Bench) -> None:
    dropping = MODEL.replace("nn.LSTM(5, 8)", "nn.LSTM(5, 8, 2, dropout=0.5)")
    dropping = dropping.replace("self.head(", "nn.functional.dropout(self.head(").replace(
        "(x)[0])", "(x)[0]), 0.3, self.training)"
    )
    result = bench(dropping)
    assert result["status"] == 0
    notes = " ".join(result["json"]["gate"]["notes"])
    assert "gradients are checked with dropout off" in notes
    # A dropout that is a function is found by its effect.
    assert "gradients are checked in eval()" in notes


def test_a_model_that_float64_does_not_suit(bench: Bench) -> None:
    fixed = MODEL.replace("self.lstm(x)", "self.lstm(x.float())")
    result = bench(fixed)
    assert result["status"] == 0
    (note,) = result["json"]["gate"]["notes"]
    assert "no float64 oracle" in note
    assert all(error["limit"] > 0 for error in result["json"]["gate"]["errors"])


def test_an_oracle_that_draws_other_numbers(bench: Bench) -> None:
    noisy = MODEL.replace("self.lstm(x)", "self.lstm(x + torch.randn_like(x))")
    result = bench(noisy, "--inference")
    assert result["status"] == 0
    (note,) = result["json"]["gate"]["notes"]
    assert "no float64 oracle" in note


def spoiled(method: Any, amount: float) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs) * (1 + amount)

    return forward


@pytest.mark.parametrize("oracle", [True, False])
def test_a_wrong_layer_fails_and_is_not_timed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, oracle: bool
) -> None:
    amount = 1e-5 if oracle else 1e-2
    monkeypatch.setattr(fnn.Linear, "forward", spoiled(fnn.Linear.forward, amount))
    source = MODEL if oracle else MODEL.replace("self.lstm(x)", "self.lstm(x.float())")
    result = bench(source)
    assert result["status"] == 1
    assert "gate FAILED" in result["out"]
    assert "inference output: error" in result["out"]
    assert result["json"]["directions"] == {}
    assert not result["json"]["gate"]["passed"]


def test_a_wrong_gradient_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    original = fnn.Linear.forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = original(self, x)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * 1.0001)
        return y

    monkeypatch.setattr(fnn.Linear, "forward", forward)
    result = bench(MODEL)
    assert result["status"] == 1
    failed = [e["name"] for e in result["json"]["gate"]["errors"] if e["ours"] > e["limit"]]
    assert "training d_head.weight" in failed
    assert "inference output" not in failed


def test_a_converted_model_that_raises(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no\nsuch luck")

    monkeypatch.setattr(fnn.Linear, "forward", forward)
    result = bench(MODEL)
    assert result["status"] == 1
    assert "gate FAILED: the converted model raised RuntimeError: no such luck" in result["out"]


# --- errors of one line


ERRORS = {
    "factory raises": (
        "def build():\n    x = 1\n    raise KeyError('a\\nb')\n",
        ":8: building the",
    ),
    "import raises": ("1 / 0\n", ":6: importing it: ZeroDivisionError: division by zero"),
    "syntax": ("def build(:\n", ":6: importing it: SyntaxError"),
    "exit": ("import sys\nsys.exit(3)\n", ":7: importing it: SystemExit: 3"),
    "no module": ("def build():\n    return 3\n", "must return a torch.nn.Module"),
    "no name": ("x = 1\n", "has no 'build'"),
    "not a function": ("build = 3\n", "'build' is not a function"),
    "no input": (MODEL.replace("example_input", "other"), "no example input"),
    "input is None": (MODEL.replace("return torch.randn(4, 2, 5)", "pass"), "is None"),
    "input raises": (
        MODEL.replace("return torch.randn(4, 2, 5)", "raise OSError('gone')"),
        ":20: making the example input: OSError: gone",
    ),
    "forward raises": (
        MODEL.replace("torch.randn(4, 2, 5)", "torch.randn(4, 2, 6)"),
        ":14: running the torch model: RuntimeError: input.size(-1)",
    ),
    "factories differ": (
        MODEL.replace("return Model()", "size.append(1); return nn.Linear(5, len(size))")
        + "size = []\n",
        "two models differ",
    ),
    "frozen": (MODEL.replace("return Model()", "return Model().requires_grad_(False)"), "no param"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_in_the_file(bench: Bench, name: str) -> None:
    source, message = ERRORS[name]
    result = bench(source)
    path = result["path"]
    assert result["status"] == 2
    line = result["err"]
    assert line.startswith(f"fastseq bench: {path}")
    assert line.count("\n") == 1
    assert message in line
    assert result["json"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py:build"], "no such file: nowhere.py"),
        (["nowhere.py"], "expected path.py:function, got 'nowhere.py'"),
        ([f"{EXAMPLE}:"], "expected path.py:function"),
        ([f"{EXAMPLE}:missing"], "has no 'missing'"),
        ([f"{EXAMPLE}:build", "--input", "missing"], "has no 'missing'"),
        ([f"{EXAMPLE}:build", "--input", "none.py:f"], "no such file: none.py"),
        ([f"{EXAMPLE}:build", "--threads", "0"], "--threads must be at least 1"),
        ([f"{EXAMPLE}:build", "--seconds", "0"], "--seconds must be more than 0"),
        ([f"{EXAMPLE}:build", "--json", "/dev/null/x.json"], "/dev/null"),
        ([f"{EXAMPLE.parent}:build"], "no such file"),
    ],
)
def test_wrong_use(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["model", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("fastseq bench: ")
    assert printed.count("\n") == 1
    assert message in printed
