"""What a format has to say: its categories, and of each image how to draw its segments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from panoptic_cache.pipeline.annotations import ImageId
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import Rejection
from panoptic_cache.pipeline.photo import FORMATS, ORIENTATION

_SIDEWAYS = {5, 6, 7, 8}
"""EXIF orientations that swap height and width."""


class Row(NamedTuple):
    """A segment of a drawing."""

    category_id: int  # Of the source's categories; of another one, it is void
    iscrowd: bool = False


@dataclass(frozen=True, slots=True)
class Drawing:
    """One image's segments. Rows without pixels go; those of one category of stuff become one."""

    segment_map: NDArray[np.uint32]  # (H, W), 0 = unlabelled, i = row i - 1
    rows: list[Row]
    overlaps: int = 0  # Pixels that more than one instance claimed
    mended: tuple[str, ...] = ()  # Codes of what was passed over


Size = tuple[int, int]
"""(height, width)"""
Draw = Callable[[Size], Drawing]
"""Draws the segments of a photo of that size; InputError where the image must be left out."""


@dataclass(frozen=True, slots=True)
class Item:
    """An image to convert."""

    image_id: ImageId
    name: str  # The photo's name in the new dataset: a relative path with slashes
    photo: Path
    draw: Draw  # Pickled, so a function of a module or a `partial` of one
    inputs: tuple[Path, ...]  # Files that `draw` reads, which a later run looks at for changes
    mark: str = ""  # The same for what it does not read from files of its own


@dataclass(frozen=True, slots=True)
class Source:
    """A whole split in some format."""

    # `id`, `name` and `isthing`, and what else an annotation file says of a category.
    categories: list[dict[str, Any]]
    items: list[Item]
    left_out: list[Rejection] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)  # The format and its options


def category(number: int, name: str, isthing: bool) -> dict[str, Any]:
    """A row of the categories."""
    return {"id": number, "name": name, "isthing": int(isthing)}


def photo_size(path: Path, *, upright: bool = False) -> Size:
    """(height, width) of a photo, as stored or as its EXIF tag turns it; InputError where none."""
    with _open(path, "photo") as photo:
        size = photo.height, photo.width
        sideways = photo.getexif().get(ORIENTATION, 1) in _SIDEWAYS
        # Pillow tells the size of a TIFF as it will turn it.
        return size[::-1] if sideways and upright != (photo.format == "TIFF") else size


def check_size(found: Size, photo: Path, size: Size, where: Path | str) -> None:
    """Raises InputError unless what is annotated has the photo's size."""
    if found == size:
        return
    remedy = ""
    with _open(photo, "photo") as opened:
        orientation = opened.getexif().get(ORIENTATION, 1)
    if found == size[::-1] and orientation in _SIDEWAYS:
        remedy = f"its EXIF orientation is {orientation}: give --upright, or leave it out"
    raise InputError(
        f"is {found[0]} x {found[1]}, its photo {size[0]} x {size[1]}",
        where=where,
        remedy=remedy,
        code="size-mismatch",
    )


def read_map(path: Path, what: str = "map") -> NDArray[np.uint32]:
    """(H, W) of an image of one channel of whole numbers; palettes are taken as their numbers.

    Raises:
        InputError: Missing, damaged, of floats, of several channels or pages, or negative.
    """
    with _open(path, what) as image:
        pages = getattr(image, "n_frames", 1)
        try:
            values = np.asarray(image)
        except (OSError, ValueError, SyntaxError) as error:
            raise _unreadable(path, what, error) from None
    problem = ""
    if pages > 1:
        problem = f"has {pages} pages"
    elif values.ndim != 2:
        problem = f"has {values.shape[-1]} channels"
    elif values.dtype.kind == "f":
        problem = "is of floats"
    elif values.dtype.kind == "i" and values.size and values.min() < 0:
        problem = f"has negative values, such as {values.min()}"
    if problem:
        raise InputError(
            f"{what} {problem}",
            where=path,
            remedy="save one channel of whole numbers: PNG of 8 or 16 bits, or TIFF",
            code="map-format",
        )
    return np.ascontiguousarray(values, np.uint32)


def read_mask(path: Path) -> NDArray[np.bool_]:
    """(H, W): where any colour of an image is not black."""
    with _open(path, "mask") as image:
        try:
            bands = image.convert("RGB") if image.mode in {"P", "PA", "LA", "RGBA"} else image
            values = np.asarray(bands)
        except (OSError, ValueError, SyntaxError) as error:
            raise _unreadable(path, "mask", error) from None
    mask: NDArray[np.bool_] = (values.any(-1) if values.ndim == 3 else values) != 0
    return mask


def paint(
    masks: Iterable[tuple[int, NDArray[np.bool_]]], size: Size, *, small: bool
) -> tuple[NDArray[np.uint32], int]:
    """Paints masks over each other, each with its number; the last, or the smallest, on top.

    Returns the map (H, W) and the pixels that more than one of them claims.
    """
    segment_map = np.zeros(size, np.uint32)
    claims = np.zeros(size, np.uint16)
    kept = []
    for number, mask in masks:
        claims += mask
        if small:
            kept.append((np.count_nonzero(mask), number, np.packbits(mask)))
        else:
            segment_map[mask] = number
    for _, number, bits in sorted(kept, key=lambda one: (-one[0], one[1])):
        mask = np.unpackbits(bits, count=segment_map.size).reshape(size) != 0
        segment_map[mask] = number
    return segment_map, int(np.count_nonzero(claims > 1))


def _open(path: Path, what: str) -> Image.Image:
    try:
        return Image.open(path, formats=FORMATS)
    except FileNotFoundError:
        raise InputError(f"{what} missing", where=path, code=f"{what}-missing") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(path, what, error) from None


def _unreadable(path: Path, what: str, error: Exception) -> InputError:
    why = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    why = f"it is none of {', '.join(FORMATS)}" if "cannot identify" in why else why
    return InputError(f"{what} cannot be read: {why}", where=path, code=f"{what}-unreadable")
