"""`panoptic convert`: the driver, and formats that are images."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from conftest import Run
from handmade import hashes
from numpy.typing import NDArray
from PIL import Image

from panoptic_cache.pipeline.coco import CocoLayout, read_dataset

NUCLEI = Path(__file__).parents[1] / "../shared/real/nuclei"
Map = NDArray[Any]
SEED = np.random.default_rng(0)


def save(path: Path, values: Map) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def blobs(seed: int, size: tuple[int, int] = (24, 31), count: int = 5) -> Map:
    """An instance map: 0, and values with gaps, some in two pieces."""
    rng = np.random.default_rng(seed)
    values = np.zeros(size, np.int64)
    for value in rng.choice(np.arange(1, 200), count, replace=False):
        for _ in range(2):
            y, x = rng.integers(0, size[0] - 4), rng.integers(0, size[1] - 5)
            values[y : y + 4, x : x + 5] = value
    return values


def photo(path: Path, size: tuple[int, int] = (24, 31)) -> Path:
    return save(path, SEED.integers(0, 256, (*size, 3), np.uint8))


def read(root: Path, split: str, place: int = 0) -> tuple[Map, list[dict[str, Any]]]:
    """Ids (H, W) of an image, as the official devkit computes them, and its segments."""
    content = json.loads((root / f"annotations/panoptic_{split}.json").read_text())
    row = content["annotations"][place]
    assert row["image_id"] == content["images"][place]["id"]
    rgb = np.asarray(Image.open(root / f"annotations/panoptic_{split}" / row["file_name"]))
    ids = rgb[..., 0].astype(int) + 256 * rgb[..., 1].astype(int) + 256**2 * rgb[..., 2].astype(int)
    return ids, row["segments_info"]


def check_rows(ids: Map, segments: list[dict[str, Any]]) -> None:
    """Every id of the map has one row, with its area and box, counted pixel by pixel."""
    assert {row["id"] for row in segments} == {*np.unique(ids).tolist()} - {0}
    assert len({row["id"] for row in segments}) == len(segments)
    for row in segments:
        places = [(y, x) for y, x in np.ndindex(ids.shape) if ids[y, x] == row["id"]]
        down, across = zip(*places, strict=True)
        box = [min(across), min(down), max(across) - min(across) + 1, max(down) - min(down) + 1]
        assert (row["area"], row["bbox"]) == (len(places), box)


def same_regions(ids: Map, values: Map) -> None:
    """Two maps cut the image into the same regions, and agree on what is in none."""
    pairs = {(int(a), int(b)) for a, b in zip(ids.ravel(), values.ravel(), strict=True)}
    assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)
    assert all((a == 0) == (b == 0) for a, b in pairs)


def quarantine(root: Path, split: str) -> dict[str, str]:
    lines = (root / f"annotations/quarantine_{split}.jsonl").read_text().splitlines()
    return {row["file"]: row["message"] for row in map(json.loads, lines)}


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Six photos and their maps."""
    for number in range(6):
        photo(tmp_path / f"data/images/{number}.png")
        save(tmp_path / f"data/maps/{number}.png", blobs(number).astype(np.uint16))
    return tmp_path / "data"


def arguments(data: Path, out: Path, *more: object) -> list[object]:
    folders = ["--images", data / "images", "--maps", data / "maps"]
    return ["convert", "label-maps", *folders, "--out", out, "--split", "a", *more]


@pytest.mark.parametrize(
    ("suffix", "kind"), [("png", "uint8"), ("png", "uint16"), ("tif", "uint16"), ("tif", "int32")]
)
def test_label_maps_keep_every_pixel(tmp_path: Path, run: Run, suffix: str, kind: str) -> None:
    values = blobs(7)
    values[values == values.max()] = np.iinfo(kind).max
    photo(tmp_path / "images/sub/a.PNG")
    save(tmp_path / f"maps/sub/a_masks.{suffix}", values.astype(kind))
    code, out, _ = run(*arguments(tmp_path, tmp_path / "out", "--workers", 0, "--json"))
    assert code == 0
    ids, segments = read(tmp_path / "out", "a")
    same_regions(ids, values)
    check_rows(ids, segments)
    said = json.loads(out)
    assert (said["images"], said["written"], said["quarantined"]) == (1, 1, 0)
    assert said["segments"] == {"object": len(np.unique(values)) - 1}
    assert (said["unlabelled"], said["pixels"]) == ((values == 0).sum(), values.size)


def test_background_is_one_segment_of_stuff(labelled: Path, tmp_path: Path, run: Run) -> None:
    more = ["--thing", "cell", "--background", "glass", "--workers", 0]
    assert run(*arguments(labelled, tmp_path / "out", *more))[0] == 0
    dataset = read_dataset(CocoLayout.of(tmp_path / "out", "a"))
    assert [(row.name, row.isthing) for row in dataset.categories] == [
        ("cell", True),
        ("glass", False),
    ]
    assert [record.key for record in dataset.records] == list("012345")
    for number in range(6):
        ids, segments = read(tmp_path / "out", "a", number)
        check_rows(ids, segments)
        (glass,) = [row["id"] for row in segments if row["category_id"] == 2]
        same_regions(np.where(ids == glass, 0, ids), blobs(number))


def test_classes_of_instances_come_from_a_second_map(tmp_path: Path, run: Run) -> None:
    values, classes = blobs(3), np.full((24, 31), 7)
    classes[:, 16:] = 9
    kinds = {}
    for value in {*np.unique(values).tolist()} - {0}:
        kinds[value] = 4 if value % 2 else 5
        classes[values == value] = kinds[value]
        y, x = np.argwhere(values == value)[0]
        classes[y, x] = 255  # the border of a class is often void
    free = np.argwhere(values == 0)[:3]
    classes[tuple(free.T)] = 4  # a thing where no instance is
    photo(tmp_path / "images/a.png")
    save(tmp_path / "maps/a.png", values.astype(np.uint16))
    save(tmp_path / "classes/a.png", classes.astype(np.uint8))
    (tmp_path / "names.txt").write_text("4 odd\n5 even cell\n7 left\n9 right\n")
    more = ["--semantic-maps", tmp_path / "classes", "--names", tmp_path / "names.txt"]
    more += ["--thing", "odd", "--thing", "even cell", "--workers", 0]
    assert run(*arguments(tmp_path, tmp_path / "out", *more))[0] == 0
    ids, segments = read(tmp_path / "out", "a")
    check_rows(ids, segments)
    owner = {row["id"]: row["category_id"] for row in segments}
    for y, x in np.ndindex(values.shape):
        wanted = kinds.get(int(values[y, x]), int(classes[y, x]))
        wanted = 0 if values[y, x] == 0 and classes[y, x] in {4, 5, 255} else wanted
        assert owner.get(int(ids[y, x]), 0) == wanted
    things = np.isin(ids, [one for one, kind in owner.items() if kind in {4, 5}])
    same_regions(np.where(things, ids, 0), values)


@pytest.mark.parametrize("overlap", ["last", "small"])
def test_masks(tmp_path: Path, run: Run, overlap: str) -> None:
    stack = np.zeros((4, 20, 30), bool)
    for number, (y, x, side) in enumerate([(2, 2, 5), (0, 0, 12), (8, 8, 10), (3, 20, 4)]):
        stack[number, y : y + side, x : x + side] = True
    photo(tmp_path / "in/one/images/one.png", (20, 30))
    save(tmp_path / "in/one/masks/0.png", stack[0].astype(np.uint8) * 255)
    save(tmp_path / "in/one/masks/1.png", stack[1])
    save(tmp_path / "in/one/masks/2.png", stack[2, ..., None].repeat(3, -1).astype(np.uint8) * 255)
    rgba = np.full((20, 30, 4), 255, np.uint8) * np.array([0, 0, 0, 1], np.uint8)
    rgba[stack[3]] = 255
    save(tmp_path / "in/one/masks/3.png", rgba)
    code, out, _ = run(
        *["convert", "masks", "--root", tmp_path / "in", "--out", tmp_path / "out"],
        *["--split", "a", "--overlap", overlap, "--workers", 0, "--json"],
    )
    assert code == 0
    wanted = np.zeros((20, 30), int)
    for y, x in np.ndindex(20, 30):
        claims = [number for number in range(4) if stack[number, y, x]]
        if claims:
            small = min(claims, key=lambda number: int(stack[number].sum()))
            wanted[y, x] = 1 + (claims[-1] if overlap == "last" else small)
    ids, segments = read(tmp_path / "out", "a")
    same_regions(ids, wanted)
    check_rows(ids, segments)
    assert json.loads(out)["overlaps"] == int((stack.sum(0) > 1).sum())
    assert (tmp_path / "out/a/one.png").samefile(tmp_path / "in/one/images/one.png")


def test_processes_give_the_bytes_of_one(labelled: Path, tmp_path: Path, run: Run) -> None:
    assert run(*arguments(labelled, tmp_path / "one", "--workers", 0, "--copy"))[0] == 0
    assert run(*arguments(labelled, tmp_path / "two", "--workers", 2, "--copy"))[0] == 0
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert (tmp_path / "one/a/0.png").stat().st_nlink == 1


def test_a_run_goes_on_where_it_was_cut(labelled: Path, tmp_path: Path, run: Run) -> None:
    whole = tmp_path / "whole"
    assert run(*arguments(labelled, whole, "--workers", 0))[0] == 0
    wanted = hashes(whole)
    journal = "annotations/convert_a.jsonl"
    data = (whole / journal).read_bytes()
    head = data.index(b"\n") + 1  # it is written whole, with the first line
    for number, cut in enumerate(np.linspace(head, len(data), 9, dtype=int).tolist()):
        out = Path(shutil.copytree(whole, tmp_path / str(number), symlinks=True))
        (out / journal).write_bytes(data[:cut])
        (out / "annotations/panoptic_a.json").unlink()
        (out / "annotations/panoptic_a/5.png").unlink()  # drawn after what was cut
        (out / "annotations/panoptic_a/.tmp-0").write_bytes(b"half")
        (out / "annotations/.lock").touch()
        (out / "a/5.png").unlink()
        assert run(*arguments(labelled, out, "--workers", 0))[0] == 0
        assert hashes(out) == wanted
    empty = tmp_path / "empty"  # killed before it had a journal
    (empty / "annotations/panoptic_a").mkdir(parents=True)
    (empty / "annotations/.lock").touch()
    assert run(*arguments(labelled, empty, "--workers", 0))[0] == 0
    assert hashes(empty) == wanted


def test_a_killed_run_goes_on(labelled: Path, tmp_path: Path, run: Run) -> None:
    for number in range(6, 60):
        shutil.copy(labelled / "images/0.png", labelled / f"images/{number}.png")
        shutil.copy(labelled / "maps/1.png", labelled / f"maps/{number}.png")
    assert run(*arguments(labelled, tmp_path / "whole", "--workers", 2))[0] == 0
    child = multiprocessing.get_context("fork").Process(
        target=run, args=arguments(labelled, tmp_path / "cut", "--workers", 2)
    )
    child.start()
    journal = tmp_path / "cut/annotations/convert_a.jsonl"
    while child.is_alive() and (not journal.is_file() or journal.read_bytes().count(b"\n") < 9):
        time.sleep(0.001)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not (tmp_path / "cut/annotations/panoptic_a.json").is_file()
    assert run(*arguments(labelled, tmp_path / "cut", "--workers", 2))[0] == 0
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def test_what_changed_is_drawn_again(labelled: Path, tmp_path: Path, run: Run) -> None:
    (labelled / "images/2.png").rename(tmp_path / "away.png")
    out = tmp_path / "out"
    assert run(*arguments(labelled, out, "--workers", 0))[0] == 3
    assert quarantine(out, "a") == {"2.png": "its photo is missing in images"}
    before = (out / "annotations/panoptic_a/0.png").stat().st_mtime_ns
    (tmp_path / "away.png").rename(labelled / "images/2.png")
    save(labelled / "maps/4.png", blobs(77).astype(np.uint16))
    assert run(*arguments(labelled, out, "--workers", 0))[0] == 0
    assert quarantine(out, "a") == {}
    same_regions(read(out, "a", 2)[0], blobs(2))
    same_regions(read(out, "a", 4)[0], blobs(77))
    assert (out / "annotations/panoptic_a/0.png").stat().st_mtime_ns == before


def test_other_settings_and_other_data_are_not_overwritten(
    labelled: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out"
    assert run(*arguments(labelled, out, "--workers", 0))[0] == 0
    wanted = hashes(out)
    code, _, said = run(*arguments(labelled, out, "--workers", 0, "--thing", "cell"))
    assert code == 1
    assert said.endswith("(choose another --out or --split, or remove this one's files)")
    assert hashes(out) == wanted
    (out / "annotations/convert_a.jsonl").unlink()
    code, _, said = run(*arguments(labelled, out, "--workers", 0))
    assert (code, said.count("\n")) == (1, 0)
    assert "holds something that was not converted here" in said


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def broken_map(values: Map) -> Callable[[Path], object]:
    def harm(data: Path) -> None:
        (data / "maps/3.png").unlink()
        save(data / "maps/3.tif", values)

    return harm


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (broken_map(np.ones((24, 31), np.float32)), "3.tif: map is of floats"),
        (broken_map(np.full((24, 31), -1, np.int32)), "3.tif: map has negative values, such as -1"),
        (broken_map(np.ones((24, 31, 3), np.uint8)), "3.tif: map has 3 channels"),
        (broken_map(np.ones((24, 30), np.uint8)), "3.tif: is 24 x 30, its photo 24 x 31"),
        (lambda data: (data / "maps/3.png").write_bytes(b"no PNG"), "3.png: map cannot be read"),
        (lambda data: (data / "images/3.png").write_bytes(b""), "3.png: photo cannot be read"),
        (lambda data: cut_short(data / "maps/3.png"), "3.png: map cannot be read"),
        (lambda data: (data / "maps/3.png").unlink(), "its map is missing in maps"),
        (lambda data: (data / "images/3.png").unlink(), "its photo is missing in images"),
        (broken_map(np.arange(300 * 300, dtype=np.int32).reshape(300, 300)), "3.tif: is 300 x 300"),
    ],
)
def test_a_bad_map_costs_one_image(
    labelled: Path, tmp_path: Path, run: Run, harm: Callable[[Path], object], message: str
) -> None:
    harm(labelled)
    code, out, said = run(*arguments(labelled, tmp_path / "out", "--workers", 0, "--json"))
    assert code == 3
    assert json.loads(out)["written"] == 5
    ((_, line),) = quarantine(tmp_path / "out", "a").items()
    assert line.startswith(message)
    assert "\n" not in line
    assert line in said
    assert len(read_dataset(CocoLayout.of(tmp_path / "out", "a")).records) == 5


def lead_out(path: Path, outside: Path) -> None:
    outside.mkdir(exist_ok=True)
    path.rename(outside / path.name)
    path.symlink_to(outside / path.name)


def test_links_that_lead_out_are_followed_when_asked(
    labelled: Path, tmp_path: Path, run: Run
) -> None:
    lead_out(labelled / "images/1.png", tmp_path / "x")
    lead_out(labelled / "maps/2.png", tmp_path / "y")
    lead_out(labelled / "images/3.png", labelled / "images/inside")  # no further than its folder
    (labelled / "images/inside/3.png").rename(labelled / "images/inside/.3.png")
    (labelled / "images/3.png").unlink()
    (labelled / "images/3.png").symlink_to("inside/.3.png")
    (labelled / "images/circle").symlink_to(labelled / "images")
    (labelled / "images/more").symlink_to(tmp_path / "x")
    code, _, said = run(*arguments(labelled, tmp_path / "out", "--workers", 0))
    assert code == 3
    assert f"{labelled / 'images/more'} leads out of its folder: see --follow-links" in said
    assert quarantine(tmp_path / "out", "a") == {
        f"{number}.png": f"{folder}: {kind} {number}.png lies outside its folder (move it there;"
        " links are followed with --follow-links)"
        for number, folder, kind in [(1, "images", "photo"), (2, "maps", "map")]
    }
    more = ["--workers", 0, "--follow-links"]
    assert run(*arguments(labelled, tmp_path / "all", *more))[0] == 0
    content = json.loads((tmp_path / "all/annotations/panoptic_a.json").read_text())
    names = [row["file_name"] for row in content["images"]]
    assert names == [*(f"{number}.png" for number in range(6)), "more/1.png"]


@pytest.mark.parametrize("where", ["images", "masks"])
def test_masks_and_photos_lie_in_the_folder(tmp_path: Path, run: Run, where: str) -> None:
    for name in ("good", "bad"):
        photo(tmp_path / f"in/{name}/images/a.png")
        save(tmp_path / f"in/{name}/masks/a.png", np.ones((24, 31), np.uint8))
    lead_out(tmp_path / f"in/bad/{where}/a.png", tmp_path / "x")
    line = ["convert", "masks", "--root", tmp_path / "in", "--split", "a", "--workers", 0, "--out"]
    assert run(*line, tmp_path / "out")[0] == 3
    (said,) = quarantine(tmp_path / "out", "a").values()
    assert f"bad/{where}/a.png lies outside its folder" in said
    assert run(*line, tmp_path / "all", "--follow-links")[0] == 0


@pytest.mark.parametrize("kind", ["jpg", "tif"])
def test_photos_that_are_stored_turned(tmp_path: Path, run: Run, kind: str) -> None:
    exif = Image.Exif()
    exif[274] = 6
    (tmp_path / "images").mkdir()
    stored = Image.fromarray(np.zeros((31, 24, 3), np.uint8))
    stored.save(tmp_path / f"images/a.{kind}", exif=exif)
    save(tmp_path / "maps/a.png", blobs(0).astype(np.uint8))
    assert run(*arguments(tmp_path, tmp_path / "one", "--workers", 0))[0] == 3
    (line,) = quarantine(tmp_path / "one", "a").values()
    assert line == (
        "a.png: is 24 x 31, its photo 31 x 24 (its EXIF orientation is 6: give --upright, or leave"
        " it out)"
    )
    assert run(*arguments(tmp_path, tmp_path / "two", "--workers", 0, "--upright"))[0] == 0
    same_regions(read(tmp_path / "two", "a")[0], blobs(0))
    rendered = ["--coco", tmp_path / "two", "--split", "a", "--out", tmp_path / "cache"]
    assert run("preprocess", *rendered, "--upright", "--workers", 0)[0] == 0


def test_more_segments_than_a_sample_holds(tmp_path: Path, run: Run) -> None:
    photo(tmp_path / "images/a.png", (300, 300))
    save(tmp_path / "maps/a.tif", np.arange(90_000, dtype=np.int32).reshape(300, 300))
    code, *_ = run(*arguments(tmp_path, tmp_path / "out", "--workers", 0))
    assert code == 3
    assert quarantine(tmp_path / "out", "a") == {"a.png": "89999 segments, 65535 are the most"}


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda one: save(one / "masks/b.png", np.zeros((24, 31), np.uint8)),
            "b.png: mask is empty",
        ),
        (
            lambda one: save(one / "masks/b.png", np.ones((9, 31), np.uint8)),
            "b.png: is 9 x 31, its",
        ),
        (lambda one: photo(one / "images/b.png"), "images: 2 photos, such as a.png and b.png"),
        (lambda one: shutil.rmtree(one / "masks"), "bad: no folder masks"),
        (lambda one: (one / "masks/a.png").write_bytes(b"?"), "a.png: mask cannot be read"),
    ],
)
def test_a_bad_mask_costs_one_image(
    tmp_path: Path, run: Run, harm: Callable[[Path], object], message: str
) -> None:
    for name in ("good", "bad"):
        photo(tmp_path / f"in/{name}/images/a.png")
        save(tmp_path / f"in/{name}/masks/a.png", np.ones((24, 31), np.uint8))
    harm(tmp_path / "in/bad")
    code, *_ = run(
        *["convert", "masks", "--root", tmp_path / "in", "--out", tmp_path / "out"],
        *["--split", "a", "--workers", 0],
    )
    assert code == 3
    ((_, line),) = quarantine(tmp_path / "out", "a").items()
    assert line.startswith(message)
    assert [row.key for row in read_dataset(CocoLayout.of(tmp_path / "out", "a")).records] == [
        "good"
    ]


def test_real_nuclei(tmp_path: Path, run: Run) -> None:
    if not NUCLEI.is_dir():
        pytest.skip("the real nuclei are not on this machine")
    out = ["--out", tmp_path, "--workers", 0, "--json"]
    places = ["--root", NUCLEI / "one_mask_a_file"]
    code, said, _ = run("convert", "masks", *places, *out, "--split", "masks")
    assert (code, json.loads(said)["written"]) == (0, 12)
    for folder in sorted((NUCLEI / "one_mask_a_file").iterdir())[:3]:
        place = sorted((NUCLEI / "one_mask_a_file").iterdir()).index(folder)
        ids, segments = read(tmp_path, "masks", place)
        masks = sorted((folder / "masks").iterdir())
        assert len(segments) == len(masks)
        for mask in masks:
            inside = np.asarray(Image.open(mask)) > 0
            assert len({*ids[inside].tolist()}) == 1
            assert (ids == ids[inside][0]).sum() == inside.sum()


TINY: dict[str, Any] = {
    "steps": 3,
    "precision": "fp32",
    "data": {"size": 28, "batch": 4, "micro_batch": 4, "workers": 0},
    "model": {
        "backbone": "random",
        "random": {"hidden_size": 16, "layers": 2, "heads": 2, "patch_size": 7},
        "taps": [1, 2],
        "channels": 8,
    },
}


def train_and_evaluate(run: Run, root: Path, place: Path) -> tuple[list[Any], dict[str, Any]]:
    """A split from preprocess to scores: the lines of the training, and what evaluate prints."""
    same = ["--fit", "squash", "--size", 28, "--workers", 0]
    data = ["--coco", root, "--split", "a"]
    assert run("preprocess", *data, "--out", place / "cache", *same)[0] == 0
    config = {**TINY, "out": str(place / "run")}
    config["data"] = {**TINY["data"], "cache": str(place / "cache")}
    (place / "tiny.toml").write_text(tomli_w.dumps(config))
    assert run("train", place / "tiny.toml")[0] == 0
    lines = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    more = ["--checkpoint", place / "run", "--out", place / "scores", "--json"]
    code, out, said = run("evaluate", *data, *more)
    assert (code, (place / "scores/report.html").is_file()) == (0, True)
    assert "undefined" not in said
    return lines, json.loads(out)


@pytest.mark.slow
def test_from_masks_to_a_score(tmp_path: Path, run: Run) -> None:
    """What docs/own-data.md does with the nuclei, on a stand-in of eight images."""
    for number in range(8):
        folder = tmp_path / f"in/cell{number}"
        photo(folder / "images/x.png")
        for value in np.unique(blobs(number))[1:]:
            save(folder / f"masks/{value}.png", blobs(number) == value)
    more = ["--thing", "cell", "--background", "glass", "--workers", 0]
    places = ["--root", tmp_path / "in", "--out", tmp_path / "data", "--split", "a"]
    assert run("convert", "masks", *places, *more)[0] == 0
    lines, scores = train_and_evaluate(run, tmp_path / "data", tmp_path)
    assert len(lines) == 3
    assert {name: scores[name] is None for name in ("All", "Things", "Stuff")} == {
        "All": False,
        "Things": False,
        "Stuff": False,
    }


@pytest.mark.slow
def test_without_instances_one_head_learns(tmp_path: Path, run: Run) -> None:
    for number in range(8):
        photo(tmp_path / f"images/{number}.png")
        save(tmp_path / f"maps/{number}.png", (blobs(number) % 3).astype(np.uint8))
    places = ["--images", tmp_path / "images", "--maps", tmp_path / "maps"]
    more = ["--out", tmp_path / "data", "--split", "a", "--workers", 0]
    assert run("convert", "semantic-maps", *places, *more)[0] == 0
    lines, scores = train_and_evaluate(run, tmp_path / "data", tmp_path)
    assert {line["task"] for line in lines} == {"semantic"}
    assert scores["Things"] is None
    assert scores["Stuff"] == scores["All"]


def test_photos_on_another_disk_are_copied(
    labelled: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_disk(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", other_disk)
    assert run(*arguments(labelled, tmp_path / "out", "--workers", 0))[0] == 0
    photos = [*(tmp_path / "out").rglob("0.png")]
    assert photos
    assert not any(photo.is_symlink() for photo in photos)
    code, text, _ = run(
        *("preprocess", "--coco", tmp_path / "out", "--split", "a"),
        *("--out", tmp_path / "cache", "--workers", 0, "--max-bad", 0, "--json"),
    )
    assert code == 0
    assert json.loads(text)["quarantined"] == 0
