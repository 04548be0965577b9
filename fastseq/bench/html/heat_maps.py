"""Speed-up heat maps: batch x hidden for recurrent layers, a row per shape for everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastseq.bench.cases import GATES, Case
from fastseq.bench.html.cells import (
    FAMILIES,
    Cell,
    case_label,
    cell,
    failure,
    family,
    layer_title,
    options_text,
    threads_text,
)
from fastseq.bench.results import CaseResult

DIRECTIONS = ("inference", "training")


@dataclass(frozen=True)
class HeatMap:
    """A table of speed-ups.

    Attributes:
        title: Heading.
        corner: What rows and columns are: "case", or batch and hidden size.
        columns: Headings of the columns.
        rows: Heading and cells of each row; None where nothing was run.
    """

    title: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


@dataclass(frozen=True)
class Panel:
    """All heat maps of one family against one peer at one thread count.

    Attributes:
        title: Heading.
        peer: The peer.
        threads: Threads of both.
        maps: The tables.
        missing: Why a table is not there, one line each.
    """

    title: str
    peer: str
    threads: int
    maps: tuple[HeatMap, ...]
    missing: tuple[str, ...]


def _grid_key(case: Case) -> tuple[str, str, int, str]:
    return case.layer, case.direction, case.T, case.dtype


def _grids(results: Sequence[CaseResult]) -> dict[tuple[str, str, int, str], list[CaseResult]]:
    """Plain recurrent cases that make a grid of batch and hidden size."""
    groups: dict[tuple[str, str, int, str], list[CaseResult]] = {}
    for result in results:
        case = result.case
        if isinstance(case, Case) and case.plain and case.I == case.H:
            groups.setdefault(_grid_key(case), []).append(result)
    order = {layer: number for number, layer in enumerate(GATES)}
    found = {}
    for key in sorted(groups, key=lambda key: (order[key[0]], key[1:])):
        cases = [result.case for result in groups[key] if isinstance(result.case, Case)]
        if len({case.B for case in cases}) > 1 and len({case.H for case in cases}) > 1:
            found[key] = groups[key]
    return found


def _grid_map(key: tuple[str, str, int, str], results: Sequence[CaseResult], peer: str) -> HeatMap:
    layer, direction, steps, dtype = key
    cells: dict[tuple[int, int], Cell] = {}
    for result in results:
        if isinstance(result.case, Case):
            cells[result.case.B, result.case.H] = cell(result, peer)
    batches = sorted({batch for batch, _ in cells})
    sizes = sorted({hidden for _, hidden in cells})
    precision = "" if dtype == "float32" else f", {dtype}"
    return HeatMap(
        f"{layer_title(layer)} {direction}, T{steps}{precision}",
        "B \\ H",
        tuple(map(str, sizes)),
        tuple((str(b), tuple(cells.get((b, h)) for h in sizes)) for b in batches),
    )


def _list_map(layer: str, results: Sequence[CaseResult], peer: str) -> HeatMap:
    rows: dict[str, dict[str, Cell]] = {}
    for result in results:
        words = [result.case.shape_label, options_text(result.case)]
        label = ", ".join(word for word in words if word)
        if isinstance(result.case, Case) and result.case.I != result.case.H:
            label = case_label(result.case)
        rows.setdefault(label, {})[result.case.direction] = cell(result, peer)
    columns = tuple(d for d in DIRECTIONS if any(d in found for found in rows.values()))
    return HeatMap(
        layer_title(layer),
        "case",
        columns,
        tuple((label, tuple(found.get(d) for d in columns)) for label, found in rows.items()),
    )


def _has_something(results: Sequence[CaseResult], peer: str) -> bool:
    return any(r.peer_speedup(peer) is not None or failure(r) is not None for r in results)


def _reasons(results: Sequence[CaseResult], peer: str) -> str:
    reasons = {result.skipped.get(peer, "not measured") for result in results}
    return "; ".join(sorted(reasons))


def panel(results: Sequence[CaseResult], kind: str, peer: str, threads: int) -> Panel:
    """The heat maps of a family.

    Args:
        results: All results.
        kind: Key in ``FAMILIES``.
        peer: The peer.
        threads: Threads of both.
    """
    chosen = [r for r in results if family(r.case) == kind and r.threads == threads]
    grids = _grids(chosen)
    rest: dict[str, list[CaseResult]] = {}
    for result in chosen:
        in_grid = isinstance(result.case, Case) and any(result in found for found in grids.values())
        if not in_grid:
            rest.setdefault(result.case.layer, []).append(result)
    maps, missing = [], []
    for key, found in grids.items():
        drawn = _grid_map(key, found, peer)
        if _has_something(found, peer):
            maps.append(drawn)
        else:
            missing.append(f"{drawn.title}: {_reasons(found, peer)}")
    for layer, found in rest.items():
        drawn = _list_map(layer, found, peer)
        if _has_something(found, peer):
            maps.append(drawn)
        else:
            missing.append(f"{drawn.title}: {_reasons(found, peer)}")
    title = f"{FAMILIES[kind]} against {peer}, {threads_text(threads)}"
    return Panel(title, peer, threads, tuple(maps), tuple(missing))
