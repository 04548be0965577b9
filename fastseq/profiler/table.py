"""The table of a profile as aligned text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastseq.profiler.summary import Row

__all__ = ["lines"]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _microseconds(seconds: float) -> str:
    # Three digits matter; beyond that the columns only get wider.
    value = seconds * 1e6
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _intensity(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _shapes(row: Row) -> str:
    if row.phase:
        return ""
    more = f" and {len(row.shapes) - 1} more" if len(row.shapes) > 1 else ""
    return row.shapes[0] + more


def _kind(row: Row) -> str:
    if row.phase:
        return ""
    first, last = row.threads[0], row.threads[-1]
    return f"{row.dtype} {row.isa} x{first if first == last else f'{first}-{last}'}"


Cell = Callable[[Row], str]
# Heading, cell, whether it is a number, and in which order columns are left out for width.
_COLUMNS: tuple[tuple[str, Cell, bool, int], ...] = (
    ("kernel, phase", lambda row: ("  " if row.phase else "") + row.name, False, 0),
    ("calls", lambda row: f"{row.calls:,}", True, 0),
    ("total ms", lambda row: f"{row.total_s * 1e3:,.2f}", True, 0),
    ("% wall", lambda row: _percent(row.share), True, 0),
    ("mean us", lambda row: _microseconds(row.mean_s), True, 0),
    ("p50 us", lambda row: _microseconds(row.p50_s), True, 2),
    ("p95 us", lambda row: _microseconds(row.p95_s), True, 5),
    ("GFLOP/s", lambda row: _number(row.gflops, 1), True, 0),
    ("GB/s*", lambda row: _number(row.gbytes, 1), True, 4),
    ("flop/B*", lambda row: _intensity(row.intensity), True, 3),
    ("% roof", lambda row: _percent(row.roof_share), True, 0),
    ("roof", lambda row: row.roof or "-", False, 6),
    ("kernels", _kind, False, 7),
    ("shape", _shapes, False, 1),
)


def lines(rows: Sequence[Row], width: int | None = None) -> list[str]:
    """The table, one row a line.

    Args:
        rows: From :func:`fastseq.profiler.summary.rows`.
        width: Columns of characters to fit into; what has no room is left out and named below.
    """
    columns = list(_COLUMNS)
    left_out: list[str] = []
    text = _aligned(columns, rows)
    while width is not None and max(map(len, text)) > width:
        droppable = [column for column in columns if column[3]]
        if not droppable:
            break
        least = min(droppable, key=lambda column: column[3])
        columns.remove(least)
        left_out.append(least[0])
        text = _aligned(columns, rows)
    if left_out:
        names = ", ".join(left_out)
        text.append(f"left out for want of width: {names}")
    return text


def _aligned(columns: Sequence[tuple[str, Cell, bool, int]], rows: Sequence[Row]) -> list[str]:
    table = [[heading for heading, _, _, _ in columns]]
    table += [[cell(row) for _, cell, _, _ in columns] for row in rows]
    widths = [max(len(line[index]) for line in table) for index in range(len(columns))]
    text = []
    for line in table:
        cells = [
            f"{value:>{width}}" if numeric else f"{value:<{width}}"
            for value, width, (_, _, numeric, _) in zip(line, widths, columns, strict=True)
        ]
        text.append("  ".join(cells).rstrip())
    text.insert(1, "-" * max(map(len, text)))
    return text
