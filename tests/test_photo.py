"""Photos: one resize without aliasing, and files of every kind as they are stored."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from panoptic_cache.pipeline.coco import PanopticRecord
from panoptic_cache.pipeline.photo import load_photo, resize_photo


def noise(*size: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)


def shrunk(line: NDArray[np.floating[Any]], size: int) -> NDArray[np.float64]:
    """Along the first axis: each pixel the mean of what it covers."""
    step = len(line) / size
    result = np.zeros((size, *line.shape[1:]))
    for target in range(size):
        for source in range(len(line)):
            overlap = min((target + 1) * step, source + 1) - max(target * step, source)
            result[target] += max(overlap, 0) / step * line[source]
    return result


def grown(line: NDArray[np.floating[Any]], size: int) -> NDArray[np.float64]:
    """Along the first axis: each pixel between the two whose centres it lies between."""
    result = np.zeros((size, *line.shape[1:]))
    for target in range(size):
        place = min(max((target + 0.5) * len(line) / size - 0.5, 0), len(line) - 1)
        low = int(place)
        high = min(low + 1, len(line) - 1)
        result[target] = line[low] * (1 - place + low) + line[high] * (place - low)
    return result


@pytest.mark.parametrize(
    "size", [(20, 15), (31, 22), (40, 30), (53, 44), (20, 44), (53, 15), (40, 15), (53, 30)]
)
def test_a_resize_averages_what_shrinks_and_interpolates_what_grows(size: tuple[int, int]) -> None:
    photo = noise(40, 30)
    wanted = photo.astype(np.float64)
    for axis in (0, 1):
        fit = shrunk if size[axis] <= photo.shape[axis] else grown
        wanted = np.swapaxes(fit(np.swapaxes(wanted, 0, axis), size[axis]), 0, axis)
    assert np.abs(resize_photo(photo, size) - wanted).max() <= 1.5  # rounded once or twice


def test_stripes_do_not_alias_where_only_one_side_shrinks() -> None:
    stripes = np.zeros((300, 1280, 3), np.uint8)
    stripes[:, ::3] = 255
    assert resize_photo(stripes, (420, 420)).std() < 5


def record(path: Path, photo: NDArray[np.uint8]) -> PanopticRecord:
    height, width = photo.shape[:2]
    return PanopticRecord(1, "1", path.name, path, path, height, width, ())


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_turned_photo_stays_as_its_map_is(tmp_path: Path, form: str) -> None:
    """Annotations are of the stored pixels, whatever EXIF says of how to hold the camera."""
    photo = np.repeat(np.linspace(0, 255, 64, dtype=np.uint8)[:, None, None], 3, axis=2)
    photo = photo.repeat(64, axis=1)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo).save(tmp_path / "photo", form, exif=exif)
    found = load_photo(record(tmp_path / "photo", photo), Counter(), pixels=True)
    assert found.rgb is not None
    assert np.abs(found.rgb.astype(int) - photo).max() < 4
