"""Watching a run: `metrics.jsonl` always, trackers where installed, pictures now and then."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.pipeline.pictures.colours import (
    Picture,
    centroid_colours,
    save_picture,
    semantic_colours,
)
from panoptic_cache.pipeline.pictures.sheets import Tile, sheet
from panoptic_cache.train.curves import draw_curves
from panoptic_cache.train.data import Batch
from panoptic_cache.train.encoding import Encoding, grid_cells, nearest_centroids
from panoptic_cache.train.model import PanopticModel

log = logging.getLogger(__name__)

SHOWN = 4
"""Samples on a picture."""


def installed_trackers(names: Sequence[str]) -> list[str]:
    """Those of Accelerate's trackers that are installed; a line names the others.

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


class Watch:
    """Where the facts of a run go. Every rank may call it; the main one writes.

    Args:
        accelerator: Made with the trackers of `installed_trackers`.
        out: The run's folder, which exists.
        first: The step to begin at; what an earlier run noted from there on is dropped.
    """

    def __init__(self, accelerator: Accelerator, out: Path, first: int) -> None:
        self._accelerator = accelerator
        self._metrics, self._pictures = out / "metrics.jsonl", out / "pictures"
        self._curves = out / "curves.svg"
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
        """Notes what held-out samples say after a step: a line of its own."""
        self._write({"step": step, "validation": dict(values)})
        numbers = {f"validation/{name}": value for name, value in values.items()}
        self._accelerator.log(numbers, step=step)

    def curves(self) -> None:
        """Draws all that was noted so far as `curves.svg`."""
        if self._accelerator.is_main_process:
            temporary = self._curves.with_suffix(".tmp")
            temporary.write_text(draw_curves(self._metrics))
            temporary.replace(self._curves)

    def picture(self, step: int, picture: Picture) -> None:
        """Keeps a picture as `pictures/step_%07d.png`, and shows it in trackers that can."""
        if not self._accelerator.is_main_process:
            return
        save_picture(self._pictures / f"step_{step:07d}.png", picture)
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
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            break  # cut by a kill
    temporary = metrics.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    temporary.replace(metrics)


def has_validation(metrics: Path, step: int) -> bool:
    """Whether the lines of a run hold what held-out samples say after a step."""
    lines = map(json.loads, metrics.read_text().splitlines())
    return any(line["step"] == step and "validation" in line for line in lines)


@torch.no_grad()
def draw_heads(
    model: PanopticModel, batch: Batch, encoding: Encoding, categories: Sequence[Category]
) -> Picture:
    """Both heads beside their targets, a row each for the first samples of a batch.

    Codes are shown as they are, before any decoding: the colour of the centroid they are nearest
    to. The model is left in evaluation mode.

    Args:
        model: Not wrapped; on the batch's device.
        batch: The samples; colours are not jittered.
        encoding: Of the instance head.
        categories: By label.
    """
    isthing = [category.isthing for category in categories]
    found = model.eval()(batch.photo[:SHOWN], "both").resized(batch.segment_map.shape[1:])
    rows: list[list[Tile]] = []
    for row, code in enumerate(found.instance):
        index = batch.segment_map[row].long().cpu().numpy()
        centroid = batch.centroid[row].cpu().numpy().copy()
        centroid[~batch.instance[row].cpu().numpy()] = np.nan
        truth = centroid_colours(centroid[index].transpose(2, 0, 1))
        cells = grid_cells(index.shape[0])
        labels = found.semantic[row].argmax(0).cpu().numpy()
        rows.append(
            [
                (batch.keys[row], batch.photo[row].permute(1, 2, 0).cpu().numpy()),
                ("true centroids", truth),
                ("instance head", centroid_colours(nearest_centroids(code, encoding, cells))),
                (
                    "true categories",
                    semantic_colours(batch.label[row].cpu().numpy()[index], isthing),
                ),
                ("semantic head", semantic_colours(labels, isthing)),
            ]
        )
    return sheet(rows)
