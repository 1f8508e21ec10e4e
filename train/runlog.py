"""What a run leaves to look at: `metrics.jsonl`, `curves.svg`, pictures, and trackers."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.pictures.colours import Picture, save_picture

log = logging.getLogger(__name__)

Series = Mapping[str, Sequence[tuple[float, float]]]
"""Points (step, value) by name."""

POINTS = 240
"""Of a curve; each is the mean of a stretch of steps."""
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


def installed_trackers(names: Sequence[str]) -> list[str]:
    """Those of Accelerate's trackers that are installed; logs the names of the others.

    Raises:
        InputError: Accelerate knows no such tracker.
    """
    known = [each for each in LoggerType.list() if each != "all"]
    if unknown := sorted({*names} - {*known}):
        raise InputError(
            f"no such tracker: {unknown[0]}", where="trackers", remedy=f"known: {', '.join(known)}"
        )
    installed = {str(each) for each in get_available_trackers()}
    for name in names:
        if name not in installed:
            log.info("%s is not installed; metrics.jsonl has it all", name)
    return [name for name in names if name in installed]


class RunLog:
    """Writes down what happens in a run. Every rank may call it; the main one writes.

    Args:
        accelerator: Made with the trackers of `installed_trackers`.
        out: The run's folder, which exists.
        first: The step to begin at; lines of later steps, of an earlier run, are dropped.
    """

    def __init__(self, accelerator: Accelerator, out: Path, first: int) -> None:
        self._accelerator, self._out = accelerator, out
        self._metrics = out / "metrics.jsonl"
        if accelerator.is_main_process:
            keep_lines(self._metrics, first)
        if accelerator.log_with:
            purge = {"tensorboard": {"purge_step": first + 1}}
            accelerator.init_trackers("panoptic", init_kwargs=purge)

    def step(self, line: Mapping[str, Any]) -> None:
        """Notes an optimizer step; trackers get a curve for each task."""
        self._write(line)
        numbers = {
            f"{line['task']}/{name}": value
            for name, value in line.items()
            if name not in {"step", "task"}
        }
        self._accelerator.log(numbers, step=line["step"])

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Notes what held-out samples say after a step, on a line of its own."""
        self._write({"step": step, "validation": dict(values)})
        numbers = {f"validation/{name}": value for name, value in values.items()}
        self._accelerator.log(numbers, step=step)

    def has_validation(self, step: int) -> bool:
        """Whether held-out samples were looked at after a step; for the main rank."""
        return any("validation" in line for line in _lines(self._metrics) if line["step"] == step)

    def curves(self) -> None:
        """Draws everything noted so far as `curves.svg`."""
        if self._accelerator.is_main_process:
            temporary = self._out / "curves.tmp"
            temporary.write_text(draw_curves(self._metrics))
            temporary.replace(self._out / "curves.svg")

    def picture(self, step: int, picture: Picture) -> None:
        """Keeps a picture as `pictures/step_%07d.png`, and shows it in trackers that can."""
        if not self._accelerator.is_main_process:
            return
        save_picture(self._out / f"pictures/step_{step:07d}.png", picture)
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                image = {"prediction": picture[None]}
                tracker.log_images(image, step=step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({"prediction": [picture]}, step=step)

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._accelerator.is_main_process:
            with self._metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")


def keep_lines(metrics: Path, step: int) -> None:
    """Drops the lines after a step: a run that goes on writes them again."""
    kept = [line for line in _lines(metrics) if line["step"] <= step] if metrics.exists() else []
    temporary = metrics.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    temporary.replace(metrics)


def _lines(metrics: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run, without one that a kill cut short."""
    for text in metrics.read_text().splitlines():
        try:
            yield json.loads(text)
        except ValueError:
            continue


def draw_curves(metrics: Path) -> str:
    """An SVG of losses by task, held-out measures, speed and learning rate.

    Args:
        metrics: `metrics.jsonl` of a run.
    """
    lines = list(_lines(metrics))
    steps = [line for line in lines if "validation" not in line]
    held_out = [{"step": x["step"], **x["validation"]} for x in lines if "validation" in x]
    panels: list[tuple[str, Series]] = []
    for task in ("instance", "semantic"):
        mine = [line for line in steps if line["task"] == task]
        names = ["loss", "pixel", "tv", *(["dice"] if any(line["dice"] for line in mine) else [])]
        panels.append((f"{task} task", {name: _points(mine, name) for name in names}))
    if held_out:
        names = sorted({name for line in held_out for name in line} - {"step"})
        losses = [name for name in names if name.endswith("_loss")]
        rest = [name for name in names if name not in losses]
        panels += [
            (title, {name.replace("_", " "): _points(held_out, name) for name in chosen})
            for title, chosen in (("held out: losses", losses), ("held out: measures", rest))
        ]
    panels += [
        ("images a second", {"images/s": _points(steps, "images_per_second")}),
        ("learning rate", {"lr": _points(steps, "lr")}),
    ]
    width, height = WIDTH * COLUMNS, HEIGHT * math.ceil(len(panels) / COLUMNS)
    body = "".join(
        f'<g transform="translate({WIDTH * (number % COLUMNS)} {HEIGHT * (number // COLUMNS)})">'
        f"{_panel(title, series)}</g>"
        for number, (title, series) in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}"><style>{STYLE}</style>{body}</svg>\n'
    )


def _points(lines: Iterable[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of a name, thinned to means of equal stretches."""
    found = np.array([(line["step"], line[name]) for line in lines if name in line], float)
    found = found.reshape(-1, 2)  # (N, 2), also if N is 0
    found = found[np.isfinite(found).all(1)]
    parts = np.array_split(found, min(POINTS, len(found))) if len(found) else []
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
    first, end = math.floor(round(low / step, 9)), math.ceil(round(high / step, 9))
    return [round(first + n, 9) * step for n in range(max(end - first, 1) + 1)]
