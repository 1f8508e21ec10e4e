"""The course of a run as a picture: one SVG drawn from `metrics.jsonl`, for any browser."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

Series = Mapping[str, Sequence[tuple[float, float]]]
"""Points (step, value) by name."""

POINTS = 240
"""Of a curve; between two of them lies the mean of what was noted."""
WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 36, 26
"""Room around the axes of a panel."""
COLUMNS = 2
COLOURS = ("#2563c9", "#d1541e", "#4d8f3a", "#8b5bb5")

STYLE = """
svg { background: #fff; font: 12px system-ui, sans-serif; fill: #333 }
.title { font-weight: 600; font-size: 13px; fill: #111 }
.grid { stroke: #e4e4e4; fill: none }
.x { text-anchor: middle; fill: #777 } .y { text-anchor: end; fill: #777 }
polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round }
"""


def draw_curves(metrics: Path) -> str:
    """An SVG of losses by task, held-out measures, speed and learning rate.

    Args:
        metrics: `metrics.jsonl` of a run; a line cut by a kill is left out.
    """
    lines = list(_lines(metrics))
    steps = [line for line in lines if "validation" not in line]
    looks = [line for line in lines if "validation" in line]
    panels: list[tuple[str, Series]] = []
    for task in ("instance", "semantic"):
        mine = [line for line in steps if line["task"] == task]
        names = ["loss", "pixel", "tv", *(["dice"] if any(line["dice"] for line in mine) else [])]
        panels.append((f"{task} task", {name: _points(mine, name) for name in names}))
    if looks:
        held_out = [{"step": look["step"], **look["validation"]} for look in looks]
        names = sorted({name for line in held_out for name in line} - {"step"})
        losses = [name for name in names if name.endswith("_loss")]
        rest = [name for name in names if name not in losses]
        panels += [
            (title, {name.replace("_", " "): _points(held_out, name) for name in chosen})
            for title, chosen in (("held out: losses", losses), ("held out: measures", rest))
        ]
    panels += [
        ("images a second", {"images/s": _points(steps, "images_per_second")}),
        ("share of a step spent waiting for data", {"waited": _points(steps, "waited")}),
        ("learning rate", {"lr": _points(steps, "lr")}),
    ]
    rows = math.ceil(len(panels) / COLUMNS)
    width, height = WIDTH * COLUMNS, HEIGHT * rows
    body = "".join(
        f'<g transform="translate({WIDTH * (number % COLUMNS)} {HEIGHT * (number // COLUMNS)})">'
        f"{_panel(title, series)}</g>"
        for number, (title, series) in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}"><style>{STYLE}</style>{body}</svg>\n'
    )


def _lines(metrics: Path) -> Iterator[dict[str, Any]]:
    for text in metrics.read_text().splitlines():
        try:
            yield json.loads(text)
        except ValueError:
            continue


def _points(lines: Iterable[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of a name, thinned to means of equal stretches."""
    found = np.array([(line["step"], line[name]) for line in lines if name in line], float)
    found = found.reshape(-1, 2)
    found = found[np.isfinite(found).all(1)]
    if len(found) == 0:
        return []
    parts = np.array_split(found, min(POINTS, len(found)))
    return [(float(x), float(y)) for x, y in (part.mean(0) for part in parts)]


def _panel(title: str, series: Series) -> str:
    points = [point for line in series.values() for point in line]
    heading = f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>'
    if not points:
        return heading + f'<text x="{LEFT}" y="{TOP + 20}">nothing noted yet</text>'
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    ticks = _ticks(min(0.0, *(y for _, y in points)), max(y for _, y in points))
    low, high = ticks[0], ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / ((last - first) or 1)
        up = (y - low) / ((high - low) or 1)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )

    parts = [heading]
    for tick in ticks:
        _, y = place(first, tick)
        parts.append(
            f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
            f'<text class="y" x="{LEFT - 6}" y="{y + 4:.1f}">{tick:g}</text>'
        )
    parts += [
        f'<text class="x" x="{place(x, low)[0]:.1f}" y="{HEIGHT - 8}">{x:,.0f}</text>'
        for x in dict.fromkeys((first, (first + last) / 2, last))
    ]
    across = LEFT
    for (name, line), colour in zip(series.items(), COLOURS * len(series), strict=False):
        path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in line)
        parts.append(f'<polyline stroke="{colour}" points="{path}"/>')
        if len(series) > 1:
            now = f"{name} {line[-1][1]:.3g}" if line else name
            parts.append(f'<text x="{across}" y="30" fill="{colour}">{escape(now)}</text>')
            across += 7 * len(now) + 10
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """Round values from at most `low` to at least `high`, three to seven of them."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= 5)
    count = math.ceil(round(high / step, 9)) - math.floor(round(low / step, 9))
    return [round(math.floor(round(low / step, 9)) + n, 9) * step for n in range(max(count, 1) + 1)]
