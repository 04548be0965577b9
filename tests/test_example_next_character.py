"""The demonstration, at a size of seconds."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        module = importlib.import_module("next_character")
        read_text = module.read_text
        # Shorter than --quick's: windows enough to carry a state, in training and held out.
        patch.setattr(module, "read_text", lambda _: read_text(8_000))
        yield module


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_losses_agree(example: ModuleType, cell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main(["--quick", "--epochs", "1", "--cell", cell]) == 0
    printed = capsys.readouterr().out
    assert "The losses agree" in printed
    assert "torch writes: The " in printed
    assert "fastseq writes: The " in printed


def test_disagreement_fails(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "largest_difference", lambda runs: float("nan"))
    assert example.main(["--quick", "--epochs", "1"]) == 1
    assert "DO NOT AGREE" in capsys.readouterr().out


def test_windows_cover_the_streams_in_order(example: ModuleType) -> None:
    text = torch.arange(2 * 2 * example.STEPS + 1)
    batches = list(example.windows(text, 2))
    assert len(batches) == 2
    characters, targets = batches[0]
    assert characters.shape == (example.STEPS, 2)
    assert torch.equal(targets, characters + 1)
    assert batches[1][0][0, 0] == example.STEPS


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--cell", "transformer"]])
def test_bad_arguments(example: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        example.main(arguments)


def test_batch_beyond_the_text(example: ModuleType) -> None:
    assert example.main(["--quick", "--batch", "100000"]) == 2
