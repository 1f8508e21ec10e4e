"""Segment ids of panoptic PNGs: R + 256 G + 65536 B, read strictly."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from panoptic_cache.pipeline.base.errors import InputError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER = b"\0\0\0\x0dIHDR"


def read_ids(path: Path, size: tuple[int, int] | None = None) -> NDArray[np.int32]:
    """Segment ids of a panoptic PNG: R + 256 G + 65536 B.

    Args:
        path: Of the PNG.
        size: (H, W) that it must have; any where None.

    Returns:
        (H, W) int32, 0 = unlabelled.

    Raises:
        InputError: Missing, damaged (every chunk's checksum is checked, as decoders hand out
            half pictures), not 8-bit RGB(A), or of another size.
    """
    return decode_ids(read_png(path, size), path)


def read_png(path: Path, size: tuple[int, int] | None = None) -> bytes:
    """The bytes of a panoptic PNG, checked as `read_ids` says but not decoded."""
    try:
        data = path.read_bytes()
    except OSError as error:
        code = "png-missing" if isinstance(error, FileNotFoundError) else "png-unreadable"
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


def decode_ids(data: bytes, where: Path) -> NDArray[np.int32]:
    """Decodes the bytes of an 8-bit RGB(A) PNG into (H, W) int32 ids; see `read_ids`."""
    # Colours as they are stored: a PNG with an alpha channel keeps its RGB under IMREAD_COLOR.
    # Pixels where they are stored: OpenCV would turn a PNG by its eXIf chunk.
    try:
        bgr = cv2.imdecode(
            np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        )
    except cv2.error:  # it claims more pixels than OpenCV reads
        bgr = None
    if bgr is None:
        raise InputError("panoptic PNG cannot be decoded", where=where, code="png-damaged")
    rgba = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGBA)
    ids: NDArray[np.int32] = rgba.view("<i4")[..., 0] & 0xFFFFFF
    return ids


def check_png(data: bytes, where: Path | str, *, code: str = "png-damaged") -> None:
    """Walks the chunks of a PNG and checks that the first is its header, and every checksum.

    Raises:
        InputError: No PNG, cut short, or a checksum is wrong.
    """
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
