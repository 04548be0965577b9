"""A training step of a Transformer layer needs less memory than torch's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastseq.bench import memory

# In a process of its own: peak above the weights, gradients and input of three training steps.
STEP = """
import sys
import torch
import fastseq.nn
from fastseq.bench.memory import _status_bytes

torch.set_num_threads(1)
torch.manual_seed(0)
library = {"torch": torch.nn, "fastseq": fastseq.nn}[sys.argv[1]]
layer = getattr(library, sys.argv[2])(256, 8, 1024, 0.1, batch_first=True)
decodes = sys.argv[2] == "TransformerDecoderLayer"

def step(steps):
    x = torch.randn(4, steps, 256, requires_grad=True)
    rest = [x.detach()] if decodes else []
    output = layer(x, *rest)
    output.backward(output.detach())

step(64)
with open("/proc/self/clear_refs", "w", encoding="ascii") as control:
    control.write("5")
before = _status_bytes("VmRSS")
for _ in range(3):
    step(256)
print(_status_bytes("VmHWM") - before)
"""


def peak_bytes(library: str, kind: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", STEP, library, kind],
        env=os.environ | memory._ALLOCATOR,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(not memory.available(), reason="a process can reset its peak on Linux only")
@pytest.mark.parametrize("kind", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_training_memory(kind: str) -> None:
    ours, theirs = (peak_bytes(library, kind) for library in ("fastseq", "torch"))
    assert ours <= 0.8 * theirs, f"{ours} bytes, torch {theirs}"
