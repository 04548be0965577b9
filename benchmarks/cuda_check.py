"""Everything the CUDA kernels have to show on a device, in one go: for the day there is one.

    python benchmarks/cuda_check.py            # builds, checks, times; writes benchmarks/results/
    python benchmarks/cuda_check.py --quick    # few small cases, no build: for compute-sanitizer

Builds the library into the environment (``FASTSEQ_CUDA=ON pip install -e .``), runs the tests that
carry the marker ``cuda``, then every case below: results and gradients against the same layer in
float64 on the CPU, with an error of at most twice that of torch's own CUDA path in the same dtype;
twice for the same bits; and only then the time, beside torch's (cuDNN for recurrent layers, its
scaled dot product for attention). A case that fails its check has no time. With compute-sanitizer
in PATH, memcheck and racecheck run over the quick cases.

The result is ``cuda-<device>-<date>.json``; the exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# How far from float64, in errors of torch's own path, and in units of the largest value where that
# happens to be exact.
ERROR_RATIO, FREE_UNITS = 2.0, 4.0


@dataclasses.dataclass(frozen=True)
class RnnCase:
    """One recurrent layer, forward and backward."""

    cell: str
    dtype: str
    T: int
    B: int
    H: int
    bidirectional: bool = False
    mode: str = "auto"  # how it is launched

    @property
    def name(self) -> str:
        """As it is called in the result file."""
        directions = "-bidirectional" if self.bidirectional else ""
        mode = "" if self.mode == "auto" else f"-{self.mode}"
        return f"{self.cell}-{self.dtype}-T{self.T}-B{self.B}-H{self.H}{directions}{mode}"


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One call of attention, forward and backward."""

    dtype: str
    B: int
    heads: int
    S: int
    E: int
    causal: bool = False
    biased: bool = False
    dropout: float = 0.0

    @property
    def name(self) -> str:
        """As it is called in the result file."""
        parts = [f"attention-{self.dtype}-B{self.B}-H{self.heads}-S{self.S}-E{self.E}"]
        parts += [word for word in ("causal", "biased") if getattr(self, word)]
        return "-".join([*parts, *([f"dropout{self.dropout:g}"] if self.dropout else [])])


Case = RnnCase | AttentionCase
DTYPES = ("float32", "bfloat16", "float16")

QUICK: list[Case] = [
    *(RnnCase(cell, "float32", 5, 3, 35, True) for cell in ("rnn_tanh", "rnn_relu", "lstm", "gru")),
    RnnCase("lstm", "bfloat16", 5, 3, 300),
    RnnCase("lstm", "float32", 5, 3, 35, mode="direct"),
    AttentionCase("float32", 1, 2, 40, 33, causal=True),
    AttentionCase("bfloat16", 1, 2, 40, 64, biased=True),
]
FULL: list[Case] = [
    *(
        RnnCase(cell, dtype, T, B, H)
        for cell in ("lstm", "gru", "rnn_tanh")
        for dtype in DTYPES
        for T, B, H in ((100, 1, 128), (100, 32, 128), (100, 32, 512), (100, 64, 1024))
    ),
    RnnCase("lstm", "bfloat16", 1024, 16, 768),
    *(RnnCase("lstm", "bfloat16", 100, 32, 512, mode=mode) for mode in ("stepwise", "direct")),
    RnnCase("lstm", "float64", 20, 4, 64),
    RnnCase("gru", "bfloat16", 100, 32, 256, bidirectional=True),
    *(
        AttentionCase(dtype, 4, 8, 1024, 64, causal=causal, biased=biased, dropout=dropout)
        for dtype in DTYPES
        for causal, biased, dropout in (
            (False, False, 0.0),
            (True, False, 0.0),
            (False, True, 0.0),
            (False, False, 0.1),
        )
    ),
    AttentionCase("bfloat16", 1, 16, 4096, 128, causal=True),
]

Call = Callable[[dict[str, Tensor]], list[Tensor]]


@dataclasses.dataclass
class Job:
    """A case made concrete: values, and the two ways to compute it from leaves of any dtype."""

    values: dict[str, Tensor]  # float64, on the CPU, exact in the case's dtype
    ours: Call
    torch: Call


def _rounded(values: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype).double() for name, value in values.items()}


def rnn_job(case: RnnCase) -> Job:
    """Zero initial states; as many input features as hidden units."""
    from fastseq import functional
    from fastseq.backends.cuda import launch_mode

    gates = {"lstm": 4, "gru": 3}.get(case.cell, 1)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    values = {"x": draw(case.T, case.B, case.H)}
    scale = 0.7 * (2 * case.H) ** -0.5
    for d in range(2 if case.bidirectional else 1):
        for name, columns in (("w_ih", case.H), ("w_hh", case.H), ("b_ih", 0), ("b_hh", 0)):
            shape = (gates * case.H, *([columns] if columns else []))
            values[f"{name}_{d}"] = draw(*shape, scale=scale)

    layers: dict[str, Any] = {
        "lstm": torch._VF.lstm,
        "gru": torch._VF.gru,
        "rnn_tanh": torch._VF.rnn_tanh,
        "rnn_relu": torch._VF.rnn_relu,
    }

    def theirs(leaves: dict[str, Tensor]) -> list[Tensor]:
        x, *weights = leaves.values()
        zeros = x.new_zeros(2 if case.bidirectional else 1, case.B, case.H)
        state = (zeros, zeros) if case.cell == "lstm" else zeros
        options = (True, 1, 0.0, True, case.bidirectional, False)
        return list(layers[case.cell](x, state, weights, *options))

    def ours(leaves: dict[str, Tensor]) -> list[Tensor]:
        x, *weights = leaves.values()
        with launch_mode(case.mode):
            output, h_n, c_n = functional.recurrent.run_layers(
                case.cell,
                x,
                None,
                None,
                weights,
                num_layers=1,
                bidirectional=case.bidirectional,
                batch_first=False,
                has_biases=True,
                dropout=0.0,
                training=True,
                proj_size=0,
                batch_sizes=None,
                lengths=None,
            )
        return [output, h_n] if c_n is None else [output, h_n, c_n]

    return Job(_rounded(values, getattr(torch, case.dtype)), ours, theirs)


def attention_job(case: AttentionCase) -> Job:
    """Self-attention; the bias is one table for all sequences, with a gradient."""
    from fastseq import functional

    generator = torch.Generator().manual_seed(0)
    shape = (case.B, case.heads, case.S, case.E)
    names = ("query", "key", "value")
    values = {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n in names}
    if case.biased:
        table = (1, case.heads, case.S, case.S)
        values["bias"] = torch.randn(table, generator=generator, dtype=torch.float64)

    def ours(leaves: dict[str, Tensor]) -> list[Tensor]:
        torch.manual_seed(0)  # the same dropout in every call
        query, key, value = (leaves[name] for name in names)
        options: dict[str, Any] = {"causal": case.causal, "dropout_p": case.dropout}
        return [functional.attention(query, key, value, bias=leaves.get("bias"), **options)]

    def theirs(leaves: dict[str, Tensor]) -> list[Tensor]:
        query, key, value = (leaves[name] for name in names)
        bias = leaves.get("bias")
        function = torch.nn.functional.scaled_dot_product_attention
        if case.dropout and query.dtype is torch.float64:
            # torch draws other weights to drop: the truth is the composite with our seed.
            from fastseq import backend

            with backend("reference"):
                return ours(leaves)
        return [function(query, key, value, bias, case.dropout, case.causal)]

    return Job(_rounded(values, getattr(torch, case.dtype)), ours, theirs)


def job_of(case: Case) -> Job:
    """The case made concrete."""
    return rnn_job(case) if isinstance(case, RnnCase) else attention_job(case)


def results_of(
    call: Call, values: dict[str, Tensor], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Outputs and gradients by name, float64 on the CPU."""
    leaves = {n: v.to(device, dtype).requires_grad_() for n, v in values.items()}
    outputs = call(leaves)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    found = {f"output {index}": output for index, output in enumerate(outputs)}
    found |= {f"grad {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {name: tensor.detach().cpu().double() for name, tensor in found.items()}


def check(case: Case, device: torch.device) -> tuple[str | None, dict[str, Any]]:
    """What is wrong with the case, ``None`` for nothing; and the largest errors."""
    job, dtype = job_of(case), getattr(torch, case.dtype)
    truth = results_of(job.torch, job.values, torch.float64, torch.device("cpu"))
    ours = results_of(job.ours, job.values, dtype, device)
    again = results_of(job.ours, job.values, dtype, device)
    # With dropout torch's own path computes something else; its error without stands for it.
    peer = case
    if isinstance(case, AttentionCase) and case.dropout:
        peer = dataclasses.replace(case, dropout=0.0)
    theirs = results_of(job_of(peer).torch, job.values, dtype, device)
    exact = truth
    if peer is not case:
        exact = results_of(job_of(peer).torch, job.values, torch.float64, torch.device("cpu"))
    errors: dict[str, Any] = {}
    wrong = None
    for name, value in truth.items():
        if not torch.equal(ours[name], again[name]):
            wrong = wrong or f"{name}: two calls give different bits"
        error = float((ours[name] - value).abs().max())
        peer_error = float((theirs[name] - exact[name]).abs().max())
        unit = torch.finfo(dtype).eps * float(value.abs().max())
        errors[name] = {"ours": error, "torch": peer_error, "unit": unit}
        # A comparison with NaN is false, so NaN is wrong, too.
        if not error <= ERROR_RATIO * peer_error + FREE_UNITS * unit:
            wrong = wrong or f"{name}: error {error:.2e}, torch's {peer_error:.2e}, unit {unit:.2e}"
    return wrong, errors


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of single calls, by the device's own clock where it has one."""
    times = []
    for index in range(repeats + 3):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            elapsed = start.elapsed_time(end)
        else:
            begin = time.perf_counter()
            call()
            elapsed = (time.perf_counter() - begin) * 1e3
        if index >= 3:
            times.append(elapsed)
    return statistics.median(times)


def measure(case: Case, device: torch.device, repeats: int) -> dict[str, float]:
    """Forward without gradients and forward with backward, ours and torch's, in milliseconds."""
    job, dtype = job_of(case), getattr(torch, case.dtype)
    leaves = {n: v.to(device, dtype).requires_grad_() for n, v in job.values.items()}
    times = {}
    for who, call in (("fastseq", job.ours), ("torch", job.torch)):

        def forward(call: Call = call) -> None:
            with torch.no_grad():
                call(leaves)

        def training(call: Call = call) -> None:
            outputs = call(leaves)
            torch.autograd.grad(outputs[0].sum(), list(leaves.values()))

        times[f"{who}_forward_ms"] = milliseconds(forward, device, repeats)
        times[f"{who}_training_ms"] = milliseconds(training, device, repeats)
    return times


def run_case(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """The case's entry in the result file; ``repeats`` 0: no times."""
    entry: dict[str, Any] = {"name": case.name, **dataclasses.asdict(case)}
    try:
        wrong, entry["errors"] = check(case, device)
        if wrong is None and repeats:
            entry["times"] = measure(case, device, repeats)
    except RuntimeError as error:  # a refused launch, out of memory: the other cases go on
        wrong = str(error)
    entry["passed"], entry["reason"] = wrong is None, wrong
    times = entry.get("times", {})
    shown = "  ".join(f"{name} {value:.3f}" for name, value in times.items())
    print(f"{case.name}: {'passed' if wrong is None else wrong}  {shown}", flush=True)
    return entry


def _step(*command: str, **environment: str) -> dict[str, Any]:
    """Run a command; what it said is kept if it failed."""
    print("+", " ".join(command), flush=True)
    started = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = done.stdout.splitlines()
    print("\n".join(lines[-3:]), flush=True)
    return {
        "command": " ".join(command),
        "passed": done.returncode == 0,
        "seconds": round(time.perf_counter() - started, 1),
        "output": lines[-1:] if done.returncode == 0 else lines[-200:],
    }


def steps(build: bool) -> list[dict[str, Any]]:
    """Build, tests on the device, sanitizers."""
    python = sys.executable
    found = []
    if build:
        install = (python, "-m", "pip", "install", "--no-deps", "-e", ".")
        found.append(_step(*install, FASTSEQ_CUDA="ON"))
        if not found[0]["passed"]:
            return found
    found.append(_step(python, "-m", "pytest", "-q", "-m", "cuda", "tests"))
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck") if sanitizer else ():
        command = [str(sanitizer), "--tool", tool, "--error-exitcode", "1", python]
        found.append(_step(*command, str(Path(__file__)), "--quick"))
    return found


def describe_device() -> dict[str, Any]:
    """What the figures were taken on."""
    import fastseq

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "fastseq": fastseq.__version__,
        "library": fastseq.capabilities()["cuda"],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="small cases, no build, no result file"
    )
    parser.add_argument("--no-build", action="store_true", help="use the library that is installed")
    parser.add_argument("--repeats", type=int, default=20, help="calls per time (default 20)")
    parsed = parser.parse_args(arguments)
    os.environ.setdefault("FASTSEQ_CUDA_UNTESTED", "1")
    if not torch.cuda.is_available():
        print("cuda_check: torch finds no CUDA device", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 is to mean float32 on both sides
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    taken = [] if parsed.quick else steps(build=not parsed.no_build)
    if not all(step["passed"] for step in taken[:1]):
        print("cuda_check: the build failed", file=sys.stderr)
        return 1
    from fastseq import _cuda_library

    reason = _cuda_library.off_reason()
    if reason is not None:
        print(f"cuda_check: the CUDA kernels are off: {reason}", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    repeats = 0 if parsed.quick else parsed.repeats
    entries = [run_case(case, device, repeats) for case in (QUICK if parsed.quick else FULL)]
    if not parsed.quick:
        about = describe_device()
        slug = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
        path = RESULTS / f"cuda-{slug}-{about['date']}.json"
        text = json.dumps({"about": about, "steps": taken, "cases": entries}, indent=1)
        path.write_text(text + "\n")
        print(f"written to {path}")
    return 0 if all(part["passed"] for part in (*taken, *entries)) else 1


if __name__ == "__main__":
    sys.exit(main())
