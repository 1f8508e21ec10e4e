"""The loader: who gets which sample when, and targets that stay exact under augmentation."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from handmade import edge_case, make_sample, noise
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.cache.sample import Sample, eds_distances, encode_distance
from panoptic_cache.pipeline.cache.shards import ShardReader
from panoptic_cache.pipeline.photo import encode_jpeg, fitted_size
from panoptic_cache.pipeline.targets import SegmentMap, boundary, edge_distance, resize_segment_map
from panoptic_cache.train.augment import (
    PADDING,
    Augmentation,
    Item,
    cut_square,
    draw_augmentation,
    jitter_colour,
    make_item,
)
from panoptic_cache.train.caches import Mix, check_rendered_size, open_caches
from panoptic_cache.train.config import DataConfig
from panoptic_cache.train.data import (
    Batch,
    MicroBatches,
    Share,
    collate,
    micro_batch_sizes,
    step_places,
)
from panoptic_cache.train.loader import iterate, make_loader

Fit = Literal["squash", "longest", "crop"]
FITS: tuple[Fit, ...] = ("squash", "longest", "crop")


# Order


def config_of(micro: int, accumulated: int, world: int) -> DataConfig:
    return DataConfig(batch=micro * accumulated * world, micro_batch=micro)


def micro_batches(
    config: DataConfig, samples: int, steps: range, rank: int = 0, world: int = 1
) -> list[list[tuple[int, int]]]:
    return list(
        MicroBatches(config, whole(samples), Share(seed=3, steps=steps, rank=rank, world=world))
    )


def whole(samples: int) -> Mix:
    """One cache."""
    return Mix((samples,), (samples,))


sizes = st.integers(1, 4)


@settings(deadline=None)
@given(st.integers(1, 30), sizes, sizes, sizes)
def test_each_sample_comes_exactly_once_an_epoch(
    samples: int, micro: int, accumulated: int, world: int
) -> None:
    config = config_of(micro, accumulated, world)
    steps = math.ceil(3 * samples / config.batch)
    places: Counter[tuple[int, int]] = Counter()
    for rank in range(world):
        batches = micro_batches(config, samples, range(steps), rank, world)
        assert {len(batch) for batch in batches} == {micro}
        assert len(batches) == steps * accumulated
        places.update(place for batch in batches for place in batch)
    whole = {(epoch, position) for epoch in range(3) for position in range(samples)}
    assert all(places[place] == 1 for place in whole)
    assert set(places.values()) == {1}
    assert {epoch for epoch, _ in places.keys() - whole} <= set(range(3, 3 + config.batch + 1))


@settings(deadline=None)
@given(st.integers(1, 30), st.sampled_from([(1, 12), (2, 6), (3, 4), (4, 1), (6, 2), (12, 1)]))
def test_a_step_holds_the_same_samples_on_any_number_of_ranks(
    samples: int, cut: tuple[int, int]
) -> None:
    world, micro = cut
    config = DataConfig(batch=12, micro_batch=micro)
    for step in range(4):
        together = [
            place
            for rank in range(world)
            for batch in micro_batches(config, samples, range(step, step + 1), rank, world)
            for place in batch
        ]
        assert sorted(together) == sorted(step_places(3, whole(samples), 12, step))


@settings(deadline=None)
@given(st.integers(1, 30), sizes, sizes, sizes, st.integers(0, 8))
def test_resuming_at_a_step_goes_on_with_its_batches(
    samples: int, micro: int, accumulated: int, world: int, first: int
) -> None:
    config = config_of(micro, accumulated, world)
    for rank in range(world):
        whole = micro_batches(config, samples, range(8), rank, world)
        rest = micro_batches(config, samples, range(first, 8), rank, world)
        assert whole[first * accumulated :] == rest


def test_steps_span_epochs_and_epochs_differ() -> None:
    first, second = step_places(0, whole(5), 4, 0), step_places(0, whole(5), 4, 1)
    assert [epoch for epoch, _ in first + second] == [0] * 5 + [1] * 3
    orders = [[p for _, p in step_places(0, whole(50), 50, epoch)] for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2] != list(range(50))
    assert orders[0] != [p for _, p in step_places(1, whole(50), 50, 0)]
    assert len(step_places(0, whole(3), 8, 0)) == 8  # a cache smaller than a batch


@pytest.mark.parametrize(
    ("batch", "world", "sizes"),
    [
        (24, 1, (4, 4, 4, 4, 4, 4)),
        (24, 4, (3, 3)),
        (24, 24, (1,)),
        (26, 2, (4, 3, 3, 3)),
        (7, 1, (4, 3)),
        (3, 1, (3,)),
    ],
)
def test_micro_batches_are_few_and_equal(batch: int, world: int, sizes: tuple[int, ...]) -> None:
    config = DataConfig(batch=batch, micro_batch=4)
    assert micro_batch_sizes(config, world) == sizes
    found = micro_batches(config, 100, range(2), world - 1, world)
    assert [len(each) for each in found] == [*sizes, *sizes]


@pytest.mark.parametrize(("world", "choices"), [(5, "20 or 25"), (48, "48")])
def test_a_batch_that_does_not_divide_is_refused(world: int, choices: str) -> None:
    with pytest.raises(InputError, match=rf"batch of 24 .* {world} ranks .*data.batch={choices}\)"):
        micro_batch_sizes(DataConfig(batch=24), world)


# Augmentation


def test_augmentation_is_a_function_of_seed_epoch_and_position() -> None:
    config = DataConfig()
    places = [(epoch, position) for epoch in range(3) for position in range(20)]
    drawn = [draw_augmentation(config, 1, place) for place in places]
    assert drawn == [draw_augmentation(config, 1, place) for place in places]
    assert len({repr(augmentation) for augmentation in drawn}) == len(places)
    assert drawn != [draw_augmentation(config, 2, place) for place in places]


def test_augmentation_stays_in_its_ranges() -> None:
    config = DataConfig(scale=(0.5, 2.0), colour=0.3)
    drawn = [draw_augmentation(config, 0, (0, position)) for position in range(400)]
    scales = np.array([augmentation.scale for augmentation in drawn])
    assert scales.min() >= 0.5
    assert scales.max() <= 2.0
    assert abs(np.log(scales).mean()) < 0.06  # log-uniform around 1: four standard errors
    colours = np.array([augmentation.colour for augmentation in drawn])
    assert colours.min() >= 0.7
    assert colours.max() <= 1.3
    places = np.array([augmentation.place for augmentation in drawn])
    assert places.min() >= 0
    assert places.max() <= 1
    assert 150 < sum(augmentation.flip for augmentation in drawn) < 250


def test_switches_turn_augmentation_off() -> None:
    assert draw_augmentation(DataConfig(augment=False), 0, (0, 0)) == Augmentation()
    places = [(0, position) for position in range(50)]
    calm = DataConfig(flip=False, colour=0.0, scale=(1.0, 1.0))
    for place in places:
        drawn = draw_augmentation(calm, 0, place)
        assert drawn == Augmentation(place=drawn.place)


@st.composite
def blocky_maps(draw: st.DrawFn) -> SegmentMap:
    """Maps of blocks of 4 px or more, so that no segment vanishes at half the size."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    height, width, block = (draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(sizes) + 3)
    index = rng.integers(0, 5, (height, width))
    index[rng.integers(height), rng.integers(width)] = 4
    return index.astype(np.uint8).repeat(block, 0).repeat(block, 1)


augmentations = st.builds(
    Augmentation,
    flip=st.booleans(),
    scale=st.floats(0.5, 2.0),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)


def table_sample(index: SegmentMap) -> Sample:
    """Row 1 is a thing, 2 stuff, 3 crowd, 4 a thing."""
    return make_sample(index, things=(1, 3, 4), crowds=(3,))


def placed(index: SegmentMap, config: DataConfig, augmentation: Augmentation) -> list[list[int]]:
    """What each pixel of the input shows, by loops: a row, or -1 outside the picture."""
    side = config.size
    height, width = fitted_size(
        index.shape[0], index.shape[1], side, config.fit, augmentation.scale
    )
    resized = resize_segment_map(index, (height, width)).tolist()
    top = round((height - side) * augmentation.place[1])
    left = round((width - side) * augmentation.place[0])
    result = []
    for y in range(top, top + side):
        row = [
            resized[y][x] if 0 <= y < height and 0 <= x < width else -1
            for x in range(left, left + side)
        ]
        result.append(row[::-1] if augmentation.flip else row)
    return result


@settings(deadline=None)
@given(blocky_maps(), st.sampled_from(FITS), st.integers(4, 24), augmentations)
def test_targets_equal_those_of_the_transformed_map(
    index: SegmentMap, fit: Fit, side: int, augmentation: Augmentation
) -> None:
    config = DataConfig(size=side, fit=fit)
    item = make_item(table_sample(index), config, augmentation)
    shown = placed(index, config, augmentation)
    assert item.segment_map.tolist() == [[max(row, 0) for row in line] for line in shown]
    void = {-1: PADDING, 0: 1, 3: 2}
    assert item.void.tolist() == [[void.get(row, 0) for row in line] for line in shown]
    assert len(item.centroid) == len(item.instance) == len(item.label) == 5
    assert item.label.tolist() == [-1, 0, 1, 2, 3]
    for row in range(5):
        pixels = [
            (y, x) for y, line in enumerate(shown) for x, value in enumerate(line) if value == row
        ]
        assert item.instance[row] == (row in {1, 4} and len(pixels) > 0)
        if item.instance[row]:
            v, u = (2 * (np.mean(pixels, axis=0) + 0.5) / side - 1).tolist()
            assert item.centroid[row].tolist() == pytest.approx([u, v], abs=1e-6)


@settings(deadline=None)
@given(blocky_maps(), st.integers(12, 40), st.floats(0.5, 1.0))
def test_distances_survive_an_isotropic_scale(index: SegmentMap, side: int, scale: float) -> None:
    """With s the scale, within (sqrt 2 + 1/4) s + sqrt(2)/2 + 1/2 pixels.

    Let e be the distance of a pixel's centre to the nearest border line between two segments.
    The distance d to the nearest boundary pixel's centre lies in [e - 1/2, e + sqrt(2)/2].
    Nearest-neighbour resizing moves a border line by half a pixel an axis at most, e by
    sqrt(2)/2, and reads a source pixel whose centre is half a source pixel an axis away, which is
    s sqrt(2)/2. Codes are rounded to half pixels: s / 4. In sum s d' - d is at most
    s sqrt(2)/2 + 1/2 + sqrt(2)/2 + s sqrt(2)/2 + s/4, and d - s d' less.
    """
    length = min(index.shape)
    square = index[:length, :length]
    used = np.unique(square[square > 0])
    square = np.where(square > 0, np.searchsorted(used, square) + 1, 0).astype(np.uint8)
    assume(round(side * scale) >= length / 2)  # else segments of 4 px might vanish
    item = make_item(make_sample(square), DataConfig(size=side), Augmentation(scale=scale))
    inside = item.void != PADDING
    new = round(side * scale)
    picture = item.segment_map[inside].reshape(new, new)
    anew = edge_distance(boundary(picture))
    carried = eds_distances()[item.eds[inside].reshape(new, new)] * item.eds_scale
    assert item.eds_scale == pytest.approx(new / length)
    if np.isinf(anew).any():
        assert np.isinf(carried).all()
        return
    bound = (math.sqrt(2) + 0.25) * item.eds_scale + math.sqrt(2) / 2 + 0.5
    assert np.abs(anew - carried).max() <= bound


@pytest.mark.parametrize("fit", FITS)
def test_far_pixels_of_a_large_photo_keep_their_weight(fit: Fit) -> None:
    """The cache holds distances up to 127.5 of its own pixels: 6 of the network's here."""
    index = np.ones((1600, 1600), np.uint8)
    index[:, 800:] = 2
    item = make_item(make_sample(index), DataConfig(size=80, fit=fit), Augmentation())
    distance = eds_distances()[item.eds] * item.eds_scale
    assert distance[:, 0].tolist() == [39.0] * 80


def test_an_image_without_segments_trains() -> None:
    sample = make_sample(np.zeros((6, 8), np.uint8))
    batch = collate([make_item(sample, DataConfig(size=6), Augmentation())])
    assert batch.label.tolist() == [[-1]]
    assert batch.instance.tolist() == [[False]]
    assert (batch.eds == 255).all()


@settings(deadline=None)
@given(blocky_maps(), st.integers(4, 24), augmentations)
def test_a_squash_computes_distances_anew(
    index: SegmentMap, side: int, augmentation: Augmentation
) -> None:
    if index.shape[0] == index.shape[1]:
        index = np.concatenate([index, index[:1]])
    config = DataConfig(size=side)
    item = make_item(table_sample(index), config, augmentation)
    new = max(1, round(side * augmentation.scale))
    distance = edge_distance(boundary(resize_segment_map(index, (new, new))))
    codes = cut_square(encode_distance(distance), side, augmentation.place, 255)
    assert item.eds.tolist() == (codes[:, ::-1] if augmentation.flip else codes).tolist()
    assert item.eds_scale == 1.0


def test_a_cache_of_the_right_size_is_handed_out_untouched() -> None:
    sample = table_sample(edge_case("segment in pieces").repeat(8, 0).repeat(8, 1))
    item = make_item(sample, DataConfig(size=24), Augmentation())
    assert item.segment_map.tolist() == sample.segment_map.tolist()
    assert item.eds.tolist() == sample.eds.tolist()
    assert item.void.tolist() == sample.void.tolist()
    assert item.eds_scale == 1.0
    flipped = make_item(sample, DataConfig(size=24), Augmentation(flip=True))
    assert flipped.eds.tolist() == sample.eds[:, ::-1].tolist()
    assert flipped.photo.tolist() == item.photo[:, :, ::-1].tolist()
    np.testing.assert_allclose(flipped.centroid[1:], item.centroid[1:] * [-1, 1], atol=1e-6)


def test_fits_show_what_they_promise() -> None:
    sample = table_sample(np.ones((20, 40), np.uint8))
    for fit, padded in zip(FITS, (0.0, 0.5, 0.0), strict=True):
        item = make_item(sample, DataConfig(size=16, fit=fit), Augmentation())
        assert (item.void == PADDING).mean() == padded


def ramp(height: int, width: int) -> NDArray[np.uint8]:
    """Red rises to the right, green downwards."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return np.stack([255 * x, 255 * y, 0 * x], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(),
        Augmentation(flip=True),
        Augmentation(scale=0.6, place=(0.2, 0.9)),
        Augmentation(scale=1.7, place=(0.8, 0.1), flip=True),
        Augmentation(scale=4.0, place=(0.3, 0.6)),
    ],
)
def test_photo_and_maps_show_the_same_place(fit: Fit, augmentation: Augmentation) -> None:
    height, width = 48, 80
    rows = np.arange(height)[:, None] // 4 * 20 + np.arange(width) // 4 + 1
    sample = replace(make_sample(rows.astype(np.uint8)), photo=encode_jpeg(ramp(height, width), 95))
    config = DataConfig(size=64, fit=fit)
    item = make_item(sample, config, augmentation)
    inside = item.void != PADDING
    row = item.segment_map[inside].astype(int) - 1
    wanted = np.stack([(row % 20 * 4 + 2) / width, (row // 20 * 4 + 2) / height]) * 255
    found = item.photo[:2, inside].astype(float)
    # Half a block of 4 px is 2 / 48 of the ramp; the rest is JPEG's and resizing's.
    assert np.abs(found - wanted).max() < 255 * 2 / 48 + 6
    assert np.abs((found - wanted).mean()) < 3
    assert item.photo[:, ~inside].max(initial=0) == 0


def test_more_than_255_segments_reach_the_batch() -> None:
    many = make_sample(edge_case("300 segments"), things=range(1, 301))
    few = make_sample(np.ones((15, 20), np.uint8))
    config = DataConfig(size=20, fit="longest")
    items = [make_item(sample, config, Augmentation()) for sample in (many, few)]
    batch = collate(items)
    assert batch.segment_map.dtype == torch.int32
    assert batch.segment_map[0].max() == 300
    assert batch.label.shape == (2, 301)
    assert batch.instance[0].sum() == 300
    assert collate(items[1:]).segment_map.dtype == torch.uint8


def test_tables_are_padded_with_rows_of_no_segment() -> None:
    maps = [np.full((6, 6), 1, np.uint8), edge_case("one row").repeat(6, 0)]
    items = [make_item(make_sample(m), DataConfig(size=6), Augmentation()) for m in maps]
    batch = collate(items)
    assert batch.keys == tuple(item.key for item in items)
    assert batch.centroid.shape == (2, 4, 2)
    assert batch.label.tolist() == [[-1, 0, -1, -1], [-1, 0, 1, 2]]
    assert batch.instance.tolist() == [[False, True, False, False]] * 2
    assert batch.centroid[0, 2:].abs().sum() == 0
    for number, item in enumerate(items):
        for field in fields(Item):
            if field.name != "key":
                value = np.asarray(getattr(item, field.name))
                found = getattr(batch, field.name)[number].numpy()
                np.testing.assert_allclose(found[: len(value)] if value.ndim else found, value)
    assert batch.photo.dtype == batch.eds.dtype == batch.void.dtype == torch.uint8
    assert batch.eds_scale.dtype == batch.centroid.dtype == torch.float32


def literal_jitter(
    photo: NDArray[np.uint8], factors: list[float], inside: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Brightness, then contrast about the picture's mean, then saturation; pixel by pixel."""
    brightness, contrast, saturation = factors
    scaled = photo / 255 * brightness
    pixels = [scaled[:, y, x] for y, x in np.argwhere(inside)]
    mean = np.mean(pixels) if pixels else 0.0
    result = np.zeros(photo.shape)
    for y, x in np.argwhere(inside):
        colour = mean + (scaled[:, y, x] - mean) * contrast
        colour = colour.mean() + (colour - colour.mean()) * saturation
        result[:, y, x] = np.clip(colour, 0, 1)
    return result


def test_colour_jitter_equals_a_literal_one_and_padding_has_no_part_in_it() -> None:
    photo = noise((5, 6)).transpose(2, 0, 1)[None].repeat(4, 0).copy()
    void = np.zeros((4, 5, 6), np.uint8)
    void[0, 0, 0], void[0, 1, 1] = 1, 2  # unlabelled and crowd are picture, too
    void[1, :, 4:] = void[1, 3:] = PADDING
    void[3] = PADDING
    photo *= (void != PADDING)[:, None]
    factors = [[0.9, 1.2, 0.8], [1.1, 0.7, 1.3], [1.0, 0.0, 1.0], [1.2, 0.5, 1.0]]
    tensors = torch.from_numpy(photo), torch.tensor(factors)
    found = jitter_colour(*tensors, torch.from_numpy(void))
    for row, values in enumerate(factors):
        wanted = literal_jitter(photo[row], values, void[row] != PADDING)
        np.testing.assert_allclose(found[row], wanted, atol=1e-6)
    assert found[2].std() < 1e-6  # no contrast: the mean everywhere
    assert torch.equal(found, jitter_colour(*tensors, torch.from_numpy(void)))
    alone = jitter_colour(tensors[0][1:2], tensors[1][1:2], torch.from_numpy(void[1:2]))
    assert torch.equal(found[1:2], alone)  # whatever the batch


def test_factors_of_one_change_nothing() -> None:
    photo = torch.from_numpy(noise((5, 6)).transpose(2, 0, 1)[None].copy())
    void = torch.zeros(1, 5, 6, dtype=torch.uint8)
    torch.testing.assert_close(jitter_colour(photo, torch.ones(1, 3), void), photo.float() / 255)


# The loader


def load(
    cache: Path, config: DataConfig, steps: range, *, rank: int = 0, world: int = 1
) -> list[Batch]:
    chosen = replace(config, cache=str(cache))
    share = Share(seed=5, steps=steps, rank=rank, world=world)
    return list(iterate(make_loader(chosen, open_caches(chosen), share)))


def same_batches(one: list[Batch], other: list[Batch]) -> bool:
    def plain(batch: Batch) -> list[object]:
        values = [getattr(batch, field.name) for field in fields(Batch)]
        return [v.tolist() if isinstance(v, torch.Tensor) else v for v in values]

    return [plain(batch) for batch in one] == [plain(batch) for batch in other]


SMALL = DataConfig(size=28, batch=4, micro_batch=2, workers=0)


def test_batches_do_not_depend_on_workers_and_resume_anywhere(tiny_cache: Path) -> None:
    alone = load(tiny_cache, SMALL, range(4))
    assert len(alone) == 8
    assert same_batches(load(tiny_cache, replace(SMALL, workers=2), range(4)), alone)
    assert same_batches(load(tiny_cache, SMALL, range(3, 4)), alone[6:])
    assert not same_batches(alone[:1], alone[6:7])
    keys = [key for batch in alone[:6] for key in batch.keys]
    assert sorted(keys) == sorted(ShardReader(tiny_cache).keys)


def test_an_epoch_augments_anew(tiny_cache: Path) -> None:
    batches = load(tiny_cache, SMALL, range(6))
    photos: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        for key, photo in zip(batch.keys, batch.photo, strict=True):
            photos.setdefault(key, []).append(photo)
    assert len(photos) == 12
    assert all(len(seen) == 2 and not torch.equal(*seen) for seen in photos.values())
    still = load(tiny_cache, replace(SMALL, augment=False), range(6))
    first: dict[str, torch.Tensor] = {}
    for batch in still:
        for key, photo in zip(batch.keys, batch.photo, strict=True):
            assert torch.equal(photo, first.setdefault(key, photo))


def test_starting_the_loader_leaves_the_global_generator_alone(tiny_cache: Path) -> None:
    before = torch.get_rng_state()
    load(tiny_cache, SMALL, range(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_padding_counts_for_nothing(tiny_cache: Path) -> None:
    config = replace(SMALL, scale=(0.5, 0.6), batch=12, micro_batch=12)
    (batch,) = load(tiny_cache, config, range(1))
    padding = batch.void == PADDING
    assert 0.6 < padding.float().mean() < 0.8
    assert batch.segment_map[padding].max() == 0
    assert batch.eds[padding].min() == 255
    assert (batch.label[:, 0] == -1).all()
    assert not batch.instance[:, 0].any()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_photo_is_one_line_that_names_it(cache: Path, workers: int) -> None:
    reader = ShardReader(cache)
    shard = sorted(cache.glob("*.tar"))[0]
    entry = json.loads(shard.with_suffix(".json").read_text())["samples"][0]
    offset, size = entry["members"][1]  # the photo, see MEMBERS
    with shard.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    position = reader.keys.index(entry["key"])
    step = next(s for s in range(12) if position == step_places(5, whole(12), 1, s)[0][1])
    config = replace(SMALL, batch=1, micro_batch=1, workers=workers)
    with pytest.raises(InputError, match="photo damaged") as caught:
        load(cache, config, range(step, step + 1))
    assert str(caught.value).startswith(f"{shard.name}: {entry['key']}.jpg: ")
    assert "\n" not in str(caught.value)


def test_a_cache_must_be_named_and_finished(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no cache is named"):
        open_caches(DataConfig())
    with pytest.raises(InputError, match="no index"):
        open_caches(DataConfig(cache=str(tmp_path)))


def test_a_cache_rendered_too_small_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    squash = {"fit": "squash", "size": 420}
    for size in (280, 420):
        check_rendered_size(DataConfig(size=size), squash, "c")
    check_rendered_size(DataConfig(size=616), {"fit": "native", "size": None}, "c")
    check_rendered_size(DataConfig(size=518, upscale=True), squash, "c")
    with pytest.raises(InputError, match=r"rendered at 420 px, trained at 518 px .*--size 518"):
        check_rendered_size(DataConfig(size=518), squash, "c")
    assert not caplog.records
    check_rendered_size(DataConfig(size=420, fit="crop"), squash, "c")
    assert "squashed already" in caplog.text
