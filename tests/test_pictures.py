"""Pictures: colours, names on segments, sheets and the files they are written to."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pytest

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.pictures import (
    centroid_colours,
    font,
    heat,
    instance_numbers,
    label_segments,
    legend,
    overlay,
    save_picture,
    segment_colours,
    semantic_colours,
    sheet,
    shortened,
    stained,
)
from panoptic_cache.pipeline.targets import boundary


def disc_and_band() -> np.ndarray:
    """(60, 80) segment map: 0 above, 1 a disc, 2 a band below."""
    index = np.zeros((60, 80), np.uint8)
    index[40:] = 2
    cv2.circle(index, (40, 25), 18, 1, -1)
    return index


def test_colours_tell_instances_apart_and_keep_a_category() -> None:
    labels, things = [3] * 12 + [4, 90], [True] * 12 + [True, False]
    colours = segment_colours(labels, things)
    assert colours.shape == (15, 3)
    assert not colours[0].any()
    apart = [np.abs(a.astype(int) - b).sum() for a, b in combinations(colours[1:].astype(int), 2)]
    assert min(apart) > 12
    alone = segment_colours([90, 4, 3], [False, True, True])
    assert np.array_equal(alone[1:], colours[[14, 13, 1]]), "depends on category and number only"
    assert len(np.unique(segment_colours(range(133), [True] * 80 + [False] * 53), axis=0)) > 130


def test_stuff_has_one_colour() -> None:
    colours = segment_colours([7, 7], [False, False])
    assert np.array_equal(colours[1], colours[2])


def test_matched_numbers_are_free_to_choose() -> None:
    assert instance_numbers([5, 2, 5, 5, 2]) == (0, 0, 1, 2, 1)
    ours = segment_colours([5, 5], [True, True], numbers=[1, 0])
    default = segment_colours([5, 5], [True, True])
    assert np.array_equal(ours[[2, 1]], default[[1, 2]])


def test_overlay_blends_inside_and_whitens_the_boundary() -> None:
    index = disc_and_band()
    photo = np.full((60, 80, 3), 100, np.uint8)
    colours = np.array([[0, 0, 0], [200, 0, 0], [0, 200, 0]], np.uint8)
    picture = overlay(photo, index, colours, alpha=0.5)
    edges = boundary(index)
    assert np.array_equal(picture[(index == 1) & ~edges][0], [150, 50, 50])
    assert (picture[edges] > 190).all()
    assert (picture[~edges] <= 150).all()


def test_centroid_colours_are_those_of_the_paper() -> None:
    uv = np.array([[[-1.0, 1.0, 0.0, np.nan]], [[-1.0, 1.0, 1.0, np.nan]]])
    picture = centroid_colours(uv)
    assert picture.tolist() == [[[0, 0, 140], [255, 255, 140], [128, 255, 140], [0, 0, 0]]]


def test_semantic_colours_are_the_categories_own() -> None:
    things = [True, False, True]
    picture = semantic_colours(np.array([[0, 1], [2, -1]]), things)
    expected = segment_colours([0, 1, 2], things)
    assert np.array_equal(picture.reshape(4, 3), expected[[1, 2, 3, 0]])


def test_heat_grows_brighter_with_weight() -> None:
    scale = heat(np.linspace(0, 1, 256)[None])
    lightness = cv2.cvtColor(scale.astype(np.float32) / 255, cv2.COLOR_RGB2Lab)[0, :, 0]
    assert lightness[0] < 2
    assert lightness[-1] > 95
    assert np.diff(lightness[::8]).min() > 1, "equal steps of weight are steps of lightness"


def test_stained_pixels_are_coloured_and_the_rest_is_pale() -> None:
    masks = (np.array([[False, True, False]]), np.array([[False, False, True]]))
    marks = ((masks[0], (0, 0, 200)), (masks[1], (244, 140, 6)))
    picture = stained(np.full((1, 3, 3), 80, np.uint8), marks)
    pale, blue, orange = picture[0].astype(int)
    assert pale.min() == pale.max() > 180
    assert blue[2] > blue[0] + 40
    assert orange[0] > orange[2] + 100


def test_names_are_written_where_there_is_room() -> None:
    index = np.kron(disc_and_band(), np.ones((4, 4), np.uint8))
    index[0, 0] = 3
    picture = np.full((*index.shape, 3), 128, np.uint8)
    named = label_segments(picture, index, ["disc", "", "speck"])
    y, x = np.nonzero((named != picture).any(-1))
    assert len(y), "the disc has a name"
    assert (index[y, x] == 1).mean() > 0.95, "and nothing else has"
    assert abs(x.mean() - 162) < 8
    assert abs(y.mean() - 102) < 8
    assert np.array_equal(label_segments(picture, index, ["", "", ""]), picture)


def test_names_do_not_cover_one_another() -> None:
    index = np.ones((60, 120), np.uint8)
    index[20:40, 58:62] = 2
    one = label_segments(np.zeros((60, 120, 3), np.uint8), index, ["wide", ""])
    both = label_segments(np.zeros((60, 120, 3), np.uint8), index, ["wide", "a name in its way"])
    assert np.array_equal(one, both)


def test_sheet_lines_up_pictures_of_any_size() -> None:
    red, green = np.full((20, 50, 3), (255, 0, 0)), np.full((40, 30, 3), (0, 255, 0))
    blue = np.full((10, 90, 3), (0, 0, 255))
    page = sheet(
        [[("red", red.astype(np.uint8)), ("green", green.astype(np.uint8))],
         [("a caption that is far too long for it", blue.astype(np.uint8))]],
        title="title",
    )  # fmt: skip
    left = {}
    for name, colour in (("red", (255, 0, 0)), ("green", (0, 255, 0)), ("blue", (0, 0, 255))):
        y, x = np.nonzero((page == colour).all(-1))
        left[name] = x.min()
        assert len(y) == {"red": 1000, "green": 1200, "blue": 900}[name], "every pixel is there"
    assert left["red"] == left["blue"] < left["green"] - 90
    assert (page[[0, -1]] == 255).all()


def test_long_text_is_cut() -> None:
    assert shortened("short", 200, 15) == "short"
    text = shortened("a very long name of a category", 100, 15)
    assert text.endswith("...")
    assert font(15).getlength(text) <= 100


def test_legend_counts_what_does_not_fit() -> None:
    rows = [((255, 0, 0), f"row {i}", "1%") for i in range(9)]
    few, all_rows = legend(rows, (72, 200)), legend(rows, (24 * 9, 200))
    swatches = [((p == (255, 0, 0)).all(-1).any(1)).sum() // 15 for p in (few, all_rows)]
    assert swatches == [2, 9]
    assert few.shape == (72, 200, 3)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_picture_is_saved_whole(tmp_path: Path, suffix: str) -> None:
    picture = heat(np.linspace(0, 1, 64 * 48).reshape(48, 64))
    path = tmp_path / "new" / f"heat{suffix}"
    save_picture(path, picture)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    found = np.asarray(cv2.imread(str(path)))[..., ::-1].astype(int)
    assert np.abs(found - picture).mean() < (0.01 if suffix == ".png" else 5)


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.png or \.jpg"):
        save_picture(tmp_path / "picture.gif", np.zeros((2, 2, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def test_names_stand_in_the_same_place_for_any_number_of_threads() -> None:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 4, (16, 12)).astype(np.uint8)
    segment_map = np.kron(blocks, np.ones((40, 40), np.uint8))  # (640, 480), many equal places
    picture = np.zeros((*segment_map.shape, 3), np.uint8)
    before, drawn = cv2.getNumThreads(), []
    try:
        for threads in (1, 2, 4):
            cv2.setNumThreads(threads)
            drawn.append(label_segments(picture, segment_map, ["sky", "grass", "wall"]))
    finally:
        cv2.setNumThreads(before)
    assert np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(drawn[0], drawn[2])
