"""``fastseq bench model``: a user's own model, checked, timed and explained."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fastseq.nn as fnn
from fastseq.bench import command, model_layers
from fastseq.bench.timing import interleave

EXAMPLE = Path(__file__).parents[1] / "examples" / "bench_model.py"

HEADER = """
import dataclasses
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
"""

# What torch says about its own layers is not about ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor"),
    pytest.mark.filterwarnings("ignore:Lazy modules"),
]

Result = dict[str, Any]
Bench = Callable[..., Result]


@pytest.fixture
def bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Bench:
    """Run the command on a file of that source; status, output and the JSON document."""

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


# --- the whole of it


def test_the_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        model_layers,
        "interleave",
        partial(lambda calls, **_: interleave(calls, seconds=0.0, minimum_visits=2)),
    )
    written = tmp_path / "out.json"
    assert command.main(["model", f"{EXAMPLE}:build", "--json", str(written)]) == 0
    printed = capsys.readouterr().out
    assert "gate passed" in printed
    assert "dropout off" in printed
    assert "fastseq has no such layer" in printed
    document = json.loads(written.read_text())
    assert document["kind"] == "model"
    assert document["gate"]["passed"]
    assert set(document["directions"]) == {"inference", "training"}
    for direction in document["directions"].values():
        assert [row["names"] for row in direction["layers"]] == [
            ["embedding"],
            ["lstm"],
            ["attention"],
            ["encoder"],
            ["norm"],
            ["output"],
        ]
        for row in direction["layers"]:
            assert row["calls"] == 1
            assert not row["problem"]
            assert set(row["timings"]) == ({"torch", "fastseq"} if row["new"] else {"torch"})
        whole, converted = direction["timings"], direction["converted_s"]
        assert direction["speedup"] == pytest.approx(
            whole["torch"]["median_s"] / whole["fastseq"]["median_s"]
        )
        for library, timing in whole.items():
            total = converted[library] + direction["left_on_torch_s"]
            assert total + direction["own_code_s"][library] == pytest.approx(timing["median_s"])
    names = results_checked({"json": document})
    assert {"inference output.scores", "training output.scores"} < names
    assert "training d_attention.in_proj_weight" in names
    assert "training d_embedding.weight" in names
    assert {row["fqn"] for row in document["conversion"]} > {"lstm", "attention", "encoder"}


def test_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "fastseq", "bench", "model", f"{EXAMPLE}:nothing"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == f"fastseq bench: {EXAMPLE} has no 'nothing'\n"


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


def test_one_direction(bench: Bench) -> None:
    result = bench(MODEL, "--inference", "--seed", "3")
    assert result["status"] == 0
    assert list(result["json"]["directions"]) == ["inference"]
    assert results_checked(result) == {"inference output"}
    result = bench(MODEL, "--training")
    assert list(result["json"]["directions"]) == ["training"]
    assert "training d_lstm.weight_hh_l0" in results_checked(result)


def test_example_inputs(bench: Bench) -> None:
    """Of --input, of the factory, of example_input, in this order."""
    both = MODEL.replace("return Model()", "return Model(), (torch.randn(6, 2, 5),)")
    assert "(6, 2, 5)" in bench(both, "--inference")["out"]
    other = "\ndef other():\n    return {'x': torch.randn(7, 2, 5)}\n"
    assert "(7, 2, 5)" in bench(both + other, "--inference", "--input", "other")["out"]
    assert "(4, 2, 5)" in bench(MODEL + other, "--inference")["out"]
    pair = "\ndef pair():\n    return ((torch.randn(9, 2, 5),), {})\n"
    assert "(9, 2, 5)" in bench(both + pair, "--inference", "--input", "pair")["out"]


# --- what models do


def test_structures_that_come_out(bench: Bench) -> None:
    result = bench(
        """
        @dataclasses.dataclass
        class Output:
            logits: torch.Tensor
            states: tuple
            tokens: torch.Tensor
            nothing: None = None

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding = nn.Embedding(11, 6)
                self.gru = nn.GRU(6, 8)

            def forward(self, tokens, scale):
                output, state = self.gru(self.embedding(tokens) * scale)
                best = output.argmax(-1)
                return Output(output, ({"last": state},), best), output.detach()

        def build():
            scale = torch.ones(6, requires_grad=True)
            return Model(), (torch.randint(11, (5, 3)), scale)
        """
    )
    assert result["status"] == 0
    names = results_checked(result)
    assert {
        "training output[0].logits",
        "training output[0].states[0].last",
        "training output[1]",
        "training d_input[1]",
        "training d_embedding.weight",
    } < names
    assert not any("tokens" in name for name in names)


def test_calls_shapes_and_shared_layers(bench: Bench) -> None:
    result = bench(
        """
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Linear(5, 5)
                self.again = self.first
                self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
                self.unused = nn.GRU(5, 5)

            def forward(self, x):
                for block in self.blocks:
                    x = block(x)
                return self.again(self.first(x)).sum() + self.first(x[0]).sum()

        def build():
            return Model(), torch.randn(4, 2, 5)
        """
    )
    assert result["status"] == 0
    rows = layers(result)
    # Alike but for the input's gradient: the model's own input has none.
    alone, alike = rows.pop("blocks.0 (4, 2, 5)"), rows.pop("blocks.1 (4, 2, 5)")
    assert alone["names"] == ["blocks.0"]
    assert alike["names"] == ["blocks.1", "blocks.2", "first"]
    assert alike["calls"] == 4
    other = rows.pop("first (2, 5)")
    assert (other["calls"], other["names"]) == (1, ["first"])
    unused = rows.pop("unused ")
    assert (unused["problem"], unused["timings"]) == ("never called", {})
    assert not rows


def test_packed_sequences_and_masks(bench: Bench) -> None:
    result = bench(
        """
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.lstm = nn.LSTM(5, 8, bidirectional=True)
                layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True)
                self.encoder = nn.TransformerEncoder(layer, 2)

            def forward(self, x, lengths):
                packed = pack_padded_sequence(x, lengths, batch_first=True)
                y, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
                hidden = torch.arange(6) >= lengths[:, None]
                return self.encoder(y, src_key_padding_mask=hidden)[~hidden]

        def build():
            return Model()

        def example_input():
            return {"x": torch.randn(3, 6, 5), "lengths": torch.tensor([6, 4, 1])}
        """
    )
    assert result["status"] == 0, result["err"] or result["out"]
    rows = layers(result)
    assert rows.pop("lstm packed (11, 5)")["speedup"] > 0
    # A stack's layers, both alike in one row.
    (row,) = rows.values()
    assert row["names"] == ["encoder.layers.0", "encoder.layers.1"]
    assert "src_key_padding_mask (3, 6)" in row["input"]
    assert not row["problem"]


def test_what_stays_on_torch_and_why(bench: Bench) -> None:
    result = bench(
        """
        class Mine(nn.LSTM):
            pass

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding = nn.Embedding(11, 6)
                self.mine = Mine(6, 6)
                self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
                self.head = nn.Linear(6, 3)
                self.small = nn.Linear(6, 3, dtype=torch.float16)

            def forward(self, tokens):
                x = self.mine(self.embedding(tokens))[0]
                return self.head(self.normed(x)), self.small(x.half())

        def build():
            return Model(), (torch.randint(11, (5, 3)),)
        """,
        "--training",
    )
    assert result["status"] == 0, result["err"] or result["out"]
    rows = layers(result)
    reasons = {name.split()[0]: row["reason"] for name, row in rows.items()}
    assert reasons["embedding"] == "fastseq has no such layer"
    assert "subclass of torch.nn.LSTM" in reasons["mine"]
    assert "parametrized" in reasons["normed"]
    assert "float16" in reasons["small"]
    assert rows["mine (5, 3, 6)"]["old"] == "user_file.Mine"
    assert rows["embedding (5, 3)"]["old"] == "torch.nn.Embedding"
    for name, row in rows.items():
        assert set(row["timings"]) == ({"torch", "fastseq"} if "head" in name else {"torch"})


def test_layers_that_fall_back_say_so(bench: Bench) -> None:
    mixed = MODEL.replace(
        "        return self.head(self.lstm(x)[0])",
        "        with torch.autocast('cpu'):\n            return self.head(self.lstm(x)[0])",
    )
    row = layers(bench(mixed, "--inference"), "inference")["lstm (4, 2, 5)"]
    assert row["reason"] == "falls back to torch: autocast is enabled for the CPU"
    assert set(row["timings"]) == {"torch", "fastseq"}


def test_lazy_and_normalizing_modules(bench: Bench) -> None:
    result = bench(
        """
        def build():
            return nn.Sequential(
                nn.LazyLinear(6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Linear(6, 3)
            )

        def example_input():
            return torch.randn(8, 5)
        """
    )
    assert result["status"] == 0, result["err"] or result["out"]
    assert layers(result)["3 (8, 6)"]["new"] == "fastseq.nn.Linear"


def test_the_model_may_be_the_layer(bench: Bench) -> None:
    result = bench("def build():\n    return nn.GRU(5, 8), torch.randn(4, 2, 5)\n")
    assert result["status"] == 0
    assert [row["names"] for row in layers(result).values()] == [[""]]
    assert "(root)" in result["out"]


def test_nothing_to_convert(bench: Bench) -> None:
    result = bench("def build():\n    return nn.Conv1d(5, 8, 3), torch.randn(4, 5, 9)\n")
    assert result["status"] == 0
    assert "no layers found that fastseq has" in result["out"]


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
        ([f"{EXAMPLE}:build", "--seconds", "0"], "--seconds must be positive"),
        ([f"{EXAMPLE}:build", "--json", "/nowhere/x.json"], "no such directory: /nowhere"),
        ([f"{EXAMPLE.parent}:build"], "no such file"),
    ],
)
def test_wrong_use(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["model", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("fastseq bench: ")
    assert printed.count("\n") == 1
    assert message in printed
