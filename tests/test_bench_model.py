"""``fastseq bench model``: a user's own model, checked, timed and explained."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
from user_model import EXAMPLE, MODEL, QUIET_TORCH, Bench, layers, results_checked

from fastseq.bench import command, model_layers
from fastseq.bench.timing import interleave

pytestmark = QUIET_TORCH


# --- the whole of it


def test_the_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        model_layers,
        "interleave",
        partial(lambda calls, **_: interleave(calls, maximum_visits=1, settle_seconds=0.0)),
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
    # Only the linear layer: torch has no bfloat16 LSTM for processors without AVX-512.
    mixed = MODEL.replace(
        "        return self.head(self.lstm(x)[0])",
        "        states = self.lstm(x)[0]\n"
        "        with torch.autocast('cpu'):\n            return self.head(states)",
    )
    row = layers(bench(mixed, "--inference"), "inference")["head (4, 2, 8)"]
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


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_time_that_is_none(bench: Bench, seconds: str) -> None:
    result = bench(MODEL, "--seconds", seconds)
    assert result["status"] == 2
    assert result["out"] == ""
    assert result["err"].startswith("fastseq bench: --seconds must be more than 0")
    assert result["err"].count("\n") == 1


def test_a_file_that_cannot_be_written_is_found_out_early(bench: Bench, tmp_path: Path) -> None:
    result = bench(MODEL, "--json", str(tmp_path))
    assert result["status"] == 2
    assert result["out"] == ""  # before the model was even built
    assert result["err"] == f"fastseq bench: {tmp_path} is a directory\n"


def test_torchs_notices_stay_out_of_the_tables(bench: Bench) -> None:
    source = """
    import warnings

    class Projected(nn.LSTM):
        pass

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = Projected(5, 8, proj_size=3)

        def forward(self, x):
            warnings.warn("mine")
            return self.lstm(x)[0]

    def build():
        return Model(), torch.randn(4, 2, 5)
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = bench(source)
    assert result["status"] == 0
    # torch says that oneDNN has no projections; what the model itself says is its author's.
    assert {str(one.message) for one in caught} == {"mine"}
    # A class of the file has the same name in both tables.
    assert result["out"].count("user_file.Projected") == 3
    assert "fastseq_user" not in result["out"]
    assert result["json"]["conversion"][0]["old"] == "user_file.Projected"
