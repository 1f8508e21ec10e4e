"""Synthetic scenes: what they promise, measured on the maps and the files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from handmade import hashes
from numpy.typing import NDArray
from skimage.measure import label as components

from panoptic_cache.pipeline.annotations import SegmentInfo
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.coco import CocoLayout, read_dataset
from panoptic_cache.pipeline.png import read_ids
from panoptic_cache.pipeline.scenes.looks import CATEGORIES
from panoptic_cache.pipeline.scenes.scene import FIRST_VAL_INDEX, Scene, make_scene, write_dataset

THINGS = {category["id"] for category in CATEGORIES if category["isthing"]}


@cache
def sixteen(first: int) -> list[Scene]:
    return [make_scene(0, index) for index in range(first, first + 16)]


def instances(scene: Scene) -> list[SegmentInfo]:
    return [row for row in scene.segments if row.category_id in THINGS and not row.iscrowd]


def pieces(scene: Scene, row: SegmentInfo) -> list[int]:
    """Areas of a segment's connected parts, largest first."""
    parts: NDArray[np.int64] = components(scene.ids == row.id, connectivity=2)
    return sorted(np.bincount(parts.ravel())[1:].tolist(), reverse=True)


def centroid(scene: Scene, row: SegmentInfo) -> NDArray[np.float64]:
    """Mean of the pixel centres, (x, y) in [-1, 1]."""
    y, x = np.nonzero(scene.ids == row.id)
    height, width = scene.ids.shape
    return np.array([(x.mean() + 0.5) / width, (y.mean() + 0.5) / height]) * 2 - 1


@pytest.mark.parametrize("first", [0, 5, FIRST_VAL_INDEX])
@pytest.mark.parametrize("seed", [0, 1])
def test_rows_are_what_the_map_shows(seed: int, first: int) -> None:
    for index in range(first, first + 16):
        scene = make_scene(seed, index, 96)
        assert scene.photo.shape == (*scene.ids.shape, 3)
        assert [scene.photo.dtype.name, scene.ids.dtype.name] == ["uint8", "int32"]
        assert max(scene.ids.shape) == 96
        listed = [row.id for row in scene.segments]
        assert len(set(listed)) == len(listed)
        assert set(listed) == set(np.unique(scene.ids).tolist()) - {0}
        assert all(0 < identity < 2**24 for identity in listed)
        for row in scene.segments:
            y, x = np.nonzero(scene.ids == row.id)
            assert row.area == len(x) > 0
            box = [int(v) for v in (x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1)]
            assert list(row.bbox or ()) == box
            assert row.category_id in {category["id"] for category in CATEGORIES}
        stuff = [row.category_id for row in scene.segments if row.category_id not in THINGS]
        assert 2 <= len(stuff) <= 3
        assert len(set(stuff)) == len(stuff)


def test_a_scene_depends_on_its_arguments_only() -> None:
    first, again = make_scene(3, 7), make_scene(3, 7)
    assert first.segments == again.segments
    np.testing.assert_array_equal(first.photo, again.photo)
    np.testing.assert_array_equal(first.ids, again.ids)
    others = [make_scene(3, 15), make_scene(4, 7), make_scene(3, FIRST_VAL_INDEX + 7)]
    assert all(scene.segments != first.segments for scene in others)


@pytest.mark.parametrize("first", [0, 3, 40, FIRST_VAL_INDEX])
def test_any_sixteen_scenes_hold_every_special(first: int) -> None:
    scenes = sixteen(first)

    def count(found: list[bool]) -> int:
        return sum(found)

    assert count([np.mean(s.ids == 0) > 0.01 for s in scenes]) == 2
    crowds = [[row for row in s.segments if row.iscrowd] for s in scenes]
    assert count([bool(rows) for rows in crowds]) == 2
    for scene, rows in zip(scenes, crowds, strict=True):
        assert all(row.category_id in THINGS and len(pieces(scene, row)) >= 5 for row in rows)

    def concentric(scene: Scene) -> bool:
        points = np.array([centroid(scene, row) for row in instances(scene)])
        apart = np.abs(points[:, None] - points[None]).max(axis=2) + 9 * np.eye(len(points))
        return bool(apart.min() < 2 * 2 / 80)  # two cells of the paper's grid

    assert count([concentric(s) for s in scenes]) >= 2
    tiny = [[row for row in instances(s) if (row.area or 0) < 0.002 * s.ids.size] for s in scenes]
    assert count([bool(rows) for rows in tiny]) >= 2

    def touches(scene: Scene, row: SegmentInfo) -> bool:
        x, y, w, h = row.bbox or (1, 1, 0, 0)
        height, width = scene.ids.shape
        big = (row.area or 0) > 0.02 * scene.ids.size
        return big and (x == 0 or y == 0 or x + w == width or y + h == height)

    assert count([any(touches(s, row) for row in instances(s)) for s in scenes]) >= 2

    def is_split(scene: Scene, row: SegmentInfo) -> bool:
        parts = pieces(scene, row)
        return len(parts) > 1 and parts[1] > 0.2 * sum(parts)

    assert count([any(is_split(s, row) for row in instances(s)) for s in scenes]) >= 2


def test_unlabelled_is_an_object_or_a_patch_of_stuff() -> None:
    """The unknown object stands out from what is around it; the patch does not."""

    def contrast(scene: Scene) -> float:
        grey = scene.photo.std(axis=2)  # the unknown object is the one grey thing
        return float(grey[scene.ids != 0].mean() / grey[scene.ids == 0].mean())

    unknown, patch = (make_scene(0, 1), make_scene(0, 9))
    assert contrast(unknown) > 1.5 * contrast(patch)


def test_scenes_are_varied_and_learnable() -> None:
    scenes = [*sixteen(0), *sixteen(16)]
    assert {np.sign(s.ids.shape[0] - s.ids.shape[1]) for s in scenes} == {-1, 1}
    seen = {row.category_id for s in scenes for row in s.segments}
    assert seen == {category["id"] for category in CATEGORIES}
    counts = [len(instances(s)) for s in scenes]
    assert min(counts) >= 1
    assert 2 <= np.median(counts) <= 5
    shares = [(row.area or 0) / s.ids.size for s in scenes for row in instances(s)]
    assert np.median(shares) > 0.02
    for scene in scenes:  # nothing is flat
        tiles = scene.photo[: scene.photo.shape[0] // 8 * 8, : scene.photo.shape[1] // 8 * 8]
        blocks = tiles.reshape(tiles.shape[0] // 8, 8, tiles.shape[1] // 8, 8, 3)
        assert blocks.std(axis=(1, 3)).mean(axis=-1).min() > 0.5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "root"
    seen: list[int] = []
    assert write_dataset(root, images=8, val_images=4, seed=5, size=96, progress=seen.append)
    assert seen == list(range(1, 13))
    return root


def test_files_agree_with_each_other(dataset: Path) -> None:
    ids: dict[str, set[int]] = {}
    for split, count in {"train": 8, "val": 4}.items():
        layout = CocoLayout.of(dataset, split)
        document: dict[str, Any] = json.loads(layout.panoptic_json.read_text())
        assert {"info", "licenses", "images", "annotations", "categories"} == set(document)
        assert document["categories"] == CATEGORIES
        ids[split] = {image["id"] for image in document["images"]}
        assert len(ids[split]) == len(document["images"]) == count
        assert (
            len(list(layout.images.iterdir())) == len(list(layout.panoptic_dir.iterdir())) == count
        )
        by_image = {row["image_id"]: row for row in document["annotations"]}
        for image in document["images"]:
            assert image["file_name"] == f"{image['id']:012d}.jpg"
            photo = simplejpeg.decode_jpeg((layout.images / image["file_name"]).read_bytes())
            scene = make_scene(5, image["id"] - 1, 96)
            assert photo.shape == (image["height"], image["width"], 3) == scene.photo.shape
            assert np.abs(photo.astype(int) - scene.photo).mean() < 12
            annotation = by_image[image["id"]]
            painted = read_ids(layout.panoptic_dir / annotation["file_name"])
            np.testing.assert_array_equal(painted, scene.ids)
            listed = {row["id"] for row in annotation["segments_info"]}
            assert listed == set(np.unique(painted).tolist()) - {0}
            for row in annotation["segments_info"]:
                assert row["area"] == int((painted == row["id"]).sum())
    assert not ids["train"] & ids["val"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_reader_finds_nothing_to_complain_about(dataset: Path, split: str) -> None:
    found = read_dataset(CocoLayout.of(dataset, split))
    assert not found.rejections
    assert [category.name for category in found.categories] == [c["name"] for c in CATEGORIES]


def test_the_same_arguments_give_the_same_bytes(dataset: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "again", images=8, val_images=4, seed=5, size=96)
    assert hashes(tmp_path / "again") == hashes(dataset)
    write_dataset(tmp_path / "longer", images=9, val_images=4, seed=5, size=96)
    assert hashes(tmp_path / "longer")["train/000000000001.jpg"] in hashes(dataset).values()


def test_a_complete_folder_is_left_alone(dataset: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}
    assert not write_dataset(dataset, images=8, val_images=4, seed=5, size=96)
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*")} == before


def test_a_killed_run_leaves_whole_files_and_is_finished_by_the_next(
    dataset: Path, tmp_path: Path
) -> None:
    def die(done: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    root = tmp_path / "root"
    with pytest.raises(KeyboardInterrupt):
        write_dataset(root, images=8, val_images=4, seed=5, size=96, progress=die)
    left, whole = hashes(root), hashes(dataset)
    assert left.items() <= whole.items()
    assert not any(name.startswith("annotations/panoptic_train.json") for name in left)
    (root / "train/.tmp-0badcafe").write_bytes(b"half")
    assert write_dataset(root, images=8, val_images=4, seed=5, size=96)
    assert hashes(root) == whole
    (root / "val" / f"{FIRST_VAL_INDEX + 1:012d}.jpg").unlink()
    assert write_dataset(root, images=8, val_images=4, seed=5, size=96)
    assert hashes(root) == whole


@pytest.mark.parametrize("change", [{"images": 9}, {"val_images": 3}, {"seed": 6}, {"size": 64}])
def test_a_folder_of_other_scenes_is_refused(dataset: Path, change: dict[str, int]) -> None:
    before = hashes(dataset)
    arguments = {"images": 8, "val_images": 4, "seed": 5, "size": 96} | change
    with pytest.raises(InputError, match="something other"):
        write_dataset(dataset, **arguments)  # type: ignore[arg-type]
    assert hashes(dataset) == before


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with Storage(str(tmp_path)).locked(), pytest.raises(InputError, match="another run"):
        write_dataset(tmp_path, images=1, val_images=0, seed=0, size=32)
    assert write_dataset(tmp_path, images=1, val_images=0, seed=0, size=32)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="something other"):
        write_dataset(tmp_path, images=1, val_images=1, seed=0)
    with pytest.raises(InputError, match="something other"):
        write_dataset(tmp_path / "thesis.txt", images=1, val_images=1, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("change", [{"size": 16}, {"images": -1}, {"val_images": -1}, {"seed": -1}])
def test_senseless_arguments_are_refused(tmp_path: Path, change: dict[str, int]) -> None:
    arguments = {"images": 1, "val_images": 1, "seed": 0, "size": 64} | change
    with pytest.raises(InputError):
        write_dataset(tmp_path / "root", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "root").exists()
