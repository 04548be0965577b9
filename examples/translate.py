"""Train a small English-to-French Transformer with torch.nn and with fastseq.nn, and compare.

The textbook example: an encoder-decoder with two layers on each side learns sentence pairs that a
grammar writes (translate_grammar.py), from the same starting weights in both libraries. Epochs
alternate between the two, so that a machine that slows down slows down both. A part of the
sentences is held out; a translation of one of these counts as right only word for word.

    python examples/translate.py                         # about three minutes on two cores
    python examples/translate.py --figure attention.png  # also a picture of who attends to whom
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import perf_counter
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from side_by_side import (
    LIBRARIES,
    check_same_weights,
    comparison_table,
    largest_difference,
    losses_agree,
    progress_bar,
    speed_row,
)
from torch import Tensor, nn
from translate_grammar import Pair, join, sentence_pairs, split

import fastseq
import fastseq.nn as fnn

SEED = 0
HEADS = 4
LAYERS = 2  # in the encoder and in the decoder
LEARNING_RATE = 2e-3
WARM_UP = 0.1  # share of the steps in which the learning rate rises; then it falls to zero
HELD_OUT = 0.1  # share of the sentences that is not trained on
EXAMPLE = ("I am a student", "je suis un étudiant")  # held out as well
LONGEST = 16  # words that a translation may have

PADDING, BEGIN, END = 0, 1, 2
SPECIAL = ("<padding>", "<begin>", "<end>")

ACCURACY = 0.95  # of the held-out sentences, to be translated word for word


class Translator(nn.Module):
    """Embeddings, sinusoidal positions, Transformer, linear: logits of each next French word.

    Args:
        layers: ``torch.nn`` or ``fastseq.nn``: the one line in which the two models differ.
        english: number of different English words.
        french: likewise.
        size: features of a word.
        dropout: probability of dropout while training.
    """

    def __init__(
        self, layers: ModuleType, english: int, french: int, size: int, dropout: float
    ) -> None:
        super().__init__()
        self.scale = math.sqrt(size)
        self.source_embedding = nn.Embedding(english, size)
        self.target_embedding = nn.Embedding(french, size)
        for embedding in (self.source_embedding, self.target_embedding):
            nn.init.normal_(embedding.weight, std=1 / self.scale)
        self.positions = fnn.PositionalEncoding(size, dropout, batch_first=True)  # torch has none
        self.transformer = layers.Transformer(
            size, HEADS, LAYERS, LAYERS, 4 * size, dropout, batch_first=True
        )
        self.output = nn.Linear(size, french)

    def embed_source(self, words: Tensor, start: int = 0) -> Tensor:
        """(B, S) English words to (B, S, size) vectors."""
        return self.positions(self.source_embedding(words) * self.scale, start)

    def embed_target(self, words: Tensor, start: int = 0) -> Tensor:
        """(B, S) French words, of which the first has the position ``start``."""
        return self.positions(self.target_embedding(words) * self.scale, start)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits (B, T, french) of the word after each of ``target`` (B, T)."""
        length = target.size(1)
        later = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
        vectors = self.transformer(
            self.embed_source(source),
            self.embed_target(target),
            tgt_mask=later,
            tgt_is_causal=True,
            src_key_padding_mask=source == PADDING,
            tgt_key_padding_mask=target == PADDING,
            memory_key_padding_mask=source == PADDING,
        )
        return self.output(vectors)

    def translate(self, source: Tensor) -> Tensor:
        """(B, S) English words to French ones, greedily; with ``<begin>``, padded by ``<end>``."""
        return fastseq.generate(
            self.transformer,
            torch.full((len(source), 1), BEGIN),
            LONGEST,
            eos=END,
            source=source,
            source_key_padding_mask=source == PADDING,
            embed=self.embed_target,
            source_embed=self.embed_source,
            project=self.output,
        )


class Vocabulary:
    """Words and their numbers."""

    def __init__(self, sentences: Sequence[str]) -> None:
        self.words = [*SPECIAL, *sorted({word for text in sentences for word in split(text)})]
        self.indices = {word: index for index, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        """Numbers of the words of a sentence."""
        return [self.indices[word] for word in split(text)]

    def decode(self, indices: Sequence[int]) -> str:
        """The sentence up to its end."""
        indices = list(indices)
        end = indices.index(END) if END in indices else len(indices)
        return join([self.words[index] for index in indices[:end]])


@dataclass
class Data:
    """Sentence pairs, split into those to train on and the others."""

    english: Vocabulary
    french: Vocabulary
    training: list[Pair]
    held_out: list[Pair]

    def sources(self, sentences: Sequence[str]) -> Tensor:
        """(B, S) words of English sentences, padded."""
        return padded([self.english.encode(text) for text in sentences])

    def targets(self, sentences: Sequence[str]) -> Tensor:
        """(B, S) words of French sentences between begin and end, padded."""
        return padded([[BEGIN, *self.french.encode(text), END] for text in sentences])

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The training pairs in an order of their own for each seed."""
        pairs = list(self.training)
        Random(seed).shuffle(pairs)
        for start in range(0, len(pairs), size):
            english, french = zip(*pairs[start : start + size], strict=True)
            yield self.sources(english), self.targets(french)


@dataclass
class Run:
    """One library's model and what came out of training it."""

    model: Translator
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    accuracy: float = float("nan")
    translation_seconds: float = 0.0
    mistakes: list[tuple[str, str, str]] = field(default_factory=list)


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """A rectangle of all rows."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, PADDING)


def write_data(count: int) -> Data:
    """Sentences from the grammar; the example is always among those held out."""
    pairs = [pair for pair in sentence_pairs(count, SEED) if pair != EXAMPLE]
    english = Vocabulary([EXAMPLE[0], *(pair[0] for pair in pairs)])
    french = Vocabulary([EXAMPLE[1], *(pair[1] for pair in pairs)])
    boundary = int(len(pairs) * (1 - HELD_OUT))
    return Data(english, french, pairs[:boundary], [EXAMPLE, *pairs[boundary:]])


def start_runs(data: Data, options: argparse.Namespace) -> dict[str, Run]:
    """One model per library, from the same seed."""
    steps = options.epochs * math.ceil(len(data.training) / options.batch)

    def rate(step: int) -> float:
        rising = max(1.0, WARM_UP * steps)
        return min((step + 1) / rising, max(0.0, (steps - step) / (steps - rising + 1)))

    runs = {}
    for name, layers in LIBRARIES.items():
        torch.manual_seed(SEED)
        words = len(data.english.words), len(data.french.words)
        model = Translator(layers, *words, options.size, options.dropout)
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        runs[name] = Run(model, optimizer, schedule)
    check_same_weights(*(run.model for run in runs.values()))
    return runs


def loss_of(model: Translator, source: Tensor, target: Tensor) -> Tensor:
    """Mean over the words: each is predicted from the English sentence and the words before."""
    logits = model(source, target[:, :-1])
    expected = target[:, 1:]
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), expected.flatten(), ignore_index=PADDING
    )


def train_epoch(run: Run, batches: list[tuple[Tensor, Tensor]], bar: Progress, label: str) -> None:
    """One pass over the training pairs."""
    run.model.train()
    task = bar.add_task(label, total=len(batches))
    losses = []
    for source, target in batches:
        start = perf_counter()
        loss = loss_of(run.model, source, target)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        run.schedule.step()
        run.seconds += perf_counter() - start
        losses.append(loss.item())
        bar.update(task, advance=1)
    bar.remove_task(task)
    run.losses.append(sum(losses) / len(losses))


def evaluate(run: Run, data: Data, batch: int) -> None:
    """Translate the held-out sentences and count those that are right word for word."""
    pairs = data.held_out
    for start in range(0, len(pairs), batch):
        english, french = zip(*pairs[start : start + batch], strict=True)
        source = data.sources(english)
        begun = perf_counter()
        words = run.model.translate(source)
        run.translation_seconds += perf_counter() - begun
        for asked, expected, row in zip(english, french, words[:, 1:].tolist(), strict=True):
            translated = data.french.decode(row)
            if translated != expected:
                run.mistakes.append((asked, expected, translated))
    run.accuracy = 1 - len(run.mistakes) / len(pairs)


@torch.no_grad()
def attention_weights(
    model: Translator, source: Tensor, target: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Per decoder layer the weights (T, T) of masked self- and (T, S) of cross-attention.

    Layers do not ask their attention for weights. So a hook notes what attention is called with in
    an ordinary pass, and afterwards it is called once more with ``need_weights=True``.
    """
    model.eval()
    modules: list[nn.Module] = []
    for layer in model.transformer.decoder.layers:
        modules += [layer.self_attn, layer.multihead_attn]
    calls: dict[nn.Module, tuple[Any, dict[str, Any]]] = {}

    def note(module: nn.Module, arguments: Any, options: dict[str, Any]) -> None:
        calls[module] = (arguments, options)

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        model(source, target)
    finally:
        for hook in hooks:
            hook.remove()
    weights = []
    for module in modules:
        arguments, options = calls[module]
        weights.append(module(*arguments, **{**options, "need_weights": True})[1][0])
    return list(zip(weights[::2], weights[1::2], strict=True))


def draw(model: Translator, data: Data, path: Path) -> None:
    """A picture of the example's attention weights, a row per decoder layer."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    source, target = data.sources([EXAMPLE[0]]), data.targets([EXAMPLE[1]])[:, :-1]
    read = [data.french.words[index] for index in target[0].tolist()]
    asked = [data.english.words[index] for index in source[0].tolist()]
    written = [*read[1:], SPECIAL[END]]
    layers = attention_weights(model, source, target)
    figure, axes = pyplot.subplots(
        len(layers), 2, figsize=(9, 4.2 * len(layers)), squeeze=False, layout="constrained"
    )
    figure.suptitle(f"“{EXAMPLE[0]}” to “{EXAMPLE[1]}”: attention, mean of {HEADS} heads")
    titles = ("masked self-attention", "cross-attention")
    for number, (row, layer) in enumerate(zip(axes, layers, strict=True), start=1):
        columns = zip(row, titles, layer, (read, asked), strict=True)
        for axis, title, weights, words in columns:
            axis.imshow(weights.numpy(), vmin=0, vmax=1, cmap="Blues")
            axis.set_title(f"layer {number}, {title}", fontsize=10)
            axis.set_xticks(range(len(words)), words)
            axis.set_yticks(range(len(written)), written)
            axis.set_xlabel("attends to")
            axis.set_ylabel("while writing")
            for (i, j), weight in zip(
                ((i, j) for i in range(len(written)) for j in range(len(words))),
                weights.flatten().tolist(),
                strict=True,
            ):
                if weight >= 0.005:
                    colour = "white" if weight > 0.5 else "black"
                    axis.text(j, i, f"{weight:.2f}", ha="center", va="center", color=colour)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def results_table(runs: dict[str, Run], sentences: int) -> Table:
    """Losses, times and accuracy side by side."""
    table = comparison_table("Transformer: torch.nn and fastseq.nn from the same weights")
    reference, ours = runs.values()
    for epoch, (a, b) in enumerate(zip(reference.losses, ours.losses, strict=True), start=1):
        table.add_row(f"loss, epoch {epoch}", f"{a:.4f}", f"{b:.4f}", "")
    table.add_section()
    table.add_row("held out, right", f"{reference.accuracy:.2%}", f"{ours.accuracy:.2%}", "")
    speed_row(table, "training", reference.seconds, ours.seconds)
    label = f"translating {sentences:,} sentences"
    speed_row(table, label, reference.translation_seconds, ours.translation_seconds)
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train an English-to-French Transformer with torch.nn and fastseq.nn."
    )
    parser.add_argument("--epochs", type=int, help="passes over the sentences (default 5)")
    parser.add_argument("--sentences", type=int, help="sentence pairs to write (default 12000)")
    parser.add_argument("--size", type=int, help="features of a word (default 128)")
    parser.add_argument("--batch", type=int, help="sentences per step (default 64)")
    parser.add_argument("--dropout", type=float, default=0.1, help="while training (default 0.1)")
    parser.add_argument("--figure", type=Path, help="write a picture of attention weights here")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small model and data")
    parsed = parser.parse_args(arguments)
    defaults = (1, 600, 32, 64) if parsed.quick else (5, 12_000, 128, 64)
    for name, default in zip(("epochs", "sentences", "size", "batch"), defaults, strict=True):
        if getattr(parsed, name) is None:
            setattr(parsed, name, default)
        if getattr(parsed, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(parsed, name)}")
    if parsed.size % (2 * HEADS):
        parser.error(f"--size must be a multiple of {2 * HEADS}, got {parsed.size}")
    if not 0 <= parsed.dropout < 1:
        parser.error(f"--dropout must lie in [0, 1), got {parsed.dropout}")
    if parsed.sentences < 10:
        parser.error(f"--sentences must be at least 10, got {parsed.sentences}")
    return parsed


def verdict(runs: dict[str, Run], options: argparse.Namespace, console: Console) -> bool:
    """Whether both libraries did what they should."""
    good = True
    if options.dropout == 0:  # otherwise the two draw different elements to drop
        difference = largest_difference(*(run.losses for run in runs.values()))
        good = losses_agree(console, difference)
    if not options.quick:
        worst = min(run.accuracy for run in runs.values())
        enough = worst >= ACCURACY
        console.print(
            f"{'At least' if enough else 'LESS THAN'} {ACCURACY:.0%} of the held-out sentences "
            f"are right in both."
        )
        good = good and enough
    return good


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; 0 if both libraries learn to translate."""
    options = parse(arguments)
    console = Console()
    # torch's encoder leaves out padding in inference by means of a type that it warns of.
    warnings.filterwarnings("ignore", message=".*nested tensors is in prototype stage")
    data = write_data(options.sentences)
    runs = start_runs(data, options)
    console.print(
        f"{len(data.training):,} sentences to train on, {len(data.held_out):,} held out, "
        f"{len(data.english.words)} English and {len(data.french.words)} French words, "
        f"{LAYERS}+{LAYERS} layers of size {options.size}, batch {options.batch}, "
        f"{torch.get_num_threads()} threads",
        highlight=False,
    )
    for run in runs.values():
        # One step that changes nothing, so that no epoch's time includes loading code.
        loss_of(run.model, *next(data.batches(options.batch, 0))).backward()
        run.optimizer.zero_grad()
    with progress_bar(console) as bar:
        overall = bar.add_task("training", total=options.epochs * len(runs))
        for epoch in range(1, options.epochs + 1):
            batches = list(data.batches(options.batch, epoch))
            for name, run in runs.items():
                train_epoch(run, batches, bar, f"{name}, epoch {epoch}")
                bar.update(overall, advance=1)
    for run in runs.values():
        evaluate(run, data, options.batch)
    console.print(results_table(runs, len(data.held_out)))
    for name, run in runs.items():
        words = run.model.translate(data.sources([EXAMPLE[0]]))[0, 1:].tolist()
        console.print(f"[bold]{name}[/bold]: {EXAMPLE[0]} -> {data.french.decode(words)}")
        if run.mistakes:
            asked, expected, got = run.mistakes[0]
            console.print(f"  a mistake: {asked} -> {got}; right would be: {expected}")
    if options.figure is not None:
        try:
            draw(runs["fastseq"].model, data, options.figure)
        except ModuleNotFoundError as error:
            if error.name != "matplotlib":
                raise
            console.print("--figure needs matplotlib: pip install matplotlib", style="red")
            return 2
        console.print(f"Attention weights: {options.figure}", highlight=False)
    return 0 if verdict(runs, options, console) else 1


if __name__ == "__main__":
    sys.exit(main())
