"""Pictures of any kind as RGB arrays, and ahead of their use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pipeline.draw import Picture
from pipeline.errors import InputError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")


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
        with Image.open(path) as image:
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # 16 bits of gray, which Pillow would cut off at 255
                gray = np.asarray(image, np.int64).clip(0, 65535) // 257
                return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=2)
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except FileNotFoundError:
        raise InputError("no such picture", where=path, code="picture-missing") from None
    # A damaged header makes Pillow raise all of these.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
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
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES)
            if not inside:
                raise InputError("no JPEG or PNG in this folder", where=path)
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise InputError("no such picture or folder", where=path)
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
