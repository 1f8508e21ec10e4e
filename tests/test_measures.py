"""What stands beside PQ, against sets of pixels and against pycocotools with real masks."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from panoptic_cache.evaluate.metric.matching import Overlap
from panoptic_cache.evaluate.metric.measures import (
    NAMES,
    SIZE_EDGES,
    Breakdown,
    ImageInstances,
    break_down,
    mask_ap,
    match_instances,
)
from panoptic_cache.evaluate.metric.pq import CategoryStat, PQStat, match_image
from panoptic_cache.evaluate.metric.score import (
    score_image,
    thing_ids,
    total_scores,
    worst_images,
)
from panoptic_cache.pipeline.annotations import SegmentInfo
from panoptic_cache.pipeline.coco import Category

Ids = NDArray[np.int32]
CATEGORIES = (
    Category(1, "disc", True, 0),
    Category(2, "box", True, 1),
    Category(3, "sky", False, 2),
)
THINGS = thing_ids(CATEGORIES)


@st.composite
def scenes(draw: st.DrawFn) -> tuple[Ids, list[SegmentInfo], Ids, dict[int, int]]:
    """Few ids on few pixels, true and predicted; some crowd, some void on either side."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = int(rng.integers(1, 12)), int(rng.integers(1, 12))
    truth = rng.integers(0, 6, shape).astype(np.int32)
    found = np.where(rng.random(shape) < draw(st.sampled_from([0.1, 0.5])), 0, truth) + 0
    found[rng.random(shape) < 0.2] = 7
    segments = [
        SegmentInfo(i, int(rng.integers(1, 4)), bool(rng.random() < 0.2))
        for i in np.unique(truth).tolist()
        if i and rng.random() < 0.9
    ]
    by_id = {segment.id: segment.category_id for segment in segments}
    categories = {
        i: by_id.get(i, 2) if rng.random() < 0.7 else int(rng.integers(1, 4))
        for i in np.unique(found).tolist()
        if i
    }
    return truth, segments, found.astype(np.int32), categories


def best_ious(
    truth: Ids, segments: list[SegmentInfo], found: Ids, categories: dict[int, int]
) -> Iterator[tuple[int, float]]:
    """Area and best IoU of each true thing, one mask after the other."""
    for segment in segments:
        mask = truth == segment.id
        if segment.iscrowd or segment.category_id not in THINGS:
            continue
        best = 0.0
        for id_, category in categories.items():
            other = (found == id_) & (truth != 0)
            if category in THINGS:
                best = max(best, (mask & other).sum() / (mask | other).sum())
        yield int(mask.sum()), best


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scenes())
def test_breakdown_equals_masks(
    scene: tuple[Ids, list[SegmentInfo], Ids, dict[int, int]],
) -> None:
    truth, segments, found, categories = scene
    got = break_down(1, Overlap.of(truth, found), segments, categories, THINGS)

    counts, ious = [0] * len(SIZE_EDGES), [0.0] * len(SIZE_EDGES)
    for area, best in best_ious(*scene):
        place = max(i for i, low in enumerate(SIZE_EDGES) if low**2 <= area)
        counts[place] += 1
        ious[place] += best
    assert got.size_counts == tuple(counts)
    assert got.size_ious == pytest.approx(tuple(ious))

    # The semantic maps, pixel by pixel.
    of = {segment.id: segment.category_id for segment in segments}
    true_map = np.vectorize(lambda i: of.get(i, 0), otypes=[int])(truth)
    found_map = np.vectorize(lambda i: categories.get(i, 0), otypes=[int])(found)
    found_map[true_map == 0] = -1
    each = [
        ((true_map == c) & (found_map == c)).sum() / ((true_map == c) | (found_map == c)).sum()
        for c in (1, 2, 3)
        if (true_map == c).any()
    ]
    miou, n = got.miou()
    assert n == len(each)
    assert miou == (pytest.approx(sum(each) / n) if each else None)

    # Class-agnostic PQ is PQ after all things became category 1, their crowds one.
    def agnostic(category: int) -> int:
        return 1 if category in THINGS else 3

    crowds = [s.id for s in segments if s.iscrowd and s.category_id in THINGS]
    merged = np.where(np.isin(truth, crowds), crowds[0] if crowds else 0, truth)
    renamed = [
        SegmentInfo(s.id, agnostic(s.category_id), s.iscrowd)
        for s in segments
        if s.id not in crowds[1:]
    ]
    expected = match_image(
        1, merged, renamed, found, {i: agnostic(c) for i, c in categories.items()}
    )[1]
    assert got.agnostic == expected

    became: dict[tuple[int, int | None], int] = {}
    for segment in segments:
        mask = truth == segment.id
        name = None
        for id_, category in categories.items():
            other = (found == id_) & (truth != 0)
            if 2 * (mask & other).sum() > (mask | other).sum():
                name = category
        if not segment.iscrowd:
            key = segment.category_id, name
            became[key] = became.get(key, 0) + 1
    assert got.confusion == became


def test_sums_do_not_depend_on_the_split() -> None:
    one = Breakdown((1,) * 8, (0.5,) * 8, CategoryStat(tp=1, iou=0.75), {(1, 1): 4}, {(1, None): 1})
    two = Breakdown((2,) * 8, (0.25,) * 8, CategoryStat(fn=1), {(1, None): 4}, {(1, None): 2})
    total = one + two
    assert total == Breakdown() + two + one
    assert total.confusion == {(1, None): 3}
    assert total.miou() == (0.5, 1)
    values = total.to_json()
    assert values.keys() == {"sizes", "things_agnostic", "semantic", "confusion"}
    assert values["sizes"][-1] == {"from": 512, "to": None, "n": 3, "iou": 0.25}
    assert values["things_agnostic"]["pq"] == pytest.approx(0.75 / 1.5)
    assert values["confusion"] == {"1": {"none": 3}}


def test_nothing_at_all_is_undefined() -> None:
    values = total_scores([], CATEGORIES).to_json()
    assert values["All"] is None
    assert values["semantic"] == {"miou": None, "n": 0}
    assert values["things_agnostic"] is None
    assert {row["iou"] for row in values["sizes"]} == {None}
    assert set(values["mask_ap"].values()) == {None}
    assert values["worst"] == []


def test_worst_and_extreme_images() -> None:
    scores: list[float | None] = [0.5, None, 0.1, 0.9, 0.1]
    worst = worst_images(zip("abcde", scores, strict=True))
    assert [row["image_id"] for row in worst] == ["c", "e", "a", "d"]
    assert PQStat({1: CategoryStat(tp=1, iou=0.8), 2: CategoryStat(fn=1)}).mean_pq == 0.4


def reference_ap(
    pictures: list[tuple[Ids, list[SegmentInfo], Ids, dict[int, int], dict[int, float]]],
) -> list[float]:
    """pycocotools as everyone runs it: from masks, with its own counting of pixels."""
    truths: list[dict[str, Any]] = []
    founds: list[dict[str, Any]] = []
    for image, (truth, segments, found, categories, scores) in enumerate(pictures):
        for segment in segments:
            mask = truth == segment.id
            if segment.category_id in THINGS and mask.any():
                rle = coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))
                truths.append(
                    {
                        "id": len(truths) + 1,
                        "image_id": image,
                        "segmentation": rle,
                        "category_id": segment.category_id,
                        "area": int(mask.sum()),
                        "iscrowd": int(segment.iscrowd),
                        "bbox": [0, 0, 1, 1],
                    }
                )
        for id_, category in categories.items():
            if category in THINGS:
                mask = np.asfortranarray((found == id_).astype(np.uint8))
                founds.append(
                    {
                        "image_id": image,
                        "category_id": category,
                        "score": scores[id_],
                        "segmentation": coco_masks.encode(mask),
                    }
                )
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = {
            "images": [
                {"id": i, "height": one[0].shape[0], "width": one[0].shape[1]}
                for i, one in enumerate(pictures)
            ],
            "annotations": truths,
            "categories": [{"id": c} for c in sorted(THINGS)],
        }
        gt.createIndex()
        evaluator = COCOeval(gt, gt.loadRes(founds), "segm")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return [float(value) for value in evaluator.stats[:6]]


@pytest.mark.parametrize("seed", range(4))
def test_mask_ap_equals_pycocotools_on_masks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(6):
        blocks = rng.integers(0, 9, (6, 6)).astype(np.int32)
        truth = np.repeat(np.repeat(blocks, 10, 0), 10, 1)
        found = np.roll(truth, tuple(rng.integers(0, 3, 2).tolist()), (0, 1))
        found[rng.random(found.shape) < 0.02] = 0
        segments = [
            SegmentInfo(i, int(rng.integers(1, 4)), bool(rng.random() < 0.25))
            for i in np.unique(truth).tolist()
            if i
        ]
        right = {s.id: s.category_id for s in segments}
        categories = {
            i: right[i] if rng.random() < 0.8 else int(rng.integers(1, 4))
            for i in np.unique(found).tolist()
            if i
        }
        scores = {i: float(rng.integers(1, 6)) / 5 for i in categories}  # with ties
        pictures.append((truth, segments, found, categories, scores))
    assert_ap_equal(pictures)


def test_mask_ap_of_crowded_and_of_large_instances() -> None:
    """More than the hundred instances that count, and all three sizes."""
    rng = np.random.default_rng(0)
    pictures = []
    for side, step in ((130, 10), (300, 100), (240, 60)):
        cells = side // step
        blocks = np.arange(1, cells**2 + 1, dtype=np.int32).reshape(cells, cells)
        truth = blocks.repeat(step, 0).repeat(step, 1)
        found = np.roll(truth, (1, step // 6), (0, 1))
        ids = np.unique(truth).tolist()
        segments = [SegmentInfo(i, 1, i == 5) for i in ids]
        scores = {i: float(rng.random()) for i in ids}
        pictures.append((truth, segments, found, dict.fromkeys(ids, 1), scores))
    assert len(pictures[0][1]) > 100
    assert_ap_equal(pictures)


def assert_ap_equal(
    pictures: list[tuple[Ids, list[SegmentInfo], Ids, dict[int, int], dict[int, float]]],
) -> None:
    expected = reference_ap(pictures)
    images = [
        match_instances(Overlap.of(truth, found), segments, categories, scores, THINGS)
        for truth, segments, found, categories, scores in pictures
    ]
    got = mask_ap(images, CATEGORIES)
    assert got is not None
    assert [-1 if got[name] is None else got[name] for name in NAMES] == pytest.approx(
        expected, abs=1e-12
    )
    assert expected[0] > 0.1


def test_mask_ap_needs_scores_and_things() -> None:
    unscored = ImageInstances({}, ((1, 0.0, bytes(40)),), scored=False)
    assert mask_ap([unscored], CATEGORIES) is None
    assert mask_ap([], CATEGORIES[2:]) is None


def test_a_perfect_prediction_is_perfect() -> None:
    ids = np.repeat(np.array([[1, 2, 3, 0]], np.int32), 40, 0).repeat(10, 1)
    segments = [SegmentInfo(1, 1, False), SegmentInfo(2, 2, False), SegmentInfo(3, 3, False)]
    found = {s.id: s.category_id for s in segments}
    scores = dict.fromkeys(found, 1.0)
    image = score_image("a", ids, segments, ids, found, scores=scores, things=THINGS)
    values = total_scores([image], CATEGORIES).to_json()
    assert values["semantic"] == {"miou": 1.0, "n": 3}
    assert values["things_agnostic"]["pq"] == 1
    assert values["mask_ap"]["ap"] == pytest.approx(1)
    assert values["confusion"] == {"1": {"1": 1}, "2": {"2": 1}, "3": {"3": 1}}
    assert values["sizes"][2] == {"from": 16, "to": 32, "n": 2, "iou": 1.0}
    assert values["worst"] == [{"image_id": "a", "pq": 1.0}]
