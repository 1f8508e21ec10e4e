"""Rows of text as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

GAP = "  "


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Aligns rows in columns; a header stands above them unless all its names are empty.

    Args:
        columns: Names of the columns.
        rows: A text for each column.
        left: So many of the columns, from the first, are aligned to the left.
    """
    lines = [columns, *rows] if any(columns) else rows
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        GAP.join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
