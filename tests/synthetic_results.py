"""Result files with invented timings: nothing in them was measured."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

from fastseq.bench.attention_cases import AttentionOptions, make_attention_case
from fastseq.bench.cases import AnyCase, CaseOptions, make_case
from fastseq.bench.cell_cases import make_cell_case
from fastseq.bench.transformer_cases import TransformerOptions, make_transformer_case

PEERS = ("torch", "torch.compile", "onnxruntime")
DIRECTIONS = ("inference", "training")
FAILED = "gru-training-T100-B16-H128"
RAISED = "lstm-inference-T100-B4-H64-bidirectional"

MACHINE: dict[str, Any] = {
    "cpu": "An invented <processor> & friends",
    "cores": 2,
    "threads": [1, 2],
    "system": "Linux x86_64",
    "python": "3.11.0",
    "libraries": {"fastseq": "0.0", "torch": "0.0"},
    "isa": "base",
    "date": "2000-01-01",
    "load_average": [0.1, 0.2, 0.3],
    "virtualised": True,
}
ROOFS: dict[str, Any] = {
    "cpu": MACHINE["cpu"],
    "caches_bytes": {"L2": 1 << 20},
    "version": "0.0",
    "threads": [1, 2],
    "measured": "2000-01-01",
    "multiply_adds": [],
    "bandwidths": [
        {"level": level, "kind": kind, "threads": threads, "bytes_per_thread": 1, "gbytes": rate}
        for level, rate in (("L2", 200.0), ("DRAM", 20.0))
        for kind in ("read", "copy")
        for threads in (1, 2)
    ],
}


def cases() -> list[AnyCase]:
    """A few of each family: a grid, sweeps over T and S, options."""
    found: list[AnyCase] = []
    for layer in ("lstm", "gru", "rnn"):
        found += [make_case(layer, "inference", T=T, B=1, H=64) for T in (1, 10, 1000)]
        for direction in DIRECTIONS:
            for B in (1, 16):
                for H in (64, 128):
                    found.append(make_case(layer, direction, T=100, B=B, H=H))
    options = CaseOptions(bidirectional=True)
    found.append(make_case("lstm", "inference", T=100, B=4, H=64, options=options))
    for direction in DIRECTIONS:
        for S in (256, 512, 1024):
            found.append(make_attention_case(direction, B=1, H=8, S=S, E=64))
    causal = AttentionOptions(causal=True, window=(64, 0))
    found.append(make_attention_case("inference", B=1, H=8, S=256, E=64, options=causal))
    found.append(make_attention_case("inference", B=8, H=8, S=256, E=64, layer="mha"))
    for S in (1, 64, 2048):
        found.append(make_transformer_case("linear", "inference", S=S, E=512, F=2048))
    found.append(make_transformer_case("layer_norm", "inference", S=256, E=512))
    dropout = TransformerOptions(dropout=0.1)
    found.append(
        make_transformer_case(
            "encoder", "training", B=8, S=256, E=512, F=2048, heads=8, options=dropout
        )
    )
    found += [make_cell_case("s_lstm", d, T=100, B=32, H=256) for d in DIRECTIONS]
    return found


def _timing(generator: random.Random, seconds: float) -> dict[str, Any]:
    median = seconds * generator.uniform(0.5, 2.0)
    return {
        "median_s": median,
        "lower_quartile_s": median * generator.uniform(0.8, 1.0),
        "upper_quartile_s": median * generator.uniform(1.0, 1.2),
        "p50_s": median,
        "p95_s": median * 1.5,
        "p99_s": None,
        "minimum_s": median * 0.7,
        "visits": 7,
        "calls_per_visit": 3,
    }


def record(case: AnyCase, threads: int, *, seed: int = 0) -> dict[str, Any]:
    """One case's entry in a file of format 2."""
    generator = random.Random(f"{case.name} {threads} {seed}")
    if case.name == RAISED:
        gate: dict[str, Any] = {"errors": [], "passed": False}
    else:
        ours = 1.0 if case.name == FAILED else 1e-8
        error = {"name": "output", "ours": ours, "torch": 1e-8, "limit": 1e-7}
        gate = {"errors": [error], "passed": case.name != FAILED}
    seconds = (case.flops() or case.bytes()) / 1e10 / threads
    libraries = ["fastseq", *PEERS]
    if case.direction == "training":
        libraries.remove("onnxruntime")
    if case.streaming and "T" in asdict(case):
        libraries.append("fastseq.functional")
    timed = libraries if gate["passed"] else []
    skipped = {"openvino": "not installed"}
    if "onnxruntime" not in libraries:
        skipped["onnxruntime"] = "it has no training"
    if case.name == RAISED:
        skipped["case"] = "RuntimeError: <invented>"
    memory = timed and case.direction == "training" and case.layer in ("attention", "encoder")
    return {
        "case": asdict(case),
        "threads": threads,
        "gate": gate,
        "timings": {peer: _timing(generator, seconds) for peer in timed},
        "cold": {peer: _timing(generator, 2 * seconds) for peer in timed if case.layer == "gru"},
        "first_call_s": {peer: 3 * seconds for peer in timed if case.layer == "rnn"},
        "peak_memory_bytes": {"fastseq": 2 * case.bytes(), "torch": 3 * case.bytes()}
        if memory
        else {},
        "skipped": skipped,
        "probes": {"share_of_read_bandwidth": 0.5} if timed and case.layer == "linear" else {},
        "fma_peak_gflops": 100.0 * threads if timed else None,
        "derived": {},
    }


def document(
    *, threads: tuple[int, ...] = (1, 2), seed: int = 0, only: int | None = None
) -> dict[str, Any]:
    """A file of format 2, read back from its JSON.

    Args:
        threads: Thread counts.
        seed: Another one invents other timings.
        only: As many cases at most.
    """
    results = [record(case, n, seed=seed) for case in cases()[:only] for n in threads]
    return {"format": 2, "suite": "full", "machine": dict(MACHINE), "results": results}


def speedups(document: dict[str, Any]) -> dict[tuple[str, str, int], float]:
    """Ratios of medians by case, peer and threads, straight from a file's numbers."""
    found = {}
    for one in document["results"]:
        timings = one["timings"]
        for peer in timings.keys() - {"fastseq", "fastseq.functional"}:
            single = "fastseq.functional" in timings and peer in ("onnxruntime", "openvino")
            ours = timings["fastseq.functional" if single else "fastseq"]
            threads = one.get("threads") or document["machine"]["threads"]
            ratio = timings[peer]["median_s"] / ours["median_s"]
            found[one["case"]["name"], peer, threads] = ratio
    return found
