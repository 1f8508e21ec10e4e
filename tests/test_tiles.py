"""Tiles: exact targets, heads that are decoded tile by tile, and the way from cache to PQ."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from handmade import edge_case, hashes, index_maps, make_sample
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from panoptic_cache.evaluate.decoder.decode import DecodedSegment, PanopticMap
from panoptic_cache.evaluate.decoder.tiles import paste, stitch
from panoptic_cache.evaluate.photos import predict_photos
from panoptic_cache.evaluate.predict import Heads, Pixels, Predictor
from panoptic_cache.evaluate.split import evaluate
from panoptic_cache.evaluate.study.heads import list_heads, read_heads, read_meta
from panoptic_cache.pipeline.base.config import build_config
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.cache.sample import (
    Sample,
    check_sample,
    decode_sample,
    encode_distance,
    encode_sample,
)
from panoptic_cache.pipeline.cache.shards import ShardReader
from panoptic_cache.pipeline.cache.verify import verify
from panoptic_cache.pipeline.coco import CocoPanoptic
from panoptic_cache.pipeline.photo import decode_photo
from panoptic_cache.pipeline.render.driver import render
from panoptic_cache.pipeline.render.job import cut_tile, render_image
from panoptic_cache.pipeline.render.plan import RenderConfig
from panoptic_cache.pipeline.targets import boundary
from panoptic_cache.pipeline.tiles import Window, windows
from panoptic_cache.train.augment import PADDING, Augmentation, make_item
from panoptic_cache.train.config import TrainConfig
from panoptic_cache.train.loop import train

TILES = RenderConfig(samples_per_shard=4, tile=24, overlap=6)
sizes = st.integers(1, 60)


@settings(deadline=None)
@given(sizes, sizes, st.integers(1, 40), st.data())
def test_tiles_cover_an_image(height: int, width: int, tile: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, tile - 1))
    seen, own = np.zeros((2, height, width), int)
    places = [*windows((height, width), tile, overlap)]
    for window in places:
        seen[window.place] += 1
        own[window.core] += 1
        assert window.shape == (min(tile, height), min(tile, width))
        for inner, outer in zip(window.core, window.place, strict=True):
            assert outer.start <= inner.start < inner.stop <= outer.stop
    assert seen.all()
    assert (own == 1).all()
    for side, spans in ((height, {w.rows for w in places}), (width, {w.columns for w in places})):
        ordered = sorted(spans)
        assert (ordered[0][0], ordered[-1][1]) == (0, side)
        assert all(b[0] <= a[1] - overlap for a, b in pairwise(ordered))
        # One tile less would not do.
        assert (len(ordered) - 1) * (tile - overlap) + overlap < side or len(ordered) == 1


def brute_force(whole: Sample, tile: Sample) -> None:
    """Holds a tile to its image, pixel by pixel."""
    assert tile.tile is not None
    (top, left), (height, width) = tile.tile, tile.segment_map.shape
    here = np.s_[top : top + height, left : left + width]
    ids = np.array([0, *(segment.id for segment in whole.segments)])
    own = np.array([0, *(segment.id for segment in tile.segments)])
    assert np.array_equal(own[tile.segment_map], ids[whole.segment_map][here])
    assert np.array_equal(tile.void, whole.void[here])
    # The distance to the nearest boundary pixel of the whole image.
    edges = np.argwhere(boundary(whole.segment_map))
    for y in range(height):
        for x in range(width):
            away = np.hypot(*(edges - (top + y, left + x)).T) if len(edges) else np.array([np.inf])
            code = encode_distance(np.array([away.min()], np.float32))[0]
            assert tile.eds[y, x] == code
    by_id = {segment.id: segment for segment in whole.segments}
    for segment in tile.segments:
        ys, xs = np.nonzero(ids[whole.segment_map][here] == segment.id)
        same = by_id[segment.id]
        assert segment.area == len(ys) > 0
        box = [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        assert [*segment.bbox] == box
        assert (segment.label, segment.iscrowd) == (same.label, same.iscrowd)
        if segment.centroid is None:
            assert same.centroid is None
        else:
            middle = (2 * (xs.mean() + 0.5) / width - 1, 2 * (ys.mean() + 0.5) / height - 1)
            assert segment.centroid == pytest.approx(middle, abs=1e-12)


def tiles_of(whole: Sample, tile: int, overlap: int) -> Iterator[Sample]:
    photo = decode_photo(whole.photo, whole.key)
    for window in windows(whole.original_size, tile, overlap):
        yield cut_tile(whole, photo, window, 95)


@settings(max_examples=40, deadline=None)
@given(index_maps(), st.integers(2, 8), st.integers(0, 1))
def test_targets_of_tiles_are_exact(index: NDArray[Any], tile: int, overlap: int) -> None:
    whole = make_sample(index, crowds=(2,), things=(1, 2, 3))
    for each in tiles_of(whole, tile, overlap):
        brute_force(whole, each)
        check_sample(each)
        read = decode_sample(each.key, encode_sample(each))
        assert (read.tile, read.segments) == (each.tile, each.segments)


def test_a_tile_of_many_segments_has_few() -> None:
    whole = make_sample(edge_case("300 segments"))
    for each in tiles_of(whole, 8, 2):
        assert each.segment_map.dtype == np.uint8
        brute_force(whole, each)


def test_wrong_distances_of_a_tile_are_found() -> None:
    whole = make_sample(np.array([[1] * 12 + [2] * 4] * 16, np.uint8))
    first = next(iter(tiles_of(whole, 8, 0)))  # no boundary in it: 8 px to that of the image
    check_sample(first)
    assert first.eds[0].tolist() == [22, 20, 18, 16, 14, 12, 10, 8]
    for eds in (first.eds * 0, first.eds // 4):  # nearer than the edge
        with pytest.raises(InputError, match="EDS"):
            check_sample(replace(first, eds=eds))
    with pytest.raises(InputError, match="EDS"):
        check_sample(replace(first, tile=None))


def rendered(dataset: CocoPanoptic, folder: Path, config: RenderConfig = TILES) -> Path:
    render(dataset, "train", Storage(str(folder)), config, workers=0)
    return folder


def test_a_cache_of_tiles(tiny_dataset: CocoPanoptic, tmp_path: Path) -> None:
    folder = rendered(tiny_dataset, tmp_path / "cache")
    assert verify(Storage(str(folder)), deep=True).ok
    reader = ShardReader(folder)
    assert reader.index.settings["tile"] == 24
    assert len({*reader.keys}) == len(reader) > 4 * len(tiny_dataset.records)
    categories = {category.id: category for category in tiny_dataset.categories}
    samples = [reader.sample(position) for position in range(len(reader))]
    for record in tiny_dataset.records[:2]:
        (whole,) = render_image(record, RenderConfig(), categories, Counter())
        mine = [sample for sample in samples if sample.image_id == record.image_id]
        assert len(mine) == len([*windows(whole.original_size, 24, 6)])
        brute_force(whole, mine[0])
        brute_force(whole, mine[-1])


def test_tiles_go_with_native_size_only() -> None:
    for values in (
        {"tile": 24, "overlap": 24},
        {"tile": 0},
        {"overlap": 4},
        {"tile": 24, "fit": "squash", "size": 28},
    ):
        with pytest.raises(InputError):
            RenderConfig(**values)


def test_a_cache_of_tiles_is_continued(tiny_dataset: CocoPanoptic, tmp_path: Path) -> None:
    whole = hashes(rendered(tiny_dataset, tmp_path / "whole"))
    folder = rendered(tiny_dataset, tmp_path / "cache")
    (folder / "train-00001.json").unlink()
    (folder / "index.json").unlink()
    assert hashes(rendered(tiny_dataset, folder)) == whole
    with pytest.raises(InputError, match="tile was 24, now None"):
        rendered(tiny_dataset, folder, RenderConfig(samples_per_shard=4))


def blocks(size: tuple[int, int], seed: int) -> NDArray[np.int32]:
    """Ids of rectangles, a third of them void, from far below to far above the side of a tile."""
    random = np.random.default_rng(seed)
    index = np.zeros(size, np.int32)
    for axis, side in enumerate(size):
        cuts = np.sort(random.choice(np.arange(6, side - 6), 3, replace=False))
        part = np.searchsorted(cuts, np.arange(side), side="right")
        index = index * 4 + np.expand_dims(part, 1 - axis)
    ids = np.where(random.random(16) < 0.7, np.arange(1, 17), 0)
    return ids[index].astype(np.int32)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(12, 40), st.integers(4, 11))
def test_true_maps_of_tiles_make_the_true_map(seed: int, tile: int, overlap: int) -> None:
    """Segments 1 to 4 are of a class of stuff each, the others are instances of one class."""
    ids, random = blocks((50, 60), seed), np.random.default_rng(seed)

    def parts() -> Iterator[tuple[Window, PanopticMap]]:
        for window in windows((50, 60), tile, overlap):
            own = ids[window.place]
            present = np.unique(own[own > 0])
            names = random.permutation(len(present)) + 1  # each tile has ids of its own
            lookup = np.zeros(17, np.int32)
            lookup[present] = names
            table = [
                DecodedSegment(
                    int(name), int(min(true, 5)), bool(true > 4), 0.5, int((own == true).sum())
                )
                for name, true in sorted(zip(names, present, strict=True))
            ]
            yield window, PanopticMap(lookup[own], tuple(table))

    found = stitch((50, 60), parts())
    pairs = {*zip(ids.ravel().tolist(), found.ids.ravel().tolist(), strict=True)}
    assert len(pairs) == len(np.unique(ids)) == len(np.unique(found.ids))  # the same partition
    mine = {segment.id: segment for segment in found.segments}
    assert [*mine] == [*range(1, len(mine) + 1)]
    for true, name in pairs:
        if true:
            segment = mine[name]
            assert (segment.isthing, segment.label) == (true > 4, min(true, 5))
            assert (segment.area, segment.score) == ((ids == true).sum(), 0.5)


def test_small_stuff_is_dropped_in_the_image_not_in_a_tile() -> None:
    ids = np.ones((20, 20), np.int32)
    ids[:2, 9:13] = 2  # eight pixels, four of them in each tile
    table = tuple(DecodedSegment(n, n, False, 1.0, 1) for n in (1, 2))
    parts = [(w, PanopticMap(ids[w.place], table)) for w in windows((20, 20), 12, 2)]
    assert np.array_equal(stitch((20, 20), parts, min_stuff_area=8).ids, ids)
    without = stitch((20, 20), parts, min_stuff_area=9)
    assert np.array_equal(without.ids, np.where(ids == 2, 0, 1))
    assert [segment.id for segment in without.segments] == [1]


def test_what_a_seam_leaves_of_an_instance_is_dropped() -> None:
    """The left tile sees all 30 px of one, of which the right one makes two, better placed."""
    left, right = windows((10, 30), 20, 10)
    ids = np.zeros((10, 20), np.int32)
    ids[:5, 11:17] = 1
    other = np.zeros((10, 20), np.int32)
    other[:5, 1:4], other[:5, 4:7] = 1, 2
    instance = DecodedSegment(1, 1, True, 1.0, 30)
    halves = tuple(DecodedSegment(n, 1, True, 1.0, 15) for n in (1, 2))
    found = stitch(
        (10, 30), [(left, PanopticMap(ids, (instance,))), (right, PanopticMap(other, halves))]
    )
    assert left.core_columns == (0, 15)
    # 20 of 30 px lie in the left tile's own part, and 10 of the right one's second half.
    assert [segment.area for segment in found.segments] == [20, 10]
    ids[:5, 11:17], ids[:5, 13:19] = 0, 1
    found = stitch(
        (10, 30), [(left, PanopticMap(ids, (instance,))), (right, PanopticMap(other, halves))]
    )
    # 10 of 30 px: dropped.
    assert [segment.area for segment in found.segments] == [10]
    assert not found.ids[:, :15].any()


def true_heads(predictor: Predictor, photos: list[Pixels]) -> list[Heads]:
    """Perfect heads of photos whose red channel holds the ids of instances, 0 = stuff."""
    thing, stuff = (
        next(c.label for c in predictor.categories if c.isthing == wanted)
        for wanted in (True, False)
    )
    found = []
    for photo in photos:
        ids = photo[..., 0].astype(np.int64)
        height, width = ids.shape
        codes = torch.zeros(predictor.encoding.channels, height, width)
        for number in np.unique(ids[ids > 0]):
            y, x = np.nonzero(ids == number)
            centroid = torch.tensor(
                [(2 * x + 1).mean() / width - 1, (2 * y + 1).mean() / height - 1]
            )
            code = predictor.encoding.encode(
                centroid[None].float(), torch.ones(1, dtype=torch.bool)
            )
            codes[:, ids == number] = code[0][:, None]
        labels = torch.from_numpy(np.where(ids > 0, thing, stuff))
        logits = torch.nn.functional.one_hot(labels, len(predictor.categories)).permute(2, 0, 1)
        found.append(Heads(codes, 10.0 * logits))
    return found


def cells_of_a_tissue() -> NDArray[np.uint8]:
    """Ids (150, 190): discs of 9 to 14 px, a touching pair, and a bar longer than two tiles."""
    ids = np.zeros((150, 190), np.uint8)
    y, x = np.ogrid[:150, :190]
    number = 0
    for row, top in enumerate(range(14, 150, 30)):
        for column, left in enumerate(range(14, 190, 32)):
            number += 1
            radius = 9 + (row + column) % 6
            ids[(y - top) ** 2 + (x - left) ** 2 <= radius**2] = number
    ids[60:72, 20:170] = number + 1
    ids[(y - 104) ** 2 + (x - 95) ** 2 <= 100] = number + 2
    ids[(y - 104) ** 2 + (x - 115) ** 2 <= 100] = number + 3
    return ids


def test_true_heads_of_tiles_give_what_the_whole_image_gives(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = cells_of_a_tissue()
    photo = ids[..., None].repeat(3, 2)

    def decoded(tile: int) -> PanopticMap:
        predictor = Predictor(trained, "cpu", tile=tile, overlap=32 if tile else None)
        monkeypatch.setattr(predictor, "heads", lambda photos: true_heads(predictor, photos))
        return predictor([photo])[0]

    whole, tiled = decoded(0), decoded(64)
    for found in (whole, tiled):
        things = [segment for segment in found.segments if segment.isthing]
        assert len(things) == len(np.unique(ids)) - 1
        for segment in things:
            mask = found.ids == segment.id
            true = ids == np.bincount(ids[mask]).argmax()
            assert (mask & true).sum() / (mask | true).sum() > 0.95
            assert segment.area == mask.sum()
    differs = (tiled.ids > 1) != (whole.ids > 1)
    assert differs.mean() < 0.001


@pytest.fixture(scope="module")
def tiled_run(tiny_dataset: CocoPanoptic, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on tiles of 24 px."""
    folder = tmp_path_factory.mktemp("tiled")
    rendered(tiny_dataset, folder / "cache")
    random = {"hidden_size": 16, "layers": 2, "heads": 2, "patch_size": 7}
    values: dict[str, Any] = {
        "out": str(folder / "run"),
        "steps": 2,
        "precision": "fp32",
        "data": {"cache": str(folder / "cache"), "size": 28, "batch": 4, "workers": 0},
        "model": {"backbone": "random", "random": random, "taps": [1, 2], "channels": 8},
    }
    train(build_config(TrainConfig, values, where="test"))
    return folder / "run"


def test_a_run_on_tiles_predicts_with_them(tiled_run: Path, run: Run) -> None:
    predictor = Predictor(tiled_run, "cpu")
    assert (predictor.tile, predictor.overlap) == (24, 6)
    assert predictor.identity["tile"] == 24
    assert Predictor(tiled_run, "cpu", tile=0).tile is None
    assert "tile" not in Predictor(tiled_run, "cpu", tile=0).identity
    assert "tile = 24" in (tiled_run / "config.toml").read_text()
    code, _, _ = run("train", tiled_run / "config.toml", "--resume", "--set", "steps=3")
    assert code == 0
    with pytest.raises(InputError, match="tiles of 24 px that overlap by 24 px"):
        Predictor(tiled_run, "cpu", overlap=24)


def test_tiles_are_the_network_s_input(tiled_run: Path) -> None:
    """24 pixels of a photo fill 28 of the input, in training and in prediction."""
    predictor = Predictor(tiled_run, "cpu")
    photo = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
    shapes = {window.shape: heads.semantic.shape[1:] for window, heads in predictor.tiles(photo)}
    assert shapes == {(20, 24): (23, 28)}
    sample = make_sample(np.ones((20, 24), np.uint8))
    item = make_item(sample, predictor.state.config.data, Augmentation())
    assert (item.void != PADDING).sum() == 23 * 28


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (24, 24), (25, 23), (100, 61)])
def test_photos_of_any_size_are_tiled(tiled_run: Path, shape: tuple[int, int]) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    predictor = Predictor(tiled_run, "cpu")
    (found,) = predictor([photo])
    assert found.ids.shape == shape
    present, areas = np.unique(found.ids[found.ids > 0], return_counts=True)
    assert [(s.id, s.area) for s in found.segments] == [*zip(present, areas, strict=True)]
    for picture in predictor.head_pictures(photo):
        assert picture.shape == (*shape, 3)


def test_a_large_photo_shows_how_far_it_is(
    tiled_run: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("panoptic_cache.pipeline.base.terminal.LINE_SECONDS", 0.0)
    Image.new("RGB", (30, 80)).save(tmp_path / "tall.png")
    with caplog.at_level("INFO"):
        predict_photos(Predictor(tiled_run, "cpu"), [tmp_path / "tall.png"], tmp_path / "out")
    lines = [line for line in caplog.messages if "tall.png: " in line]
    rows = [int(line.partition("tall.png: ")[2].split()[0]) for line in lines]
    assert rows == sorted(rows)
    assert rows[0] == 24
    assert rows[-1] == 80


def test_pictures_of_heads_name_places_in_the_image() -> None:
    """Each pixel of a tile names itself; so does each pixel of the image then."""
    size = (40, 70)

    def places(height: int, width: int) -> NDArray[np.float32]:
        v, u = np.mgrid[:height, :width].astype(np.float32)
        u, v = (2 * u + 1) / width - 1, (2 * v + 1) / height - 1
        return np.stack([u, v, np.full_like(u, 3)])

    parts = [(window, places(*window.shape)) for window in windows(size, 32, 8)]
    assert np.allclose(paste(size, parts), places(*size), atol=1e-5)


def test_evaluation_on_tiles_resumes(
    tiled_run: Path, tiny_dataset: CocoPanoptic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, few = Predictor(tiled_run, "cpu"), tiny_dataset.spread(3)
    outcome = evaluate(predictor, few, tmp_path / "once", heads_folder=tmp_path / "heads")
    assert outcome.seconds_per_image["network"] > 0 < outcome.seconds_per_image["decode"]
    tiles = [len([*windows((r.height, r.width), 24, 6)]) for r in few.records]
    assert len([*(tmp_path / "heads").glob("*.npz")]) == sum(tiles)
    meta = read_meta(tmp_path / "heads")
    for image in read_heads(list_heads(tmp_path / "heads"), meta):
        assert max(image.size) <= 24
        assert {s.id for s in image.segments} == {*np.unique(image.ids)} - {0}

    heads, left = predictor.heads, iter(range(4))

    def interrupted(photos: list[Pixels]) -> list[Heads]:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return heads(photos)

    monkeypatch.setattr(predictor, "heads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(predictor, few, tmp_path / "twice", batch=1, overlays=0)
    monkeypatch.setattr(predictor, "heads", heads)
    evaluate(predictor, few, tmp_path / "twice", batch=1, overlays=0)
    for name in ("once", "twice"):
        assert not [*(tmp_path / name).glob("*.jsonl")]
    once, twice = (
        json.loads((tmp_path / name / "panoptic.json").read_text()) for name in ("once", "twice")
    )
    assert once == twice
    for row in once["annotations"]:
        one, two = (
            np.asarray(Image.open(tmp_path / name / "panoptic" / row["file_name"]))
            for name in ("once", "twice")
        )
        assert np.array_equal(one, two)


def test_the_commands(run: Run, tiny_root: Path, tiled_run: Path, tmp_path: Path) -> None:
    data = ("--coco", tiny_root, "--split", "val")
    out = tmp_path / "cache"
    code, said, _ = run(
        "preprocess", *data, "--tile", 24, "--overlap", 6, "--out", out, "--workers", 0, "--json"
    )
    assert code == 0
    written = json.loads(said)["written"]
    code, said, _ = run("inspect", out, "--json")
    assert json.loads(said)["samples"] == written > 4
    assert run("verify", out, "--deep")[0] == 0
    code, said, _ = run(
        "preprocess", *data, "--tile", 24, "--out", tmp_path / "a", "--dry-run", "--json"
    )
    assert json.loads(said)["images"] == 4
    at = ("--checkpoint", tiled_run)
    code, said, _ = run("evaluate", *at, *data, "--out", tmp_path / "val", "--json")
    assert code == 0
    assert json.loads(said)["images"] == 4
    photos = tiny_root / "val"
    for tile in ((), ("--tile", 20, "--overlap", 3), ("--tile", 0)):
        code, said, _ = run("predict", photos, *at, *tile, "--out", tmp_path / "out", "--json")
        assert code == 0
        assert json.loads(said)["pictures"] == 4
    assert run("predict", photos, *at, "--tile", 8, "--overlap", 8, "--out", out)[0] == 1
    assert run("export", *at, "--out", tmp_path / "model")[0] == 0
    assert Predictor(tmp_path / "model", "cpu").tile == 24
