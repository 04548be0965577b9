"""The translation example, at a size of seconds, and the French of its grammar."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("translate")


@pytest.fixture(scope="module")
def grammar() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("translate_grammar")


def test_losses_agree_and_attention_is_drawn(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--quick", "--dropout", "0"]
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    figure = tmp_path / "attention.png"
    if has_matplotlib:
        arguments += ["--figure", str(figure)]
    assert example.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "The losses agree" in printed
    assert "torch: I am a student -> " in printed
    assert "fastseq: I am a student -> " in printed
    if has_matplotlib:
        assert figure.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(*arguments: object) -> None:
        raise ModuleNotFoundError("no", name="matplotlib")

    monkeypatch.setattr(example, "draw", draw)
    arguments = ["--quick", "--sentences", "20", "--figure", "x.png"]
    assert example.main(arguments) == 2
    assert "pip install matplotlib" in capsys.readouterr().out


def test_disagreement_and_too_many_mistakes_fail(
    example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    options = example.parse(["--dropout", "0"])
    runs = {name: example.Run(None, None, None, accuracy=0.99) for name in example.LIBRARIES}
    runs["torch"].losses, runs["fastseq"].losses = [1.0, 0.5], [1.001, 0.5]
    assert example.verdict(runs, options, example.Console())
    runs["fastseq"].losses = [1.0, float("nan")]
    assert not example.verdict(runs, options, example.Console())
    assert "DO NOT AGREE" in capsys.readouterr().out
    options = example.parse([])
    assert example.verdict(runs, options, example.Console())
    runs["torch"].accuracy = 0.94
    assert not example.verdict(runs, options, example.Console())
    assert "LESS THAN 95%" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["torch", "fastseq"])
def test_attention_weights_are_those_used(example: ModuleType, name: str) -> None:
    """They sum to 1, later words have none, and both libraries have the same."""
    data = example.write_data(50)
    options = example.parse(["--quick"])
    models = {key: run.model for key, run in example.start_runs(data, options).items()}
    source, target = data.sources([example.EXAMPLE[0]]), data.targets([example.EXAMPLE[1]])
    layers = example.attention_weights(models[name], source, target)
    assert len(layers) == example.LAYERS
    expected = example.attention_weights(models["torch"], source, target)
    for pair, expected_pair in zip(layers, expected, strict=True):
        own, cross = pair
        assert own.shape == (target.size(1), target.size(1))
        assert cross.shape == (target.size(1), source.size(1))
        assert own.triu(1).eq(0).all()
        for weights, expected_weights in zip(pair, expected_pair, strict=True):
            torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))
            torch.testing.assert_close(weights, expected_weights)
    assert not any(module._forward_pre_hooks for module in models[name].modules())


def test_training_sees_no_held_out_sentence(example: ModuleType) -> None:
    data = example.write_data(300)
    trained, held_out = ({pair[0] for pair in pairs} for pairs in (data.training, data.held_out))
    assert example.EXAMPLE in data.held_out
    assert not trained & held_out
    assert len(held_out) >= 30
    batches = list(data.batches(64, 1))
    assert sum(len(source) for source, _ in batches) == len(data.training)
    source, target = batches[0]
    assert (target[:, 0] == example.BEGIN).all()
    rows = source.tolist()
    asked = {data.english.decode([i for i in row if i != example.PADDING]) for row in rows}
    assert asked <= trained


@pytest.mark.parametrize(
    "arguments",
    [["--epochs", "0"], ["--size", "20"], ["--dropout", "1"], ["--sentences", "3"]],
)
def test_bad_arguments(example: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        example.main(arguments)


def test_every_sentence_has_one_translation(grammar: ModuleType) -> None:
    writer, pairs = grammar._Writer(Random(7)), {}
    for _ in range(20_000):
        english, french = writer.sentence()
        assert pairs.setdefault(english, french) == french
        for text in (english, french):
            assert grammar.join(grammar.split(text)) == text
            assert "-" not in grammar.split(text)
    assert len(pairs) > 10_000
    assert len(grammar.sentence_pairs(100, 1)) == 100
    assert grammar.sentence_pairs(100, 1) == grammar.sentence_pairs(200, 1)[:100]


@pytest.mark.parametrize(
    ("english", "french"),
    [
        ("I am a student", "je suis un étudiant"),
        ("I am an actress", "je suis une actrice"),
        ("you are students", "vous êtes des étudiants"),
        ("you are not tired", "tu n'es pas fatigué"),
        ("they are good pupils", "ils sont de bons élèves"),
        ("they are actresses", "elles sont des actrices"),
        ("are we happy ?", "sommes-nous heureux ?"),
        ("I do not have a car", "je n'ai pas de voiture"),
        ("he does not have an orange", "il n'a pas d'orange"),
        ("does she have a dog ?", "a-t-elle un chien ?"),
        ("she is an old friend", "elle est une vieille amie"),
        ("he is an old friend", "il est un vieil ami"),
    ],
)
def test_french(grammar: ModuleType, english: str, french: str) -> None:
    assert _all_pairs(grammar)[english] == french


@pytest.mark.parametrize(
    ("english", "french"),
    [
        ("she has two ", "elle a deux "),
        ("is the man ", "l'homme est-il "),
        ("are our friends ", "nos amis sont-ils "),
        ("does her brother have ", "son frère a-t-il "),
        ("the women are not ", "les femmes ne sont pas "),
    ],
)
def test_french_beginnings(grammar: ModuleType, english: str, french: str) -> None:
    found = {
        asked: said for asked, said in _all_pairs(grammar).items() if asked.startswith(english)
    }
    assert found
    assert all(said.startswith(french) for said in found.values())


_pairs: dict[str, str] = {}


def _all_pairs(grammar: ModuleType) -> dict[str, str]:
    if not _pairs:
        writer = grammar._Writer(Random(11))
        _pairs.update(writer.sentence() for _ in range(200_000))
    return _pairs
