from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from panoptic_cache.evaluate.decoder.decode import DecodedSegment, PanopticMap
from panoptic_cache.evaluate.metric.measures import Breakdown
from panoptic_cache.evaluate.metric.pq import PQResult, PQStat, match_image, summarize
from panoptic_cache.evaluate.metric.score import Scores
from panoptic_cache.evaluate.report.page import write_report
from panoptic_cache.evaluate.report.pictures import (
    BOTH,
    FALSE,
    MISSED,
    ImageView,
    LabelledMap,
    compare,
    comparison_sheet,
    draw_pictures,
    error_picture,
    extremes,
    make_figure,
    matched_numbers,
    panels,
    predicted_map,
    true_map,
    write_overlay,
)
from panoptic_cache.evaluate.report.tables import score_text
from panoptic_cache.pipeline.annotations import SegmentInfo
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.pipeline.pictures import segment_colours

CATEGORIES = (
    Category(1, "disc", True, 0),
    Category(5, "<b>box & co</b>", True, 1),
    Category(9, "sky", False, 2),
)
IDS = np.repeat(np.repeat(np.array([[10, 10, 20, 0], [10, 10, 30, 30]], np.int32), 40, 0), 40, 1)
SEGMENTS = (SegmentInfo(10, 1, False), SegmentInfo(20, 1, False), SegmentInfo(30, 9, False))


def view(title: str = "a.jpg", pq: float | None = 0.5) -> ImageView:
    """The disc of 10 is found, that of 20 is called a box; void is called sky."""
    ids = np.select([IDS == 10, IDS == 20, IDS == 30], [7, 3, 4], 4).astype(np.int32)
    result = PanopticMap(
        ids,
        (
            DecodedSegment(3, 1, True, 1.0, 1600),
            DecodedSegment(4, 2, False, 1.0, 4800),
            DecodedSegment(7, 0, True, 1.0, 6400),
        ),
    )
    head = np.zeros((20, 40, 3), np.uint8)
    photo = np.full((*IDS.shape, 3), 99, np.uint8)
    truth = true_map(IDS, SEGMENTS, CATEGORIES)
    return ImageView(title, photo, truth, predicted_map(result), head, head, pq)


def result_of(one: ImageView) -> PQResult:
    found = {row + 1: CATEGORIES[label].id for row, label in enumerate(one.prediction.labels)}
    return summarize(match_image(1, IDS, SEGMENTS, one.prediction.segment_map, found), CATEGORIES)


def page_of(
    folder: Path, breakdown: Breakdown, result: PQResult | None = None, **settings: Any
) -> str:
    result = result or result_of(view())
    values = Scores(result, breakdown, None, [], 1).to_json()
    settings = {"best": (), "worst": (), "title": "Quality", "facts": {}} | settings
    return write_report(folder, values, CATEGORIES, **settings).read_text()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_comparison_counts_as_the_metric_does(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    blocks = rng.integers(0, 6, (2, 4, 5))
    true, found = (np.repeat(np.repeat(b, 3, 0), 3, 1).astype(np.int32) for b in blocks)
    found[:, :8] = true[:, :8]
    rows = [
        SegmentInfo(i, int(rng.choice([1, 5, 9])), bool(rng.random() < 0.3))
        for i in np.unique(true[true > 0]).tolist()
    ]
    labels = {int(i): int(rng.integers(0, 3)) for i in np.unique(found[found > 0])}
    for row in rows:
        if row.id in labels and rng.random() < 0.7:
            labels[row.id] = [c.id for c in CATEGORIES].index(row.category_id)
    prediction = predicted_map(
        PanopticMap(found, tuple(DecodedSegment(i, n, True, 1.0, 1) for i, n in labels.items()))
    )
    stat = match_image(1, true, rows, found, {i: CATEGORIES[n].id for i, n in labels.items()})
    ours = compare(true_map(true, rows, CATEGORIES), prediction)
    counts = [
        sum(getattr(one, name) for one in stat.categories.values()) for name in ("tp", "fn", "fp")
    ]
    assert [len(ours.ious), len(ours.missed), len(ours.false)] == counts


def test_a_match_has_its_true_segments_colour() -> None:
    one = view()
    found = compare(one.truth, one.prediction)
    assert found.ious.keys() == {(1, 3), (3, 2)}
    numbers = matched_numbers(one.truth, one.prediction, found)
    theirs = segment_colours(one.truth.labels, one.truth.isthing)
    ours = segment_colours(one.prediction.labels, one.prediction.isthing, numbers)
    assert np.array_equal(ours[3], theirs[1])
    assert np.array_equal(ours[2], theirs[3])


def test_false_instances_take_unused_numbers() -> None:
    truth = LabelledMap(np.array([[1, 1, 2, 2]], np.uint8), (0, 0), (True, True))
    prediction = LabelledMap(np.array([[1, 3, 2, 2]], np.uint8), (0, 0, 0), (True,) * 3)
    found = compare(truth, prediction)
    assert found.ious.keys() == {(2, 2)}
    assert matched_numbers(truth, prediction, found) == (2, 1, 3)


def test_errors_are_marked() -> None:
    one = view()
    found = compare(one.truth, one.prediction)
    picture = error_picture(one.photo, one.truth, one.prediction, found).astype(int)
    wrong = (IDS == 20) & (one.prediction.segment_map == 1)
    expected = 0.25 * 99 + 0.75 * np.array(BOTH)
    assert np.abs(picture[wrong] - expected).max() <= 1
    assert len(np.unique(picture[~wrong], axis=0)) == 1
    assert len({MISSED, FALSE, BOTH}) == 3


def test_tables_for_the_terminal() -> None:
    text = score_text(result_of(view()).to_json(), CATEGORIES)
    assert [line.split() for line in text.splitlines() if line] == [
        ["category", "kind", "PQ", "SQ", "RQ", "TP", "FP", "FN"],
        ["disc", "thing", "66.7", "100.0", "66.7", "1", "0", "1"],
        ["<b>box", "&", "co</b>", "thing", "0.0", "0.0", "0.0", "0", "1", "0"],
        ["sky", "stuff", "100.0", "100.0", "100.0", "1", "0", "0"],
        ["group", "PQ", "SQ", "RQ", "categories"],
        ["All", "55.6", "66.7", "55.6", "3"],
        ["Things", "33.3", "50.0", "33.3", "2"],
        ["Stuff", "100.0", "100.0", "100.0", "1"],
    ]


def test_undefined_is_a_dash() -> None:
    text = score_text(summarize(PQStat(), CATEGORIES).to_json(), CATEGORIES)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert rows["All"] == ["-", "-", "-", "0"]
    assert rows["disc"] == ["thing", "-", "-", "-", "0", "0", "0"]
    assert PQStat().mean_pq is None


def test_pq_of_an_image_is_the_mean_over_its_categories() -> None:
    result = result_of(view())
    assert result.all is not None
    assert PQStat(result.per_class).mean_pq == pytest.approx(result.all.pq)


def test_panels_follow_what_there_is() -> None:
    names = [name for name, _ in panels(view(), CATEGORIES)]
    assert names == ["photo", "truth", "result", "semantic head", "instance head", "errors"]
    one = view()
    bare = replace(one, instance=None, semantic=None)
    assert [name for name, _ in panels(bare, CATEGORIES)] == ["photo", "truth", "result", "errors"]
    assert {picture.shape for _, picture in panels(one, CATEGORIES, 100)} == {(50, 100, 3)}


def test_sheet_has_a_row_for_each_image(tmp_path: Path) -> None:
    one, two = (comparison_sheet([view()] * n, CATEGORIES) for n in (1, 2))
    assert one.shape[1] == two.shape[1] > 1200
    assert two.shape[0] > one.shape[0] + 200


@pytest.mark.parametrize(
    ("size", "shown"),
    [((80, 160), (320, 640)), ((700, 900), (700, 900)), ((4000, 8000), (800, 1600)),
     ((1, 1), (640, 640)), ((1, 3000), (1, 1600))],
)  # fmt: skip
def test_overlays_are_of_a_size_to_look_at(
    tmp_path: Path, size: tuple[int, int], shown: tuple[int, int]
) -> None:
    photo = np.full((*size, 3), 99, np.uint8)
    whole = LabelledMap(np.ones(size, np.uint8), (0,), (True,))
    write_overlay(tmp_path / "a.png", photo, whole, CATEGORIES)
    picture = np.asarray(cv2.imread(str(tmp_path / "a.png")))
    assert picture.shape == (*shown, 3)
    named = (picture == 255).any(2).any(1).sum()
    assert named == 0 or named >= 8 * max(shown) / 640, "names grow with the picture"


@given(st.lists(st.sampled_from([None, 0.0, 0.25, 0.5, 1.0]), max_size=9), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_the_best_and_the_worst_images_are_shown(scores: list[float | None], limit: int) -> None:
    best, worst = extremes(scores, [3] * len(scores), limit)
    defined = [(pq, at) for at, pq in enumerate(scores) if pq is not None]
    order = [at for _, at in sorted(defined, key=lambda row: (-row[0], row[1]))]
    assert best == order[:limit]
    assert worst == [at for _, at in sorted(defined)[:limit] if at not in best]


def test_images_with_many_segments_are_shown_first() -> None:
    scores = [1.0, 1.0, 1.0, 0.9, 0.0, 0.0, None, 0.1]
    segments = [1, 2, 8, 5, 1, 3, 9, 4]
    assert extremes(scores, segments, 3) == ([2, 1, 3], [5, 7])
    assert extremes(scores, segments, 5) == ([2, 1, 3, 7, 5], [])
    assert extremes(scores, [1] * 8, 2) == ([0, 1], [4, 5])


def test_pictures_of_an_evaluation(tmp_path: Path) -> None:
    scores = [None, *(number / 20 for number in range(19))]
    asked: dict[int, bool] = {}

    def view_of(at: int, with_heads: bool) -> ImageView:
        assert at not in asked
        asked[at] = with_heads
        return view(str(at), scores[at])

    names = [f"image{at}" for at in range(20)]
    best, worst = draw_pictures(
        tmp_path, names, scores, [3] * 20, view_of, categories=CATEGORIES, overlays=2
    )
    assert [figure.title for figure in best] == ["19", "18", "17", "16", "15", "14"]
    assert [figure.title for figure in worst] == ["1", "2", "3", "4", "5", "6"]
    assert asked == {at: at > 0 for at in (*range(7), *range(14, 20))}
    assert {path.name for path in (tmp_path / "overlays").iterdir()} == {"image0.jpg", "image1.jpg"}
    assert (tmp_path / "comparison.png").exists()


class Page(HTMLParser):
    """Balanced tags, addresses and rows of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.rows = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.rows += tag == "tr"
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href"}]
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_one_file_without_any_other(tmp_path: Path) -> None:
    worst, best = (
        [make_figure(view(f'<i>{n}</i>" onload="x.jpg', pq), CATEGORIES)]
        for n, pq in enumerate((0.2, 0.9))
    )
    text = page_of(tmp_path / "new", Breakdown(), best=best, worst=worst, facts={"images": "2 < 3"})
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["report.html"]
    page = Page(text)
    assert page.open == []
    assert page.rows == 1 + len(CATEGORIES)
    assert len(page.addresses) == 2 * 6
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    assert not re.search(r"https?://|url\(|@import", text)
    jpeg = base64.b64decode(page.addresses[0].partition(",")[2])
    assert np.asarray(cv2.imdecode(np.frombuffer(jpeg, np.uint8), 1)).shape == (240, 480, 3)
    assert "<i>" not in text
    assert 'onload="' not in text
    assert "Content-Security-Policy\" content=\"default-src 'none'; img-src data:;" in text
    assert "<b>box" not in text
    assert "2 &lt; 3" in text
    assert text.index("&lt;i&gt;1") < text.index("&lt;i&gt;0"), "the best image comes first"
    assert "2 of 3 segments found; missed: disc; false: " in text


def test_page_without_images_or_scores(tmp_path: Path) -> None:
    text = page_of(tmp_path, Breakdown(), summarize(PQStat(), CATEGORIES))
    assert "undefined" in text
    assert "<article>" not in text
