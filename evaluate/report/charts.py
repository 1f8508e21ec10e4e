"""Parts of the report as HTML and inline SVG: IoU by size, numbers beside PQ, confusions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from panoptic_cache.evaluate.report.tables import measure_table, size_name
from panoptic_cache.pipeline.coco import Category

WIDTH, HEIGHT = 640, 250
LEFT, TOP, BOTTOM = 44, 14, 46
"""Room for the axes, in units of the drawing."""
SHOWN = 12
"""Confusions in the table."""
CONFUSION_COLUMNS = ("true category", "found as", "segments", "share")


def measure_list(values: Mapping[str, Any]) -> str:
    """The numbers beside PQ as a definition list; `values` as of `Scores.to_json`."""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in measure_table(values)
    )
    return f'<dl class="facts">{items}</dl>'


def size_chart(sizes: Sequence[Mapping[str, Any]]) -> str:
    """Bars of the mean best IoU by size, as in the paper's Figures 5 and 6.

    Args:
        sizes: See `Measures.to_json`.

    Returns:
        An SVG, from the first to the last size that has instances; empty where none has.
    """
    filled = [number for number, row in enumerate(sizes) if row["n"]]
    if not filled:
        return ""
    rows = sizes[filled[0] : filled[-1] + 1]
    floor, step = HEIGHT - BOTTOM, (WIDTH - LEFT) / len(rows)
    parts = []
    for percent in (0, 25, 50, 75, 100):
        y = floor - (floor - TOP) * percent / 100
        parts.append(
            f'<path d="M{LEFT} {y:.1f}H{WIDTH}"/><text class="y" x="{LEFT - 8}" y="{y + 4:.1f}">'
            f"{percent}</text>"
        )
    for number, row in enumerate(rows):
        middle, width = LEFT + step * (number + 0.5), min(0.7 * step, 90)
        iou = row["iou"]
        top = floor - (floor - TOP) * (iou or 0.0)
        label = "" if iou is None else f"{100 * iou:.1f}"
        parts.append(
            f'<rect x="{middle - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" '
            f'height="{floor - top:.1f}"/>'
            f'<text class="value" x="{middle:.1f}" y="{max(top - 5, 12):.1f}">{label}</text>'
            f'<text x="{middle:.1f}" y="{floor + 18}">{size_name(row)}</text>'
            f'<text class="n" x="{middle:.1f}" y="{floor + 36}">{row["n"]:,}</text>'
        )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="mean IoU of things by size">{"".join(parts)}</svg>'
    )


def confusion_table(
    confusion: Mapping[str, Mapping[str, int]], categories: Sequence[Category]
) -> str:
    """The most frequent confusions of two categories; see `Measures.to_json`.

    Returns:
        A table whose headings sort, or a sentence where nothing was confused.
    """
    names = {str(category.id): category.name for category in categories}
    pairs = [
        (count, count / sum(found.values()), names[true], names[other])
        for true, found in confusion.items()
        for other, count in found.items()
        if other not in {true, "none"}
    ]
    if not pairs:
        return '<p class="soft">No segment was found under another category than its own.</p>'
    pairs.sort(key=lambda pair: (-pair[0], -pair[1]))
    body = "".join(
        f'<tr><td data-v="{escape(true)}">{escape(true)}</td>'
        f'<td data-v="{escape(other)}">{escape(other)}</td>'
        f'<td data-v="{count}">{count}</td><td data-v="{share}">{share:.1%}</td></tr>'
        for count, share, true, other in pairs[:SHOWN]
    )
    head = "".join(f"<th scope=col><button>{name}</button></th>" for name in CONFUSION_COLUMNS)
    return (
        f'<div class="table small"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
