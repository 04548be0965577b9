"""Train one next-character model with torch.nn and with fastseq.nn, and compare.

Both models start from the same weights and see the same batches of real English text: the help
topics that every CPython carries in ``pydoc_data``. Epochs alternate between the two libraries, so
that a machine that slows down slows down both. The losses must agree; the time should not.

    python examples/next_character.py                # LSTM, about two minutes on two cores
    python examples/next_character.py --cell gru
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from types import ModuleType

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from side_by_side import (
    LIBRARIES,
    check_same_weights,
    comparison_table,
    losses_agree,
    progress_bar,
    speed_row,
)
from side_by_side import largest_difference as largest_difference_of
from torch import Tensor, nn

SEED = 0
STEPS = 100  # characters per training window; the state is carried from window to window
EMBEDDING = 128
HELD_OUT = 0.05  # share of the text that is not trained on
LEARNING_RATE = 3e-3
GRADIENT_NORM = 1.0
SAMPLE_LENGTH = 160
PROMPT = "The "
TEMPERATURE = 0.7

State = Tensor | tuple[Tensor, Tensor]


class NextCharacter(nn.Module):
    """Embedding, recurrent layer, linear: logits of the next character at every position.

    Args:
        layers: ``torch.nn`` or ``fastseq.nn``: the one line in which the two models differ.
        cell: "lstm", "gru" or "rnn".
        vocabulary: Number of different characters.
        hidden: Size of the recurrent layer.
    """

    def __init__(self, layers: ModuleType, cell: str, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, EMBEDDING)
        self.recurrent: nn.Module = getattr(layers, cell.upper())(EMBEDDING, hidden)
        self.output = nn.Linear(hidden, vocabulary)

    def forward(self, characters: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Map (T, B) characters to (T, B, vocabulary) logits and the state after them."""
        hidden, state = self.recurrent(self.embedding(characters), state)
        return self.output(hidden), state


@dataclass
class Text:
    """The text as indices into its vocabulary, split in training and held-out part."""

    vocabulary: str
    training: Tensor
    held_out: Tensor


@dataclass
class Run:
    """One library's model and what came out of training it."""

    model: NextCharacter
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    held_out: float = float("nan")
    sample: str = ""
    sample_seconds: float = 0.0


def read_text(limit: int | None) -> Text:
    """Concatenate the help topics in sorted order; the last part is held out."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))[:limit]
    vocabulary = "".join(sorted(set(text)))
    indices = {character: index for index, character in enumerate(vocabulary)}
    encoded = torch.tensor([indices[character] for character in text])
    split = int(len(encoded) * (1 - HELD_OUT))
    return Text(vocabulary, encoded[:split], encoded[split:])


def windows(text: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a text into ``batch`` streams and walk them in step: (T, B) characters and targets."""
    length = (len(text) - 1) // batch
    streams = text[: length * batch].view(batch, length).t()
    targets = text[1 : length * batch + 1].view(batch, length).t()
    for start in range(0, length - STEPS + 1, STEPS):
        yield streams[start : start + STEPS], targets[start : start + STEPS]


def detached(state: State) -> State:
    """The state's values without the graph that made them."""
    if isinstance(state, tuple):
        return state[0].detach(), state[1].detach()
    return state.detach()


def warm_up(run: Run, text: Tensor, batch: int) -> None:
    """One step that changes nothing, so that no epoch's time includes loading code."""
    characters, targets = next(windows(text, batch))
    logits, _ = run.model(characters)
    nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    run.optimizer.zero_grad()


def train_epoch(run: Run, text: Tensor, batch: int, progress: Progress, label: str) -> float:
    """One pass over the text with backpropagation through each window; returns the mean loss."""
    run.model.train()
    batches = list(windows(text, batch))
    task = progress.add_task(label, total=len(batches))
    losses, state = [], None
    for characters, targets in batches:
        start = perf_counter()
        logits, state = run.model(characters, state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        run.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), GRADIENT_NORM)
        run.optimizer.step()
        run.seconds += perf_counter() - start
        state = detached(state)
        losses.append(loss.item())
        progress.update(task, advance=1)
    progress.remove_task(task)
    return sum(losses) / len(losses)


@torch.no_grad()
def held_out_loss(model: NextCharacter, text: Tensor) -> float:
    """Mean loss per character on text the model has not seen, read as one stream."""
    model.eval()
    losses, state = [], None
    for characters, targets in windows(text, 1):
        logits, state = model(characters, state)
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item())
    return sum(losses) / len(losses)


@torch.no_grad()
def generate(run: Run, vocabulary: str, length: int) -> str:
    """Write text one character at a time: one step at batch 1, the state carried along."""
    run.model.eval()
    generator = torch.Generator().manual_seed(SEED)
    state = None
    written = [vocabulary.index(c) for c in PROMPT if c in vocabulary] or [0]
    for character in written[:-1]:
        _, state = run.model(torch.tensor([[character]]), state)
    start = perf_counter()
    for _ in range(length):
        logits, state = run.model(torch.tensor([[written[-1]]]), state)
        chances = torch.softmax(logits[-1, 0] / TEMPERATURE, dim=-1)
        written.append(int(torch.multinomial(chances, 1, generator=generator)))
    run.sample_seconds = perf_counter() - start
    return "".join(vocabulary[index] for index in written)


def start_runs(cell: str, vocabulary: int, hidden: int) -> dict[str, Run]:
    """One model per library, from the same seed."""
    runs = {}
    for name, layers in LIBRARIES.items():
        torch.manual_seed(SEED)
        model = NextCharacter(layers, cell, vocabulary, hidden)
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        runs[name] = Run(model, optimizer)
    check_same_weights(*(run.model for run in runs.values()))
    return runs


def largest_difference(runs: dict[str, Run]) -> float:
    """Largest relative difference between the two libraries' losses."""
    return largest_difference_of(*([*run.losses, run.held_out] for run in runs.values()))


def results_table(runs: dict[str, Run], cell: str) -> Table:
    """Loss per epoch, held-out loss and times, side by side."""
    table = comparison_table(f"{cell.upper()}: torch.nn and fastseq.nn from the same weights")
    reference, ours = runs.values()
    for epoch, (a, b) in enumerate(zip(reference.losses, ours.losses, strict=True), start=1):
        table.add_row(f"loss, epoch {epoch}", f"{a:.4f}", f"{b:.4f}", f"{(b - a) / a:+.2%}")
    a, b = reference.held_out, ours.held_out
    table.add_row("loss, held-out text", f"{a:.4f}", f"{b:.4f}", f"{(b - a) / a:+.2%}")
    table.add_section()
    speed_row(table, "training", reference.seconds, ours.seconds)
    speed_row(table, "writing the sample", reference.sample_seconds, ours.sample_seconds)
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a next-character model with torch.nn and fastseq.nn and compare."
    )
    parser.add_argument("--cell", choices=("lstm", "gru", "rnn"), default="lstm")
    parser.add_argument("--epochs", type=int, help="passes over the text (default 5)")
    parser.add_argument("--hidden", type=int, help="size of the recurrent layer (default 256)")
    parser.add_argument("--batch", type=int, help="streams read side by side (default 32)")
    parser.add_argument("--quick", action="store_true", help="a few seconds: small model and text")
    parsed = parser.parse_args(arguments)
    defaults = (2, 32, 8) if parsed.quick else (5, 256, 32)
    for name, default in zip(("epochs", "hidden", "batch"), defaults, strict=True):
        if getattr(parsed, name) is None:
            setattr(parsed, name, default)
        if getattr(parsed, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(parsed, name)}")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; 0 if the losses agree."""
    options = parse(arguments)
    console = Console()
    text = read_text(20_000 if options.quick else None)
    if len(text.training) <= options.batch * STEPS:
        console.print(
            f"--batch {options.batch} leaves no window of {STEPS} characters", style="red"
        )
        return 2
    runs = start_runs(options.cell, len(text.vocabulary), options.hidden)
    console.print(
        f"{len(text.training):,} characters of CPython's help topics, "
        f"{options.cell.upper()} of size {options.hidden}, batch {options.batch}, "
        f"windows of {STEPS}, {torch.get_num_threads()} threads"
    )
    for run in runs.values():
        warm_up(run, text.training, options.batch)
    with progress_bar(console) as progress:
        overall = progress.add_task("training", total=options.epochs * len(runs))
        for epoch in range(1, options.epochs + 1):
            for name, run in runs.items():
                label = f"{name}, epoch {epoch}"
                loss = train_epoch(run, text.training, options.batch, progress, label)
                run.losses.append(loss)
                progress.update(overall, advance=1)
    for run in runs.values():
        run.held_out = held_out_loss(run.model, text.held_out)
        run.sample = generate(run, text.vocabulary, SAMPLE_LENGTH)
    console.print(results_table(runs, options.cell))
    for name, run in runs.items():
        console.print(f"\n[bold]{name}[/bold] writes: {escape(run.sample)}", highlight=False)
    console.print()
    return 0 if losses_agree(console, largest_difference(runs)) else 1


if __name__ == "__main__":
    sys.exit(main())
