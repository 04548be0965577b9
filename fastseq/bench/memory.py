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

from fastseq.bench.cases import AnyCase, Case, from_record

Library = Literal["torch", "fastseq"]
Question = Literal["peak", "shapes"]

# Large blocks straight from the kernel and back: what is freed leaves the figure at once.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_SHAPES = 1000
_LIMIT_SECONDS = 120.0


def available() -> bool:
    """Whether the kernel lets a process reset its own peak."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def measure(case: AnyCase, library: Library, question: Question, threads: int | None = None) -> int:
    """Bytes one library needs, asked of a fresh process.

    Args:
        case: What to run.
        library: Whose layer to run.
        question: "peak": the most above the level before the call; "shapes": growth over the
            second half of a thousand different shapes.
        threads: Threads to use; torch's default unless given.

    Raises:
        RuntimeError: The process failed or took too long.
    """
    record = json.dumps(dataclasses.asdict(case))
    wanted = [record, library, question, str(threads or 0)]
    command = [sys.executable, "-m", "fastseq.bench.memory", *wanted]
    environment = os.environ | _ALLOCATOR
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=_LIMIT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"measuring memory takes more than {_LIMIT_SECONDS:g} s") from None
    if done.returncode != 0:
        raise RuntimeError(f"memory measurement failed: {done.stderr.strip()[-500:]}")
    return int(json.loads(done.stdout)["bytes"])


def _status_bytes(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        for line in lines:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no field {field}")


def _peak_bytes(case: AnyCase, library: Library) -> int:
    import torch

    from fastseq.bench.families import family_of

    family = family_of(case)
    call = family.timed_call(family.build(case), library)
    warm = family.timed_call(family.build(family.small(case)), library)
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
    record, library, question, threads = arguments
    case = from_record(json.loads(record))
    if library not in ("torch", "fastseq"):
        raise SystemExit(f"unknown library {library!r}")
    chosen: Library = "torch" if library == "torch" else "fastseq"
    if int(threads):
        import torch

        torch.set_num_threads(int(threads))
    if question == "peak":
        answer = _peak_bytes(case, chosen)
    elif isinstance(case, Case):
        answer = _shapes_bytes(case, chosen)
    else:
        raise SystemExit(f"{case.name} has no answer to {question!r}")
    print(json.dumps({"bytes": answer}))


if __name__ == "__main__":
    _main(sys.argv[1:])
