"""Reading COCO panoptic folders: ids, joins, keys and what is rejected before the work."""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import (
    MAX_KEY_BYTES,
    CocoLayout,
    CocoPanoptic,
    read_dataset,
    sample_key,
)
from panoptic_cache.pipeline.png import ids_to_rgb, read_ids


def change_json(root: Path, change: Callable[[dict[str, Any]], None]) -> CocoLayout:
    layout = CocoLayout.of(root, "val")
    content = json.loads(layout.panoptic_json.read_bytes())
    change(content)
    layout.panoptic_json.write_text(json.dumps(content))
    return layout


def test_ids_are_read_as_they_are_defined(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    rgb[0, 0], rgb[0, 1] = 0, 255
    path = tmp_path / "ids.png"
    wanted = rgb[..., 0] + 256 * rgb[..., 1].astype(np.int32) + 65536 * rgb[..., 2].astype(np.int32)
    for alpha in (False, True):
        Image.fromarray(np.dstack([rgb, rgb[..., :1] // 2]) if alpha else rgb).save(path)
        ids = read_ids(path)
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_array_equal(ids_to_rgb(wanted), rgb)


def test_an_orientation_in_a_png_turns_nothing(tmp_path: Path) -> None:
    rgb = np.arange(2 * 5 * 3, dtype=np.uint8).reshape(2, 5, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=exif)
    assert b"eXIf" in (tmp_path / "turned.png").read_bytes()
    np.testing.assert_array_equal(ids_to_rgb(read_ids(tmp_path / "turned.png")), rgb)


def test_categories_get_labels_by_ascending_id(root: Path) -> None:
    def shuffle(content: dict[str, Any]) -> None:
        content["categories"].reverse()

    found = read_dataset(change_json(root, shuffle)).categories
    ids = [category.id for category in found]
    assert ids == sorted(ids)
    assert [category.label for category in found] == list(range(len(ids)))
    assert {category.name for category in found if not category.isthing} == {
        "sky", "wall", "grass", "water",
    }  # fmt: skip


def test_images_and_annotations_join_by_id_never_by_position(root: Path) -> None:
    before = read_dataset(CocoLayout.of(root, "val"))

    def shuffle(content: dict[str, Any]) -> None:
        content["images"].reverse()
        content["annotations"].insert(0, content["annotations"].pop())

    after = read_dataset(change_json(root, shuffle))
    assert after.records == before.records
    assert after.digest != before.digest
    for record in after.records:
        listed = {segment.id for segment in record.segments}
        assert set(np.unique(read_ids(record.png)).tolist()) - {0} == listed


def test_real_annotations_are_read(coco_sample: Path) -> None:
    dataset = read_dataset(CocoLayout.of(coco_sample, "val2017"))
    assert (len(dataset.categories), len(dataset.records), dataset.rejections) == (133, 16, ())
    assert sum(category.isthing for category in dataset.categories) == 80
    for record in dataset.records:
        ids = read_ids(record.png)
        assert ids.shape == (record.height, record.width)
        area = {segment.id: segment.area for segment in record.segments}
        found = dict(zip(*(v.tolist() for v in np.unique(ids, return_counts=True)), strict=True))
        found.pop(0, None)
        assert found == area


@pytest.mark.parametrize(
    ("image_id", "file_name", "key"),
    [
        (7, "whatever.jpg", "000000000007"),
        ("aachen_1", "aachen/aachen_1_leftImg8bit.jpg", "aachen_1_leftImg8bit"),
        ("x", "a.b.c.jpg", "a_b_c"),
    ],
)
def test_keys_have_no_dots(image_id: int | str, file_name: str, key: str) -> None:
    assert sample_key(image_id, file_name) == key


def reject(root: Path, change: Callable[[dict[str, Any]], None]) -> tuple[CocoPanoptic, list[str]]:
    dataset = read_dataset(change_json(root, change))
    return dataset, [rejection.code for rejection in dataset.rejections]


def double(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[name].append(content[name][0])


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[name].pop(0) and None


def edit(table: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[table][0].update(values)


def edit_segment(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["annotations"][0]["segments_info"][0].update(values)


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        (double("annotations"), ["image-duplicate"]),
        (drop("annotations"), ["annotation-missing"]),
        (drop("images"), ["image-missing"]),
        (edit("images", file_name="gone.jpg"), ["photo-missing"]),
        (edit("annotations", file_name="gone.png"), ["png-missing"]),
        (edit("images", width="wide"), ["annotation-malformed"]),
        (edit("images", width=math.inf), ["annotation-malformed"]),
        (edit_segment(id=math.inf), ["annotation-malformed"]),
        (edit_segment(category_id=math.inf), ["annotation-malformed"]),
        (edit("images", category_id=3), []),
        (edit("annotations", segments_info=None), ["annotation-malformed"]),
        (edit_segment(category_id=99), ["category-unknown"]),
        (edit_segment(id=0), ["segment-id"]),
        (edit_segment(id=1 << 24), ["segment-id"]),
        (edit_segment(bbox=None), []),
        (edit_segment(area=None), []),
    ],
)
def test_what_cannot_be_tried_is_rejected(
    root: Path, change: Callable[[dict[str, Any]], None], codes: list[str]
) -> None:
    dataset, found = reject(root, change)
    assert found == codes
    assert len(dataset.records) == 4 - len(codes)


def test_an_image_listed_twice_is_rejected_twice(root: Path) -> None:
    _, codes = reject(root, double("images"))
    assert codes == ["image-duplicate"] * 2


def rename(content: dict[str, Any], names: list[str]) -> None:
    for image, annotation, name in zip(
        content["images"], content["annotations"], names, strict=False
    ):
        image["id"] = annotation["image_id"] = image["file_name"] = name


@pytest.mark.parametrize(
    ("names", "codes"),
    [
        (["a/b/x.jpg", "a.b/x.jpg"], ["key-shared"] * 2),
        ([f"{'n' * (MAX_KEY_BYTES + 1)}.jpg"], ["key-invalid"]),
        ([f"{'n' * MAX_KEY_BYTES}.jpg"], []),
        (["caf\udce9.jpg"], ["key-invalid"]),
        (["café.jpg"], []),
    ],
)
def test_names_that_make_no_key_are_rejected(
    root: Path, names: list[str], codes: list[str]
) -> None:
    photo = next((root / "val").iterdir()).read_bytes()
    for name in names:
        (root / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "val" / name).write_bytes(photo)
    assert reject(root, lambda content: rename(content, names))[1] == codes


def test_a_rejection_tells_no_folder(root: Path) -> None:
    dataset, _ = reject(root, edit("images", file_name="gone.jpg"))
    assert dataset.rejections[0].message == "gone.jpg: photo missing"


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b'"text"', b"\xff", b'{"images": [], "annotations": []}',
        b'{"images": 3, "annotations": [], "categories": [{"id": 1, "name": "a", "isthing": 1}]}',
        b'{"images": [], "annotations": [{"id": 1, "category_id": 1, "image_id": 1}], "categories":'
        b' [{"id": 1, "name": "", "isthing": 1}]}',
        b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": "", "isthing": "0"}]}',
        b'{"images": [], "annotations": [], "categories": []}',
        b'{"images": [], "annotations": [], "categories": [{"id": Infinity}]}',
        b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}',
    ],
)  # fmt: skip
def test_another_json_is_named(root: Path, content: bytes) -> None:
    layout = CocoLayout.of(root, "val")
    layout.panoptic_json.write_bytes(content)
    with pytest.raises(InputError, match=r"panoptic_val\.json"):
        read_dataset(layout)


def test_a_row_without_an_id_costs_only_itself(root: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        del content["images"][0]["id"]
        del content["annotations"][1]["image_id"]

    dataset, codes = reject(root, change)
    assert len(dataset.records) == 2
    assert codes.count("annotation-malformed") == 2
    messages = [r.message for r in dataset.rejections if r.code == "annotation-malformed"]
    assert sorted(messages) == ["has no id", "has no image_id"]


@pytest.mark.parametrize("value", ["0", None, 2, [], "true"])
def test_a_flag_is_0_or_1(root: Path, value: Any) -> None:
    """Text is true in Python, whatever it says."""
    assert reject(root, edit_segment(iscrowd=value))[1] == ["annotation-malformed"]
    with pytest.raises(InputError, match=r"\$\.isthing"):
        reject(root, edit("categories", isthing=value))


def test_whole_numbers_may_have_a_point(root: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        for row in content["images"]:
            row.update(width=float(row["width"]), height=float(row["height"]))
        for row in content["annotations"]:
            for segment in row["segments_info"]:
                segment |= {name: float(segment[name]) for name in ("id", "category_id", "iscrowd")}

    before = read_dataset(CocoLayout.of(root, "val"))
    after = read_dataset(change_json(root, change))
    assert after.records == before.records
    assert not after.rejections


def test_two_categories_of_one_id_are_refused(root: Path) -> None:
    with pytest.raises(InputError, match="share an id"):
        reject(root, double("categories"))


def test_missing_places_are_named(root: Path) -> None:
    with pytest.raises(InputError, match="splits here: train, val"):
        CocoLayout.of(root, "test")
    with pytest.raises(InputError, match="no such folder"):
        CocoLayout.of(root / "nowhere", "val")
    layout = CocoLayout.of(root, "val")
    (root / "val").rename(root / "elsewhere")
    with pytest.raises(InputError, match="no folder of photos"):
        read_dataset(layout)


def test_a_png_of_absurd_size_is_refused(tmp_path: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    with pytest.raises(InputError) as caught:
        read_ids(tmp_path / "huge.png")
    assert caught.value.code == "png-large"


def test_every_flipped_bit_of_a_png_is_seen(tmp_path: Path) -> None:
    rgb = np.random.default_rng(1).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    data = bytes(cv2.imencode(".png", rgb)[1])
    path = tmp_path / "flipped.png"
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(InputError):
            read_ids(path)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(InputError):
            read_ids(path)


@pytest.mark.parametrize(("limit", "places"), [(1, [6]), (3, [2, 6, 10]), (12, range(12))])
def test_a_limit_takes_images_of_the_whole_split(
    tiny_dataset: CocoPanoptic, limit: int, places: Sequence[int]
) -> None:
    records = tiny_dataset.records
    assert tiny_dataset.spread(limit).records == tuple(records[at] for at in places)
    assert tiny_dataset.spread(99).records == records
    assert tiny_dataset.spread(0).records == ()
    assert tiny_dataset.spread(None) is tiny_dataset
