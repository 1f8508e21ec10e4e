"""What a run leaves to look at: `metrics.jsonl`, `curves.svg`, pictures, and trackers."""

from __future__ import annotations

import json
import logging
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from numpy.typing import NDArray

from panoptic_cache.pipeline.base.config import decode_json
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import no_links, write_file
from panoptic_cache.pipeline.pictures import Picture, save_picture

log = logging.getLogger(__name__)

PARTS = ("loss", "pixel", "tv")
"""Of a step's loss, in both tasks."""
WANDB_ID = "wandb_id"
"""The file that holds the id of a run at W&B."""
POINTS = 240
"""Of a curve; each is the mean of a stretch of steps."""
WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 24, 36, 26
"""Room around the axes of a panel."""
COLOURS = ("#2563c9", "#d1541e", "#4d8f3a", "#8b5bb5")
STYLE = """
svg { background: #fff; font: 12px system-ui, sans-serif; fill: #333 }
.title { font-weight: 600; font-size: 13px; fill: #111 }
.grid { stroke: #e4e4e4; fill: none }
.x { text-anchor: middle; fill: #777 } .y { text-anchor: end; fill: #777 }
polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round }
"""


def installed_trackers(names: Sequence[str]) -> list[str]:
    """Those of Accelerate's trackers that are installed; InputError if it knows no such tracker."""
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

    The accelerator is made with the trackers of `installed_trackers`, and the folder exists. Lines
    of an earlier run after the step `first` are dropped. W&B gets the settings, and goes on in the
    same run of its own.
    """

    def __init__(
        self, accelerator: Accelerator, out: Path, first: int, settings: Mapping[str, Any]
    ) -> None:
        self._accelerator, self._out = accelerator, out
        self._metrics = out / "metrics.jsonl"
        if accelerator.log_with:
            options: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": first + 1}}
            if accelerator.is_main_process and "wandb" in map(str, accelerator.log_with):
                shown = {"name": out.absolute().name, "dir": str(out)}
                options["wandb"] = {"id": wandb_id(out), "resume": "allow", **shown}
            try:
                accelerator.init_trackers("panoptic", init_kwargs=options)
                for tracker in accelerator.trackers:
                    if tracker.name == "wandb":
                        tracker.store_init_configuration(settings)
            except OSError:
                raise
            except Exception as error:  # noqa: BLE001 - each tracker has types of its own
                raise InputError(
                    f"a tracker cannot start: {' '.join(str(error).split())[:160]}",
                    where="trackers",
                    remedy="log in to it, or --set trackers=[]",
                ) from None
        if accelerator.is_main_process:
            keep_lines(self._metrics, first)

    def step(self, line: Mapping[str, Any]) -> None:
        """Notes an optimizer step; trackers get a curve for each task."""
        self._write(line)
        numbers = {name: value for name, value in line.items() if name not in {"step", "task"}}
        self._note(line["step"], line["task"], numbers)

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Notes what held-out samples say after a step, on a line of its own."""
        self._write({"step": step, "validation": dict(values)})
        self._note(step, "validation", values)

    def _note(self, step: int, group: str, values: Mapping[str, float]) -> None:
        self._accelerator.log({f"{group}/{name}": v for name, v in values.items()}, step=step)

    def has_validation(self, step: int) -> bool:
        """Whether held-out samples were looked at after a step; for the main rank."""
        return any("validation" in line for line in lines_of(self._metrics) if line["step"] == step)

    def measured(self, name: str) -> list[float]:
        """What held-out samples said so far, in order; for the main rank."""
        found = (line.get("validation", {}) for line in lines_of(self._metrics))
        return [values[name] for values in found if name in values]

    def curves(self) -> None:
        """Draws everything noted so far as `curves.svg`."""
        if self._accelerator.is_main_process:
            write_file(self._out / "curves.svg", draw_curves(self._metrics).encode())

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
            with open(self._metrics, "a", opener=no_links) as file:
                file.write(json.dumps(line) + "\n")


def wandb_id(out: Path) -> str:
    """The id of a run at W&B, the same one each time that it goes on."""
    path = out / WANDB_ID
    if not path.exists():
        write_file(path, f"{secrets.token_hex(8)}\n".encode())
    return path.read_text().strip()


def keep_lines(metrics: Path, step: int) -> None:
    """Drops the lines after a step: a run that goes on writes them again."""
    kept = [line for line in lines_of(metrics) if line["step"] <= step] if metrics.exists() else []
    write_file(metrics, "".join(json.dumps(line) + "\n" for line in kept).encode())


def lines_of(metrics: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run, without those that a kill cut short or that are damaged."""
    for text in metrics.read_bytes().splitlines():
        with suppress(ValueError):
            line = decode_json(text, dict[str, Any])
            values = line.get("validation", {k: v for k, v in line.items() if k != "task"})
            numbers = isinstance(values, dict) and all(map(_is_number, values.values()))
            if numbers and isinstance(line.get("step"), int):
                yield line


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def draw_curves(metrics: Path) -> str:
    """An SVG of losses by task, held-out measures, speed and learning rate of a `metrics.jsonl`."""
    lines = [*lines_of(metrics)]
    steps = [line for line in lines if "validation" not in line]
    held_out = [{"step": x["step"], **x["validation"]} for x in lines if "validation" in x]
    names = sorted({name for line in held_out for name in line} - {"step"})
    kinds = {"losses": "_loss", "accuracies": "_accuracy"}
    panels: dict[str, tuple[list[dict[str, Any]], Sequence[str]]] = {
        f"{task} task": ([x for x in steps if x.get("task") == task], parts)
        for task, parts in (("instance", (*PARTS, "dice")), ("semantic", PARTS))
    }
    for kind, ending in kinds.items():
        if chosen := [name for name in names if name.endswith(ending)]:
            panels[f"held out: {kind}"] = held_out, chosen
    rest = [name for name in names if not name.endswith((*kinds.values(),))]
    for start in range(0, len(rest), len(COLOURS)):  # a colour means one curve
        number = f", {start // len(COLOURS) + 1}" if start else ""
        panels[f"held out: measures{number}"] = held_out, rest[start : start + len(COLOURS)]
    panels |= {"images a second": (steps, ["images_per_second"]), "learning rate": (steps, ["lr"])}
    width, height = 2 * WIDTH, HEIGHT * math.ceil(len(panels) / 2)
    body = "".join(
        f'<g transform="translate({WIDTH * (number % 2)} {HEIGHT * (number // 2)})">'
        f"{_panel(title, *shown)}</g>"
        for number, (title, shown) in enumerate(panels.items())
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}"><style>{STYLE}</style>{body}</svg>\n'
    )


def _panel(title: str, lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """One pair of axes with a curve, over the steps, for each name."""
    parts = [f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>']
    curves = {name: _points(lines, name) for name in names}
    every = np.concatenate([np.empty((0, 2)), *curves.values()])  # (N, 2), step and value
    if not len(every):
        return f'{parts[0]}<text x="{LEFT}" y="{TOP + 20}">nothing noted yet</text>'
    (first, low), (last, high) = every.min(0).tolist(), every.max(0).tolist()
    ticks = round_ticks(min(0.0, low), high)
    corner = np.array([first, ticks[0]])
    scale = np.array([WIDTH - LEFT - RIGHT, TOP + BOTTOM - HEIGHT])  # pixels of all steps, values
    scale = scale / [(last - first) or 1, ticks[-1] - ticks[0]]

    def place(points: Any) -> Any:  # (N, 2), step and value -> x and y, pixels
        return ([LEFT, HEIGHT - BOTTOM] + (np.asarray(points) - corner) * scale).tolist()

    for tick, (_, y) in zip(ticks, place([(first, tick) for tick in ticks]), strict=True):
        parts.append(
            f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
            f'<text class="y" x="{LEFT - 6}" y="{y + 4:.1f}">{tick:g}</text>'
        )
    for step in dict.fromkeys((first, (first + last) / 2, last)):
        ((x, _),) = place([(step, 0.0)])
        parts.append(f'<text class="x" x="{x:.1f}" y="{HEIGHT - 8}">{step:,.0f}</text>')
    label = LEFT
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in place(curve))
        parts.append(f'<polyline stroke="{colour}" points="{path}"/>')
        if len(curves) > 1:
            now = name.removesuffix("_accuracy").replace("_", " ") + (
                f" {curve[-1, 1]:.3g}" if len(curve) else ""
            )
            parts.append(f'<text x="{label}" y="30" fill="{colour}">{escape(now)}</text>')
            label += 7 * len(now) + 10
    return "".join(parts)


def _points(lines: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64]:
    """(N, 2) steps and values of a name, thinned to means of equal stretches."""
    found = np.array([(line["step"], line[name]) for line in lines if name in line], float)
    found = found.reshape(-1, 2)
    found = found[np.isfinite(found).all(1)]
    stretches = np.array_split(found, min(POINTS, len(found)) or 1)
    return np.array([part.mean(0) for part in stretches if len(part)]).reshape(-1, 2)


def round_ticks(low: float, high: float) -> list[float]:
    """Round values from at most `low` to at least `high`, three to seven of them."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= 5)
    first, end = math.floor(round(low / step, 9)), math.ceil(round(high / step, 9))
    return [round(first + n, 9) * step for n in range(max(end - first, 1) + 1)]
