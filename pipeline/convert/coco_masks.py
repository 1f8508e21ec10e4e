"""A `segmentation` of COCO's JSON, polygons or RLE of both kinds -> the mask that it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from panoptic_cache.pipeline.convert.source import Size

Mask = NDArray[np.bool_]


def read_segmentation(segmentation: Any, size: Size) -> Mask | None:
    """(H, W) of a segmentation; None where there is none, as beside boxes.

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
