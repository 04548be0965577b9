"""Runs ``fastseq bench model`` on files that tests write."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastseq.bench import command, model_layers
from fastseq.bench.timing import interleave

EXAMPLE = Path(__file__).parents[1] / "examples" / "bench_model.py"

HEADER = """
import dataclasses
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
"""

Result = dict[str, Any]
Bench = Callable[..., Result]

# What torch says about its own layers is not about ours.
QUIET_TORCH = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor"),
    pytest.mark.filterwarnings("ignore:Lazy modules"),
]


def bench_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Bench:
    """A function that runs the command on a file of a source: status, output, JSON document.

    The arguments are pytest's fixtures; tests ask for the fixture ``bench`` of ``conftest.py``.
    """

    def quick(calls: Any, **options: Any) -> Any:
        return interleave(
            calls, seconds=0.0, minimum_visits=1, maximum_visits=1, settle_seconds=0.0
        )

    monkeypatch.setattr(model_layers, "interleave", quick)

    def run(source: str, *options: str, target: str = "build") -> Result:
        path = tmp_path / "user_file.py"
        path.write_text(HEADER + textwrap.dedent(source), encoding="utf-8")
        written = tmp_path / "out.json"
        status = command.main(["model", f"{path}:{target}", "--json", str(written), *options])
        printed = capsys.readouterr()
        document = json.loads(written.read_text()) if written.exists() else None
        return {
            "status": status,
            "out": printed.out,
            "err": printed.err,
            "json": document,
            "path": path,
        }

    return run


def layers(result: Result, direction: str = "training") -> dict[str, dict[str, Any]]:
    """Rows by the first name (and the input, where a layer has several rows)."""
    rows = result["json"]["directions"][direction]["layers"]
    return {" ".join((row["names"][0], row["input"])): row for row in rows}


def results_checked(result: Result) -> set[str]:
    return {error["name"] for error in result["json"]["gate"]["errors"]}


MODEL = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0])

def build():
    return Model()

def example_input():
    return torch.randn(4, 2, 5)
"""
