"""What a format has to say: its categories, and of each image how to draw its segments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from panoptic_cache.pipeline.annotations import ImageId, loose_row, parse_file, parse_row
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import read_file
from panoptic_cache.pipeline.coco import Rejection
from panoptic_cache.pipeline.photo import open_picture, stored_size

T = TypeVar("T")
Mask = NDArray[np.bool_]
Size = tuple[int, int]
"""(height, width)"""


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


@dataclass(frozen=True, slots=True)
class Canvas:
    """The photo that segments are drawn for."""

    photo: Path
    size: Size

    def check(self, found: tuple[int, ...], where: Path | str) -> None:
        """Raises InputError unless what is annotated has the photo's size."""
        height, width, *_ = found
        if (height, width) == self.size:
            return
        with opened(self.photo, "photo") as photo:
            orientation = stored_size(photo)[1]
        turned = (width, height) == self.size and orientation > 4
        remedy = f"its EXIF orientation is {orientation}: give --upright, or leave it out"
        raise InputError(
            f"is {height} x {width}, its photo {self.size[0]} x {self.size[1]}",
            where=where,
            remedy=remedy if turned else "",
            code="size-mismatch",
        )


Draw = Callable[[Canvas], Drawing]
"""Draws the segments of a photo; InputError where the image must be left out."""


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


@contextmanager
def opened(path: Path, what: str) -> Iterator[Image.Image]:
    """A picture, undecoded; InputError where it is missing or what is done with it fails."""
    try:
        with open_picture(path) as picture:
            yield picture
    except FileNotFoundError:
        raise InputError(f"{what} missing", where=path, code=f"{what}-missing") from None
    except ValueError as error:
        what, code = f"{what} cannot be read: {error}", f"{what}-unreadable"
        raise InputError(what, where=path, code=code) from None


def photo_size(path: Path, *, upright: bool) -> Size:
    """(height, width) of a photo, as stored or as its EXIF tag turns it; InputError where none."""
    with opened(path, "photo") as photo:
        size, orientation = stored_size(photo)
    return size[::-1] if upright and orientation > 4 else size


def read_map(path: Path, canvas: Canvas | None = None) -> NDArray[np.uint32]:
    """(H, W) of an image of one channel of whole numbers; palettes are taken as their numbers.

    InputError where it is of floats, of several channels or pages, negative, or not of the size of
    a canvas.
    """
    with opened(path, "map") as image:
        pages = getattr(image, "n_frames", 1)
        values = np.asarray(image)
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
            f"map {problem}",
            where=path,
            remedy="save one channel of whole numbers: PNG of 8 or 16 bits, or TIFF",
            code="map-format",
        )
    if canvas is not None:
        canvas.check(values.shape, path)
    return np.ascontiguousarray(values, np.uint32)


def read_mask(path: Path, canvas: Canvas) -> Mask:
    """(H, W): where any colour of an image is not black; InputError where none is."""
    with opened(path, "mask") as image:
        bands = image.convert("RGB") if image.mode in {"P", "PA", "LA", "RGBA"} else image
        values = np.asarray(bands)
    canvas.check(values.shape, path)
    mask: Mask = (values.any(-1) if values.ndim == 3 else values) != 0
    if not mask.any():
        raise InputError("mask is empty", where=path, code="mask-empty")
    return mask


def read_segmentation(segmentation: Any, size: Size) -> Mask | None:
    """(H, W) of polygons or RLE of both kinds; None where there is none, as beside boxes.

    Raises ValueError where it is malformed, or of no photo of that size.
    """
    if segmentation in (None, [], [[]], {}):
        return None
    try:
        if isinstance(segmentation, dict):
            rle = _rle(segmentation, size)
        else:
            rle = coco_mask.merge(coco_mask.frPyObjects(_polygons(segmentation, size), *size))
    except KeyError as error:
        raise ValueError(f"RLE has no {error.args[0]}") from None
    except (TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(error) from None
    mask: Mask = coco_mask.decode(rle) != 0
    return mask


def _rle(rle: Mapping[str, Any], size: Size) -> dict[str, Any]:
    """Runs as the decoder takes them; ValueError where they are not of the photo's size."""
    found, counts = tuple(rle["size"]), rle["counts"]
    if found != size:
        raise ValueError(f"RLE is {found[0]} x {found[1]}, its photo {size[0]} x {size[1]}")
    runs = _runs(counts) if isinstance(counts, str) else counts
    if min(runs, default=0) < 0 or sum(runs) != size[0] * size[1]:
        # The decoder would fill the rest with what lies in memory.
        raise ValueError(f"RLE has {sum(runs)} pixels, its photo {size[0] * size[1]}")
    packed: dict[str, Any] = coco_mask.frPyObjects({"size": list(size), "counts": runs}, *size)
    return packed


def _runs(text: str) -> list[int]:
    """The runs of a compressed RLE: base 32, low digits first, differences to the last but one."""
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        digit = ord(letter) - 48
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        value -= (1 << shift) if digit & 16 else 0
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs


def _polygons(parts: list[Any], size: Size) -> list[list[float]]:
    """Lists of x, y, x, y, ...; ValueError where one is none, or not near the photo."""
    if not isinstance(parts[0], list):
        parts = [parts]
    polygons = []
    for part in parts:
        points = np.asarray(part, np.float64).reshape(-1, 2)  # pairs, or flat
        if len(points) < 3:
            raise ValueError(f"polygon has {len(points)} points")
        if not np.isfinite(points).all():
            raise ValueError("polygon has a point that is no number")
        low, high, edge = points.min(0), points.max(0), np.array(size[::-1])
        if (high < 0).any() or (low > edge).any() or (low < -edge).any() or (high > 2 * edge).any():
            box = f"x {low[0]:g} to {high[0]:g}, y {low[1]:g} to {high[1]:g}"
            raise ValueError(f"polygon lies outside the photo, {box} of {edge[0]} x {edge[1]}")
        polygons.append(points.ravel().tolist())
    return polygons


def paint(
    masks: Iterable[tuple[int, Mask]], size: Size, *, small: bool
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


def read_lists(path: Path, kind: type[T], what: str, remedy: str = "") -> tuple[Any, list[T]]:
    """The lists of an annotation file, and its categories; InputError where it is no `what`."""
    try:
        content = parse_file(read_file(path))
        if content.images is None or content.categories is None:
            raise ValueError("no images or no categories")
        return content, [parse_row(row, kind) for row in content.categories]
    except OSError as error:
        raise InputError(f"cannot read: {error.strerror}", where=path) from None
    except ValueError as error:
        raise InputError(f"not a COCO {what} file: {error}", where=path, remedy=remedy) from None


def read_items(
    rows: Iterable[Any], kind: type[T], make: Callable[[T], Item], what: str
) -> tuple[list[Item], list[Rejection]]:
    """The images of the rows of `images`; those of which `make` raises an error are left out."""
    items, left_out = [], []
    for each in rows:
        said = loose_row(each)
        image_id, called = said.get("id", ""), str(said.get("file_name", ""))
        try:
            items.append(make(parse_row(each, kind)))
        except InputError as error:
            left_out.append(Rejection.of(image_id, called, error))
        except ValueError as error:
            message = f"malformed {what}: {error}"
            left_out.append(Rejection(str(image_id), called, "annotation-malformed", message))
    return items, left_out
