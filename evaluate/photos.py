"""Pictures of any kind as RGB arrays, and ahead of their use."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.pictures.colours import Picture

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
ORIENTATION = 0x0112
"""The EXIF tag."""
TURNS: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By its value, what makes a picture upright."""


def read_picture(path: Path | str, *, upright: bool = True) -> Picture:
    """Any picture that Pillow reads as (H, W, 3) uint8 RGB, the first one of an animation.

    Gray and CMYK become RGB, 16 bits become 8, transparency is ignored.

    Args:
        path: Of the picture.
        upright: Turn it as its EXIF tag says. Annotated photos must not be: annotations lie on
            the pixels as they are stored.

    Raises:
        InputError: Missing, damaged, no picture, or so large that it may be an attack.
    """
    try:
        with Image.open(path) as file:
            image: Image.Image = file
            # By the tag alone: writing all tags anew, as Pillow's own function does, trips over
            # those of an odd type.
            turn = file.getexif().get(ORIENTATION) if upright else None
            if turn in TURNS:
                image = image.transpose(TURNS[turn])
            if image.mode.startswith("I"):  # 16 bits of gray, which Pillow would cut off at 255
                gray = np.asarray(image, np.int64).clip(0, 65535) // 257
                return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=2)
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except FileNotFoundError:
        raise InputError("no such picture", where=path, code="picture-missing") from None
    # A damaged header makes Pillow raise all of these.
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        what = str(error).removesuffix(f" {str(path)!r}")
        raise InputError(
            f"not a readable picture: {what}", where=path, code="picture-damaged"
        ) from None


def list_pictures(paths: Sequence[Path]) -> list[Path]:
    """The pictures named, and those in the folders named, in order.

    Raises:
        InputError: Nothing there.
    """
    found: list[Path] = []
    for path in paths:
        try:
            if not path.is_dir():
                path.stat()
                found.append(path)
                continue
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES)
        except FileNotFoundError:
            raise InputError("no such picture or folder", where=path) from None
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", where=path) from None
        if not inside:
            raise InputError("no JPEG or PNG in this folder", where=path)
        found += inside
    return found


def read_ahead(
    paths: Sequence[Path], ahead: int, *, upright: bool = True
) -> Iterator[Future[Picture]]:
    """Reads pictures in order with a few threads, at most `ahead` of them early.

    Yields:
        One future a path; its `result()` waits for the picture, or raises `read_picture`'s error.
    """
    read = partial(read_picture, upright=upright)
    with ThreadPoolExecutor(2) as pool:
        waiting: list[Future[Picture]] = []
        rest = iter(paths)
        waiting.extend(pool.submit(read, path) for path in islice(rest, ahead))
        while waiting:
            yield waiting.pop(0)
            waiting.extend(pool.submit(read, path) for path in islice(rest, 1))
