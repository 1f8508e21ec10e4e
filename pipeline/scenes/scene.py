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
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from msgspec.structs import asdict

from panoptic_cache.pipeline.annotations import SegmentInfo
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage, write_file
from panoptic_cache.pipeline.png import ids_to_rgb
from panoptic_cache.pipeline.scenes.looks import (
    CATEGORIES,
    THINGS,
    Look,
    Shape,
    inside_patch,
    paint_stuff,
    paint_thing,
)

SPECIALS = ("plain", "unlabelled", "crowd", "concentric", "plain", "tiny", "cut", "split")
"""What a scene contains, by `index % 8`. "unlabelled" alternates: an unknown object, a patch."""

FIRST_VAL_INDEX = 900_000_000
"""The first validation scene; a multiple of 16, so both splits have the same specials."""

MIN_SIZE = 32
VERSION = 1
"""Increases whenever the same arguments give other bytes."""

_COUNTS = {2: 0.2, 3: 0.28, 4: 0.24, 5: 0.14, 6: 0.08, 7: 0.06}
"""Probability of each number of things in a scene."""

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


class _Group(NamedTuple):
    """The shapes of one segment: one, or several for a crowd."""

    look: Look
    shapes: tuple[Shape, ...]
    iscrowd: bool = False


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

    canvas, looks = paint_stuff(rng, height, width, unit=size / 160)
    table = [(look, False) for look in looks]
    groups, patches = _Layout(rng, height, width).scene(special)
    for patch in patches:
        canvas.rows[inside_patch(patch, height, width)] = 0
    for group in groups:
        row = 0
        if group.look != "unknown":
            table.append((group.look, group.iscrowd))
            row = len(table)
        for shape in group.shapes:
            paint_thing(rng, canvas, group.look, shape, row=row)
    ids, segments = _label(rng, canvas.rows, table)
    photo = canvas.photo * np.float32(255 * rng.uniform(0.85, 1.08))  # exposure
    photo += canvas.grain[..., None] * np.float32(rng.uniform(1.5, 4))  # sensor noise
    return Scene(np.clip(photo, 0, 255, out=photo).astype(np.uint8), ids, segments)


def _label(
    rng: np.random.Generator, rows: npt.NDArray[np.uint8], table: list[tuple[Look, bool]]
) -> tuple[npt.NDArray[np.int32], tuple[SegmentInfo, ...]]:
    """The id map and the visible segments; ids are colours close to the category's, as in COCO."""
    category_of = {category["name"]: category for category in CATEGORIES}
    areas = np.bincount(rows.ravel(), minlength=len(table) + 1)
    ids = [0]
    segments = []
    for row, (look, iscrowd) in enumerate(table, start=1):
        category, identity = category_of[look], 0
        while identity in ids:
            red, green, blue = np.clip(category["color"] + rng.integers(-24, 25, 3), 0, 255)
            identity = int(red + 256 * green + 65536 * blue)
        ids.append(identity)
        if areas[row]:  # COCO lists visible segments only
            x, y, width, height = cv2.boundingRect((rows == row).view(np.uint8))
            box = (x, y, width, height)
            segments.append(
                SegmentInfo(identity, category["id"], 1 if iscrowd else 0, int(areas[row]), box)
            )
    return np.array(ids, np.int32)[rows], tuple(segments)


class _Layout:
    """Where the things of a scene are, in pixels: decided before painting."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.rng, self.height, self.width = rng, height, width
        self.side = min(height, width)

    def scene(self, special: str) -> tuple[list[_Group], list[Shape]]:
        """The things back to front, and the patches of stuff to leave unlabelled.

        Those of `special` come last, so that nothing hides them.
        """
        front: list[_Group] = getattr(self, f"_{special}", list)()
        patches = []
        if special == "patch":
            radius = self.side * self.rng.uniform(0.16, 0.24)
            patches = [Shape(*self._spot(radius), radius, self.rng.uniform(0, 2 * np.pi))]
        taken = [shape for group in front for shape in group.shapes] + patches
        count = int(self.rng.choice(list(_COUNTS), p=list(_COUNTS.values())))
        things = []
        for _ in range(max(2, count - len(front))):
            look, radius = self._look(), self.side * (0.08 + 0.2 * self.rng.random() ** 1.2)
            spot = self._free_spot(radius, taken)
            if spot is None:
                continue
            shape = self._pose(look, spot, radius)
            if look == "crate":
                shape = Shape(shape.x, shape.y, shape.r, shape.angle, self.rng.uniform(1, 2))
            taken.append(shape)
            things.append(_Group(look, (shape,)))
        things.sort(key=lambda group: group.shapes[0].y)  # lower in the image is nearer
        return things + front, patches

    def _spot(self, margin: float) -> tuple[float, float]:
        """A point (x, y) at least `margin` pixels from the border."""
        x = self.rng.uniform(margin, self.width - margin)
        return x, self.rng.uniform(margin, self.height - margin)

    def _look(self, looks: tuple[Look, ...] = THINGS) -> Look:
        return looks[int(self.rng.integers(len(looks)))]

    def _pose(self, look: Look, spot: tuple[float, float], radius: float) -> Shape:
        """A shape in a typical pose: tents stand about upright, other things are turned freely."""
        tent = look == "tent"
        turn = self.rng.normal(0, 0.3) if tent else self.rng.uniform(0, 2 * np.pi)
        return Shape(*spot, radius, float(turn))

    def _free_spot(self, radius: float, taken: list[Shape]) -> tuple[float, float] | None:
        """A centre (x, y) that leaves more than half of a smaller neighbour visible, or None."""
        rng, margin = self.rng, 0.8 * radius
        peers = [other for other in taken if other.r > radius / 3]
        for _ in range(24):
            if peers and rng.random() < 0.4:  # often next to another thing: segments overlap
                other = peers[int(rng.integers(len(peers)))]
                reach, turn = 0.85 * (other.r + radius), rng.uniform(0, 2 * np.pi)
                x, y = other.x + reach * np.cos(turn), other.y + reach * np.sin(turn)
            else:
                x, y = self._spot(margin)
            inside = margin <= x <= self.width - margin and margin <= y <= self.height - margin
            if inside and all(
                np.hypot(x - o.x, y - o.y) > 0.95 * max(radius, o.r) + 0.2 * min(radius, o.r)
                for o in taken
            ):
                return float(x), float(y)
        return None

    def _unknown(self) -> list[_Group]:
        """An object of no category."""
        radius = self.side * self.rng.uniform(0.13, 0.2)
        return [_Group("unknown", (self._pose("unknown", self._spot(radius), radius),))]

    def _crowd(self) -> list[_Group]:
        """Ten to twenty small things of one look, in lines, as one segment."""
        rng, look, radius = self.rng, self._look(), max(2.0, 0.042 * self.side)
        columns, lines = int(rng.integers(5, 8)), int(rng.integers(2, 4))
        x, y = rng.uniform(0.35, 0.65) * self.width, rng.uniform(0.45, 0.75) * self.height
        shapes = []
        for i in range(columns * lines):
            right = 2.5 * (i % columns - (columns - 1) / 2) + rng.uniform(-0.4, 0.4)
            down = 2.5 * (i // columns - (lines - 1) / 2) + rng.uniform(-0.4, 0.4)
            spot = x + radius * right, y + radius * down
            shapes.append(self._pose(look, spot, radius * rng.uniform(0.85, 1.15)))
        return [_Group(look, tuple(shapes), iscrowd=True)]

    def _concentric(self) -> list[_Group]:
        """Two things with the same centre: their centroids do not tell them apart."""
        radius = self.side * self.rng.uniform(0.2, 0.28)
        spot = self._spot(radius)
        back, front, part = (
            ("ring", "ball", 0.4),
            ("ring", "ball", 0.4),
            ("crate", "star", 0.55),
            ("ball", "crate", 0.5),
        )[int(self.rng.integers(4))]
        sizes = ((back, radius), (front, part * radius))
        return [_Group(look, (self._pose(look, spot, reach),)) for look, reach in sizes]

    def _tiny(self) -> list[_Group]:
        """Two things a few pixels wide, centred on a pixel so that even the thinnest covers one."""
        groups = []
        for _ in range(2):
            look, radius = self._look(), max(2.0, self.side * self.rng.uniform(0.017, 0.023))
            x, y = self._spot(4 * radius)
            shape = self._pose(look, (int(x) + 0.5, int(y) + 0.5), radius)
            groups.append(_Group(look, (shape,)))
        return groups

    def _cut(self) -> list[_Group]:
        """A large thing, about half of it outside the image."""
        look, radius = self._look(), self.side * self.rng.uniform(0.2, 0.28)
        x, y = self._spot(radius)
        out, border = self.rng.uniform(-0.25, 0.25) * radius, int(self.rng.integers(4))
        if border < 2:
            x = border * self.width + out
        else:
            y = (border - 2) * self.height + out
        return [_Group(look, (self._pose(look, (x, y), radius),))]

    def _split(self) -> list[_Group]:
        """A thing that a plank in front of it cuts in two."""
        look = self._look(("ball", "crate"))
        radius = self.side * self.rng.uniform(0.2, 0.26)
        x, y = self._spot(1.3 * radius)
        plank = Shape(x, y, 1.3 * radius, self.rng.uniform(0, np.pi), self.rng.uniform(4.5, 6))
        thing = _Group(look, (self._pose(look, (x, y), radius),))
        return [thing, _Group("crate", (plank,))]


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
        what = f"cannot draw {images} + {val_images} scenes of {size} px with seed {seed}"
        remedy = f"no number may be negative, and scenes need at least {MIN_SIZE} px"
        raise InputError(what, remedy=remedy)
    arguments = {"images": images, "val_images": val_images, "seed": seed, "size": size}
    arguments["version"] = VERSION
    scenes = [("train", index) for index in range(images)]
    scenes += [("val", FIRST_VAL_INDEX + index) for index in range(val_images)]
    annotations = root / "annotations"
    documents: dict[str, dict[str, Any]] = {
        split: {
            "info": {"description": "Made-up scenes", **arguments},
            "licenses": [],
            "categories": CATEGORIES,
            "images": [],
            "annotations": [],
        }
        for split in ("train", "val")
    }

    def paths(split: str, index: int) -> tuple[Path, Path]:
        name = f"{index + 1:012d}"
        return root / split / f"{name}.jpg", annotations / f"panoptic_{split}" / f"{name}.png"

    marker = root / "synthetic.json"
    if root.is_file() or any(root.glob("[!.]*")):
        if not marker.is_file() or marker.read_bytes() != _json_bytes(arguments):
            what, remedy = (
                "holds something other than these scenes",
                "choose another folder or remove",
            )
            raise InputError(what, root, f"{remedy} this one", "folder-taken")
        files = [path for scene in scenes for path in paths(*scene)]
        files += [annotations / f"panoptic_{split}.json" for split in documents]
        if all(path.is_file() for path in files):
            return False
    storage = Storage(str(root))
    storage.create()
    with storage.locked():
        _write(marker, _json_bytes(arguments))
        for split in documents:
            (root / split).mkdir(exist_ok=True)
            (annotations / f"panoptic_{split}").mkdir(parents=True, exist_ok=True)
        for done, (split, index) in enumerate(scenes, start=1):
            image, annotation = _write_scene(
                *paths(split, index), index, make_scene(seed, index, size)
            )
            documents[split]["images"].append(image)
            documents[split]["annotations"].append(annotation)
            if progress is not None:
                progress(done)
        for split, document in documents.items():
            _write(annotations / f"panoptic_{split}.json", _json_bytes(document))
    return True


def _write_scene(
    photo: Path, png: Path, index: int, scene: Scene
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes a scene's photo and PNG; returns its rows of `images` and `annotations`."""
    _write(photo, simplejpeg.encode_jpeg(scene.photo, quality=92, colorspace="RGB"))
    bgr = np.ascontiguousarray(ids_to_rgb(scene.ids)[..., ::-1])
    _write(png, cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 3])[1].tobytes())
    height, width = scene.ids.shape
    segments = [
        {key: value for key, value in asdict(row).items() if key != "score"}
        for row in scene.segments
    ]
    image = {"id": index + 1, "file_name": photo.name, "height": height, "width": width}
    return image, {"image_id": index + 1, "file_name": png.name, "segments_info": segments}


def _json_bytes(document: object) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


_write = partial(write_file, durable=False)
