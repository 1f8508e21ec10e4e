"""A folder an image: its photo in `images/`, and in `masks/` one binary mask an instance.

The layout of the 2018 Data Science Bowl.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import Rejection
from panoptic_cache.pipeline.convert.files import MAPS, walk
from panoptic_cache.pipeline.convert.source import (
    Drawing,
    Item,
    Row,
    Size,
    Source,
    category,
    check_size,
    paint,
    read_mask,
)
from panoptic_cache.pipeline.photo import SUFFIXES


def masks(root: Path, *, thing: str, background: str | None, small: bool) -> Source:
    """The folders below `root` that hold `images/`; what no mask covers is background, or void."""
    if not root.is_dir():
        raise InputError("no such folder", where=root)
    items, left_out = [], []
    for folder in sorted(place.parent for place in root.rglob("images") if place.is_dir()):
        name = folder.relative_to(root).as_posix()
        try:
            photos = walk(folder / "images", SUFFIXES)
            if len(photos) > 1:
                what = f"{len(photos)} photos, such as {photos[0]} and {photos[1]}"
                raise InputError(what, where=folder / "images", code="photo-ambiguous")
            if not (folder / "masks").is_dir():
                raise InputError("no folder masks", where=folder, code="mask-missing")
        except InputError as error:
            left_out.append(Rejection.of(name, f"{name}/images", error))
            continue
        photo = folder / "images" / photos[0]
        files = tuple(
            path
            for path in sorted((folder / "masks").iterdir())
            if path.suffix.lower() in MAPS and not path.name.startswith(".")
        )
        draw = partial(_draw, photo, files, background is not None, small)
        new = f"{name}{photo.suffix}" if name != "." else photo.name
        items.append(Item(name, new, photo, draw, files))
    if not items:
        raise InputError("no folder here holds images/ and masks/", where=root)
    names = [thing, background] if background is not None else [thing]
    return Source(
        [category(number, each, number == 1) for number, each in enumerate(names, 1)],
        items,
        left_out,
        {"format": "masks", "background": background, "small": small},
    )


def _draw(
    photo: Path, files: tuple[Path, ...], background: bool, small: bool, size: Size
) -> Drawing:
    def read(path: Path) -> NDArray[np.bool_]:
        mask = read_mask(path)
        check_size((mask.shape[0], mask.shape[1]), photo, size, path)
        if not mask.any():
            raise InputError("mask is empty", where=path, code="mask-empty")
        return mask

    numbered = ((number, read(path)) for number, path in enumerate(files, 1))
    segment_map, overlaps = paint(numbered, size, small=small)
    rows = [Row(1)] * len(files)
    if background:
        segment_map[segment_map == 0] = len(files) + 1
        rows.append(Row(2))
    return Drawing(segment_map, rows, overlaps)
