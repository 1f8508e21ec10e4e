"""Photos: read strictly, fitted and resized by one rule everywhere, kept as JPEG."""

from __future__ import annotations

import io
import logging
import struct
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import PASSING, read_file
from panoptic_cache.pipeline.coco import PanopticRecord
from panoptic_cache.pipeline.png import (
    MOST_BYTES,
    MOST_PIXELS,
    PNG_SIGNATURE,
    check_png,
    decode_png,
    png_size,
)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
"""Of files that are taken for photos, in any case."""
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
"""The ones that Pillow may read: of others, such as EPS, some start programs."""
ORIENTATION = 0x0112
"""EXIF's tag of how the stored pixels are to be turned: 1 not at all, 2 to 8."""

Fit = Literal["native", "squash", "longest", "crop"]
"""How a picture takes a side of so many pixels: not at all (`native`); as a square (`squash`); with
its longer side (`longest`) or, to be cropped, its shorter one (`crop`)."""

_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for a damaged file."""
# It warns of tags, and of large sizes, which are checked here.
warnings.filterwarnings("ignore", module=r"PIL\.")

log = logging.getLogger(__name__)

_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
_JPEG_SIGNATURE = b"\xff\xd8"


def fitted_size(
    height: int, width: int, side: int | None, fit: Fit, scale: float = 1.0, *, tile: int = 0
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

    InputError names `where` it is damaged.
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


class Photo(NamedTuple):
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


@dataclass(frozen=True, slots=True)
class _File:
    """A photo's file, not decoded."""

    path: Path
    data: bytes
    form: str  # "PNG", "JPEG", or "" for what Pillow reads
    colours: str  # Of a JPEG
    size: tuple[int, int]  # (height, width) of the stored pixels
    orientation: int  # 1 to 8

    def pixels(self, *, upright: bool) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB by Pillow; InputError where it is damaged."""
        with _damage(self.path):
            return turned(_decode(self.data), self.orientation if upright else 1)


def load_photo(record: PanopticRecord, repairs: Counter[str], *, pixels: bool) -> Photo:
    """Reads the photo of an annotated image strictly, and makes RGB of all but colour JPEGs.

    `repairs` counts, by code, what was mended. Colour JPEGs are decoded, instead of only checked,
    where `pixels` are wanted. InputError where it is missing, damaged, of another kind, or of
    another size than annotated.
    """
    file = _read_of(record)
    turn = file.orientation if record.upright else 1
    repairs["photo-orientation"] += file.orientation != turn
    rgb: NDArray[np.uint8] | None = None
    with _damage(record.photo):
        if file.form == "PNG":
            rgb = decode_png(file.data, cv2.COLOR_BGR2RGB, file.path)
            if rgb is None:
                raise ValueError("PNG cannot be decoded")
        elif not file.form:
            rgb = _decode(file.data)
        elif file.colours in {"CMYK", "YCCK"}:
            repairs["photo-cmyk"] += 1
            rgb = _cmyk_to_rgb(simplejpeg.decode_jpeg(file.data, colorspace="CMYK"))
        elif file.colours == "Gray" or pixels or turn != 1:
            repairs["photo-grayscale"] += file.colours == "Gray"
            rgb = simplejpeg.decode_jpeg(file.data, colorspace="RGB")
        else:
            check_jpeg(file.data)
    if rgb is not None:
        rgb = turned(rgb, turn)
    kept = file.form == "JPEG" and file.colours not in {"CMYK", "YCCK", "Gray"} and turn == 1
    return Photo(file.data if kept else None, rgb)


def check_photo(record: PanopticRecord) -> None:
    """What can be told of a photo without decoding a pixel; InputError as from `load_photo`."""
    file = _read_of(record)
    # Markers cannot occur in a scan's data, so a file cut short has none after its last one.
    cut = file.data.find(_END_OF_IMAGE, file.data.rfind(_START_OF_SCAN)) < 0
    with _damage(record.photo):
        if file.form == "JPEG" and cut:
            raise ValueError("cut short")


def read_photo(path: Path | str, *, upright: bool = True) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of any photo of `FORMATS`; the first frame of an animation.

    Gray, CMYK and palettes become RGB, 16 bits become 8, transparency is ignored. InputError where
    it is missing, damaged, no photo, or so large that it may be an attack.
    """
    return _read(Path(path)).pixels(upright=upright)


def read_annotated(record: PanopticRecord) -> NDArray[np.uint8]:
    """An annotated photo, (H, W, 3) uint8 RGB, of the annotated size; errors as of `load_photo`."""
    file = _read_of(record)
    if file.orientation != 1 and not record.upright:
        _warn_of_orientation(record.photo.parent)
    return file.pixels(upright=record.upright)


@cache
def _warn_of_orientation(folder: Path) -> None:
    log.warning("%s: some photos have an EXIF orientation other than 1; see --upright", folder)


def _read_of(record: PanopticRecord) -> _File:
    file = _read(record.photo)
    size, upright = file.size, file.size[::-1] if file.orientation > 4 else file.size
    taken, other = (upright, size) if record.upright else (size, upright)
    # Before decoding: a header can claim gigabytes.
    if taken != (record.height, record.width):
        what = f"sizes differ: photo {taken}, JSON {(record.height, record.width)}"
        remedy = ""
        if other == (record.height, record.width):
            way = "as stored" if record.upright else "turned"
            what += f"; they fit {way}: its EXIF orientation is {file.orientation}"
            remedy = "leave out --upright" if record.upright else "read it with --upright"
        raise InputError(what, where=record.photo, remedy=remedy, code="size-mismatch")
    return file


def _read(path: Path) -> _File:
    try:
        data = read_file(path, MOST_BYTES)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise InputError("no such photo", where=path, code="photo-missing") from None
        what = f"photo unreadable: {error.strerror}"
        code = "input-failing" if error.errno in PASSING else "photo-unreadable"
        remedy = "go on when its disk is back" if error.errno in PASSING else ""
        raise InputError(what, where=path, remedy=remedy, code=code) from None
    orientation, form, colours = 1, "", ""
    with _damage(path):
        if data.startswith(PNG_SIGNATURE):
            check_png(data, path, code="photo-damaged")
            form, size = "PNG", png_size(data)
        elif data.startswith(_JPEG_SIGNATURE) or not data:
            form = "JPEG"
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            size = height, width
        # Rare in data sets, and half a millisecond each.
        tags = {"PNG": b"eXIf" in data, "JPEG": b"Exif\0" in data[: 1 << 16], "": True}
        if tags[form]:
            with open_picture(io.BytesIO(data)) as picture:
                found, orientation = stored_size(picture)
                size = size if form else found
    if size[0] * size[1] > MOST_PIXELS:
        raise InputError(
            f"photo has {size[0]} x {size[1]} pixels, {MOST_PIXELS:,} are the most",
            where=path,
            remedy="cut it into tiles",
            code="photo-large",
        )
    return _File(path, data, form, colours, size, orientation)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise InputError(f"photo damaged: {error}", where=path, code="photo-damaged") from None


@contextmanager
def open_picture(file: Path | io.BytesIO) -> Iterator[Image.Image]:
    """A picture of `FORMATS`, undecoded; ValueError where it, or what is done with it, fails.

    FileNotFoundError where there is no such file.
    """
    try:
        with Image.open(file, formats=FORMATS) as picture:
            yield picture
    except FileNotFoundError:
        raise
    except UnidentifiedImageError:
        raise ValueError(f"it is none of {', '.join(FORMATS)}") from None
    except _ERRORS as error:
        raise ValueError(getattr(error, "strerror", None) or str(error)) from None


def stored_size(picture: Image.Image) -> tuple[tuple[int, int], int]:
    """(height, width) of a picture as it is stored, and its EXIF orientation, 1 to 8."""
    try:
        orientation = picture.getexif().get(ORIENTATION, 1)
    except _ERRORS:  # odd tags turn nothing
        orientation = 1
    orientation = orientation if orientation in range(1, 9) else 1
    size = picture.height, picture.width
    # Pillow tells the size of a TIFF as it will turn it.
    return size[::-1] if picture.format == "TIFF" and orientation > 4 else size, orientation


def _decode(data: bytes) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB by Pillow, as stored; ValueError where it is damaged."""
    with open_picture(io.BytesIO(data)) as picture:
        turn = stored_size(picture)[1]
        picture.load()
        if picture.mode == "F":
            raise ValueError("its pixels are floating-point numbers")
        if picture.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255
            gray = np.asarray(picture, np.int64).clip(0, 65535) // 257
            rgb = np.repeat(gray.astype(np.uint8)[..., None], 3, axis=2)
        else:
            rgb = np.asarray(picture.convert("RGB"))
        if picture.format == "TIFF":  # the only one that Pillow turns itself
            rgb = turned(rgb, {6: 8, 8: 6}.get(turn, turn))
    return rgb


def turned(rgb: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """(H, W, 3) pixels turned as an EXIF orientation says."""
    if orientation > 4:
        rgb = rgb.swapaxes(0, 1)
    if orientation in {2, 3, 6, 7}:
        rgb = rgb[:, ::-1]
    if orientation in {3, 4, 7, 8}:
        rgb = rgb[::-1]
    return np.ascontiguousarray(rgb)


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
