"""`panoptic convert` of Cityscapes, ADE20K, semantic maps, and --merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from PIL import Image
from test_convert import Map, blobs, check_rows, photo, quarantine, read, same_regions, save

from panoptic_cache.pipeline.coco import CocoLayout, read_dataset

Document = dict[str, Any]
CITY = [
    {"id": 7, "name": "road", "color": [128, 64, 128], "supercategory": "flat", "isthing": 0},
    {"id": 8, "name": "sidewalk", "color": [244, 35, 232], "supercategory": "flat", "isthing": 0},
    {"id": 24, "name": "person", "color": [220, 20, 60], "supercategory": "human", "isthing": 1},
    {"id": 26, "name": "car", "color": [0, 0, 142], "supercategory": "vehicle", "isthing": 1},
    {"id": 28, "name": "bus", "color": [0, 60, 100], "supercategory": "vehicle", "isthing": 1},
]
IMAGES = ["aachen_000000_000019", "aachen_000001_000019", "zurich_000000_000019"]


def id2rgb(ids: Map) -> Map:
    """The devkit's colours of ids."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 256**2], -1).astype(np.uint8)


def street(seed: int) -> Map:
    """An instanceIds map: class, or 1000 * class + number; 1 is out of the evaluation."""
    values = np.full((24, 31), 7)
    values[:, 20:], values[:3] = 8, 1
    kinds = {value: 26000 + place for place, value in enumerate(np.unique(blobs(seed))[1:4])}
    for value, kind in kinds.items():
        values[blobs(seed) == value] = kind
    values[20:, :6], values[20:, 6:9], values[20:, 9:12] = 26, 24000, 28001  # 26: a group of cars
    return values


def write_cityscapes(root: Path, split: str = "val", suffix: str = "") -> dict[str, Map]:
    """What createPanopticImgs leaves: ids are the values, groups of instances are crowds."""
    document: Document = {"images": [], "annotations": [], "categories": CITY}
    maps = {name: street(seed) for seed, name in enumerate(IMAGES)}
    pngs = root / f"gtFine/cityscapes_panoptic_{split}{suffix}"
    for name, values in maps.items():
        photo(root / f"leftImg8bit/{split}/{name.split('_')[0]}/{name}_leftImg8bit.png")
        save(pngs / f"{name}_gtFine_panoptic.png", id2rgb(np.where(values == 1, 0, values)))
        document["images"].append(
            {"id": name, "width": 31, "height": 24, "file_name": f"{name}_gtFine_leftImg8bit.png"}
        )
        rows = [
            {
                "id": value,
                "category_id": value // 1000 or value,
                "area": int((values == value).sum()),
                "bbox": [0, 0, 31, 24],
                "iscrowd": int(value == 26),
            }
            for value in np.unique(values).tolist()
            if value != 1
        ]
        file = f"{name}_gtFine_panoptic.png"
        document["annotations"].append({"image_id": name, "file_name": file, "segments_info": rows})
    (root / f"gtFine/cityscapes_panoptic_{split}{suffix}.json").write_text(json.dumps(document))
    return maps


def run_convert(run: Run, *more: object) -> tuple[int, str, str]:
    return run("convert", *more, "--workers", 0)


@pytest.mark.parametrize("suffix", ["", "_trainId"])
def test_cityscapes(run: Run, tmp_path: Path, suffix: str) -> None:
    maps = write_cityscapes(tmp_path, suffix=suffix)
    out = tmp_path / "out"
    assert run_convert(run, "cityscapes", tmp_path, "--out", out, "--split", "val")[0] == 0
    for place, name in enumerate(IMAGES):
        ids, segments = read(out, "val", place)
        check_rows(ids, segments)
        same_regions(ids, np.where(maps[name] == 1, 0, maps[name]))
        for row in segments:
            value = maps[name][ids == row["id"]][0]
            assert row["category_id"] == (value // 1000 or value)
            assert row["iscrowd"] == (value == 26)
        original = tmp_path / f"leftImg8bit/val/{name.split('_')[0]}/{name}_leftImg8bit.png"
        assert (out / f"val/{name}.png").read_bytes() == original.read_bytes()
    content = json.loads((out / "annotations/panoptic_val.json").read_text())
    assert content["categories"] == CITY
    dataset = read_dataset(CocoLayout.of(out, "val"))
    assert [record.key for record in dataset.records] == IMAGES


def write_ade20k(root: Path) -> dict[str, Map]:
    """What prepare_ade20k_pan_seg leaves: ids are colours, things may hide all of a stuff."""
    categories = [
        {"name": "wall", "id": 0, "isthing": 0, "color": [120, 120, 120]},
        {"name": "window ", "id": 8, "isthing": 1, "color": [230, 230, 230]},
        {"name": "road, route", "id": 6, "isthing": 0, "color": [140, 140, 140]},
    ]
    document: Document = {"images": [], "annotations": [], "categories": categories}
    maps = {}
    for seed, name in enumerate(["ADE_val_00000001", "ADE_val_00000002"]):
        values = blobs(seed) + 15_132_390
        values[blobs(seed) == 0] = 120 + 256 * 120 + 65536 * 120
        values[0] = 0
        maps[name] = values
        photo(root / f"images/validation/{name}.jpg")
        save(root / f"ade20k_panoptic_val/{name}.png", id2rgb(values))
        document["images"].append(
            {"id": name, "file_name": f"{name}.jpg", "width": 31, "height": 24}
        )
        rows = [
            {"id": one, "category_id": 8 if one > 10_000_000 else 0, "iscrowd": 0, "area": 9}
            for one in np.unique(values).tolist()
            if one
        ]
        rows.append({"id": 140 * 65793, "category_id": 6, "iscrowd": 0, "area": 40})
        document["annotations"].append(
            {"image_id": name, "file_name": f"{name}.png", "segments_info": rows}
        )
    (root / "ade20k_panoptic_val.json").write_text(json.dumps(document))
    return maps


def test_ade20k(run: Run, tmp_path: Path) -> None:
    maps = write_ade20k(tmp_path)
    out = tmp_path / "out"
    assert run_convert(run, "ade20k", tmp_path, "--out", out, "--split", "val")[0] == 0
    for place, (name, values) in enumerate(maps.items()):
        ids, segments = read(out, "val", place)
        check_rows(ids, segments)
        same_regions(ids, values)
        for row in segments:
            assert row["category_id"] == (8 if values[ids == row["id"]][0] > 10_000_000 else 0)
        assert (out / f"val/{name}.jpg").is_file()
    assert len(read_dataset(CocoLayout.of(out, "val")).records) == 2


@pytest.mark.parametrize(
    ("kind", "split", "message"),
    [
        ("cityscapes", "val", "cityscapes_panoptic_val.json: no annotation file (run createPan"),
        ("ade20k", "val", "ade20k_panoptic_val.json: no annotation file (run prepare_ade20k"),
        ("ade20k", "test", "--split: no split test (train or val)"),
    ],
)
def test_the_official_script_comes_first(
    run: Run, tmp_path: Path, kind: str, split: str, message: str
) -> None:
    code, _, said = run_convert(run, kind, tmp_path, "--out", tmp_path / "out", "--split", split)
    assert (code, message in said, "\n" in said) == (1, True, False)


def change(**more: Any) -> Callable[[Document], object]:
    return lambda document: document["annotations"][0]["segments_info"][0].update(more)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (change(category_id=99), "malformed annotation: segment 7: category 99"),
        (change(id=5), "aachen_000000_000019_gtFine_panoptic.png: "),
        (lambda document: document["annotations"].pop(0), "malformed annotation: 0 rows in"),
        (lambda document: document["images"][0].update(file_name="x.png"), "x.png: photo missing"),
        (
            lambda document: document["images"][0].update(height=9),
            "aachen_000000_000019_gtFine_pan",
        ),
        (lambda document: document["annotations"][0].pop("file_name"), "malformed annotation: Obj"),
    ],
)
def test_a_bad_row_costs_one_image(
    run: Run, tmp_path: Path, harm: Callable[[Document], object], message: str
) -> None:
    write_cityscapes(tmp_path)
    file = tmp_path / "gtFine/cityscapes_panoptic_val.json"
    document = json.loads(file.read_text())
    harm(document)
    file.write_text(json.dumps(document))
    out = tmp_path / "out"
    assert run_convert(run, "cityscapes", tmp_path, "--out", out, "--split", "val")[0] == 3
    ((_, line),) = quarantine(out, "val").items()
    assert line.startswith(message)
    assert len(read_dataset(CocoLayout.of(out, "val")).records) == 2


def test_swapped_channels_are_named_without_an_option_that_is_none(
    run: Run, tmp_path: Path
) -> None:
    write_ade20k(tmp_path)
    path = tmp_path / "ade20k_panoptic_val/ADE_val_00000001.png"
    save(path, np.asarray(Image.open(path))[..., ::-1])
    out = tmp_path / "out"
    assert run_convert(run, "ade20k", tmp_path, "--out", out, "--split", "val")[0] == 3
    (line,) = quarantine(out, "val").values()
    assert "with red and blue swapped" in line
    assert line.endswith("would match (write it again, from RGB)")


@pytest.mark.parametrize("form", ["supercategory", "toml", "json"])
def test_merged_categories(run: Run, tmp_path: Path, form: str) -> None:
    maps = write_cityscapes(tmp_path)
    rule = "supercategory"
    wanted = {7: "flat", 8: "flat", 24: "human", 26: "vehicle", 28: "vehicle"}
    if form != "supercategory":
        text = {
            "toml": "vehicle = ['car', 'bus']\nvoid = 'sidewalk'",
            "json": '{"vehicle": ["car", "bus"], "void": ["sidewalk"]}',
        }[form]
        rule = str(tmp_path / f"table.{form}")
        Path(rule).write_text(text)
        wanted = {7: "road", 8: "", 24: "person", 26: "vehicle", 28: "vehicle"}
    out = tmp_path / "out"
    more = ["--out", out, "--split", "val", "--merge", rule]
    assert run_convert(run, "cityscapes", tmp_path, *more)[0] == 0
    content = json.loads((out / "annotations/panoptic_val.json").read_text())
    assert {row["name"]: row["isthing"] for row in content["categories"]} == {
        name: int(kind >= 24) for kind, name in wanted.items() if name
    }
    names = {row["id"]: row["name"] for row in content["categories"]}
    for place, name in enumerate(IMAGES):
        ids, segments = read(out, "val", place)
        check_rows(ids, segments)
        owner = {row["id"]: names[row["category_id"]] for row in segments}
        for y, x in np.ndindex(ids.shape):
            value = int(maps[name][y, x])
            assert owner.get(int(ids[y, x]), "") == wanted.get(value // 1000 or value, "")
        things = maps[name] >= 24
        same_regions(np.where(things, ids, 0), np.where(things, maps[name], 0))
        assert len([row for row in segments if owner[row["id"]] in {"flat", "road"}]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vehicle = ['car', 'buss']", "no category is called buss (did you mean bus?)"),
        ("rest = ['car', 'road']", "rest would be things and stuff: car is not what the others"),
        ("a = ['car']\nb = ['car']", "car becomes a and b"),
        ("a = 7", "no table of names (write lines such as: vehicle = ['car', 'bus'])"),
    ],
)
def test_a_wrong_table(run: Run, tmp_path: Path, text: str, message: str) -> None:
    write_cityscapes(tmp_path)
    (tmp_path / "table.toml").write_text(text)
    more = ["--out", tmp_path / "out", "--split", "val", "--merge", tmp_path / "table.toml"]
    code, _, said = run_convert(run, "cityscapes", tmp_path, *more)
    assert (code, message in said, "\n" in said) == (1, True, False)


def test_coco_itself_is_merged(run: Run, tmp_path: Path, tiny_root: Path) -> None:
    layout = CocoLayout.of(tiny_root, "val")
    places = ["--panoptic-json", layout.panoptic_json, "--panoptic-dir", layout.panoptic_dir]
    places += ["--images", layout.images, "--out", tmp_path, "--split", "val"]
    assert run_convert(run, "coco-panoptic", *places, "--merge", "supercategory")[0] == 0
    before, after = read_dataset(layout), read_dataset(CocoLayout.of(tmp_path, "val"))
    assert [row.key for row in before.records] == [row.key for row in after.records]
    assert {row.name for row in after.categories} == {"round", "angular", "open", "built", "ground"}


def test_semantic_maps(run: Run, tmp_path: Path) -> None:
    values = np.full((24, 31), 3, np.uint8)
    values[10:], values[:, 20:], values[0] = 11, 0, 255
    photo(tmp_path / "images/a.jpg")
    save(tmp_path / "maps/a_labelIds.png", values)
    photo(tmp_path / "images/b.jpg")
    palette = Image.fromarray(np.full((24, 31), 11, np.uint8), "P")
    palette.putpalette([5, 6, 7] * 256)
    palette.save(tmp_path / "maps/b.png")
    places = ["--images", tmp_path / "images", "--maps", tmp_path / "maps", "--split", "a"]
    (tmp_path / "names.toml").write_text("sky = 0\nroad = 3\n'tall grass' = 11\ncar = 12\n")
    more = ["--names", tmp_path / "names.toml", "--out", tmp_path / "out"]
    assert run_convert(run, "semantic-maps", *places, *more)[0] == 0
    ids, segments = read(tmp_path / "out", "a")
    check_rows(ids, segments)
    owner = {row["id"]: row["category_id"] for row in segments} | {0: 255}
    assert all(owner[int(ids[y, x])] == values[y, x] for y, x in np.ndindex(ids.shape))
    dataset = read_dataset(CocoLayout.of(tmp_path / "out", "a"))
    assert [row.name for row in dataset.categories] == ["sky", "road", "tall grass", "car"]
    assert not any(row.isthing for row in dataset.categories)
    assert run_convert(run, "semantic-maps", *places, "--out", tmp_path / "b", "--void", 0)[0] == 0
    dataset = read_dataset(CocoLayout.of(tmp_path / "b", "a"))
    assert [row.name for row in dataset.categories] == ["class 3", "class 11", "class 255"]


def test_an_undeclared_class_costs_one_image(run: Run, tmp_path: Path) -> None:
    for name, value in (("a", 3), ("b", 4)):
        photo(tmp_path / f"images/{name}.png")
        save(tmp_path / f"maps/{name}.png", np.full((24, 31), value, np.uint8))
    (tmp_path / "names.txt").write_text("3 road\n")
    places = ["--images", tmp_path / "images", "--maps", tmp_path / "maps", "--split", "a"]
    more = ["--names", tmp_path / "names.txt", "--out", tmp_path / "out"]
    assert run_convert(run, "semantic-maps", *places, *more)[0] == 3
    assert quarantine(tmp_path / "out", "a") == {
        "b.png": "b.png: value 4 at 744 pixels is undeclared (name it in --names, or give it as"
        " --void)"
    }


@pytest.mark.parametrize("text", ["", "road\n", "7 road\n8 road\n", "-1 road\n", "70000 road\n"])
def test_wrong_names(run: Run, tmp_path: Path, text: str) -> None:
    photo(tmp_path / "images/a.png")
    save(tmp_path / "maps/a.png", np.full((24, 31), 7, np.uint8))
    (tmp_path / "names.txt").write_text(text)
    places = ["--images", tmp_path / "images", "--maps", tmp_path / "maps", "--split", "a"]
    more = ["--names", tmp_path / "names.txt", "--out", tmp_path / "out"]
    code, _, said = run_convert(run, "semantic-maps", *places, *more)
    assert (code, "names.txt: " in said, "\n" in said) == (1, True, False)


def test_names_that_lead_out_of_their_folder_are_left_out(run: Run, tmp_path: Path) -> None:
    root, out = tmp_path / "in", tmp_path / "a" / "b" / "out"
    write_ade20k(root)
    path = root / "ade20k_panoptic_val.json"
    document = json.loads(path.read_text())
    document["images"][0]["file_name"] = "../../ADE_val_00000001.jpg"
    row = document["annotations"][1]
    (root / "ade20k_panoptic_val" / row["file_name"]).rename(tmp_path / "outside.png")
    row["file_name"] = "../../outside.png"
    path.write_text(json.dumps(document))
    before = {each for each in tmp_path.rglob("*") if each.is_file()}
    assert run_convert(run, "ade20k", root, "--out", out, "--split", "val")[0] == 3
    quarantine = (out / "annotations" / "quarantine_val.jsonl").read_text().splitlines()
    assert [json.loads(line)["code"] for line in quarantine] == ["file-outside"] * 2
    new = {each for each in tmp_path.rglob("*") if each.is_file()} - before
    assert all(out in each.parents for each in new)
    assert not [each for each in new if each.suffix in {".jpg", ".png"}]
