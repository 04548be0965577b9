"""Registers, shared memory and spills of every CUDA kernel, from what ptxas said while building.

``cmake -S . -B build/cuda -G Ninja -DFASTSEQ_CUDA=ON && ninja -C build/cuda fastseq_cuda > log``,
``python benchmarks/cuda_resources.py log > docs/cuda-kernels.txt``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers[^\n]*?(?:, (?P<shared>\d+) bytes smem)?\n",
    re.DOTALL,
)


def table(log: str) -> str:
    """One line per kernel; dynamic shared memory, which a plan decides on, is not in it."""
    found = list(_KERNEL.finditer(log))
    names = "\n".join(match["name"] for match in found)
    demangled = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True)
    rows = []
    for match, name in zip(found, demangled.stdout.splitlines(), strict=True):
        short = name.replace("fastseq::cuda::(anonymous namespace)::", "").removeprefix("void ")
        short = short.split("(", 1)[0]
        for storage, word in (("__nv_bfloat16", "bfloat16"), ("__half", "float16")):
            short = short.replace(storage, word)
        spilled = int(match["stores"]) + int(match["loads"])
        rows.append((short, match["architecture"], match["registers"], match["shared"], spilled))
    lines = [f"{'kernel':<48} {'for':<8} {'registers':>9} {'shared':>8} {'spilled':>8}"]
    for short, architecture, registers, shared, spilled in sorted(rows):
        lines.append(f"{short:<48} {architecture:<8} {registers:>9} {shared or 0:>8} {spilled:>8}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1]).read_text()))
