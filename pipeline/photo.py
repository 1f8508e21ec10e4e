"""Photos: read strictly, fitted and resized by one rule everywhere, kept as JPEG."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import PanopticRecord
from panoptic_cache.pipeline.png import PNG_SIGNATURE, check_png, png_size

Fit = Literal["native", "squash", "longest", "crop"]
"""How a picture takes a side of so many pixels: not at all (`native`); as a square (`squash`); with
its longer side (`longest`) or, to be cropped, its shorter one (`crop`)."""

_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
_JPEG_SIGNATURE = b"\xff\xd8"


def fitted_size(
    height: int,
    width: int,
    side: int | None,
    fit: Fit,
    scale: float = 1.0,
    *,
    tile: int = 0,
) -> tuple[int, int]:
    """(height, width) of a picture after a fit, times a scale; no side is below 1 pixel.

    With a tile, so many pixels of the picture take the side, whatever the fit.
    """
    if side is None or fit == "native":
        return height, width
    fitted: tuple[float, float] = side, side
    if tile or fit != "squash":
        taken = max(height, width) if fit == "longest" else min(height, width)
        ratio = side / (tile or taken)
        fitted = height * ratio, width * ratio
    return max(1, round(fitted[0] * scale)), max(1, round(fitted[1] * scale))


def decode_photo(data: bytes, where: str, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of JPEG bytes, at its own or another (height, width).

    Raises:
        InputError: It is damaged; `where` names it.
    """
    try:
        if size is None:
            return np.asarray(simplejpeg.decode_jpeg(data, "RGB"))
        # The decoder may skip frequencies that shrinking would throw away.
        photo = simplejpeg.decode_jpeg(data, "RGB", min_height=size[0], min_width=size[1])
    except ValueError as error:
        raise InputError(
            f"photo damaged: {error}",
            where=where,
            remedy="run panoptic verify --deep",
            code="member-damaged",
        ) from None
    return resize_photo(photo, size)


def resize_photo(photo: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resizes (H, W, 3) to another (height, width): a side that shrinks by area, else bilinear.

    Rendering, training and prediction all do it here, so that a network sees the same picture.
    """
    # Apart, for OpenCV averages by area only where no side grows, and else skips pixels.
    smaller = min(size[0], photo.shape[0]), min(size[1], photo.shape[1])
    for (height, width), mode in ((smaller, cv2.INTER_AREA), (size, cv2.INTER_LINEAR)):
        if photo.shape[:2] != (height, width):
            resized = cv2.resize(photo, (width, height), interpolation=mode)
            photo = np.asarray(resized, np.uint8)
    return photo


@dataclass(frozen=True, slots=True)
class Photo:
    """A photo, as its file's bytes, as pixels, or both."""

    data: bytes | None  # Those of a colour JPEG, which may be kept
    # (H, W, 3) uint8, of any other, and where the settings ask for another size.
    rgb: NDArray[np.uint8] | None

    def resized(self, size: tuple[int, int], quality: int) -> bytes:
        """JPEG bytes at a size (height, width); the file's own where that is its own."""
        if self.data is not None and (self.rgb is None or self.rgb.shape[:2] == size):
            return self.data
        assert self.rgb is not None
        return encode_jpeg(resize_photo(self.rgb, size), quality)


def encode_jpeg(rgb: NDArray[np.uint8], quality: int) -> bytes:
    """(H, W, 3) uint8 RGB -> JPEG bytes, colour at full resolution."""
    return bytes(
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(rgb), quality=quality, colorspace="RGB", colorsubsampling="444"
        )
    )


def read_photo(record: PanopticRecord, repairs: Counter[str], *, pixels: bool) -> Photo:
    """Reads a JPEG or PNG strictly; makes RGB of PNG, grayscale and CMYK.

    Args:
        record: The annotated image.
        repairs: Counts, by code, of what was converted; added to.
        pixels: Decode a colour JPEG, too, instead of only checking it.

    Raises:
        InputError: Missing, damaged, of another kind, or of another size than annotated.
    """
    try:
        data, colours = read_bytes(record)
        rgb: NDArray[np.uint8] | None = None
        if colours == "PNG":
            rgb = _decode_png(data)
        elif colours in {"CMYK", "YCCK"}:
            repairs["photo-cmyk"] += 1
            rgb = _cmyk_to_rgb(simplejpeg.decode_jpeg(data, colorspace="CMYK"))
        elif colours == "Gray" or pixels:
            repairs["photo-grayscale"] += colours == "Gray"
            rgb = simplejpeg.decode_jpeg(data, colorspace="RGB")
        else:
            check_jpeg(data)
    except ValueError as error:
        raise _damaged(record, error) from None
    own = colours not in {"PNG", "CMYK", "YCCK", "Gray"}
    return Photo(data if own else None, rgb)


def check_photo(record: PanopticRecord) -> None:
    """What can be told of a photo without decoding a pixel.

    Raises:
        InputError: As `read_photo` would.
    """
    try:
        data, colours = read_bytes(record)
        # Markers cannot occur in a scan's data, so a file cut short has none after its last one.
        cut = data.find(_END_OF_IMAGE, data.rfind(_START_OF_SCAN)) < 0
        if colours != "PNG" and cut:
            raise ValueError("cut short")
    except ValueError as error:
        raise _damaged(record, error) from None


def read_bytes(record: PanopticRecord) -> tuple[bytes, str]:
    """A photo's file, of the size that is annotated, not decoded; and its colour space or `PNG`.

    Raises:
        InputError: It cannot be read, is of another kind, or has another size.
        ValueError: It is damaged.
    """
    try:
        data = record.photo.read_bytes()
    except OSError as error:
        code = "photo-missing" if isinstance(error, FileNotFoundError) else "photo-unreadable"
        raise InputError(
            f"photo unreadable: {error.strerror}", where=record.photo, code=code
        ) from None
    if data.startswith(PNG_SIGNATURE):
        check_png(data, record.photo, code="photo-damaged")
        (height, width), colours = png_size(data), "PNG"
    elif data.startswith(_JPEG_SIGNATURE) or not data:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    else:
        raise InputError(
            "photo is neither JPEG nor PNG",
            where=record.photo,
            remedy="convert it",
            code="photo-damaged",
        )
    # Before decoding: a header can claim gigabytes.
    if (height, width) != (record.height, record.width):
        raise InputError(
            f"sizes differ: photo {(height, width)}, JSON {(record.height, record.width)}",
            where=record.photo,
            code="size-mismatch",
        )
    return data, colours


def _damaged(record: PanopticRecord, error: ValueError) -> InputError:
    return InputError(f"photo damaged: {error}", where=record.photo, code="photo-damaged")


def _decode_png(data: bytes) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of a PNG of any kind; ValueError where it is damaged."""
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        bgr: Any = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        bgr = None
    if bgr is None:
        raise ValueError("PNG cannot be decoded")
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)


def check_jpeg(data: bytes) -> None:
    """Raises ValueError where a colour JPEG is damaged, as decoding all of it would.

    An eighth of the size leaves out the inverse transform, in which nothing can go wrong. Every
    bit is still read, and that is where damage shows.
    """
    simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=1, min_width=1, min_factor=8)


def _cmyk_to_rgb(cmyk: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Inks as Adobe's writers store them, inverted: RGB = CMY * K / 255."""
    inks = cmyk.astype(np.uint16)
    return (inks[..., :3] * inks[..., 3:] // 255).astype(np.uint8)
