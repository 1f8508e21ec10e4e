"""Any photos and videos: found in folders, given as arrays, and videos frame by frame."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.photo import SUFFIXES

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm")
"""Of files that are taken for videos, in any case."""


def list_photos(
    paths: Sequence[Path], *, recursive: bool = False, besides: Path | None = None
) -> list[Path]:
    """The files among `paths`, and the photos and videos in the folders among them, in order.

    Hidden files, sub-folders unless `recursive`, and what is no photo are not taken; the log says
    so. The folder `besides`, which is to be written, is not looked into. Raises InputError where a
    path does not exist, or a folder holds no photo.
    """
    found: list[Path] = []
    aside: Counter[str] = Counter()
    for path in paths:
        try:
            if path.is_dir():
                inside = [*_inside(path, aside, recursive=recursive, besides=besides)]
                if not inside:
                    raise InputError("no photo or video in this folder", where=path)
                found += inside
            else:
                path.stat()
                found.append(path)
        except FileNotFoundError:
            raise InputError("no such photo or folder", where=path) from None
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", where=path) from None
    if aside:
        listed = ", ".join(f"{count} {name}" for name, count in aside.most_common(10))
        hint = (
            " (--recursive takes what is in folders)" if aside["folders"] and not recursive else ""
        )
        logger.info("not taken: %s%s", listed, hint)
    return found


def _inside(
    folder: Path, aside: Counter[str], *, recursive: bool, besides: Path | None
) -> Iterator[Path]:
    """The photos and videos of a folder, by name, then those of its sub-folders."""
    folders = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            aside["hidden"] += 1
        elif entry.is_dir():
            own = besides is not None and entry.absolute() == besides.absolute()
            if recursive and not own and not entry.is_symlink():
                folders.append(entry)
            else:
                aside["folders"] += 1
        elif entry.suffix.lower() in (*SUFFIXES, *VIDEO_SUFFIXES):
            yield entry
        else:
            aside[f"*{entry.suffix}"] += 1
    for each in folders:
        yield from _inside(each, aside, recursive=recursive, besides=besides)


def as_pixels(photo: object, where: str) -> NDArray[np.uint8]:
    """An array or a picture of Pillow's as (H, W, 3) uint8 RGB.

    Gray becomes RGB, transparency is ignored, floats are in [0, 1]. Integers up to 255 are taken as
    they are, larger ones of 16 bits lose the lower 8. InputError for anything else.
    """
    try:
        if isinstance(photo, Image.Image) and not photo.mode.startswith(("I", "F")):
            photo = photo.convert("RGB")
        pixels = np.asarray(photo)
    # Such as a tensor on a GPU, or a damaged file that Pillow has not read yet.
    except (TypeError, ValueError, RuntimeError, OSError, SyntaxError) as error:
        raise InputError(f"no photo: {error}", where=where) from None
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in {1, 2, 3, 4} or pixels.size == 0:
        given = f"shape {pixels.shape}" if pixels.ndim else type(photo).__name__
        raise InputError(f"{given} is no photo", where=where, remedy="give (H, W, 3) RGB")
    pixels = pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., :1]
    if pixels.dtype != np.uint8:
        pixels = _as_bytes(pixels, where)
    if pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    return pixels


def _as_bytes(pixels: NDArray[Any], where: str) -> NDArray[np.uint8]:
    floats = pixels.dtype.kind == "f"
    if not floats and pixels.dtype.kind not in "iu":
        raise InputError(f"values of type {pixels.dtype}", where=where, remedy="give uint8")
    low, high = pixels.min(), pixels.max()
    most = 1 if floats else 65535 if pixels.dtype.itemsize == 2 else 255
    if not (low >= 0 and high <= most):  # NaN, too
        raise InputError(
            f"{pixels.dtype} values of {low:g} to {high:g}, not of 0 to {most}",
            where=where,
            remedy="give uint8, or floats in [0, 1]",
        )
    if floats:
        pixels = (pixels * 255).round()
    elif high > 255:
        pixels = pixels // 257
    return pixels.astype(np.uint8)


def is_video(path: Path) -> bool:
    """Whether a file is taken for a video, by its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def count_frames(path: Path) -> int:
    """How many frames a video promises; 0 where it cannot be read, or does not say."""
    capture = _opened(path)
    found = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    capture.release()
    return max(0, found)


def read_frames(
    path: Path, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Numbers, from 0, and (H, W, 3) uint8 RGB pixels of the frames that are wanted, in order.

    Raises InputError at the end of a file that was cut short. The last frame of such a file may be
    half a picture, which decoders fill up without a word, so it is left out.
    """
    capture = _opened(path)
    try:
        if not capture.isOpened():
            raise InputError("not a readable video", where=path, code="video-damaged")
        promised = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        # One frame late, as the file may end in it.
        held: tuple[int, NDArray[np.uint8]] | None = None
        for number in count():
            if not capture.grab():
                break
            if held is not None:
                yield held
            held = None
            if wanted(number):
                _, frame = capture.retrieve()
                held = number, np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8)
        if number < promised or number == 0 or _is_cut(path):
            raise InputError(
                f"the video ends early: {max(0, number - 1)} whole frames of {promised}",
                where=path,
                remedy="copy or record it again",
                code="video-cut",
            )
        if held is not None:
            yield held
    finally:
        capture.release()


def _opened(path: Path) -> cv2.VideoCapture:
    # Else both print what they meet.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)


def _is_cut(path: Path) -> bool:
    """Whether an AVI or MP4 is shorter than it says: with all frames, but for half of the last."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF":
            return int.from_bytes(head[4:8], "little") + 8 > size
        end = 0
        while head[4:8].isalpha() and len(head) >= 8:  # boxes, each with its length and name
            length = int.from_bytes(head[:4], "big")
            if length == 1:
                file.seek(end + 8)
                length = int.from_bytes(file.read(8), "big")
            if length < 8:  # 0 is "to the end of the file"
                return False
            end += length
            file.seek(end)
            head = file.read(12)
    return end > size
