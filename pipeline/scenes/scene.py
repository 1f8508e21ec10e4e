"""Synthetic scenes in COCO panoptic format: for the demo, the tests and the benchmarks.

A scene is two or three bands of stuff with a few things in front, painted back to front; the
visible part of a thing is its segment. Six of every eight scenes hold something special (see
`SPECIALS`), so sixteen images contain the hard cases of COCO.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg

from panoptic_cache.pipeline.annotations import SegmentInfo
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage, write_file
from panoptic_cache.pipeline.png import ids_to_rgb
from panoptic_cache.pipeline.scenes.layout import lay_out
from panoptic_cache.pipeline.scenes.looks import TEXTURES, Canvas, Look, Picture, Shape, paint_thing

CATEGORIES: list[dict[str, Any]] = [
    {"id": 1, "name": "ball", "supercategory": "round", "isthing": 1, "color": [220, 60, 70]},
    {"id": 3, "name": "crate", "supercategory": "angular", "isthing": 1, "color": [190, 120, 50]},
    {"id": 4, "name": "tent", "supercategory": "angular", "isthing": 1, "color": [140, 70, 200]},
    {"id": 8, "name": "ring", "supercategory": "round", "isthing": 1, "color": [250, 140, 40]},
    {"id": 13, "name": "star", "supercategory": "angular", "isthing": 1, "color": [240, 210, 60]},
    {"id": 21, "name": "sky", "supercategory": "open", "isthing": 0, "color": [130, 180, 230]},
    {"id": 22, "name": "wall", "supercategory": "built", "isthing": 0, "color": [150, 90, 80]},
    {"id": 40, "name": "grass", "supercategory": "ground", "isthing": 0, "color": [90, 160, 70]},
    {"id": 57, "name": "water", "supercategory": "ground", "isthing": 0, "color": [40, 100, 150]},
]
"""The categories as COCO lists them, in the order of `Look`; the ids have gaps, like COCO's."""

SPECIALS = ("plain", "unlabelled", "crowd", "concentric", "plain", "tiny", "cut", "split")
"""What a scene contains, by `index % 8`. "unlabelled" alternates: an unknown object, a patch."""

FIRST_VAL_INDEX = 900_000_000
"""The first validation scene; a multiple of 16, so both splits have the same specials."""

MIN_SIZE = 32
VERSION = 1
"""Increases whenever the same arguments give other bytes."""

# Short over long side, and whether the image is upright. Five formats, so that each of the eight
# specials meets each format.
_FORMATS = ((0.75, False), (0.75, True), (0.667, False), (0.94, False), (0.667, True))


@dataclass(frozen=True)
class Scene:
    """An image and its panoptic ground truth."""

    photo: npt.NDArray[np.uint8]  # (H, W, 3) uint8, RGB
    ids: npt.NDArray[np.int32]  # (H, W) int32 segment ids, 0 = unlabelled
    # A row for every id in `ids` but 0, with area (pixels) and bbox; stuff first.
    segments: tuple[SegmentInfo, ...]


def make_scene(seed: int, index: int, size: int = 160) -> Scene:
    """Draws a scene of a family, `size` pixels on its longer side, from its arguments alone.

    `index % 8` chooses its special content, `index % 5` its format. InputError where `size` is
    below `MIN_SIZE`.
    """
    if size < MIN_SIZE:
        raise InputError(f"scenes of {size} px show nothing", remedy=f"use {MIN_SIZE} px or more")
    rng = np.random.default_rng([seed, index])
    ratio, upright = _FORMATS[index % len(_FORMATS)]
    height, width = (size, round(size * ratio)) if upright else (round(size * ratio), size)
    special = SPECIALS[index % len(SPECIALS)]
    if special == "unlabelled":
        special = ("unknown", "patch")[index // len(SPECIALS) % 2]

    canvas, looks = _paint_stuff(rng, height, width, unit=size / 160)
    table = [(look, False) for look in looks]
    groups, patches = lay_out(rng, special, height, width)
    for patch in patches:
        canvas.rows[_inside_patch(patch, height, width)] = 0
    for group in groups:
        row = 0
        if group.look is not Look.UNKNOWN:
            table.append((group.look, group.iscrowd))
            row = len(table)
        for shape in group.shapes:
            paint_thing(rng, canvas, group.look, shape, row=row)
    ids, segments = _label(rng, canvas.rows, table)
    return Scene(_expose(rng, canvas), ids, segments)


def write_dataset(
    root: Path,
    *,
    images: int,
    val_images: int,
    seed: int,
    size: int = 160,
    progress: Callable[[int], None] | None = None,
) -> bool:
    """Writes scenes in COCO's layout: `ROOT/{train,val}` and `ROOT/annotations`.

    Ids begin at 1, those of the val split at `FIRST_VAL_INDEX` + 1. The same arguments give the
    same bytes. Every file is whole or not there, and the annotation files come last, so a second
    call finishes what a killed one began; it returns False where there was nothing left to do.
    `progress` gets the number of images written after each one. InputError where the folder holds
    something else, or an argument is out of range.
    """
    if min(images, val_images, seed) < 0 or images > FIRST_VAL_INDEX or size < MIN_SIZE:
        raise InputError(
            f"cannot draw {images} + {val_images} scenes of {size} px with seed {seed}",
            remedy=f"no number may be negative, and scenes need at least {MIN_SIZE} px",
        )
    arguments = {
        "images": images,
        "val_images": val_images,
        "seed": seed,
        "size": size,
        "version": VERSION,
    }
    indexes = {
        "train": range(images),
        "val": range(FIRST_VAL_INDEX, FIRST_VAL_INDEX + val_images),
    }
    annotations = {split: root / "annotations" / f"panoptic_{split}.json" for split in indexes}
    scenes = [
        (split, index, *_paths(root, split, index))
        for split, numbers in indexes.items()
        for index in numbers
    ]
    marker = root / "synthetic.json"
    if root.is_file() or any(root.glob("[!.]*")):
        if not marker.is_file() or marker.read_bytes() != _json_bytes(arguments):
            raise InputError(
                "holds something other than these scenes",
                where=root,
                remedy="choose another folder or remove this one",
                code="folder-taken",
            )
        scenes_are_there = all(photo.is_file() and png.is_file() for *_, photo, png in scenes)
        if scenes_are_there and all(file.is_file() for file in annotations.values()):
            return False
    storage = Storage(str(root))
    storage.create()
    with storage.locked():
        _write(marker, _json_bytes(arguments))
        for split, file in annotations.items():
            (root / split).mkdir(exist_ok=True)
            file.with_suffix("").mkdir(parents=True, exist_ok=True)
        rows: dict[str, list[tuple[Any, Any]]] = {split: [] for split in indexes}
        for done, (split, index, photo, png) in enumerate(scenes, start=1):
            rows[split].append(_write_scene(photo, png, index, make_scene(seed, index, size)))
            if progress is not None:
                progress(done)
        for split, file in annotations.items():
            document = {
                "info": {"description": "Made-up scenes", **arguments},
                "licenses": [],
                "categories": CATEGORIES,
                "images": [image for image, _ in rows[split]],
                "annotations": [annotation for _, annotation in rows[split]],
            }
            _write(file, _json_bytes(document))
    return True


def _paint_stuff(
    rng: np.random.Generator, height: int, width: int, unit: float
) -> tuple[Canvas, list[Look]]:
    """Paints bands of stuff with wavy borders; returns them and the look of rows 1, 2, ..."""
    looks = [Look.SKY if rng.random() < 0.7 else Look.WALL]
    looks += [Look.GRASS, Look.WATER] if rng.random() < 0.5 else [Look.WATER, Look.GRASS]
    cuts = [rng.uniform(0.28, 0.4), rng.uniform(0.6, 0.75)]
    if rng.random() < 0.8:
        looks, cuts = looks[:2], [rng.uniform(0.35, 0.6)]
    across = np.linspace(0, 1, width, dtype=np.float32)
    borders = [np.zeros(width, np.float32)]
    for cut in cuts:
        wave = np.sin(across * rng.uniform(3, 9) + rng.uniform(0, 6))
        wave += 0.4 * np.sin(across * rng.uniform(12, 25) + rng.uniform(0, 6))
        borders.append(height * (cut + rng.uniform(0.01, 0.045) * wave).astype(np.float32))
    borders.append(np.full(width, height, np.float32))

    photo: Picture = np.zeros((height, width, 3), np.float32)
    rows = np.ones((height, width), np.uint8)
    down = np.arange(height, dtype=np.float32)[:, None] + np.float32(0.5)
    for row, (look, upper, lower) in enumerate(zip(looks, borders, borders[1:], strict=False), 1):
        first, last = max(0, int(upper.min()) - 1), min(height, int(lower.max()) + 2)
        stuff = TEXTURES[look](rng, last - first, width, unit)
        cover = np.clip(down[first:last] - upper + np.float32(0.5), 0, 1)
        photo[first:last] += cover[..., None] * (stuff - photo[first:last])
        rows[first:last][cover >= 0.5] = row
    return Canvas(photo, rows, rng.standard_normal((height, width), dtype=np.float32)), looks


def _inside_patch(patch: Shape, height: int, width: int) -> npt.NDArray[np.bool_]:
    """(H, W) bool: inside a circle with a wavy outline."""
    x = np.arange(width, dtype=np.float32)[None, :] - np.float32(patch.x)
    y = np.arange(height, dtype=np.float32)[:, None] - np.float32(patch.y)
    turn = np.arctan2(y, x) + patch.angle
    limit = 1 + 0.15 * np.sin(3 * turn) + 0.1 * np.sin(5 * turn + patch.angle)
    return np.asarray(np.hypot(x, y) < patch.r * limit)


def _expose(rng: np.random.Generator, canvas: Canvas) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8: the photo with a random brightness and sensor noise."""
    photo = canvas.photo * np.float32(255 * rng.uniform(0.85, 1.08))
    photo += canvas.grain[..., None] * np.float32(rng.uniform(1.5, 4))
    return np.clip(photo, 0, 255, out=photo).astype(np.uint8)


def _label(
    rng: np.random.Generator, rows: npt.NDArray[np.uint8], table: list[tuple[Look, bool]]
) -> tuple[npt.NDArray[np.int32], tuple[SegmentInfo, ...]]:
    """The id map and the visible segments; ids are colours close to the category's, as in COCO."""
    areas = np.bincount(rows.ravel(), minlength=len(table) + 1)
    ids = [0]
    segments = []
    for row, (look, iscrowd) in enumerate(table, start=1):
        category, identity = CATEGORIES[look], 0
        while identity in ids:
            red, green, blue = np.clip(category["color"] + rng.integers(-24, 25, 3), 0, 255)
            identity = int(red + 256 * green + 65536 * blue)
        ids.append(identity)
        if areas[row] == 0:
            continue  # COCO lists visible segments only
        x, y, width, height = cv2.boundingRect((rows == row).view(np.uint8))
        bbox = (x, y, width, height)
        segments.append(SegmentInfo(identity, category["id"], iscrowd, int(areas[row]), bbox))
    return np.array(ids, np.int32)[rows], tuple(segments)


def _write_scene(
    photo: Path, png: Path, index: int, scene: Scene
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes a scene's photo and PNG; returns its rows of `images` and `annotations`."""
    _write(photo, simplejpeg.encode_jpeg(scene.photo, quality=92, colorspace="RGB"))
    bgr = np.ascontiguousarray(ids_to_rgb(scene.ids)[..., ::-1])
    _write(png, cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 3])[1].tobytes())
    height, width = scene.ids.shape
    names = ("id", "category_id", "area", "bbox")
    segments = [
        {name: getattr(row, name) for name in names} | {"iscrowd": int(row.iscrowd)}
        for row in scene.segments
    ]
    return (
        {"id": index + 1, "file_name": photo.name, "height": height, "width": width},
        {"image_id": index + 1, "file_name": png.name, "segments_info": segments},
    )


def _paths(root: Path, split: str, index: int) -> tuple[Path, Path]:
    """Photo and panoptic PNG of a scene."""
    name, pngs = f"{index + 1:012d}", root / "annotations" / f"panoptic_{split}"
    return root / split / f"{name}.jpg", pngs / f"{name}.png"


def _json_bytes(document: object) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


_write = partial(write_file, durable=False)
