"""Peak and leftover memory of one library at one case, measured in a process of its own.

The process's resident memory is read from the kernel, not from torch's allocator: what a kernel
allocates for itself counts too. Linux only.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Literal

from fastseq.bench.cases import AnyCase, Case, select
from fastseq.bench.transformer_cases import TransformerCase

Library = Literal["torch", "fastseq"]
Question = Literal["peak", "shapes"]

# Large blocks straight from the kernel and back: what is freed leaves the figure at once.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_SHAPES = 1000


def available() -> bool:
    """Whether the kernel lets a process reset its own peak."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def measure(case: AnyCase, library: Library, question: Question, suite: str) -> int:
    """Bytes one library needs, asked of a fresh process.

    Args:
        case: A case of ``suite``.
        library: Whose layer to run.
        question: "peak": the most above the level before the call; "shapes": growth over the
            second half of a thousand different shapes.
        suite: The suite that holds the case.
    """
    command = [sys.executable, "-m", "fastseq.bench.memory", suite, case.name, library, question]
    environment = os.environ | _ALLOCATOR
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"memory measurement failed: {done.stderr.strip()[-500:]}")
    return int(json.loads(done.stdout)["bytes"])


def _status_bytes(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        for line in lines:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no field {field}")


def _peak_bytes(case: Case | TransformerCase, library: Library) -> int:
    import torch

    from fastseq.bench import build, transformer

    if isinstance(case, TransformerCase):
        call = transformer.timed_call(transformer.build(case), library)
        small = dataclasses.replace(case, B=1, S=16)
        warm = transformer.timed_call(transformer.build(small), library)
    else:
        built = build.build(case)
        layer = built.torch_layer if library == "torch" else built.fastseq_layer
        call = build.layer_call(layer, built)
        warm = build.layer_call(layer, build.build(dataclasses.replace(case, T=2, B=1)))
    with torch.set_grad_enabled(case.direction == "training"):
        # A small call first, so that starting threads and loading code does not count.
        warm()
        with open("/proc/self/clear_refs", "w", encoding="ascii") as control:
            control.write("5")  # peak := current
        before = _status_bytes("VmRSS")
        for _ in range(3):
            call()
    return _status_bytes("VmHWM") - before


def _shapes_bytes(case: Case, library: Library) -> int:
    import torch

    from fastseq.bench import build

    built = build.build(case)
    layer = built.torch_layer if library == "torch" else built.fastseq_layer
    halfway = 0
    with torch.no_grad():
        for index in range(_SHAPES):
            if index == _SHAPES // 2:
                halfway = _status_bytes("VmRSS")
            # 40 x 25 different (T, B), all of them small.
            layer(torch.zeros(1 + index % 40, 1 + index // 40, case.I, dtype=torch.float32))
    return _status_bytes("VmRSS") - halfway


def _main(arguments: list[str]) -> None:
    suite, name, library, question = arguments
    case = select(suite, [name])[0]
    if library not in ("torch", "fastseq"):
        raise SystemExit(f"unknown library {library!r}")
    chosen: Library = "torch" if library == "torch" else "fastseq"
    if question == "peak" and isinstance(case, Case | TransformerCase):
        answer = _peak_bytes(case, chosen)
    elif isinstance(case, Case):
        answer = _shapes_bytes(case, chosen)
    else:
        raise SystemExit(f"{name} has no answer to {question!r}")
    print(json.dumps({"bytes": answer}))


if __name__ == "__main__":
    _main(sys.argv[1:])
