"""The product of a few rows with packed weights, the one inside the recurrence.

Weights lie in panels ``[panel][term][column]`` of two vectors of columns, so that a tile reads them
in order. Every element's terms are added up in the same order whatever the height of the tile it is
in: how rows are spread over threads changes no bit.
"""

from __future__ import annotations

import functools
from typing import Any

from numba import types

from fastseq.backends.numba.compile import compiled, sources_digest
from fastseq.backends.numba.intrinsics import PRODUCT_ARGUMENTS, TERMS, tile
from fastseq.backends.numba.vectors import lanes, tile_rows

__all__ = ["FEW_ROWS", "product_kernel"]

# Up to so many sequences each element is summed up in four parts: two sums would wait for each
# other's additions.
FEW_ROWS = 2


@functools.cache
def product_kernel(item_bytes: int) -> Any:
    """The product for floats of so many bytes."""
    sources = sources_digest()
    columns = 2 * lanes(item_bytes)
    most_rows = tile_rows()
    most_terms = TERMS
    tall = most_rows > 6

    def product(
        left: int,  # [rows, terms], address
        left_stride: int,  # from row to row
        left_term: int,  # from term to term
        rows: int,
        weights: int,  # [panels, terms, columns], address
        weights_stride: int,  # from term to term
        panel_stride: int,  # from panel to panel
        terms: int,
        panels: int,
        result: int,  # [rows, panels * columns], address
        result_stride: int,
        few: int,
    ) -> None:
        """``result += left @ weights``; strides in elements."""
        sources  # noqa: B018
        tiles = (rows + most_rows - 1) // most_rows
        for panel in range(panels):
            for start in range(0, terms, most_terms):
                n = min(most_terms, terms - start)
                w = weights + (panel * panel_stride + start * weights_stride) * item_bytes
                a = left + start * left_term * item_bytes
                to = result + panel * columns * item_bytes
                ls, lt, ws, rs = left_stride, left_term, weights_stride, result_stride
                if few:
                    if rows == 1:
                        tile(item_bytes, 1, 4, a, ls, lt, w, ws, n, to, rs)
                    elif rows == 2:
                        tile(item_bytes, 2, 4, a, ls, lt, w, ws, n, to, rs)
                    continue
                for index in range(tiles):
                    first = rows * index // tiles
                    height = rows * (index + 1) // tiles - first
                    b = a + first * ls * item_bytes
                    c = to + first * rs * item_bytes
                    if height == 1:
                        tile(item_bytes, 1, 1, b, ls, lt, w, ws, n, c, rs)
                    elif height == 2:
                        tile(item_bytes, 2, 1, b, ls, lt, w, ws, n, c, rs)
                    elif height == 3:
                        tile(item_bytes, 3, 1, b, ls, lt, w, ws, n, c, rs)
                    elif height == 4:
                        tile(item_bytes, 4, 1, b, ls, lt, w, ws, n, c, rs)
                    elif height == 5:
                        tile(item_bytes, 5, 1, b, ls, lt, w, ws, n, c, rs)
                    elif height == 6:
                        tile(item_bytes, 6, 1, b, ls, lt, w, ws, n, c, rs)
                    elif tall:
                        if height == 7:
                            tile(item_bytes, 7, 1, b, ls, lt, w, ws, n, c, rs)
                        elif height == 8:
                            tile(item_bytes, 8, 1, b, ls, lt, w, ws, n, c, rs)
                        elif height == 9:
                            tile(item_bytes, 9, 1, b, ls, lt, w, ws, n, c, rs)
                        elif height == 10:
                            tile(item_bytes, 10, 1, b, ls, lt, w, ws, n, c, rs)
                        elif height == 11:
                            tile(item_bytes, 11, 1, b, ls, lt, w, ws, n, c, rs)
                        elif height == 12:
                            tile(item_bytes, 12, 1, b, ls, lt, w, ws, n, c, rs)

    return compiled(types.void(*[types.int64] * PRODUCT_ARGUMENTS), product)
