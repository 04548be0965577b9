"""A pure-Python installation: what is chosen, what it says, and that everything still answers.

Finders that do not see ``fastseq._cpu`` stand for it here; ``make test-pure`` runs the whole suite
in a real one.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("numba", reason="Numba is not installed: pip install 'fastseq[numba]'")

REFUSE = """
import sys

class Refusing:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name in {refused} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Refusing(finder) for finder in sys.meta_path]
"""
LAYERS = """
import torch, fastseq, fastseq.nn as nn
from fastseq import _config, functional as F

assert _config.backend_name() == "reference", _config.backend_name()
torch.manual_seed(0)
x = torch.randn(3, 5, 8, requires_grad=True)
calls = {
    "lstm": lambda x: nn.LSTM(8, 4, proj_size=2)(x)[0],
    "cell": lambda x: nn.GRUCell(8, 4)(x[0]),
    "linear": lambda x: F.linear(x, torch.ones(6, 8), activation="gelu"),
    "norm": nn.LayerNorm(8),
    "attention": lambda x: F.attention(x, x, x, causal=True),
    "encoder": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    "decoder": lambda x: nn.TransformerDecoderLayer(8, 2, 16)(x, x),
}
for name, call in calls.items():
    call(x).sum().backward()
    with torch.no_grad():
        call(x)
for name in ("linear", "norm", "attention"):
    compiled = torch.compile(calls[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), calls[name](x))
    compiled(x).sum().backward()
try:
    fastseq.profile().__enter__()
except RuntimeError as error:
    print(error)
for choose in (lambda: fastseq.set_isa("avx2"), lambda: fastseq.backend("cpu").__enter__()):
    try:
        choose()
    except ImportError as error:
        print(error)
print("done")
"""


def run(refused: set[str], code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", REFUSE.format(refused=refused) + code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_layer_without_extension_and_without_numba() -> None:
    done = run({"fastseq._cpu", "numba"}, LAYERS)
    assert done.returncode == 0, done.stderr
    *errors, last = done.stdout.splitlines()
    assert last == "done"
    assert "there are no kernels to profile" in errors[0]
    assert all("no compiled kernels here" in error for error in errors[1:])


@pytest.mark.parametrize(("refused", "backend"), [("", "numba"), ("numba", "reference")])
def test_what_is_chosen(refused: str, backend: str) -> None:
    code = "from fastseq.info import main; sys.exit(main([]))"
    done = run({"fastseq._cpu", refused or "nothing"}, code)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("backend"))
    assert line.split()[1] == backend
    assert "there is no compiled extension" in line
    assert ("pip install" in line) == (backend == "reference")
    assert "CPU kernels       not available: No module named 'fastseq._cpu'" in done.stdout


def test_a_tier_cannot_be_asked_for() -> None:
    """FASTSEQ_ISA is about the compiled kernels; nothing else may answer in silence."""
    code = (
        "import os; os.environ['FASTSEQ_ISA'] = 'avx2'; "
        "from fastseq import _config; _config.backend_name()"
    )
    done = run({"fastseq._cpu"}, code)
    assert done.returncode != 0
    assert "ImportError: fastseq has no compiled kernels here" in done.stderr
