"""Bad input: one outcome for each image, and never a lost shard."""

from __future__ import annotations

import io
import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from conftest import Run
from numpy.typing import NDArray
from PIL import Image

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.cache.index import read_index, read_sidecar
from panoptic_cache.pipeline.cache.sample import Sample
from panoptic_cache.pipeline.cache.shards import ShardReader
from panoptic_cache.pipeline.cache.verify import verify
from panoptic_cache.pipeline.coco import CocoLayout, read_dataset
from panoptic_cache.pipeline.png import ids_to_rgb, read_ids
from panoptic_cache.pipeline.render.driver import RenderResult, render
from panoptic_cache.pipeline.render.dry_run import dry_run
from panoptic_cache.pipeline.render.plan import RenderConfig, allowed

BAD = 900_000_002
"""The image that comes to harm; the other three of the split stay as they are."""

Harm = Callable[["Victim"], None]


class Victim:
    """The files and the annotation of one image."""

    def __init__(self, root: Path) -> None:
        self.layout = CocoLayout.of(root, "val")
        self.photo = self.layout.images / f"{BAD:012d}.jpg"
        self.png = self.layout.panoptic_dir / f"{BAD:012d}.png"
        self.json = json.loads(self.layout.panoptic_json.read_bytes())

    @property
    def image(self) -> dict[str, Any]:
        """Its row of `images`."""
        return dict_of(self.json["images"], "id")

    @property
    def annotation(self) -> dict[str, Any]:
        """Its row of `annotations`."""
        return dict_of(self.json["annotations"], "image_id")

    @property
    def segments(self) -> list[dict[str, Any]]:
        """Its segments."""
        rows: list[dict[str, Any]] = self.annotation["segments_info"]
        return rows

    def save_json(self) -> None:
        """Writes the annotations back."""
        self.layout.panoptic_json.write_text(json.dumps(self.json))

    def count_anew(self) -> None:
        """Corrects the areas, and leaves out the boxes."""
        ids = read_ids(self.png)
        for row in self.segments:
            row.update(area=int((ids == row["id"]).sum()), bbox=None)

    def save_photo(self, mode: str = "RGB", form: str = "JPEG", **settings: Any) -> None:
        """Writes the photo in another mode or format."""
        buffer = io.BytesIO()
        with Image.open(self.photo) as picture:
            picture.convert(mode).save(buffer, form, **settings)
        self.photo.write_bytes(buffer.getvalue())

    def save_ids(self, ids: NDArray[np.int32]) -> None:
        """Writes the panoptic PNG."""
        Image.fromarray(ids_to_rgb(ids)).save(self.png)


def dict_of(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(row for row in rows if row[name] == BAD)


def run(root: Path, **settings: Any) -> RenderResult:
    dataset = read_dataset(CocoLayout.of(root, "val"))
    storage, config = Storage(str(root / "cache")), RenderConfig(samples_per_shard=2)
    return render(dataset, "val", storage, config, **{"workers": 0, "max_bad": 2, **settings})


def outlook(root: Path, **settings: Any) -> dict[str, Any]:
    dataset = read_dataset(CocoLayout.of(root, "val"))
    storage, config = Storage(str(root / "cache")), RenderConfig(samples_per_shard=2)
    return dry_run(dataset, "val", storage, config, max_bad=2, **settings)


def test_what_no_retry_brings_back_is_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    Victim(root).photo.unlink()
    with caplog.at_level(logging.INFO, "panoptic_cache"):
        assert run(root).quarantined == 1
    told = "files that were missing and annotations, once mended, need a new cache"
    assert told in caplog.messages
    assert not any("--retry" in message for message in caplog.messages)


def quarantine(root: Path) -> list[dict[str, Any]]:
    lines = (root / "cache" / "quarantine.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def cached(root: Path) -> Sample:
    reader = ShardReader(root / "cache")
    return reader.sample(reader.keys.index(f"{BAD:012d}"))


def repairs(root: Path) -> Counter[str]:
    storage = Storage(str(root / "cache"))
    shards = read_index(storage).shards
    return sum((Counter(read_sidecar(storage, shard).repairs) for shard in shards), Counter())


def cut_photo(victim: Victim) -> None:
    victim.photo.write_bytes(victim.photo.read_bytes()[:-400])


def cut_end_of_photo(victim: Victim) -> None:
    victim.photo.write_bytes(victim.photo.read_bytes()[:-2])


def empty_photo(victim: Victim) -> None:
    victim.photo.write_bytes(b"")


def cut_png_as_photo(victim: Victim) -> None:
    victim.save_photo(form="PNG")
    victim.photo.write_bytes(victim.photo.read_bytes()[:-20])


def small_png_as_photo(victim: Victim) -> None:
    Image.new("RGB", (8, 8)).save(victim.photo, "PNG")


def bare_png(victim: Victim) -> None:
    """The signature and the last chunk."""
    data = victim.png.read_bytes()
    victim.png.write_bytes(data[:8] + data[-12:])


def flag_as_text(victim: Victim) -> None:
    victim.segments[0]["iscrowd"] = "0"


def page_as_photo(victim: Victim) -> None:
    victim.photo.write_text("<html>404 Not Found</html>")


def no_photo(victim: Victim) -> None:
    victim.photo.unlink()


def folder_as_photo(victim: Victim) -> None:
    victim.photo.unlink()
    victim.photo.mkdir()


def no_png(victim: Victim) -> None:
    victim.png.unlink()


def cut_png(victim: Victim) -> None:
    victim.png.write_bytes(victim.png.read_bytes()[:-20])


def flipped_png(victim: Victim) -> None:
    data = bytearray(victim.png.read_bytes())
    data[len(data) // 2] ^= 1
    victim.png.write_bytes(data)


def jpeg_as_png(victim: Victim) -> None:
    victim.png.write_bytes(victim.photo.read_bytes())


def palette_png(victim: Victim) -> None:
    Image.fromarray(ids_to_rgb(read_ids(victim.png))).quantize(16).save(victim.png)


def grayscale_png(victim: Victim) -> None:
    Image.fromarray(ids_to_rgb(read_ids(victim.png))).convert("L").save(victim.png)


def deep_png(victim: Victim) -> None:
    cv2.imwrite(str(victim.png), ids_to_rgb(read_ids(victim.png)).astype(np.uint16))


def small_png(victim: Victim) -> None:
    victim.save_ids(read_ids(victim.png)[1:])


def small_photo(victim: Victim) -> None:
    with Image.open(victim.photo) as picture:
        half = picture.resize((picture.width // 2, picture.height // 2))
    half.save(victim.photo)


def turned_size(victim: Victim) -> None:
    image = victim.image
    image["height"], image["width"] = image["width"], image["height"] + 1


def two_categories(victim: Victim) -> None:
    first = victim.segments[0]
    other = next(s for s in victim.segments if s["category_id"] != first["category_id"])
    victim.segments.append({**first, "category_id": other["category_id"]})


def unknown_category(victim: Victim) -> None:
    victim.segments[0]["category_id"] = 99


def no_annotation(victim: Victim) -> None:
    victim.json["annotations"].remove(victim.annotation)


def annotated_twice(victim: Victim) -> None:
    victim.json["annotations"].append(victim.annotation)


def size_as_text(victim: Victim) -> None:
    victim.image["height"] = "tall"


def many_unknown_ids(victim: Victim) -> None:
    victim.segments.pop(0)


@pytest.mark.parametrize(
    ("harm", "code", "early"),
    [
        (no_photo, "photo-missing", True),
        (folder_as_photo, "photo-unreadable", False),
        (cut_photo, "photo-damaged", False),
        (cut_end_of_photo, "photo-damaged", False),
        (empty_photo, "photo-damaged", False),
        (cut_png_as_photo, "photo-damaged", False),
        (small_png_as_photo, "size-mismatch", False),
        (bare_png, "png-damaged", False),
        (flag_as_text, "annotation-malformed", True),
        (page_as_photo, "photo-damaged", False),
        (no_png, "png-missing", True),
        (cut_png, "png-damaged", False),
        (flipped_png, "png-damaged", False),
        (jpeg_as_png, "png-damaged", False),
        (palette_png, "png-format", False),
        (grayscale_png, "png-format", False),
        (deep_png, "png-format", False),
        (small_png, "size-mismatch", False),
        (small_photo, "size-mismatch", False),
        (turned_size, "size-mismatch", False),
        (two_categories, "segment-duplicate", True),
        (unknown_category, "category-unknown", True),
        (no_annotation, "annotation-missing", True),
        (annotated_twice, "image-duplicate", True),
        (size_as_text, "annotation-malformed", True),
        (many_unknown_ids, "png-id-unknown", False),
    ],
)
def test_a_bad_image_is_left_out_and_listed(root: Path, harm: Harm, code: str, early: bool) -> None:
    victim = Victim(root)
    harm(victim)
    victim.save_json()
    result = run(root)
    assert (result.images, result.written, result.quarantined) == (4, 3, 1)
    assert not result.too_many
    (line,) = quarantine(root)
    assert (line["image_id"], line["file"], line["code"]) == (BAD, victim.photo.name, code)
    assert len(line["message"]) > 8
    assert str(root) not in line["message"]
    dataset = read_dataset(victim.layout)
    assert [rejection.code for rejection in dataset.rejections] == [code] * early
    assert f"{BAD:012d}" not in ShardReader(root / "cache").keys
    assert verify(Storage(str(root / "cache")), deep=True).ok
    with pytest.raises(InputError):  # although the cache is finished
        run(root, strict=True)


def grayscale_photo(victim: Victim) -> None:
    victim.save_photo("L")


def cmyk_photo(victim: Victim) -> None:
    victim.save_photo("CMYK", quality=95)


def id_in_png_only(victim: Victim) -> None:
    ids = read_ids(victim.png)
    ids[0, :3] = 12_345
    victim.save_ids(ids)
    victim.count_anew()


def listed_twice(victim: Victim) -> None:
    victim.segments.append({**victim.segments[0], "area": 3, "bbox": None})


def no_size(victim: Victim) -> None:
    del victim.image["height"], victim.image["width"]


def id_in_json_only(victim: Victim) -> None:
    victim.segments.append({**victim.segments[0], "id": 77})


def zero_area(victim: Victim) -> None:
    ids, gone = read_ids(victim.png), victim.segments[-1]
    victim.save_ids(np.where(ids == gone["id"], victim.segments[0]["id"], ids).astype(np.int32))
    victim.count_anew()


def wrong_area(victim: Victim) -> None:
    victim.segments[0]["area"] += 5


def wrong_box(victim: Victim) -> None:
    victim.segments[0]["bbox"] = [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("harm", "wanted"),
    [
        (grayscale_photo, {"photo-grayscale": 1}),
        (cmyk_photo, {"photo-cmyk": 1}),
        (id_in_png_only, {"png-id-unknown": 1}),
        (listed_twice, {"segment-merged": 1}),
        (no_size, {}),
        (id_in_json_only, {"segment-empty": 1}),
        (zero_area, {"segment-empty": 1}),
        (wrong_area, {"area-wrong": 1}),
        (wrong_box, {"bbox-wrong": 1}),
    ],
)
def test_what_can_be_mended_is_mended_and_said(
    root: Path, harm: Harm, wanted: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    victim = Victim(root)
    harm(victim)
    victim.save_json()
    with caplog.at_level(logging.WARNING, "panoptic_cache"):
        result = run(root)
    assert (result.written, result.quarantined) == (4, 0)
    assert repairs(root) == wanted
    assert [record.getMessage() for record in caplog.records] == [
        f"mended: {code}, {count} times" for code, count in wanted.items()
    ]
    assert verify(Storage(str(root / "cache")), deep=True).ok
    for _ in range(2 if wanted else 0):  # a shard that an earlier run finished is no excuse
        with pytest.raises(InputError) as caught:
            run(root, strict=True)
        assert caught.value.code == "strict"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "I;16"])
def test_png_photos_are_photos(root: Path, mode: str) -> None:
    """Cityscapes has them; a PNG loses no pixel, the cache's JPEG hardly any."""
    victim = Victim(root)
    if mode == "I;16":
        gray = np.asarray(Image.open(victim.photo).convert("L"), np.uint16)
        Image.fromarray(gray * 257).save(victim.photo, "PNG")
    else:
        victim.save_photo(mode, "PNG")
    victim.save_json()
    with Image.open(victim.photo) as picture:
        wide = np.asarray(picture.convert("RGB") if mode != "I;16" else picture)
    wanted = wide if mode != "I;16" else np.repeat((wide // 257)[..., None], 3, axis=2)
    result = run(root)
    assert (result.written, result.quarantined) == (4, 0)
    assert repairs(root) == {}
    found = simplejpeg.decode_jpeg(cached(root).photo, colorspace="RGB")
    assert np.abs(found.astype(int) - wanted.astype(int)).mean() < 4
    assert verify(Storage(str(root / "cache")), deep=True).ok


def test_mended_images_come_in_with_retry(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    victim = Victim(root)
    whole = victim.photo.read_bytes()
    cut_photo(victim)
    with caplog.at_level(logging.INFO, "panoptic_cache"):
        assert run(root).quarantined == 1
    assert "pictures that are mended come in with --retry" in caplog.messages
    victim.photo.write_bytes(whole)
    assert outlook(root)["quarantined"] == 1
    retried = outlook(root, retry=True)
    assert (retried["quarantined"], retried["done"]) == (0, 1)
    assert run(root).quarantined == 1
    assert run(root, retry=True).quarantined == 0


def test_an_id_of_the_png_only_becomes_unlabelled(root: Path) -> None:
    victim = Victim(root)
    id_in_png_only(victim)
    victim.save_json()
    run(root)
    ids, sample = read_ids(victim.png), cached(root)
    np.testing.assert_array_equal(sample.segment_map == 0, (ids == 12_345) | (ids == 0))
    np.testing.assert_array_equal(sample.void == 1, sample.segment_map == 0)


def test_an_id_of_the_json_only_is_dropped(root: Path) -> None:
    victim = Victim(root)
    victim.segments.insert(0, {**victim.segments[0], "id": 77})
    victim.save_json()
    run(root)
    assert [s.id for s in cached(root).segments] == [s["id"] for s in victim.segments[1:]]


def test_wrong_areas_and_boxes_are_counted_anew(root: Path) -> None:
    victim = Victim(root)
    wanted = [(row["area"], tuple(row["bbox"])) for row in victim.segments]
    for row in victim.segments:
        row["area"], row["bbox"] = 1, [0, 0, 1, 1]
    victim.save_json()
    run(root)
    assert [(s.area, s.bbox) for s in cached(root).segments] == wanted
    assert repairs(root) == {"area-wrong": len(wanted), "bbox-wrong": len(wanted)}


@pytest.mark.parametrize(("mode", "tolerance"), [("L", 3), ("CMYK", 3)])
def test_photos_in_other_colours_become_rgb(root: Path, mode: str, tolerance: float) -> None:
    victim = Victim(root)
    victim.save_photo(mode, quality=95)
    with Image.open(victim.photo) as picture:
        assert picture.mode == mode
        wanted = np.asarray(picture.convert("RGB"), np.float64)
    run(root)
    with Image.open(io.BytesIO(cached(root).photo)) as picture:
        assert (picture.format, picture.mode) == ("JPEG", "RGB")
        assert np.abs(np.asarray(picture) - wanted).mean() < tolerance


def test_a_good_photo_is_passed_through(root: Path) -> None:
    victim = Victim(root)
    victim.save_photo(quality=80, progressive=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")
    run(root)
    assert cached(root).photo == victim.photo.read_bytes()
    assert repairs(root) == {}


@pytest.mark.parametrize(
    ("max_bad", "images", "limit"),
    [(0, 100, 0), (0.01, 250, 2), (0.01, 99, 0), (1, 9, 1), (7, 9, 7)],
)
def test_max_bad_is_a_fraction_or_a_count(max_bad: float, images: int, limit: int) -> None:
    assert allowed(max_bad, images) == limit


def test_many_missing_photos_abort_before_the_work(root: Path) -> None:
    for photo in sorted((root / "val").iterdir())[:3]:
        photo.unlink()
    with pytest.raises(InputError, match="3 of 4 images are bad, 2 are allowed") as caught:
        run(root)
    assert caught.value.code == "max-bad"
    assert not (root / "cache").exists()
    assert run(root, max_bad=3).written == 1


def test_many_damaged_photos_finish_and_say_so(root: Path) -> None:
    for photo in (root / "val").iterdir():
        photo.write_bytes(b"")
    result = run(root)
    assert result.too_many
    assert (result.written, result.quarantined, result.shards) == (0, 4, 2)
    ids = [line["image_id"] for line in quarantine(root)]
    assert ids == sorted(ids)
    report = verify(Storage(str(root / "cache")), deep=True)
    assert (report.ok, report.samples) == (True, 0)
    assert len(ShardReader(root / "cache")) == 0


def test_strict_lets_clean_data_pass(root: Path) -> None:
    assert run(root, strict=True).written == 4


def test_strict_aborts_before_the_work_where_it_can(root: Path) -> None:
    Victim(root).photo.unlink()
    with pytest.raises(InputError, match="photo missing"):
        run(root, strict=True)
    assert not (root / "cache").exists()


def test_a_png_that_does_not_fit_is_one_line(
    root: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = cv2.error("OpenCV(5.0.0) alloc.cpp:73: error: (-4:Insufficient memory)\nFailed to")
    error.code = cv2.Error.StsNoMem

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(cv2, "imdecode", fails)
    places = ("--coco", root, "--split", "val", "--out", tmp_path / "cache", "--workers", 0)
    code, _, said = run("preprocess", *places)
    pngs = root / "annotations/panoptic_val"
    assert (code, said.count("\n")) == (1, 0)
    assert said.startswith(f"out of memory: {pngs}")
    assert "a PNG of" in said
    assert said.endswith("pixels (use fewer --workers, or cut it up)")
