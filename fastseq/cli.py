"""The ``fastseq`` command: looks up the subcommand and hands over the rest of the line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


def _info(arguments: Sequence[str]) -> int:
    from fastseq.info import main

    return main(arguments)


def _bench(arguments: Sequence[str]) -> int:
    from fastseq.bench.command import main

    return main(arguments)


def _profile(arguments: Sequence[str]) -> int:
    from fastseq.profiler.command import main

    return main(arguments)


def _roof(arguments: Sequence[str]) -> int:
    from fastseq.profiler.command import roof_main

    return roof_main(arguments)


_COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "info": (_info, "versions, instruction sets, threads, caches"),
    "bench": (_bench, "time the layers against torch.nn and onnxruntime"),
    "profile": (_profile, "run a program and show what the kernels' time goes into"),
    "roof": (_roof, "what this machine can do: multiply-adds and memory, measured once"),
}


def _usage() -> str:
    width = max(map(len, _COMMANDS))
    rows = [f"  {name:<{width}}  {summary}" for name, (_, summary) in _COMMANDS.items()]
    return "\n".join(["usage: fastseq COMMAND [options]", "", *rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given and given[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if given and given[0] == "--version":
        import fastseq

        print(fastseq.__version__)
        return 0
    if not given or given[0] not in _COMMANDS:
        problem = f"unknown command {given[0]!r}" if given else "a command is missing"
        print(f"fastseq: {problem}; one of: {', '.join(_COMMANDS)}", file=sys.stderr)
        return 2
    return _COMMANDS[given[0]][0](given[1:])
