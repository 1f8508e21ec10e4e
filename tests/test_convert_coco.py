"""`panoptic convert coco-instances`: what COCO's and other tools' exports become."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from test_convert import check_rows, photo, quarantine, read, same_regions, save

from panoptic_cache.pipeline.coco import CocoLayout, read_dataset

REAL = Path(__file__).parents[1] / "../shared/real/coco"
HEIGHT, WIDTH = 40, 50
Document = dict[str, Any]
Mask = NDArray[np.bool_]

SQUARE = [5.0, 5.0, 25.0, 5.0, 25.0, 25.0, 5.0, 25.0]
TRIANGLE = [20.0, 10.0, 45.5, 12.25, 30.0, 38.75]
OVER_THE_EDGE = [40.0, -6.5, 61.0, 8.0, 38.0, 12.0]


def runs(mask: Mask) -> list[int]:
    """Uncompressed RLE: lengths of runs down the columns, beginning with zeros."""
    counts, now = [0], False
    for value in mask.T.ravel().tolist():
        if value != now:
            counts.append(0)
            now = value
        counts[-1] += 1
    return counts


def disc(x: float, y: float, radius: float) -> Mask:
    down, across = np.mgrid[:HEIGHT, :WIDTH]
    inside: Mask = (across - x) ** 2 + (down - y) ** 2 < radius**2
    return inside


def rle(mask: Mask, packed: bool) -> dict[str, Any]:
    if not packed:
        return {"counts": runs(mask), "size": [HEIGHT, WIDTH]}
    said = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"counts": said["counts"].decode(), "size": said["size"]}


def decode(segmentation: Any) -> Mask:
    """(H, W) of one annotation, by pycocotools alone or by laying out its runs."""
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            bits = [np.full(n, place % 2, bool) for place, n in enumerate(segmentation["counts"])]
            return np.concatenate(bits).reshape(WIDTH, HEIGHT).T
        return coco_mask.decode(segmentation | {"counts": segmentation["counts"].encode()}) != 0  # type: ignore[no-any-return]
    flat = segmentation if isinstance(segmentation[0], list) else [segmentation]
    flat = [np.ravel(part).tolist() for part in flat]
    together = np.zeros((HEIGHT, WIDTH), bool)
    for part in flat:
        (one,) = coco_mask.frPyObjects([part], HEIGHT, WIDTH)
        together |= coco_mask.decode(one) != 0
    return together


def coco() -> Document:
    """As COCO itself: polygons, and a crowd as uncompressed RLE."""
    return {
        "info": {"year": 2017},
        "licenses": [{"id": 1, "name": "none", "url": ""}],
        "images": [
            {"id": 42, "file_name": "one.png", "height": HEIGHT, "width": WIDTH, "license": 1},
            {"id": 139, "file_name": "two.png", "height": HEIGHT, "width": WIDTH, "license": 1},
        ],
        "annotations": [
            annotation(1, 42, 1, [SQUARE]),
            annotation(2, 42, 18, [TRIANGLE, OVER_THE_EDGE]),
            annotation(3, 42, 1, rle(disc(24, 24, 12), False), iscrowd=1),
            annotation(4, 139, 18, [SQUARE]),
            annotation(5, 139, 18, rle(disc(20, 20, 6), True)),
        ],
        "categories": [
            {"supercategory": "person", "id": 1, "name": "person"},
            {"supercategory": "animal", "id": 18, "name": "dog"},
        ],
    }


def annotation(number: Any, image: Any, kind: Any, segmentation: Any, **more: Any) -> Document:
    return {
        "id": number,
        "image_id": image,
        "category_id": kind,
        "segmentation": segmentation,
        "area": 1.5,
        "bbox": [0, 0, 1, 1],
        "iscrowd": 0,
        **more,
    }


def cvat() -> Document:
    """Subsets are folders; masks drawn with a brush are uncompressed RLE, and marked as crowds."""
    document = coco()
    for image in document["images"]:
        image |= {"file_name": f"Train/{image['file_name']}", "flickr_url": "", "coco_url": ""}
    for row in document["annotations"]:
        row |= {"segmentation": rle(decode(row["segmentation"]), False), "iscrowd": 1}
        row["attributes"] = {"occluded": False}
    return document


def roboflow() -> Document:
    """A first category that only groups the others; ids from 0; names with a hash."""
    document = coco()
    document["categories"] = [
        {"id": 0, "name": "animals", "supercategory": "none"},
        {"id": 1, "name": "person", "supercategory": "animals"},
        {"id": 2, "name": "dog", "supercategory": "animals"},
    ]
    for number, image in enumerate(document["images"]):
        image |= {"id": number, "date_captured": "2024-01-01T00:00:00+00:00"}
    for number, row in enumerate(document["annotations"]):
        row |= {"id": number, "image_id": number // 3, "category_id": 1 + row["category_id"] // 18}
    return document


def fiftyone() -> Document:
    """No supercategories, categories from 0, masks as compressed RLE, no flag of crowds."""
    document = coco()
    document["info"], document["licenses"] = {"year": "", "url": None}, []
    document["categories"] = [
        {"id": 0, "name": "person", "supercategory": None},
        {"id": 1, "name": "dog", "supercategory": None},
    ]
    for row in document["annotations"]:
        row |= {"category_id": row["category_id"] // 18}
        row |= {"segmentation": rle(decode(row["segmentation"]), True)}
        del row["iscrowd"]
    return document


def label_studio() -> Document:
    """Backslashes, a server's folders, everything from 0, boxes without a segmentation."""
    document = coco()
    del document["licenses"]
    document["categories"] = [{"id": 0, "name": "person"}, {"id": 1, "name": "dog"}]
    names = ["images\\one.png", "..\\..\\label-studio\\media\\upload\\4\\two.png"]
    for number, image in enumerate(document["images"]):
        image |= {"id": number, "file_name": names[number]}
    for number, row in enumerate(document["annotations"]):
        row |= {"id": number, "image_id": number // 3, "category_id": row["category_id"] // 18}
        row |= {"ignore": 0, "iscrowd": 0}
    document["annotations"].append(annotation(9, 0, 1, [], ignore=0))
    return document


def supervisely() -> Document:
    """Each category is its own group; no licence is the text None."""
    document = coco()
    for number, row in enumerate(document["categories"]):
        row |= {"id": number, "supercategory": row["name"]}
    for image in document["images"]:
        image |= {"license": "None", "url": "None", "sly_id": None}
    for row in document["annotations"]:
        row |= {"category_id": row["category_id"] // 18, "iscrowd": 0}
    return document


def by_hand() -> Document:
    """What scripts write: text ids, numbers with a point, flat polygons, pairs, fields missing."""
    document: Document = {key: coco()[key] for key in ("images", "annotations", "categories")}
    for image in document["images"]:
        image["id"] = str(image["id"])
        del image["height"], image["width"], image["license"]
    for row in document["annotations"]:
        del row["id"], row["area"], row["bbox"], row["iscrowd"]
    first, second, *_ = document["annotations"]
    first["segmentation"] = SQUARE
    second |= {"image_id": 42.0, "segmentation": [np.reshape(TRIANGLE, (-1, 2)).tolist()]}
    return document


EXPORTS = [coco, cvat, roboflow, fiftyone, label_studio, supervisely, by_hand]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for name in ("one", "two"):
        photo(folder / f"{name}.png", (HEIGHT, WIDTH))
    return folder


def convert(run: Run, photos: Path, document: Any, *more: object) -> tuple[int, str, str]:
    file = photos.parent / "annotations.json"
    file.write_text(json.dumps(document))
    return run(
        *["convert", "coco-instances", "--json", file, "--images", photos],
        *["--out", photos.parent / "out", "--split", "a", "--workers", 0, *more],
    )


def expected(document: Document, image_id: Any, small: bool) -> NDArray[np.int64]:
    """(H, W) of positions in the file + 1, crowds below the others: a loop over all pixels."""
    rows = [
        (place, decode(row["segmentation"]), bool(row.get("iscrowd")))
        for place, row in enumerate(document["annotations"], 1)
        if str(row["image_id"]).removesuffix(".0") == str(image_id) and row["segmentation"]
    ]
    wanted = np.zeros((HEIGHT, WIDTH), np.int64)
    for y, x in np.ndindex(HEIGHT, WIDTH):
        here = [(place, mask) for place, mask, crowd in rows if mask[y, x] and not crowd]
        crowds = [place for place, mask, crowd in rows if mask[y, x] and crowd]
        if here:
            least = min(here, key=lambda one: (int(one[1].sum()), -one[0]))
            wanted[y, x] = least[0] if small else here[-1][0]
        elif crowds:
            wanted[y, x] = crowds[-1]
    return wanted


@pytest.mark.parametrize("overlap", ["last", "small"])
@pytest.mark.parametrize("export", EXPORTS, ids=lambda export: export.__name__)
def test_exports(run: Run, photos: Path, export: Callable[[], Document], overlap: str) -> None:
    document = export()
    code, _, said = convert(run, photos, document, "--overlap", overlap)
    assert code == 0, said
    root = photos.parent / "out"
    content = json.loads((root / "annotations/panoptic_a.json").read_text())
    assert {row["name"] for row in content["categories"]} == {"person", "dog"}
    names = {row["id"]: row["name"] for row in content["categories"]}
    given = {str(row["id"]): row["name"] for row in document["categories"]}
    for place, image in enumerate(document["images"]):
        ids, segments = read(root, "a", place)
        wanted = expected(document, image["id"], overlap == "small")
        same_regions(ids, wanted)
        check_rows(ids, segments)
        for segment in segments:
            row = document["annotations"][wanted[ids == segment["id"]][0] - 1]
            assert names[segment["category_id"]] == given[str(row["category_id"])]
            assert segment["iscrowd"] == row.get("iscrowd", 0)
    assert len(read_dataset(CocoLayout.of(root, "a")).records) == 2


def test_all_crowds_are_pointed_out(run: Run, photos: Path) -> None:
    said = convert(run, photos, cvat())[2]
    assert "all are crowds, as CVAT marks what a brush drew: see --no-crowds" in said
    (photos.parent / "out").rename(photos.parent / "before")
    assert convert(run, photos, cvat(), "--no-crowds")[0] == 0
    rows = [row for place in (0, 1) for row in read(photos.parent / "out", "a", place)[1]]
    assert {row["iscrowd"] for row in rows} == {0}


def test_boxes_are_passed_over_and_counted(run: Run, photos: Path) -> None:
    assert "mended: segmentation-missing, 1 times" in convert(run, photos, label_studio())[2]


def test_stuff_lies_below(run: Run, photos: Path) -> None:
    stuff = coco()
    stuff["categories"] = [
        {"id": 92, "name": "sky", "supercategory": "sky-stuff"},
        {"id": 183, "name": "other", "supercategory": "other"},
    ]
    upper = np.zeros((HEIGHT, WIDTH), bool)
    upper[:20] = True
    stuff["annotations"] = [
        annotation(1, 42, 92, rle(upper, True)),
        annotation(2, 42, 183, rle(~upper, True)),
    ]
    (photos.parent / "stuff.json").write_text(json.dumps(stuff))
    more = ["--stuff-json", photos.parent / "stuff.json"]
    assert convert(run, photos, coco(), *more)[0] == 0
    ids, segments = read(photos.parent / "out", "a")
    (sky,) = [row["id"] for row in segments if row["category_id"] == 92]
    wanted = expected(coco(), 42, False)
    assert ((ids == sky) == (upper & (wanted == 0))).all()
    same_regions(np.where(ids == sky, 0, ids), wanted)
    content = json.loads((photos.parent / "out/annotations/panoptic_a.json").read_text())
    assert [(row["id"], row["isthing"]) for row in content["categories"]] == [
        (1, 1),
        (18, 1),
        (92, 0),
    ]


def test_semantic_maps_lie_below(run: Run, photos: Path) -> None:
    classes = np.full((HEIGHT, WIDTH), 3, np.uint8)
    classes[:, 25:], classes[:, 40:], classes[30:] = 8, 255, 5
    for name in ("one", "two"):
        save(photos.parent / f"maps/{name}.png", classes)
    (photos.parent / "names.json").write_text('{"3": "sky", "8": "road", "5": "dog"}')
    more = ["--semantic-maps", photos.parent / "maps", "--names", photos.parent / "names.json"]
    assert convert(run, photos, coco(), *more)[0] == 0
    content = json.loads((photos.parent / "out/annotations/panoptic_a.json").read_text())
    number = {row["name"]: row["id"] for row in content["categories"]}
    assert number.keys() == {"person", "dog", "sky", "road"}
    ids, segments = read(photos.parent / "out", "a")
    owner = {row["id"]: row["category_id"] for row in segments}
    wanted = expected(coco(), 42, False)
    kinds = {3: number["sky"], 8: number["road"]}  # of a dog only instances are drawn
    for y, x in np.ndindex(HEIGHT, WIDTH):
        if wanted[y, x] == 0:
            assert owner.get(int(ids[y, x]), 0) == kinds.get(int(classes[y, x]), 0)


def test_what_classes_mean_is_a_setting(run: Run, photos: Path) -> None:
    for name in ("one", "two"):
        save(photos.parent / f"maps/{name}.png", np.full((HEIGHT, WIDTH), 3, np.uint8))
    names = photos.parent / "names.json"
    names.write_text('{"3": "sky", "8": "road"}')
    more = ["--semantic-maps", photos.parent / "maps", "--names", names]
    assert convert(run, photos, coco(), *more)[0] == 0
    names.write_text('{"8": "sky", "3": "road"}')
    code, _, said = convert(run, photos, coco(), *more)
    assert (code, "was begun with other settings" in said) == (1, True)


def test_a_file_without_images(run: Run, photos: Path) -> None:
    document = coco() | {"images": [], "annotations": []}
    code, _, said = convert(run, photos, document)
    assert (code, "\n" in said) == (1, False)


def test_background_and_stuff_of_the_file(run: Run, photos: Path) -> None:
    more = ["--background", "floor", "--stuff", "dog"]
    assert convert(run, photos, coco(), *more)[0] == 0
    ids, segments = read(photos.parent / "out", "a", 1)
    assert (ids > 0).all()
    assert [row["category_id"] for row in segments] == [19, 18]
    dog = decode([SQUARE]) | disc(20, 20, 6)
    same_regions(ids, np.where(dog, 1, 2))
    code, _, said = convert(run, photos, coco(), "--stuff", "cat")
    assert (code, said) == (1, "--stuff: no category is called cat (of person, dog)")


def wrong(segmentation: Any, **more: Any) -> Document:
    document = coco()
    document["annotations"][0] |= {"segmentation": segmentation, **more}
    return document


def changed_image(**more: Any) -> Document:
    document = coco()
    document["images"][0] |= more
    return document


SHORT = rle(disc(24, 24, 12), False)
FAR = [900.0, 5.0, 925.0, 5.0, 925.0, 25.0]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (wrong([[1, 2, 3, 4]]), "segmentation of annotation 1: polygon has 2 points"),
        (wrong([[1, 2, 3, 4, 5]]), "segmentation of annotation 1: cannot reshape"),
        (wrong([["a"] * 6]), "segmentation of annotation 1: could not convert"),
        (
            wrong([FAR]),
            "segmentation of annotation 1: polygon lies outside the photo, x 900 to 925",
        ),
        (wrong([[1e9, 1, 5, 5, 5, 9]]), "segmentation of annotation 1: polygon lies outside"),
        (
            wrong(SHORT | {"size": [50, 40]}),
            "segmentation of annotation 1: RLE is 50 x 40, its photo 40 x 50",
        ),
        (wrong(SHORT | {"counts": [5, 5]}), "segmentation of annotation 1: RLE has 10 pixels"),
        (
            wrong(SHORT | {"counts": [-5, 2005]}),
            "segmentation of annotation 1: RLE has 2000 pixels",
        ),
        (wrong(SHORT | {"counts": "c26>0"}), "segmentation of annotation 1: RLE has"),
        (wrong({"counts": []}), "segmentation of annotation 1: RLE has no size"),
        (wrong("[[1, 2]]"), "segmentation of annotation 1: "),
        (wrong([SQUARE], category_id=5), "annotation 1 has unknown category 5"),
        (wrong([SQUARE], iscrowd="no"), "annotation 1 malformed: Expected `bool | int | null`"),
        (changed_image(height=50, width=40), "one.png: is 50 x 40, its photo 40 x 50"),
        (changed_image(file_name="three.png"), "three.png: photo missing"),
        (changed_image(file_name=7), "malformed image: Expected `str`, got `int`"),
        (changed_image(id=139), "another image has this id, too"),
    ],
)
def test_a_bad_annotation_costs_one_image(
    run: Run, photos: Path, document: Document, message: str
) -> None:
    code, _, said = convert(run, photos, document)
    assert code == 3
    rows = quarantine(photos.parent / "out", "a")
    assert all("\n" not in line for line in rows.values())
    assert any(line.startswith(message) for line in rows.values()), rows
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "not a COCO instances file: Expected `object`, got `array`"),
        ({"annotations": []}, "not a COCO instances file: no images or no categories"),
        (coco() | {"categories": []}, "categories are empty or share an id"),
        (
            coco() | {"annotations": [{"image_id": 42, "category_id": 1, "bbox": [0, 0, 1, 1]}]},
            "no annotation has a segmentation (boxes and points alone are no masks)",
        ),
        (
            coco() | {"annotations": [{"image_id": 42, "file_name": "a", "segments_info": []}]},
            "is in COCO's panoptic format already (give it to preprocess)",
        ),
    ],
)
def test_a_file_of_another_kind(run: Run, photos: Path, document: Any, message: str) -> None:
    code, _, said = convert(run, photos, document)
    assert code == 1
    assert said.startswith(f"{photos.parent / 'annotations.json'}: {message}")
    assert "\n" not in said


def test_a_photo_of_two_places(run: Run, photos: Path) -> None:
    Image.open(photos / "one.png").save(photos / "x.png")
    for folder in ("left", "right"):
        photo(photos / folder / "three.png", (HEIGHT, WIDTH))
    document = changed_image(file_name="C:\\data\\right\\three.png")
    document["images"][1] |= {"file_name": "elsewhere/three.png"}
    assert convert(run, photos, document)[0] == 3
    content = json.loads((photos.parent / "out/annotations/panoptic_a.json").read_text())
    assert [row["file_name"] for row in content["images"]] == ["right/three.png"]
    (line,) = quarantine(photos.parent / "out", "a").values()
    assert line.startswith("elsewhere/three.png is 2 files, such as left/three.png and")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["json", "maps"])
def test_real_coco_comes_back(run: Run, tmp_path: Path, form: str) -> None:
    """Its panoptic annotations, taken apart into instances and stuff, are put together again."""
    if not REAL.is_dir():
        pytest.skip("the real COCO photos are not on this machine")
    before = read_dataset(CocoLayout.of(REAL, "val2017"))
    number = {category.id: category for category in before.categories}
    parts: dict[bool, Document] = {
        isthing: {
            "images": [],
            "annotations": [],
            "categories": [
                {"id": row.id, "name": row.name}
                for row in before.categories
                if row.isthing == isthing
            ],
        }
        for isthing in (True, False)
    }
    truth = {}
    records = before.records[:12]
    for record in records:
        ids = np.asarray(Image.open(record.png).convert("RGB")).astype(int) @ [1, 256, 65536]
        truth[record.image_id] = ids
        classes = np.full(ids.shape, 255, np.uint8)
        image = {"id": record.image_id, "file_name": record.file_name}
        parts[True]["images"].append(image)
        parts[False]["images"].append(image)
        for segment in record.segments:
            inside = ids == segment.id
            classes[inside] = segment.category_id
            said = coco_mask.encode(np.asfortranarray(inside.astype(np.uint8)))
            said["counts"] = said["counts"].decode()
            row = annotation(segment.id, record.image_id, segment.category_id, said)
            row["iscrowd"] = int(segment.iscrowd)
            parts[number[segment.category_id].isthing]["annotations"].append(row)
        save(tmp_path / f"classes/{Path(record.file_name).stem}.png", classes)
    (tmp_path / "things.json").write_text(json.dumps(parts[True]))
    (tmp_path / "stuff.json").write_text(json.dumps(parts[False]))
    values = {row.name: row.id for row in before.categories}
    (tmp_path / "names.json").write_text(json.dumps(values))
    more = {
        "json": ["--stuff-json", tmp_path / "stuff.json"],
        "maps": ["--semantic-maps", tmp_path / "classes", "--names", tmp_path / "names.json"],
    }[form]
    code, *_ = run(
        *["convert", "coco-instances", "--json", tmp_path / "things.json"],
        *["--images", REAL / "val2017", "--out", tmp_path / "out", "--split", "a", *more],
    )
    assert code == 0
    after = read_dataset(CocoLayout.of(tmp_path / "out", "a"))
    names = {row.id: row.name for row in after.categories}
    for record, old in zip(after.records, records, strict=True):
        ids = np.asarray(Image.open(record.png)).astype(int) @ [1, 256, 65536]
        both = np.unique((ids << 24) + truth[record.image_id]).tolist()
        pairs = [divmod(one, 1 << 24) for one in both]
        assert len(pairs) == len({one for one, _ in pairs}) == len({one for _, one in pairs})
        new = {row.id: (names[row.category_id], bool(row.iscrowd)) for row in record.segments}
        was = {row.id: (number[row.category_id].name, bool(row.iscrowd)) for row in old.segments}
        assert all(new.get(one) == was.get(other) for one, other in pairs)
