"""Datasets as people have them: what can be proved is mended, what cannot is named in one line."""

from __future__ import annotations

import io
import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import Run
from PIL import Image, ImageOps

from panoptic_cache.pipeline.cache.shards import ShardReader

Json = dict[str, Any]


class Data:
    """A copy of a made-up split, and the commands that read it."""

    def __init__(self, root: Path, run: Run) -> None:
        self.root, self.run = root, run
        self.photos, self.pngs = root / "val", root / "annotations/panoptic_val"
        self.file = root / "annotations/panoptic_val.json"
        self.json: Json = json.loads(self.file.read_text())
        self.out = root / "cache"

    def save(self) -> None:
        """Writes the annotations back."""
        self.file.write_text(json.dumps(self.json))

    def preprocess(self, *options: object, dry: bool = False) -> tuple[int, Json, str]:
        """Exit code, what is printed, and what is said."""
        shutil.rmtree(self.out, ignore_errors=True)
        code, out, said = self.run(
            *("preprocess", "--coco", self.root, "--split", "val", "--out", self.out),
            *("--workers", 0, "--json", *(["--dry-run"] if dry else []), *options),
        )
        return code, json.loads(out) if out else {}, said

    def score(self, *options: object) -> tuple[int, float | None, str]:
        """Exit code, PQ of the split against itself, and what is said."""
        code, out, said = self.run("score", self.file, self.file, "--json", *options)
        return code, json.loads(out)["All"]["pq"] if out else None, said

    def quarantine(self) -> list[Json]:
        """What was left out."""
        return [json.loads(line) for line in (self.out / "quarantine.jsonl").open()]

    def tars(self) -> list[bytes]:
        """The shards."""
        return [path.read_bytes() for path in sorted(self.out.glob("*.tar"))]


@pytest.fixture
def data(root: Path, run: Run) -> Data:
    return Data(root, run)


# Ids


def swap(folder: Path) -> None:
    for path in folder.iterdir():
        picture = cv2.imread(str(path))
        assert picture is not None
        cv2.imwrite(str(path), picture[..., ::-1])


def test_swapped_channels_are_named_and_read_when_asked(data: Data) -> None:
    assert data.preprocess()[0] == 0
    wanted = data.tars()
    swap(data.pngs)
    for dry in (True, False):
        code, values, said = data.preprocess(dry=dry)
        assert (code, values["quarantined"]) == (3, 4)
        assert "--bgr" in (said if dry else data.quarantine()[0]["message"])
    assert {line["code"] for line in data.quarantine()} == {"png-id-unknown"}
    assert data.preprocess("--bgr")[0] == 0
    assert data.tars() == wanted
    code, _, said = data.score()
    assert (code, said.count("\n")) == (1, 0)
    assert "--pred-bgr" in said
    code, _, said = data.score("--pred-bgr")
    assert code == 1
    assert "read it with --bgr" in said
    assert data.score("--bgr", "--pred-bgr")[:2] == (0, 1.0)


def test_a_map_resized_with_interpolation_is_recognised(data: Data) -> None:
    for path in data.pngs.iterdir():
        with Image.open(path) as picture:
            half = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
            half.resize(picture.size, Image.Resampling.BILINEAR).save(path)
    code, _, _ = data.preprocess()
    assert code == 3
    assert all("interpolation" in line["message"] for line in data.quarantine())


def test_rows_that_repeat_an_id_are_merged_everywhere(data: Data) -> None:
    for annotation in data.json["annotations"]:
        annotation["segments_info"] += [
            {**row, "area": 3, "bbox": [0, 0, 1, 1]} for row in annotation["segments_info"]
        ]
    data.save()
    code, values, said = data.preprocess()
    assert (code, values["written"]) == (0, 4)
    assert "mended: segment-merged" in said
    assert data.score()[:2] == (0, 1.0)


def test_areas_that_nobody_gave_are_counted(data: Data) -> None:
    for annotation in data.json["annotations"]:
        for row in annotation["segments_info"]:
            row.pop("area")
    data.save()
    assert data.score()[:2] == (0, 1.0)


def test_more_segments_than_a_map_can_number_are_refused(data: Data) -> None:
    rows = data.json["annotations"][0]["segments_info"]
    rows += [{"id": 1_000_000 + n, "category_id": rows[0]["category_id"]} for n in range(65_536)]
    data.save()
    assert data.preprocess("--max-bad", 1)[1]["quarantined"] == 1
    assert data.quarantine()[0]["code"] == "segments-many"


# Rows


def drop_isthing(content: Json) -> None:
    for category in content["categories"]:
        del category["isthing"]


def drop_a_category(content: Json) -> None:
    used = content["annotations"][0]["segments_info"][0]["category_id"]
    content["categories"] = [row for row in content["categories"] if row["id"] != used]


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (drop_isthing, ("`isthing`", "add it")),
        (drop_a_category, ("unknown category", "`categories`")),
    ],
)
def test_a_missing_field_is_named_with_its_remedy(
    data: Data, harm: Callable[[Json], None], words: tuple[str, ...]
) -> None:
    harm(data.json)
    data.save()
    for code, _, said in (data.preprocess(), data.score()):
        assert (code, said.count("\n")) == (1, 0)
        assert all(word in said for word in words), said


def no_things(content: Json) -> None:
    for category in content["categories"]:
        category["isthing"] = 0


def no_sizes(content: Json) -> None:
    for image in content["images"]:
        del image["height"], image["width"]


def ids_as_text(content: Json) -> None:
    for image in content["images"]:
        image["id"] = str(image["id"])


def a_prediction(content: Json) -> None:
    del content["images"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (no_things, "`isthing`"),
        (no_sizes, ""),
        (ids_as_text, "text in one list"),
        (a_prediction, "no `images`"),
    ],
)
def test_other_tools_annotations_work(
    data: Data, change: Callable[[Json], None], said: str
) -> None:
    change(data.json)
    data.save()
    code, values, told = data.preprocess()
    assert (code, values["written"]) == (0, 4)
    assert said in told
    assert bool(told) == bool(said)
    assert data.score()[:2] == (0, 1.0)


# Photos


def lower(data: Data) -> None:
    (data.photos / "deep/er").mkdir(parents=True)
    for path in [*data.photos.glob("*.jpg")]:
        path.rename(data.photos / "deep/er" / path.name)


def another_machine(data: Data) -> None:
    for image in data.json["images"]:
        image["file_name"] = f"C:\\data\\val\\{image['file_name']}"


def folder_in_front(data: Data) -> None:
    for image in data.json["images"]:
        image["file_name"] = f"images/val/{image['file_name']}"


def loud_suffix(data: Data) -> None:
    for path in [*data.photos.iterdir()]:
        path.rename(path.with_suffix(".JPG"))


def other_form_of_unicode(data: Data) -> None:
    for image in data.json["images"]:
        name = f"é{image['file_name']}"
        here = unicodedata.normalize("NFD", name)
        (data.photos / image["file_name"]).rename(data.photos / here)
        image["file_name"] = name


def cityscapes(data: Data) -> None:
    (data.photos / "town").mkdir()
    for image in data.json["images"]:
        stem = Path(image["file_name"]).stem
        there = data.photos / f"town/{stem}_leftImg8bit.jpg"
        (data.photos / image["file_name"]).rename(there)
        image["file_name"] = f"{stem}_gtFine_leftImg8bit.jpg"


ELSEWHERE = [
    lower, another_machine, folder_in_front, loud_suffix, other_form_of_unicode, cityscapes,
]  # fmt: skip


@pytest.mark.parametrize("move", ELSEWHERE)
def test_photos_that_are_all_elsewhere_in_one_way_are_found(
    data: Data, move: Callable[[Data], None]
) -> None:
    assert data.preprocess()[0] == 0
    wanted = photos_of(data)
    move(data)
    data.save()
    code, values, said = data.preprocess()
    assert (code, values["written"]) == (0, 4)
    assert "4 of 4 file names are not there" in said
    assert said.count("\n") == 0
    assert photos_of(data) == wanted


def photos_of(data: Data) -> dict[str, bytes]:
    reader = ShardReader(data.out)
    return {key: reader.members(at)["jpg"] for at, key in enumerate(reader.keys)}


def test_pngs_that_are_all_elsewhere_are_found_for_scoring_too(data: Data) -> None:
    for row in data.json["annotations"]:
        row["file_name"] = f"panoptic_val\\{row['file_name']}"
    data.save()
    assert data.preprocess()[1]["written"] == 4
    assert data.score()[:2] == (0, 1.0)


def test_a_photo_that_is_elsewhere_is_named(data: Data) -> None:
    name = data.json["images"][0]["file_name"]
    (data.photos / "deep").mkdir()
    (data.photos / name).rename(data.photos / "deep" / name)
    code, _, said = data.preprocess("--max-bad", 1)
    assert code == 0
    assert f"1 of 4 files are missing, such as {data.photos / name}" in said
    assert data.quarantine()[0]["message"] == f"{name}: photo missing (is it deep/{name}?)"


def test_photos_of_one_name_in_two_folders_have_two_keys(data: Data) -> None:
    for image, annotation, folder in zip(
        data.json["images"], data.json["annotations"], "aabc", strict=True
    ):
        name = f"{folder}/{'y' if image is data.json['images'][1] else 'x'}.jpg"
        (data.photos / folder).mkdir(exist_ok=True)
        (data.photos / image["file_name"]).rename(data.photos / name)
        image.update(id=f"video {folder} {name[2]}", file_name=name)
        annotation["image_id"] = image["id"]
    data.save()
    assert data.preprocess()[0] == 0
    keys = set(ShardReader(data.out).keys)
    assert keys == {"y", *(f"video {folder} x" for folder in "abc")}


@pytest.mark.parametrize(
    "form", ["WEBP", "TIFF", "BMP", "GIF", "PNG", "palette", "alpha", "16-bit"]
)
def test_photos_of_other_kinds_become_jpeg(data: Data, form: str) -> None:
    image = data.json["images"][0]
    path = data.photos / image["file_name"]
    with Image.open(path) as picture:
        rgb = picture.convert("RGB")
    path.unlink()
    path = path.with_suffix(f".{form}")
    if form == "16-bit":
        cv2.imwrite(f"{path}.TIFF", np.asarray(rgb)[..., ::-1].astype(np.uint16) * 257)
        path = Path(f"{path}.TIFF")
    elif form in {"palette", "alpha"}:
        other = rgb.quantize(256) if form == "palette" else rgb.copy()
        if form == "alpha":
            other.putalpha(3)
        other.save(path, "PNG")
    else:
        rgb.save(path, form, **({"quality": 95} if form == "WEBP" else {}))
    image["file_name"] = path.name
    data.save()
    assert data.preprocess(dry=True)[1]["quarantined"] == 0
    code, values, said = data.preprocess()
    assert (code, values["written"], said) == (0, 4, "")
    with Image.open(io.BytesIO(photos_of(data)[f"{image['id']:012d}"])) as found:
        assert (found.format, found.mode) == ("JPEG", "RGB")
        assert np.abs(np.asarray(found, int) - np.asarray(rgb, int)).mean() < 8


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_turned_photos_are_told_of_and_turned_when_asked(
    data: Data, form: str, orientation: int
) -> None:
    """The annotation is drawn on the upright photo."""
    image = data.json["images"][0]
    path = data.photos / image["file_name"]
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(path) as picture:
        upright = picture.convert("RGB")
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    upright.transpose(back).save(
        path, form, exif=exif, **({"quality": 95} if form == "JPEG" else {})
    )
    code, values, said = data.preprocess("--max-bad", 1)
    if orientation == 3:
        assert (code, values["written"]) == (0, 4)
        assert "EXIF orientation" in said
        assert "--upright" in said
    else:
        assert (code, values["quarantined"]) == (0, 1)
        assert "EXIF orientation is 6 (read it with --upright)" in data.quarantine()[0]["message"]
    code, values, said = data.preprocess("--upright", "--strict")
    assert (code, values["written"], said) == (0, 4, "")
    with Image.open(io.BytesIO(photos_of(data)[f"{image['id']:012d}"])) as found:
        assert ImageOps.exif_transpose(found).size == upright.size
        assert np.abs(np.asarray(found, int) - np.asarray(upright, int)).mean() < 6


# Hostile files


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(40 << 30)


def bomb(path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(path, "PNG")


def postscript(path: Path) -> None:
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\nshowpage\n%%EOF\n")


@pytest.mark.parametrize("harm", [pipe, endless, huge, bomb, postscript])
@pytest.mark.parametrize("which", ["photo", "png", "json"])
def test_what_is_no_picture_costs_one_line(
    data: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Path], None],
    which: str,
) -> None:
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    image, annotation = data.json["images"][0], data.json["annotations"][0]
    path = {
        "photo": data.photos / image["file_name"],
        "png": data.pngs / annotation["file_name"],
        "json": data.file,
    }[which]
    path.unlink()
    harm(path)
    if which == "json":
        for code, _, said in (data.preprocess(), data.score()):
            assert (code, said.count("\n")) == (1, 0)
    else:
        for dry in (True, False):
            code, values, _ = data.preprocess("--max-bad", 1, "--follow-links", dry=dry)
            assert (code, values["quarantined"]) == (0, 1)
        assert data.score("--follow-links")[0] == int(which == "png")
    assert not (tmp_path / "started").exists()


def test_files_outside_the_folder_are_refused(data: Data, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    names = [image["file_name"] for image in data.json["images"]]
    for name in names:
        shutil.copy(data.photos / name, outside / name)
    data.json["images"][0]["file_name"] = f"../../outside/{names[0]}"
    data.json["images"][1]["file_name"] = str(outside / names[1])
    (data.photos / names[2]).unlink()
    (data.photos / names[2]).symlink_to(outside / names[2])
    (data.photos / "more").symlink_to(outside)
    data.json["images"][3]["file_name"] = f"more/{names[3]}"
    data.save()
    code, values, _ = data.preprocess("--max-bad", 4)
    assert (code, values["written"]) == (0, 0)
    assert {line["code"] for line in data.quarantine()} == {"file-outside"}
    _, values, _ = data.preprocess("--max-bad", 4, "--follow-links")
    assert values["written"] == 2


def test_a_link_to_nothing_is_a_missing_photo(data: Data) -> None:
    name = data.json["images"][0]["file_name"]
    (data.photos / name).unlink()
    (data.photos / name).symlink_to("nothing")
    assert data.preprocess("--max-bad", 1)[1]["written"] == 3
    assert data.quarantine()[0]["message"] == f"{name}: photo missing"


def test_links_inside_the_folder_are_fine(data: Data) -> None:
    name = data.json["images"][0]["file_name"]
    (data.photos / "here").mkdir()
    (data.photos / name).rename(data.photos / "here" / name)
    (data.photos / name).symlink_to(f"here/{name}")
    shutil.move(data.photos, data.root / "elsewhere")
    data.photos.symlink_to("elsewhere")  # the folder itself is the user's choice
    assert data.preprocess()[:2][1]["written"] == 4


@pytest.mark.parametrize("way", ["up", "absolute", "link"])
def test_a_png_outside_its_folder_is_never_scored(data: Data, tmp_path: Path, way: str) -> None:
    row = data.json["annotations"][0]
    there = tmp_path / row["file_name"]
    (data.pngs / row["file_name"]).rename(there)
    if way == "link":
        (data.pngs / row["file_name"]).symlink_to(there)
    else:
        row["file_name"] = str(there) if way == "absolute" else f"../../../{there.name}"
    data.save()
    code, _, said = data.score()
    assert (code, said.count("\n")) == (1, 0)
    assert "lies outside its folder" in said
    assert data.score("--follow-links")[0] == int(way != "link")


def test_evaluation_tells_of_turned_photos(data: Data, trained: Path, tmp_path: Path) -> None:
    path = data.photos / data.json["images"][0]["file_name"]
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(path) as picture:
        picture.save(path, exif=exif, quality=95)
    options = ("--coco", data.root, "--split", "val", "--device", "cpu", "--overlays", 0)
    for flags, told in (((), True), (("--upright",), False)):
        out = tmp_path / str(told)
        code, _, said = data.run(
            "evaluate", "--checkpoint", trained, "--out", out, *options, *flags
        )
        assert code == 0
        assert ("EXIF orientation" in said) == told


def test_a_prediction_is_a_dataset(data: Data, trained: Path, tmp_path: Path) -> None:
    """Pseudo-labels: what `evaluate` writes, beside the photos."""
    out = tmp_path / "out"
    options = ("--coco", data.root, "--split", "val", "--device", "cpu", "--overlays", 0)
    assert data.run("evaluate", "--checkpoint", trained, "--out", out, *options)[0] == 0
    folders = ("--images", data.photos, "--panoptic-json", out / "panoptic.json")
    code, printed, said = data.run(
        *("preprocess", *folders, "--panoptic-dir", out / "panoptic", "--out", data.out),
        *("--workers", 0, "--json"),
    )
    assert (code, json.loads(printed)["written"]) == (0, 4)
    assert "images`" not in said
    names = [row["file_name"] for row in json.loads((out / "panoptic.json").read_text())["images"]]
    assert names == [row["file_name"] for row in data.json["images"]]
    code, printed, _ = data.run("score", out / "panoptic.json", out / "panoptic.json", "--json")
    assert code == 0


def test_predictions_of_any_photos_are_a_dataset(data: Data, trained: Path, tmp_path: Path) -> None:
    """Also where two photos have one name, which the names of PNGs cannot tell apart."""
    out, below = tmp_path / "out", data.photos / "below"
    below.mkdir()
    first, second, *_ = sorted(data.photos.glob("*.jpg"))
    shutil.copy(second, below / first.name)
    line = ("--checkpoint", trained, "--out", out, "--recursive", "--device", "cpu")
    assert data.run("predict", data.photos, *line)[0] == 0
    code, printed, said = data.run(
        *("preprocess", "--images", data.photos, "--panoptic-json", out / "panoptic.json"),
        *("--panoptic-dir", out / "panoptic", "--out", data.out, "--workers", 0, "--json"),
    )
    assert (code, json.loads(printed)["written"]) == (0, 5)
    assert "file names are not there" not in said
    assert sorted(photos_of(data).values()) == sorted(
        path.read_bytes() for path in data.photos.rglob("*.jpg")
    )
    code, printed, _ = data.run("inspect", data.out, "--json")
    assert (code, json.loads(printed)["samples"]) == (0, 5)


@pytest.mark.parametrize("as_text", ["truth", "prediction"])
def test_numbers_and_their_text_are_the_same_ids(data: Data, as_text: str) -> None:
    other = data.root / "annotations/other.json"
    for row in data.json["annotations"]:
        row["image_id"] = str(row["image_id"])
    other.write_text(json.dumps(data.json))
    files = (other, data.file) if as_text == "truth" else (data.file, other)
    folders = ("--gt-dir", data.pngs, "--pred-dir", data.pngs)
    code, printed, _ = data.run("score", *files, *folders, "--json")
    assert (code, json.loads(printed)["All"]["pq"]) == (0, 1.0)
