"""What fastseq found on this machine: ``python -m fastseq.info`` or ``fastseq info``.

Works without torch and without the compiled kernels: finding out why those are missing is what
the command is for.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import platform
import sys
from collections.abc import Sequence
from typing import Any


def collect() -> dict[str, Any]:
    """``capabilities()`` plus the versions of Python, torch and the compiler of users' cells."""
    # Loaded first, as in every program that computes something: the kernels use torch's OpenMP
    # library and thread count, and that is what should be shown.
    torch_version: str | None = None
    with contextlib.suppress(ImportError):
        torch_version = str(importlib.import_module("torch").__version__)
    from fastseq._cell_compiler import describe
    from fastseq._config import capabilities

    return {
        "python": platform.python_version(),
        "torch": torch_version,
        **capabilities(),
        "cell_compiler": describe(),
    }


def _bytes(count: int | None) -> str:
    if not count:
        return "unknown"
    for scale, unit in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= scale:
            return f"{count / scale:g} {unit}"
    return f"{count} B"


def _available(state: dict[str, Any]) -> str:
    return "available" if state["available"] else f"not available: {state['reason']}"


def _backend(info: dict[str, Any]) -> str:
    reason = info["backend_reason"]
    return f"{info['backend']} ({reason})" if reason else str(info["backend"])


def lines(info: dict[str, Any]) -> list[str]:
    """The report as aligned lines."""
    caches = ", ".join(f"{level} {_bytes(size)}" for level, size in info["caches_bytes"].items())
    rows = {
        "fastseq": info["version"],
        "Python": info["python"],
        "torch": info["torch"] or "not installed",
        "CPU": info["cpu"],
        "ISA tiers built": ", ".join(info["isa_built"]) or "none",
        "ISA tiers usable": ", ".join(info["isa_usable"]) or "none",
        "ISA tier chosen": info["isa_chosen"] or "none",
        "backend": _backend(info),
        "threads": info["threads"],
        "OpenMP library": info["openmp"] or "none loaded",
        "caches": caches or "unknown",
        "CPU kernels": _available(info["extension"]),
        "Numba kernels": _available(info["numba"]),
        "cell compiler": info["cell_compiler"]["version"] or _available(info["cell_compiler"]),
        "CUDA kernels": _available(info["cuda"]),
    }
    width = max(map(len, rows))
    return [f"{label:<{width}}  {value}" for label, value in rows.items()]


def _tuned() -> list[str]:
    """Measure the products of linear layers; what came out, one line per class of shapes."""
    from fastseq import _products

    times = _products.tune()
    rows = [
        f"{name:<36} {ours * 1e6:>9.1f} {theirs * 1e6:>9.1f}  {_products.winner(ours, theirs)}"
        for name, (ours, theirs) in times.items()
    ]
    header = f"{'class':<36} {'fused us':>9} {'torch us':>9}  chosen"
    return [header, *rows, f"written to {_products.table_path()}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="fastseq info", description="Show versions, instruction sets, threads and caches."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="measure whose matrix product is faster, the kernels' or torch's, and remember it",
    )
    # Not parse_args(): its own complaint is the usage text and the error, we want one line.
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        print(f"fastseq info: unknown argument {unknown[0]!r} (see --help)", file=sys.stderr)
        return 2
    try:
        if parsed.tune:
            print("\n".join(_tuned()))
            return 0
        info = collect()
    except (ImportError, OSError) as error:
        print(f"fastseq info: cannot tune: {error}", file=sys.stderr)
        return 2
    except ValueError as error:  # a setting such as FASTSEQ_ISA with a wrong value
        print(f"fastseq info: {error}", file=sys.stderr)
        return 2
    print(json.dumps(info, indent=1) if parsed.json else "\n".join(lines(info)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
