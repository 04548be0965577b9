"""The one registry of benchmark cases, and the suites and figures they belong to.

Tests, benchmarks, profiler and documentation read shapes, flops and bytes from here and nowhere
else. Importing this module needs neither torch nor the compiled extension.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

from fastseq.bench.attention_cases import (
    AttentionCase,
    AttentionOptions,
    attention_suite,
    memory_cases,
)
from fastseq.bench.cell_cases import CELL_LAYERS, CellCase, cell_suite
from fastseq.bench.rnn_cases import (
    DIRECTIONS,
    GATES,
    RNN_GRID,
    Case,
    CaseOptions,
    Direction,
    heat_map_cases,
    make_case,
    rnn_suite,
    steps_cases,
)
from fastseq.bench.transformer_cases import (
    TRANSFORMER_LAYERS,
    TransformerCase,
    TransformerOptions,
    transformer_suite,
)

__all__ = [
    "ATTENTION_SUITE",
    "DIRECTIONS",
    "GATES",
    "LAYERS",
    "QUICK",
    "REGISTRY",
    "RNN_GRID",
    "RNN_SUITE",
    "SUITES",
    "TRANSFORMER_SUITE",
    "AnyCase",
    "Case",
    "CaseOptions",
    "Direction",
    "from_record",
    "make_case",
    "select",
]

AnyCase = Case | AttentionCase | TransformerCase
LAYERS = (*GATES, "attention", "mha", *TRANSFORMER_LAYERS)

# A little of everything, in both directions, that takes less than three minutes.
QUICK = (
    # corners of the recurrent grid, and its middle
    "lstm-inference-T100-B1-H64",
    "lstm-inference-T100-B1-H1024",
    "lstm-inference-T100-B64-H64",
    "lstm-inference-T100-B64-H512",
    "lstm-training-T100-B16-H256",
    "gru-inference-T100-B1-H128",
    "gru-inference-T100-B64-H256",
    "gru-training-T100-B16-H256",
    "rnn-inference-T100-B16-H256",
    "rnn-inference-T100-B64-H1024",
    "rnn-training-T100-B1-H128",
    # one step, packed sequences
    "lstm-inference-T1-B1-H128",
    "lstm-inference-T100-B16-H256-ragged",
    # attention: all pairs, causal, one query, training, the module
    "attention-inference-B4-H8-S512-E64",
    "attention-inference-B4-H8-S512-E64-causal",
    "attention-inference-B1-H32_8-S1_4096-E128",
    "attention-training-B4-H8-S512-E64-causal",
    "mha-inference-B8-H8-S256-E64",
    # parts of the Transformer, and a layer
    "linear-inference-2048x512-2048-gelu",
    "linear-inference-1x512-2048",
    "linear-training-64x512-2048",
    "layer_norm-inference-4096x512",
    "rms_norm-training-4096x512",
    "encoder-inference-B8-S256-E512-F2048-H8",
    "encoder-training-B8-S256-E512-F2048-H8-dropout0.1",
)


def _registry() -> dict[str, AnyCase]:
    """Every case once, by name, with the tags of all groups that list it."""
    groups: tuple[tuple[str, Sequence[AnyCase]], ...] = (
        ("rnn", rnn_suite()),
        ("attention", attention_suite()),
        ("transformer", transformer_suite()),
        ("cells", cell_suite()),
        ("grid", heat_map_cases()),
        ("latency_vs_steps", steps_cases()),
        ("memory_vs_length", memory_cases()),
    )
    found: dict[str, AnyCase] = {}
    for tag, cases in groups:
        for case in cases:
            # The group that lists a case first decides on its extra questions.
            known = found.get(case.name, case)
            found[case.name] = _tagged(known, tag)
    for name in QUICK:
        found[name] = _tagged(found[name], "quick")
    return found


def _tagged(case: AnyCase, tag: str) -> AnyCase:
    return dataclasses.replace(case, tags=(*case.tags, tag))


REGISTRY = _registry()


def _with_tag(tag: str) -> tuple[AnyCase, ...]:
    return tuple(case for case in REGISTRY.values() if tag in case.tags)


RNN_SUITE = tuple(case for case in _with_tag("rnn") if isinstance(case, Case))
ATTENTION_SUITE = tuple(c for c in _with_tag("attention") if isinstance(c, AttentionCase))
TRANSFORMER_SUITE = tuple(c for c in _with_tag("transformer") if isinstance(c, TransformerCase))
SUITES: dict[str, tuple[AnyCase, ...]] = {
    "quick": tuple(REGISTRY[name] for name in QUICK),
    "full": tuple(REGISTRY.values()),
    "rnn": RNN_SUITE,
    "attention": ATTENTION_SUITE,
    "transformer": TRANSFORMER_SUITE,
    "cells": _with_tag("cells"),
    "grid": _with_tag("grid"),
    "latency_vs_steps": _with_tag("latency_vs_steps"),
    "memory_vs_length": _with_tag("memory_vs_length"),
}


def from_record(fields: dict[str, Any]) -> AnyCase:
    """The case behind ``dataclasses.asdict(case)``, also after a trip through JSON."""
    fields = dict(fields)
    fields["tags"] = tuple(fields.get("tags", ()))
    options = dict(fields.pop("options"))
    options["probes"] = tuple(options["probes"])
    if "depth" in fields:
        return TransformerCase(**fields, options=TransformerOptions(**options))
    if fields["layer"] in CELL_LAYERS:
        return CellCase(**fields, options=CaseOptions(**options))
    if "Hq" not in fields:
        return Case(**fields, options=CaseOptions(**options))
    if options["window"] is not None:
        options["window"] = tuple(options["window"])
    return AttentionCase(**fields, options=AttentionOptions(**options))


def select(suite: str, patterns: Iterable[str] = ()) -> list[AnyCase]:
    """The cases of a suite whose names match any of the globs (all of them without globs).

    Raises:
        ValueError: The suite does not exist, or no case matches.
    """
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; known: {', '.join(SUITES)}")
    globs = list(patterns) or ["*"]
    chosen = [c for c in SUITES[suite] if any(fnmatch.fnmatch(c.name, g) for g in globs)]
    if not chosen:
        raise ValueError(f"no case of suite {suite!r} matches {' '.join(globs)}")
    return chosen
