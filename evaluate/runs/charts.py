"""Line charts of the study's page: curves over steps, IoU by size, and the paper's Figure 3."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from panoptic_cache.train.encoding import GRID_CELLS, cell_centres, gamma

COLOURS = ("#2563c9", "#d1541e", "#4d8f3a", "#8b5bb5", "#b8860b", "#0e8a8a", "#c2378b", "#777777")
LEFT, RIGHT, TOP, BOTTOM = 44.0, 640.0, 14.0, 204.0
"""The plot's box, in units of the drawing, which is 640 wide and 250 high."""

VOID = "void, L = 4"

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart."""

    name: str
    colour: str
    path: str  # Of an SVG polyline


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines in the units of the drawing, and the ticks of both axes with their positions."""

    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def draw_chart(
    series: Mapping[str, Points],
    *,
    x_ticks: Sequence[tuple[float, str]] = (),
) -> Chart | None:
    """Scales lines to the plot; None where there is nothing to draw."""
    filled = {name: points for name, points in series.items() if points}
    if not filled:
        return None
    xs = [x for points in filled.values() for x, _ in points] + [x for x, _ in x_ticks]
    ys = [y for points in filled.values() for _, y in points]
    x_low, x_high = min(xs), max(xs)
    steps = ticks(min(ys), max(ys))
    y_low, y_high = steps[0], steps[-1]

    def x_at(x: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (x - x_low) / ((x_high - x_low) or 1), 1)

    def y_at(y: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (y - y_low) / (y_high - y_low), 1)

    lines = tuple(
        Line(
            name,
            COLOURS[number % len(COLOURS)],
            " ".join(f"{x_at(x)},{y_at(y)}" for x, y in filled[name]),
        )
        for number, name in enumerate(series)
        if name in filled
    )
    marks = x_ticks or [(x, f"{x:g}") for x in ticks(x_low, x_high) if x_low <= x <= x_high]
    return Chart(
        lines,
        tuple((x_at(x), text) for x, text in marks),
        tuple((y_at(y), f"{y:g}") for y in steps),
    )


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers whose first and last enclose both values."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * one for one in (1, 2, 2.5, 5, 10) if power * one >= span / 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * number, 9) for number in range(first, max(last, first + 1) + 1)]


def size_chart(sizes: Mapping[str, Sequence[tuple[str, int, float]]], base: str) -> Chart | None:
    """IoU of things by size, each variant less the base, percent (Figures 5 and 6)."""
    reference = {name: iou for name, _, iou in sizes.get(base, ())}
    names = [*reference]
    series = {
        variant: [
            (float(names.index(name)), iou - reference[name])
            for name, _, iou in rows
            if name in reference
        ]
        for variant, rows in sizes.items()
    }
    return draw_chart(series, x_ticks=[(float(at), name) for at, name in enumerate(names)])


def code_curves(harmonics: Sequence[int] = (2, 3, 4, 5)) -> tuple[Chart | None, dict[str, float]]:
    """Distances of the codes of all cells from the right-most one (Figure 3).

    Returns:
        The chart, with the distance of void for L = 4; and the contrast ratio of each code, its
        largest over its smallest distance from the right-most cell.
    """
    cells = cell_centres(GRID_CELLS).double()  # (80,)
    distances = {"coordinate, L1": cells[-1] - cells}
    for count in harmonics:
        code = gamma(cells, count)  # (80, 2L)
        distances[f"positional, L = {count}"] = torch.linalg.vector_norm(code - code[-1], dim=-1)
    series: dict[str, Points] = {
        name: [*zip(cells.tolist(), values.tolist(), strict=True)]
        for name, values in distances.items()
    }
    away = float(torch.linalg.vector_norm(gamma(cells[-1], 4)))  # void is the zero vector
    series[VOID] = [(float(cells[0]), away), (float(cells[-1]), away)]
    ratios = {name: float(values.max() / values[:-1].min()) for name, values in distances.items()}
    return draw_chart(series), ratios
