"""The ``model`` command: a user's own model, checked and timed as it is and converted."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from fastseq.bench.model_check import Models
    from fastseq.bench.model_layers import Whole
    from fastseq.bench.model_source import Example, Source
    from fastseq.convert import Report

__all__ = ["add_command"]


def add_command(commands: argparse._SubParsersAction[Any]) -> None:
    """Add ``model`` to the ``bench`` command."""
    parser = commands.add_parser(
        "model",
        help="check and time your own model, converted, layer by layer",
        description="Build a model twice, convert one, compare results, time both.",
    )
    parser.add_argument(
        "factory",
        metavar="path.py:factory",
        help="a function that returns a module, or (module, example input)",
    )
    parser.add_argument(
        "--input",
        metavar="FUNCTION",
        help="a function (in that file, or other.py:function) that returns the example input: a "
        "tensor, a tuple of arguments, a dict of keyword arguments (default: what the factory "
        "returns, then example_input)",
    )
    parser.add_argument("--training", action="store_true", help="only forward and backward")
    parser.add_argument("--inference", action="store_true", help="only forward under no_grad")
    parser.add_argument("--threads", type=int, help="threads for both (default: torch's)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=2.0,
        help="time for the whole model in each direction; a layer gets a quarter (default 2)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--seed", type=int, default=0, help="for weights and input (default 0)")
    parser.set_defaults(action=_run)


def _run(arguments: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from fastseq.bench import machine, model_report, results
    from fastseq.bench.model_check import check
    from fastseq.bench.model_source import Source

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    if not 0 < arguments.seconds < float("inf"):
        raise ValueError(f"--seconds must be more than 0, got {arguments.seconds}")
    if arguments.json is not None:
        # Better now than after the work.
        results.check_writable(arguments.json)
    # torch's notices about its own layers would tear the tables apart.
    warnings.filterwarnings("ignore", module="torch")
    directions = [name for name in ("inference", "training") if getattr(arguments, name)] or [
        "inference",
        "training",
    ]
    source = Source(arguments.factory, arguments.input)
    models, report, example = _build(source, arguments.seed, directions)
    machine.warn_if_busy()
    record = machine.describe([torch.get_num_threads()])
    console = Console(width=None if sys.stdout.isatty() else 200)
    threads = machine.threads_text(record)
    console.print(f"{record['cpu']}, {threads}, {record['isa']} kernels")
    console.print(report if len(report) else str(report))
    found = check(models, example, directions, arguments.seed)
    for line in model_report.check_lines(found):
        console.print(line, style=None if found.passed else "red", highlight=False)
    wholes: list[Whole] = []
    if found.passed:
        for direction in directions:
            whole = _time(models, report, example, direction, arguments, console)
            wholes.append(whole)
            console.print(model_report.table(whole))
        for line in model_report.verdict(wholes):
            console.print(line, highlight=False)
    if arguments.json is not None:
        document = model_report.to_json(
            machine=record,
            target=arguments.factory,
            seed=arguments.seed,
            report=report,
            check=found,
            wholes=wholes,
        )
        results.save(arguments.json, document)
    return 0 if found.passed else 1


def _build(source: Source, seed: int, directions: list[str]) -> tuple[Models, Report, Example]:
    """The torch model, its converted twin, the float64 one, with the same weights."""
    import fastseq
    from fastseq.bench.model_check import Models

    plain, from_factory = source.build(seed)
    example = source.example(from_factory, seed + 1)
    twin, _ = source.build(seed)
    exact: nn.Module | None = source.build(seed)[0]
    assert exact is not None
    for model in (plain, twin, exact):
        _initialize(model, example, source)
    state = plain.state_dict()
    for model in (twin, exact):
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{source.path}: two models differ: {reason}") from error
    report = _shown(fastseq.convert(twin, verbose=False))
    try:
        exact = exact.double()
    except Exception:  # quantized modules and the like
        exact = None
    if "training" in directions and not any(p.requires_grad for p in plain.parameters()):
        raise ValueError(f"{source.path}: no parameter has a gradient; use --inference")
    return Models(plain, twin, exact, source.path), report, example


def _shown(report: Report) -> Report:
    """The report with the user's classes under the names that they have in their file."""
    from fastseq.bench.model_source import MODULE_PREFIX

    rows = tuple(
        dataclasses.replace(row, old=row.old.removeprefix(MODULE_PREFIX)) for row in report.rows
    )
    return dataclasses.replace(report, rows=rows)


def _initialize(model: nn.Module, example: Example, source: Source) -> None:
    """Give lazy modules their shapes, by running the model once."""
    import torch
    from torch.nn.parameter import is_lazy

    from fastseq.bench.model_source import user_code

    if any(is_lazy(parameter) for parameter in model.parameters()):
        with user_code(source.path, "running the torch model"), torch.no_grad():
            model(*example.args, **example.kwargs)


def _time(
    models: Models,
    report: Report,
    example: Example,
    direction: str,
    arguments: argparse.Namespace,
    console: Console,
) -> Whole:
    from fastseq.bench import model_layers

    training = direction == "training"
    both = {model_layers.TORCH: models.torch, model_layers.OURS: models.fastseq}
    for model in both.values():
        model.train(training)
    layers = model_layers.find_layers(
        models.torch, report, example, training=training, seed=arguments.seed
    )
    with console.status(f"{direction}: the whole model") as status:
        timings = model_layers.time_whole(both, example, direction, arguments.seconds)
        timed = model_layers.time_layers(layers, both, direction, arguments.seconds / 4)
        for layer in timed:
            status.update(f"{direction}: {layer.names[0] or '(root)'}")
    return model_layers.Whole(direction, timings, layers)
