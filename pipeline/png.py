"""Segment ids of panoptic PNGs: R + 256 G + 65536 B, read strictly."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Set
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import PASSING, read_file

MOST_BYTES = 1 << 30
"""Of the file of a picture."""
MOST_PIXELS = 178_956_970
"""Of a picture: more may be an attack on the memory. Pillow has the same limit."""
MOST_UNKNOWN = 0.02
"""Part of the labelled pixels whose ids the JSON need not list."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER = b"\0\0\0\x0dIHDR"


def read_ids(
    path: Path, size: tuple[int, int] | None = None, *, bgr: bool = False
) -> NDArray[np.int32]:
    """(H, W) int32 segment ids of a panoptic PNG: R + 256 G + 65536 B, 0 = unlabelled.

    With `bgr`, red and blue are swapped, as where an RGB map was written by `cv2.imwrite`.
    InputError where it is missing, damaged (every chunk's checksum is checked, as decoders hand out
    half pictures), not 8-bit RGB(A), or not of the (H, W) that it must have.
    """
    return decode_ids(read_png(path, size), path, bgr=bgr)


def read_png(path: Path, size: tuple[int, int] | None = None) -> bytes:
    """The bytes of a panoptic PNG, checked as `read_ids` says but not decoded."""
    try:
        data = read_file(path, MOST_BYTES)
    except OSError as error:
        code = "png-missing" if isinstance(error, FileNotFoundError) else "png-unreadable"
        code = "input-failing" if error.errno in PASSING else code
        raise InputError(
            f"panoptic PNG unreadable: {error.strerror}", where=path, code=code
        ) from None
    check_png(data, path)
    if data[24] != 8 or data[25] not in {2, 6}:
        raise InputError(
            f"panoptic PNG has bit depth {data[24]}, colour type {data[25]}",
            where=path,
            remedy="ids are read from 8-bit RGB or RGBA",
            code="png-format",
        )
    # Before decoding: a header can claim gigabytes.
    if size is not None and png_size(data) != size:
        raise InputError(
            f"sizes differ: PNG {png_size(data)}, JSON {size}", where=path, code="size-mismatch"
        )
    return data


def png_size(data: bytes) -> tuple[int, int]:
    """(height, width) of a PNG that `check_png` has passed."""
    width, height = struct.unpack_from(">II", data, 16)
    return height, width


def decode_ids(data: bytes, where: Path, *, bgr: bool = False) -> NDArray[np.int32]:
    """Decodes the bytes of an 8-bit RGB(A) PNG into (H, W) int32 ids; see `read_ids`."""
    height, width = png_size(data)
    if height * width > MOST_PIXELS:
        raise InputError(
            f"panoptic PNG has {height} x {width} pixels, {MOST_PIXELS:,} are the most",
            where=where,
            remedy="cut it into tiles",
            code="png-large",
        )
    rgba = decode_png(data, cv2.COLOR_BGR2BGRA if bgr else cv2.COLOR_BGR2RGBA, where)
    if rgba is None:
        raise InputError("panoptic PNG cannot be decoded", where=where, code="png-damaged")
    ids: NDArray[np.int32] = rgba.view("<i4")[..., 0]
    ids &= 0xFFFFFF  # without alpha
    return ids


def decode_png(data: bytes, order: int, where: Path) -> NDArray[np.uint8] | None:
    """(H, W, C) uint8 of a PNG of any kind, its channels in an order of OpenCV's; None if damaged.

    MemoryError says in a line where it does not fit.
    """
    # Colours as they are stored: a PNG with an alpha channel keeps its RGB under IMREAD_COLOR.
    # Pixels where they are stored: OpenCV would turn a PNG by its eXIf chunk.
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        stored = cv2.imdecode(np.frombuffer(data, np.uint8), flags)  # (H, W, 3), blue first
        return None if stored is None else np.asarray(cv2.cvtColor(stored, order), np.uint8)
    except cv2.error as error:
        if error.code != cv2.Error.StsNoMem:
            return None
        height, width = png_size(data)
        what = f"{where}: a PNG of {height} x {width} pixels (use fewer --workers, or cut it up)"
        raise MemoryError(what) from None


def check_known(
    areas: Mapping[int, int],
    known: Set[int],
    where: Path | str,
    *,
    swapped: str = "read it with --bgr, or without where it is given",
) -> None:
    """Raises InputError where too many labelled pixels have ids that no row of the JSON lists.

    `areas` are the pixels of each id, 0 for unlabelled. The message names the reason where it can
    be told; `swapped` is the remedy where red and blue are.
    """
    unknown = {id_: area for id_, area in areas.items() if id_ and id_ not in known}
    total = sum(areas.values()) - areas.get(0, 0)
    if sum(unknown.values()) <= MOST_UNKNOWN * total:
        return
    what, remedy = "", "list them in `segments_info`, or paint them 0"
    mean = sum(unknown.values()) / len(unknown)
    if is_swapped(areas, known):
        what = "; with red and blue swapped, as cv2.imwrite swaps them, they would match"
        remedy = swapped
    elif len(unknown) > max(8, len(known)) and mean < 16:
        what = f": {len(unknown)} ids of {mean:.0f} pixels each, as where a map is resized with"
        what += " interpolation or saved with loss"
        remedy = "resize it to the nearest neighbour, and save it as PNG"
    raise InputError(
        f"{sum(unknown.values()) / total:.0%} of the labelled pixels have ids that the JSON does"
        f" not list{what}",
        where=where,
        remedy=remedy,
        code="png-id-unknown",
    )


def is_swapped(areas: Mapping[int, int], known: Set[int]) -> bool:
    """Whether the ids of a map are listed once their red and blue are swapped."""
    swapped = {(id_ & 0xFF) << 16 | id_ & 0xFF00 | id_ >> 16: area for id_, area in areas.items()}
    matching = sum(area for id_, area in swapped.items() if id_ in known)
    return matching >= (1 - MOST_UNKNOWN) * (sum(areas.values()) - areas.get(0, 0)) > 0


def check_png(data: bytes, where: Path | str, *, code: str = "png-damaged") -> None:
    """Raises InputError unless a PNG begins with its header, is whole, and all checksums fit."""
    if not data.startswith(PNG_SIGNATURE) or data[8:16] != _HEADER:
        raise InputError("is no PNG", where=where, code=code)
    position = len(PNG_SIGNATURE)
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            break
        (crc,) = struct.unpack_from(">I", data, end)
        if crc != zlib.crc32(memoryview(data)[position + 4 : end]):
            raise InputError("PNG damaged: wrong checksum", where=where, code=code)
        if data[position + 4 : position + 8] == b"IEND":
            return
        position = end + 4
    raise InputError("PNG cut short", where=where, code=code)


def ids_to_rgb(ids: NDArray[np.int32]) -> NDArray[np.uint8]:
    """(H, W) int32 ids -> (H, W, 3) uint8 RGB, the inverse of `read_ids`."""
    rgba = np.ascontiguousarray(ids, "<i4").view(np.uint8).reshape(*ids.shape, 4)
    return np.ascontiguousarray(rgba[..., :3])
