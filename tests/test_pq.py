from __future__ import annotations

import json
import logging
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from panoptic_cache.evaluate.metric import score as score_module
from panoptic_cache.evaluate.metric.matching import Overlap
from panoptic_cache.evaluate.metric.pairs import read_pairs
from panoptic_cache.evaluate.metric.pq import (
    CategoryStat,
    PQResult,
    PQStat,
    match_image,
    summarize,
)
from panoptic_cache.evaluate.metric.score import score_pairs
from panoptic_cache.pipeline.annotations import SegmentInfo
from panoptic_cache.pipeline.base import process as processes
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.pipeline.png import ids_to_rgb

Ids = NDArray[np.int32]
SHARED = Path(__file__).parents[1] / "../shared"
CASES = sorted(p.name for p in (SHARED / "golden/pq").glob("*")) or ["absent"]
SAMPLE = SHARED / "coco_sample/annotations/panoptic_val2017.json"
CATEGORIES = (
    Category(1, "disc", True, 0),
    Category(2, "box", True, 1),
    Category(3, "sky", False, 2),
)


def score(*files: Path | None, workers: int = 1) -> PQResult:
    """PQ of a ground truth's and a prediction's JSON, and of their folders where given."""
    return score_pairs(*read_pairs(*files), workers=workers).pq  # type: ignore[arg-type]


# The official evaluator's own numbers.


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str) -> None:
    folder = SHARED / "golden/pq" / case
    if not folder.is_dir():
        pytest.skip("the golden cases are not here")
    expected = json.loads((folder / "expected.json").read_text())
    if "error" in expected:
        named = {
            "id_missing_in_json": ["image 1", "ids 4 "],
            "id_missing_in_png": ["image 1", "ids 77 "],
            "missing_prediction": ["image 2"],
            "unknown_category": ["image 1", "segment 4", "category 55"],
        }[case]
        with pytest.raises(InputError) as caught:
            score(folder / "gt.json", folder / "pred.json")
        assert all(name in str(caught.value) for name in named), caught.value
        assert caught.value.remedy
        return
    got = score(folder / "gt.json", folder / "pred.json").to_json()
    for group in ("All", "Things", "Stuff"):
        if expected[group] is None:
            assert got[group] is None
        else:
            assert got[group] == pytest.approx(expected[group], rel=0, abs=1e-12)
            assert got[group]["n"] == expected[group]["n"]
    assert list(got["per_class"]) == list(expected["per_class"])
    for category_id, counts in expected["per_class"].items():
        mine = got["per_class"][category_id]
        assert [mine[k] for k in ("tp", "fp", "fn")] == [counts[k] for k in ("tp", "fp", "fn")]
        assert mine["iou"] == pytest.approx(counts["iou"], rel=0, abs=1e-12)
        assert set(mine) == {"tp", "fp", "fn", "iou", "pq", "sq", "rq"}


def test_coco_against_itself_is_perfect(caplog: pytest.LogCaptureFixture) -> None:
    if not SAMPLE.is_file():
        pytest.skip("the COCO sample is not here")
    result = score(SAMPLE, SAMPLE)
    assert result.all is not None
    assert (result.all.pq, result.all.sq, result.all.rq) == (1.0, 1.0, 1.0)
    assert not caplog.records, "areas of COCO agree with its PNGs"


# An oracle in sets of pixels, with exact fractions.


def oracle(
    gt: Ids, segments: list[SegmentInfo], pred: Ids, categories: dict[int, int]
) -> dict[int, tuple[int, int, int, Fraction]]:
    def pixels(ids: Ids, value: int) -> set[tuple[int, int]]:
        return {
            (y, x) for y, row in enumerate(ids.tolist()) for x, v in enumerate(row) if v == value
        }

    void = pixels(gt, 0)
    ious = []
    for g in segments:
        for p, category in categories.items():
            both = pixels(gt, g.id) & pixels(pred, p)
            if not both or g.iscrowd or g.category_id != category:
                continue
            assert g.area is not None
            union = len(pixels(pred, p) - void) + g.area - len(both)
            if union <= 0:
                raise ZeroDivisionError
            if Fraction(len(both), union) > Fraction(1, 2):
                ious.append((g.id, p, category, Fraction(len(both), union)))
    result = {}
    for c in {g.category_id for g in segments} | set(categories.values()):
        found = [iou for _, _, category, iou in ious if category == c]
        missed = {g.id for g in segments if g.category_id == c and not g.iscrowd}
        missed -= {g for g, _, _, _ in ious}
        crowds = [g.id for g in segments if g.category_id == c and g.iscrowd]
        forgiven = void | (pixels(gt, crowds[-1]) if crowds else set())
        false = 0
        for p in {p for p, category in categories.items() if category == c}:
            mine = pixels(pred, p)
            matched = any(q == p for _, q, _, _ in ious)
            false += not matched and 2 * len(mine & forgiven) <= len(mine)
        result[c] = (len(found), false, len(missed), sum(found, Fraction(0)))
    return {c: counts for c, counts in result.items() if any(counts)}


@st.composite
def scenes(draw: st.DrawFn) -> tuple[Ids, list[SegmentInfo], Ids, dict[int, int]]:
    """Few ids on few pixels: IoU of exactly 1/2, void and crowd are common."""
    h, w = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    palette = draw(st.lists(st.integers(1, 2**24 - 1), min_size=4, max_size=4, unique=True))

    def paint() -> Ids:
        values = draw(st.lists(st.sampled_from([0, *palette]), min_size=h * w, max_size=h * w))
        return np.array(values, np.int32).reshape(h, w)

    gt = paint()
    pred = draw(st.just(gt.copy()) | st.builds(paint))
    flips = draw(st.lists(st.tuples(st.integers(0, h - 1), st.integers(0, w - 1)), max_size=4))
    for y, x in flips:
        pred[y, x] = draw(st.sampled_from([0, *palette]))
    kind = st.sampled_from([1, 1, 2, 3])
    segments = [
        SegmentInfo(i, draw(kind), draw(st.integers(0, 3)) == 0, max(0, int((gt == i).sum()) + off))
        for i in draw(st.permutations(palette))
        # A segment may be missing in the list or in the map, and its area may be wrong.
        if draw(st.integers(0, 5)) and ((off := draw(st.sampled_from([0] * 8 + [-2, 2]))) or True)
    ]
    same = {s.id: s.category_id for s in segments}
    painted = [int(i) for i in np.unique(pred) if i]
    return (
        gt,
        segments,
        pred,
        {i: same[i] if i in same and draw(st.integers(0, 3)) else draw(kind) for i in painted},
    )


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scenes())
def test_matching_equals_sets(scene: tuple[Ids, list[SegmentInfo], Ids, dict[int, int]]) -> None:
    try:
        expected = oracle(*scene)
    except ZeroDivisionError:
        with pytest.raises(InputError, match=r"image 7: .* area"):
            match_image(7, *scene)
        return
    got = match_image(7, *scene).categories
    assert {c: (s.tp, s.fp, s.fn) for c, s in got.items()} == {
        c: counts[:3] for c, counts in expected.items()
    }
    for category_id, stat in got.items():
        assert stat.iou == pytest.approx(float(expected[category_id][3]), rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(scenes(), st.randoms())
def test_renaming_predicted_ids_changes_nothing(
    scene: tuple[Ids, list[SegmentInfo], Ids, dict[int, int]], random: Any
) -> None:
    gt, segments, pred, categories = scene
    segments = [SegmentInfo(s.id, s.category_id, s.iscrowd) for s in segments]
    names = dict(zip(categories, random.sample(range(1, 99), 9), strict=False))
    renamed = np.vectorize(lambda i: names.get(i, 0), otypes=[np.int32])(pred)
    before = match_image(1, gt, segments, pred, categories)
    after = match_image(1, gt, segments, renamed, {names[i]: c for i, c in categories.items()})
    assert before == after


def test_area_none_is_counted() -> None:
    ids = np.array([[1, 1, 2, 0]], np.int32)
    segments = [SegmentInfo(1, 1, False), SegmentInfo(2, 2, False, 1)]
    stat = match_image(1, ids, segments, ids, {1: 1, 2: 2})
    assert stat[1] == stat[2] == CategoryStat(tp=1, iou=1.0)
    assert stat.wrong_areas == {}


def test_the_overlap_ascends_and_sums_to_the_picture() -> None:
    rng = np.random.default_rng(0)
    gt = rng.choice([0, 3, 2**24 - 1], (50, 40)).astype(np.int32)
    pred = rng.choice([0, 1, 2**24 - 1], (50, 40)).astype(np.int32)
    overlap = Overlap.of(gt, pred)
    pairs = overlap.shared
    assert list(pairs) == sorted(pairs)
    assert sum(pairs.values()) == gt.size
    assert all(n == ((gt == g) & (pred == p)).sum() for (g, p), n in pairs.items())
    assert all(n == (gt == g).sum() for g, n in overlap.true_area.items())
    assert all(n == (pred == p).sum() for p, n in overlap.area.items())


# Sums and means.


def test_statistics_add_up() -> None:
    one = PQStat({1: CategoryStat(1, 2, 3, 0.75), 2: CategoryStat(fp=1)})
    two = PQStat({1: CategoryStat(1, 0, 1, 0.5), 3: CategoryStat(tp=1, iou=0.9)})
    total = one + two
    assert total[1] == CategoryStat(2, 2, 4, 1.25)
    assert total[2] == CategoryStat(fp=1)
    assert total[3] == CategoryStat(tp=1, iou=0.9)
    assert one[1] == CategoryStat(1, 2, 3, 0.75), "a sum leaves its terms alone"
    assert total[4] == CategoryStat()
    assert (total[1].pq, total[1].sq, total[1].rq) == (1.25 / 5, 1.25 / 2, 2 / 5)
    assert PQStat() + one == one


def test_groups_are_means_over_categories_with_segments(caplog: pytest.LogCaptureFixture) -> None:
    total = PQStat({1: CategoryStat(1, 0, 0, 0.8), 2: CategoryStat(0, 1, 1, 0.0)})
    result = summarize(total, CATEGORIES).to_json()
    assert result["All"] == result["Things"] == {"pq": 0.4, "sq": 0.4, "rq": 0.5, "n": 2}
    assert result["Stuff"] is None
    assert "Stuff: PQ is undefined" in caplog.text
    assert "Things" not in caplog.text
    assert result["per_class"]["3"] == {
        "tp": 0, "fp": 0, "fn": 0, "iou": 0.0, "pq": 0.0, "sq": 0.0, "rq": 0.0
    }  # fmt: skip
    with pytest.raises(ValueError, match="55"):
        summarize(PQStat({55: CategoryStat(fp=1)}), CATEGORIES)


# Files.


class Folder:
    """Ground truth and prediction on disk, to be spoilt by a test."""

    def __init__(self, root: Path, images: int = 2) -> None:
        self.root = root
        rng = np.random.default_rng(1)
        self.json: dict[str, Any] = {}
        for side in ("gt", "pred"):
            (root / side).mkdir(parents=True)
            self.json[side] = {"annotations": [], "categories": []}
        for c in CATEGORIES:
            row = {"id": c.id, "name": c.name, "isthing": int(c.isthing)}
            self.json["gt"]["categories"].append(row)
        for image_id in range(1, images + 1):
            gt = np.kron(rng.integers(0, 4, (4, 5)), np.ones((4, 4))).astype(np.int32) * 70_000
            gt[0, :4] = [0, 70_000, 140_000, 210_000]
            pred = np.roll(gt, 1, axis=1)
            self.paint("gt", image_id, gt)
            self.paint("pred", image_id, pred)
            for side, ids in (("gt", gt), ("pred", pred)):
                infos = [
                    {
                        "id": i,
                        "category_id": i // 70_000,
                        "area": int((ids == i).sum()),
                        "iscrowd": 0,
                    }
                    for i in (70_000, 140_000, 210_000)
                ]
                name = f"{image_id:012d}.png"
                row = {"image_id": image_id, "file_name": name, "segments_info": infos}
                self.json[side]["annotations"].append(row)

    def paint(self, side: str, image_id: int, ids: Ids) -> None:
        self.write(side, image_id, ids_to_rgb(ids)[..., ::-1])

    def write(self, side: str, image_id: int, picture: NDArray[Any]) -> None:
        assert cv2.imwrite(str(self.png(side, image_id)), picture)

    def png(self, side: str, image_id: int) -> Path:
        return self.root / side / f"{image_id:012d}.png"

    def row(self, side: str, image_id: int) -> dict[str, Any]:
        row: dict[str, Any] = self.json[side]["annotations"][image_id - 1]
        return row

    def save(self) -> tuple[Path, Path]:
        for side, content in self.json.items():
            (self.root / f"{side}.json").write_text(json.dumps(content))
        return self.root / "gt.json", self.root / "pred.json"

    def score(self, *folders: Path, workers: int = 1) -> PQResult:
        return score(*self.save(), *folders, workers=workers)


def test_any_number_of_workers_gives_the_same_floats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More tasks than the window holds.
    monkeypatch.setattr(score_module, "CHUNK", 1)
    monkeypatch.setattr(processes, "WINDOW", 2)
    folder = Folder(tmp_path, images=9)
    one, two = folder.score(), folder.score(workers=2)
    assert one == two
    assert one.all is not None
    assert 0.3 < one.all.pq < 1, "the scene is neither trivial nor empty"
    folder.row("pred", 3)["segments_info"].pop()
    folder.row("pred", 8)["segments_info"].pop()
    with pytest.raises(InputError, match="image 3: segment ids 210000"):
        folder.score(workers=2)


def test_alpha_is_ignored(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    before = folder.score()
    bgr = cv2.imread(str(folder.png("pred", 1)))
    assert bgr is not None
    alpha = np.arange(bgr[..., 0].size, dtype=np.uint8).reshape(bgr.shape[:2])
    folder.write("pred", 1, np.dstack([bgr, alpha]))
    assert folder.score() == before


def test_other_folders_and_extra_predictions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Folder(tmp_path)
    before = folder.score()
    folder.json["pred"]["annotations"].append({**folder.row("pred", 1), "image_id": 99})
    for side in ("gt", "pred"):
        (tmp_path / side).rename(tmp_path / f"{side}_elsewhere")
    after = folder.score(tmp_path / "gt_elsewhere", tmp_path / "pred_elsewhere")
    assert after == before
    assert "predictions of images without ground truth are ignored: image 99" in caplog.text


def test_wrong_area_is_trusted_but_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Folder(tmp_path)
    folder.row("gt", 2)["segments_info"][1]["area"] -= 9
    before = Folder(tmp_path / "right").score().per_class[2].iou
    with caplog.at_level(logging.WARNING):
        assert folder.score().per_class[2].iou > before
    assert "1 ground-truth segments of 1 images" in caplog.text
    assert "140000 of image 2" in caplog.text


def _spoil(side: str, image_id: int, segment: int, **changes: Any) -> Callable[[Folder], None]:
    return lambda f: f.row(side, image_id)["segments_info"][segment].update(changes)


def _zero_area(f: Folder) -> None:
    f.row("gt", 2)["segments_info"][0]["area"] = 0
    f.paint("gt", 2, np.full((16, 20), 70_000, np.int32))


def _unlink_gt(f: Folder) -> None:
    for path in f.root.glob("gt/*.png"):
        path.unlink()


def _cut(f: Folder) -> None:
    path = f.png("pred", 2)
    path.write_bytes(path.read_bytes()[:-30])


def _palette(f: Folder) -> None:
    pytest.importorskip("PIL.Image").new("P", (20, 16)).save(f.png("pred", 2))


BAD: dict[str, tuple[Callable[[Folder], Any], str]] = {
    "no prediction": (lambda f: f.json["pred"]["annotations"].pop(0), "image 1 "),
    "two predictions": (
        lambda f: f.json["pred"]["annotations"].append(f.row("pred", 2)),
        "image 2 is annotated twice",
    ),
    "two ground truths": (
        lambda f: f.json["gt"]["annotations"].append(f.row("gt", 2)),
        "gt.json: image 2 is annotated twice",
    ),
    "id not in the JSON": (
        lambda f: f.row("pred", 2)["segments_info"].pop(0),
        "image 2: segment ids 70000 are in the predicted PNG but not in its JSON",
    ),
    "ids not in the PNG": (
        lambda f: f.paint("pred", 2, np.full((16, 20), 70_000, np.int32)),
        "image 2: segment ids 140000, 210000 are in the predicted JSON but not in its PNG",
    ),
    "unknown predicted category": (
        _spoil("pred", 2, 1, category_id=8),
        "pred.json: image 2, segment 140000: unknown category 8",
    ),
    "unknown category": (
        _spoil("gt", 1, 0, category_id=8),
        "gt.json: image 1, segment 70000: unknown category 8",
    ),
    "predicted segment twice": (_spoil("pred", 2, 1, id=70_000), "image 2, segment 70000: listed"),
    "segment twice": (_spoil("gt", 2, 1, id=70_000), "image 2, segment 70000: listed twice"),
    "segment with the id of void": (_spoil("gt", 2, 1, id=0), "image 2, segment 0: id is not in"),
    "negative area": (_spoil("gt", 2, 1, area=-3), "image 2, segment 140000: area -3"),
    "area is not a number": (_spoil("gt", 2, 1, area=float("nan")), "segment 140000: area nan"),
    "area of zero": (
        _zero_area,
        "image 2: ground-truth segment 70000 has area 0 in the JSON, but shares",
    ),
    "other size": (
        lambda f: f.paint("pred", 2, np.full((20, 16), 70_000, np.int32)),
        r"image 2: prediction is \(20, 16\) pixels \(H, W\), ground truth \(16, 20\)",
    ),
    "broadcastable size": (
        lambda f: f.paint("pred", 2, np.array([[70_000, 140_000, 210_000, 0] * 5], np.int32)),
        r"image 2: prediction is \(1, 20\)",
    ),
    "PNG missing": (
        lambda f: f.png("pred", 2).unlink(),
        r"pred.000000000002.png: PNGs missing for 1 of 2 images: image 2 ",
    ),
    "PNG of the ground truth missing": (
        _unlink_gt,
        r"gt.000000000001.png: PNGs missing for 2 of 2 images: image 1, 2 ",
    ),
    "PNG cut": (_cut, "image 2: .*pred.000000000002.png"),
    "no PNG": (lambda f: f.png("gt", 2).write_text("hello"), "image 2: .*gt.000000000002.png"),
    "grayscale": (
        lambda f: f.write("pred", 2, np.zeros((16, 20), np.uint8)),
        "image 2: .*pred.000000000002.png",
    ),
    "palette": (_palette, "image 2: .*pred.000000000002.png"),
    "16 bit": (
        lambda f: f.write("pred", 2, np.zeros((16, 20, 3), np.uint16)),
        "image 2: .*pred.000000000002.png",
    ),
    "no folder": (lambda f: (f.root / "pred").rename(f.root / "x"), "pred: no folder of PNGs"),
    "a list": (
        lambda f: f.json.update(pred=[]),
        "pred.json: is no annotation file",
    ),
    "no categories": (lambda f: f.json["gt"].pop("categories"), "gt.json: it has no `categories`"),
    "malformed category": (
        lambda f: f.json["gt"]["categories"][0].pop("isthing"),
        "gt.json: 1 of 3 categories, such as disc, have no `isthing`",
    ),
    "category twice": (
        lambda f: f.json["gt"]["categories"].append(f.json["gt"]["categories"][0]),
        "gt.json: categories",
    ),
    "annotation without image": (
        lambda f: f.row("pred", 1).pop("image_id"),
        "pred.json.*`image_id`",
    ),
    "annotation without file": (
        lambda f: f.row("pred", 2).pop("file_name"),
        "image 2: .*`file_name`",
    ),
    "annotation without segments": (
        lambda f: f.row("gt", 2).pop("segments_info"),
        "gt.json: image 2: .*`segments_info`",
    ),
    "segment is no object": (
        lambda f: f.row("pred", 2)["segments_info"].append(7),
        r"pred.json: image 2: .*segments_info\[3\]",
    ),
    "segment without category": (
        lambda f: f.row("pred", 2)["segments_info"][2].pop("category_id"),
        r"pred.json: image 2: .*`category_id` - at `\$.segments_info\[2\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, tmp_path: Path) -> None:
    spoil, message = BAD[name]
    folder = Folder(tmp_path)
    folder.score()
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        folder.score()
    assert "\n" not in str(caught.value)
    assert caught.value.remedy or name == "category twice"


def test_unreadable_json(tmp_path: Path) -> None:
    gt, pred = Folder(tmp_path).save()
    with pytest.raises(InputError, match=r"nowhere\.json: unreadable"):
        score(gt, tmp_path / "nowhere.json")
    pred.write_text('{"annotations": [')
    with pytest.raises(InputError, match=r"pred\.json: is no annotation file"):
        score(gt, pred)
