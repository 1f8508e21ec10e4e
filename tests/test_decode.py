"""Decoding: exact against literal searches, sound on hard and on degenerate pictures."""

from __future__ import annotations

from dataclasses import replace

import elsewhere
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from panoptic_cache.evaluate.decoder.decode import DecodeConfig, PanopticMap, decode, together
from panoptic_cache.evaluate.decoder.field import Votes, nearest, read_classes, smooth
from panoptic_cache.evaluate.decoder.instances import find_basins, find_voters, merge
from panoptic_cache.evaluate.decoder.segments import Painting, number, resize_values
from panoptic_cache.evaluate.study.corruption import corrupt
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.targets import geometry
from panoptic_cache.train.encoding import (
    ClassificationCode,
    DirectCode,
    Encoding,
    PositionalCode,
    cell_centres,
    gamma,
)

DECODE = "panoptic_cache.evaluate.decoder.decode"
CODE = PositionalCode()
ISTHING = torch.tensor([True, True, False, False])
"""Two thing classes, two stuff classes."""


def heads(
    index: NDArray[np.int64], labels: list[int], encoding: Encoding = CODE
) -> tuple[Tensor, Tensor]:
    """What a perfect network says of a segment map (0 = stuff class 2, i = instance i - 1)."""
    centroid = torch.zeros(len(labels) + 1, 2)
    centroid[1:] = torch.from_numpy(geometry(index.astype(np.uint16), len(labels)).centroid)
    present = torch.arange(len(labels) + 1) > 0
    target = encoding.encode(centroid, present)
    if isinstance(encoding, ClassificationCode):
        target = torch.nn.functional.one_hot(target, encoding.cells + 1).flatten(-2) * 12.0
    label = torch.nn.functional.one_hot(torch.tensor([2, *labels]), len(ISTHING)) * 8.0
    map_ = torch.from_numpy(index)
    return target[map_].permute(2, 0, 1), label[map_].permute(2, 0, 1)


def run(
    index: NDArray[np.int64],
    labels: list[int],
    encoding: Encoding = CODE,
    noise: float = 0.0,
    config: DecodeConfig | None = None,
) -> PanopticMap:
    code, logits = heads(index, labels, encoding)
    code = code + noise * torch.randn(code.shape, generator=torch.Generator().manual_seed(0))
    return decode(
        code[None],
        logits[None],
        encoding=encoding,
        isthing=ISTHING,
        sizes=[(index.shape[0], index.shape[1])],
        config=config,
    )[0]


def assert_recovers(
    result: PanopticMap, index: NDArray[np.int64], labels: list[int], iou: float = 1.0
) -> None:
    """Every instance is found with its class, and nothing else."""
    check(result)
    things = [segment for segment in result.segments if segment.isthing]
    assert len(things) == len(labels)
    for row, label in enumerate(labels, start=1):
        mask = index == row
        best = max(
            ((result.ids == s.id) & mask).sum() / ((result.ids == s.id) | mask).sum()
            for s in things
            if s.label == label
        )
        assert best >= iou, (row, best)


def check(result: PanopticMap) -> None:
    """What holds of every map."""
    assert result.ids.dtype == np.int32
    ids, areas = np.unique(result.ids[result.ids > 0], return_counts=True)
    assert [s.id for s in result.segments] == ids.tolist()
    assert [s.area for s in result.segments] == areas.tolist()
    assert all(s.isthing == bool(ISTHING[s.label]) for s in result.segments)
    assert all(0 <= s.score <= 1 for s in result.segments)
    stuff = [s.label for s in result.segments if not s.isthing]
    assert len(stuff) == len(set(stuff))


def disc(index: NDArray[np.int64], number: int, x: float, y: float, radius: float) -> None:
    rows, columns = np.mgrid[: index.shape[0], : index.shape[1]]
    index[(rows - y) ** 2 + (columns - x) ** 2 <= radius**2] = number


# Stages.


def test_nearest_places_are_those_of_a_full_search() -> None:
    """On a grid ten times as fine, of codes near the curve and of pure noise."""
    generator = torch.Generator().manual_seed(1)
    uv = torch.rand(300, 2, generator=generator) * 2 - 1
    code = CODE.encode(uv, torch.ones(300, dtype=torch.bool)).T
    place, length, beside = (found[0] for found in nearest(code[None], 80))
    assert torch.allclose(place, (uv.T + 1) * 40 - 0.5, atol=0.02)
    assert length.min() > 0.95
    assert beside.max() < 0.01
    noise = torch.randn(16, 300, generator=generator)
    place, length, _ = (found[0] for found in nearest(noise[None], 80))
    for axis, half in enumerate(noise.chunk(2)):
        products = gamma(cell_centres(80), 4) @ half  # (80, 300)
        assert ((place[axis] - products.argmax(0)).abs() <= 0.5001).all()
        assert (length <= products.amax(0).clamp_min(0) / 4 + 1e-5).all()


def test_first_and_last_cell_are_not_neighbours() -> None:
    """In code space they are as close as any two neighbours."""
    ends = gamma(cell_centres(80)[[0, -1]], 4)
    assert float((ends[0] - ends[1]).norm()) == pytest.approx(0.715, abs=2e-3)
    index = np.zeros((160, 160), np.int64)
    index[40:120, :3], index[40:120, -3:] = 1, 2
    assert_recovers(run(index, [0, 0]), index, [0, 0])


def test_a_class_that_an_image_loses_little_without_is_not_there() -> None:
    logits = torch.zeros(1, 4, 20, 20)
    logits[:, 2] = 8
    logits[:, 0, 5:9, 5:9], logits[:, 2, 5:9, 5:9] = 8, 0  # 16 of 400 pixels, by 8
    logits[:, 1, 0, :9] = 8.2  # 9 pixels, by 0.2: 0.0045 a pixel of the image
    logits[:, 3, 19], logits[:, 2, 19] = 0.2, 0  # 20 pixels, by 0.2: 0.01
    found = read_classes(logits, ISTHING, 0.02)
    assert found.thing.unique().tolist() == [0]
    assert found.stuff.unique().tolist() == [2]
    expected = torch.zeros(20, 20, dtype=torch.bool)
    expected[5:9, 5:9] = True
    expected[19] = True  # neither is likelier there, and a tie is a thing's
    assert torch.equal(found.chance[0] >= 0.5, expected)
    some = read_classes(logits, ISTHING, 0.008)
    assert (some.thing.unique().tolist(), some.stuff.unique().tolist()) == ([0], [2, 3])
    everything = read_classes(logits, ISTHING, 0.0)
    assert everything.thing[0, 0, :9].tolist() == [1] * 9
    assert everything.stuff[0, 19].tolist() == [3] * 20


def test_smoothing_is_the_mean_along_rows_then_columns_within_a_region() -> None:
    """Of two images, whose radii may differ."""
    rng = np.random.default_rng(0)
    region = torch.from_numpy(rng.integers(0, 3, (2, 5, 6)).repeat(2, 1).repeat(2, 2))
    values = torch.from_numpy(rng.normal(size=(2, 5, 10, 12))).float()

    def literal(values: Tensor, region: Tensor, radius: int) -> Tensor:
        """Along the rows."""
        result = values.clone()
        height, width = region.shape
        for y in range(height):
            for x in range(width):
                low = high = x
                while low > max(0, x - radius) and region[y, low - 1] == region[y, x]:
                    low -= 1
                while high < min(width - 1, x + radius) and region[y, high + 1] == region[y, x]:
                    high += 1
                result[:, y, x] = values[:, y, low : high + 1].mean(1)
        return result

    for radii in ((0, 0), (1, 1), (3, 3), (0, 3), (2, 1)):
        found = smooth(values, region, torch.tensor(radii))
        for one, area, image, radius in zip(found, region, values, radii, strict=True):
            once = literal(image, area, radius)
            twice = literal(once.mT, area.T, radius).mT
            assert torch.allclose(one, twice, atol=1e-5)


def votes_at(places: list[tuple[float, float]], pixels: list[int]) -> Votes:
    """Votes of an image of 40 x 160 of which so many pixels in a row vote for each place."""
    place, length = np.zeros((2, 6400), np.float32), np.zeros(6400, np.float32)
    start = 0
    for where, count in zip(places, pixels, strict=True):
        for row in range(8):
            its = slice(row * 160 + start, row * 160 + start + count)
            place[:, its], length[its] = np.array(where)[:, None], 1
        start += count
    chance = length.clip(0.01, 0.99)
    label = np.zeros(6400, np.int64)
    return Votes(place, length, chance, label, label + 2, radius=0, shape=(40, 160), cells=80)


def instances_of(votes: Votes, config: DecodeConfig | None = None) -> int:
    config = config or DecodeConfig()
    voters = find_voters(votes, config.trust)
    basins = find_basins(voters, votes, config.blur)
    owner = merge(basins, voters, votes, config.bias)
    assert len(owner) == (votes.length > 0).sum()
    return len(np.unique(owner))


def two_crowds(apart: float) -> Votes:
    """Votes that scatter about two places, so many cells apart, of the left and the right half."""
    places = [(10 + apart * (-0.5, 0.5)[x >= 20] + (x * 7 % 5 - 2) / 10, 4.5) for x in range(40)]
    return votes_at(places, [1] * 40)


def test_parts_of_one_class_are_rather_one_instance_than_those_of_two() -> None:
    votes = two_crowds(4)
    right = (np.arange(6400) % 160 >= 20).astype(np.int64)
    assert instances_of(votes) == 1
    assert instances_of(replace(votes, thing=right)) == 2


def test_votes_of_two_places_are_two_instances_and_a_sweep_is_one() -> None:
    assert instances_of(votes_at([(10, 5)], [40])) == 1
    assert instances_of(votes_at([(10, 5), (30, 5)], [40, 40])) == 2
    # Each pixel votes for its own middle and a third of the way to itself: from 7 to 13.
    sweep = [(10 + (x - 20) / 2 / 3, 3.5) for x in range(40)]
    assert instances_of(votes_at(sweep, [1] * 40)) == 1
    assert instances_of(votes_at([], [])) == 0


def test_the_bias_makes_fewer_instances_or_more() -> None:
    votes = two_crowds(6)
    assert instances_of(votes) == 2
    assert instances_of(votes, DecodeConfig(bias=20)) == 1
    sweep = votes_at([(10 + (x - 20) / 6, 3.5) for x in range(40)], [1] * 40)
    assert instances_of(sweep, DecodeConfig(bias=-20)) > 1


@pytest.mark.parametrize("source", [(7, 9), (1, 4), (30, 1), (20, 20)])
@pytest.mark.parametrize("target", [(31, 40), (60, 60), (35, 45)])
@pytest.mark.parametrize("kinds", [2, 5, 50])
@pytest.mark.parametrize("strip", [1, 1 << 20])
def test_enlarging_takes_the_largest_bilinear_weight(
    source: tuple[int, int],
    target: tuple[int, int],
    kinds: int,
    strip: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("panoptic_cache.evaluate.decoder.segments.STRIP", strip)
    values = np.random.default_rng(1).integers(0, kinds, source, dtype=np.int32)
    masks = torch.nn.functional.one_hot(torch.from_numpy(values).long(), kinds).permute(2, 0, 1)
    weights = torch.nn.functional.interpolate(
        masks[None].double(), size=target, mode="bilinear", align_corners=False
    )[0]
    found = resize_values(values, target)
    chosen = weights.gather(0, torch.from_numpy(found).long()[None])[0]
    assert torch.allclose(chosen, weights.max(0).values, rtol=0, atol=1e-6)


def test_shrinking_takes_the_nearest_pixel() -> None:
    values = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert np.array_equal(resize_values(values, (3, 4)), values)
    assert resize_values(values, (1, 2)).tolist() == [[5, 7]]


def test_native_areas_do_not_depend_on_the_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = np.array([0, 3, 4, 5, 6, 7, 8])  # void, two kinds of stuff, four instances
    values = np.random.default_rng(0).choice(shown, (20, 30)).astype(np.int32)
    painting = Painting(values, np.array([0, 1, 2, 3, 0, 1, 0, 1]), np.ones(8), 4)
    whole = number(painting, resize_values(values, (61, 77)), min_stuff_area=400)
    check(whole)
    monkeypatch.setattr("panoptic_cache.evaluate.decoder.segments.STRIP", 100)
    strips = number(painting, resize_values(values, (61, 77)), min_stuff_area=400)
    assert np.array_equal(whole.ids, strips.ids)
    assert whole.segments == strips.segments


def test_instances_are_found_exactly() -> None:
    index = np.zeros((60, 80), np.int64)
    disc(index, 1, 20, 20, 12)
    disc(index, 2, 55, 30, 15)
    disc(index, 3, 58, 34, 5)
    result = run(index, [0, 0, 1])
    assert_recovers(result, index, [0, 0, 1])
    assert [s.label for s in result.segments if not s.isthing] == [2]


def test_two_instances_with_nearly_one_centroid() -> None:
    index = np.zeros((120, 120), np.int64)
    disc(index, 1, 60, 60, 40)
    disc(index, 2, 61.6, 60, 12)  # about one cell beside
    assert_recovers(run(index, [0, 0]), index, [0, 0], iou=0.98)


def test_an_instance_in_pieces_stays_one() -> None:
    index = np.zeros((60, 90), np.int64)
    disc(index, 1, 15, 30, 10)
    disc(index, 1, 75, 30, 10)
    index[:, 30:38] = 2
    assert_recovers(run(index, [0, 0]), index, [0, 0])


def test_rings_and_centroids_outside_their_instance() -> None:
    index = np.zeros((120, 120), np.int64)
    disc(index, 1, 50, 50, 40)
    disc(index, 2, 50, 50, 25)  # leaves a ring, whose centroid it nearly shares
    index[50:, 50:] = 0
    index[5:10, 90:115] = index[5:60, 110:115] = 3  # an L
    assert_recovers(run(index, [0, 1, 0]), index, [0, 1, 0])


@pytest.mark.slow
def test_more_than_a_hundred_instances() -> None:
    index = np.zeros((240, 240), np.int64)
    for cell in range(144):
        y, x = divmod(cell, 12)
        index[20 * y + 3 : 20 * y + 17, 20 * x + 3 : 20 * x + 17] = cell + 1
    assert_recovers(run(index, [0] * 144), index, [0] * 144)


@pytest.mark.parametrize("cells", [1.5, 3, 5])
def test_a_drifting_code_stays_one_instance(cells: float) -> None:
    """Two touching discs whose centroids move by so many of 80 cells from end to end."""
    index = np.zeros((160, 240), np.int64)
    code, logits = heads(index, [])
    columns = torch.arange(240.0).expand(160, 240)
    for row, (x, y, radius) in enumerate([(80, 80, 60), (181, 90, 41)], start=1):
        disc(index, row, x, y, radius)
        mask = torch.from_numpy(index == row)
        along = (columns[mask] - x) / radius * cells / 80
        uv = torch.stack([x / 120 - 1 + along, y / 80 - 1 - along / 2], dim=1)
        code[:, mask] = CODE.encode(uv, torch.ones(len(uv), dtype=torch.bool)).T
        logits[:, mask] = torch.tensor([8.0, 0.0, 0.0, 0.0])[:, None]
    result = decode(code[None], logits[None], encoding=CODE, isthing=ISTHING, sizes=[(160, 240)])[0]
    assert_recovers(result, index, [0, 0], iou=0.98)


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.4])
def test_noise_neither_splits_nor_merges(noise: float) -> None:
    index = np.zeros((160, 160), np.int64)
    disc(index, 1, 50, 60, 35)
    disc(index, 2, 110, 60, 30)
    disc(index, 3, 100, 130, 20)
    assert_recovers(run(index, [0, 0, 0], noise=noise), index, [0, 0, 0], iou=0.95)


def test_a_wrong_semantic_blob_does_not_split_an_instance() -> None:
    index = np.zeros((100, 100), np.int64)
    disc(index, 1, 50, 50, 40)
    code, logits = heads(index, [0])
    logits[:, 40:55, 40:55] = torch.tensor([0.0, 8.0, 0.0, 0.0])[:, None, None]
    logits[:, 60:70, 40:55] = torch.tensor([0.0, 0.0, 0.0, 8.0])[:, None, None]
    result = decode(code[None], logits[None], encoding=CODE, isthing=ISTHING, sizes=[(100, 100)])[0]
    assert_recovers(result, index, [0])
    assert result.segments[-1].score < 1


@pytest.mark.parametrize("encoding", [CODE, PositionalCode(5), DirectCode(), ClassificationCode()])
def test_every_encoding_decodes(encoding: Encoding) -> None:
    index = np.zeros((80, 80), np.int64)
    disc(index, 1, 20, 40, 15)
    disc(index, 2, 58, 40, 18)
    assert_recovers(run(index, [0, 1], encoding), index, [0, 1])
    code, _ = heads(index, [0, 1], encoding)
    _, length, _ = nearest(encoding.to_positional(code.flatten(1))[None], 80)
    inside = torch.from_numpy(index > 0).flatten()
    assert length[0, inside].min() > 0.9
    assert length[0, ~inside].max() < 0.1


def test_nothing_but_stuff() -> None:
    result = run(np.zeros((40, 50), np.int64), [])
    check(result)
    assert [(s.label, s.area) for s in result.segments] == [(2, 2000)]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3)])
def test_tiny_pictures(size: tuple[int, int]) -> None:
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        result = decode(
            torch.randn(2, 16, *size, generator=generator) * 2,
            torch.randn(2, 4, *size, generator=generator),
            encoding=CODE,
            isthing=ISTHING,
            sizes=[(1, 1), (11, 9)],
        )
        assert [r.ids.shape for r in result] == [(1, 1), (11, 9)]
        for one in result:
            check(one)
    single = run(
        np.ones(size, np.int64),
        [1],
    )
    assert_recovers(single, np.ones(size, np.int64), [1])


def test_an_untrained_network_decodes_in_bounded_time() -> None:
    generator = torch.Generator().manual_seed(0)
    code = torch.randn(1, 16, 120, 120, generator=generator) * 1.5
    logits = torch.randn(1, 4, 120, 120, generator=generator)
    check(decode(code, logits, encoding=CODE, isthing=ISTHING, sizes=[(120, 120)])[0])


def test_native_size_is_what_was_asked_for() -> None:
    index = np.zeros((64, 64), np.int64)
    disc(index, 1, 30, 30, 16)
    code, logits = heads(index, [0])
    sizes = [(96, 128), (40, 30), (64, 64)]
    results = decode(
        code.expand(3, -1, -1, -1),
        logits.expand(3, -1, -1, -1),
        encoding=CODE,
        isthing=ISTHING,
        sizes=sizes,
    )
    for result, (height, width) in zip(results, sizes, strict=True):
        check(result)
        assert result.ids.shape == (height, width)
        (thing,) = [s for s in result.segments if s.isthing]
        share = (index == 1).mean() * height * width
        assert thing.area == pytest.approx(share, rel=0.03)


@pytest.mark.parametrize("noise", [0.0, 1.5])
def test_a_picture_of_48_megapixels(noise: float) -> None:
    """By strips: a few bytes a pixel, whatever the prediction."""
    index = np.zeros((60, 80), np.int64)
    disc(index, 1, 30, 30, 16)
    code, logits = heads(index, [0])
    generator = torch.Generator().manual_seed(0)
    code = code + noise * torch.randn(code.shape, generator=generator)
    logits = logits + 4 * noise * torch.randn(logits.shape, generator=generator)
    size = (6000, 8000)
    result = decode(code[None], logits[None], encoding=CODE, isthing=ISTHING, sizes=[size])[0]
    assert result.ids.shape == size
    assert sum(s.area for s in result.segments) + (result.ids == 0).sum() == result.ids.size
    if not noise:
        (thing,) = [s for s in result.segments if s.isthing]
        assert thing.area == pytest.approx((index == 1).mean() * result.ids.size, rel=0.02)


def assert_same(one: PanopticMap, other: PanopticMap) -> None:
    """But for the rounding of scores."""
    assert np.array_equal(one.ids, other.ids)
    first, second = ([replace(s, score=0.0) for s in map_.segments] for map_ in (one, other))
    assert first == second
    scores = [[segment.score for segment in map_.segments] for map_ in (one, other)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def scenes() -> list[tuple[Tensor, Tensor]]:
    """Heads that take every way through the decoder: clean, noisy, faint, nothing, two sizes."""
    found = []
    generator = torch.Generator().manual_seed(5)
    for noise, faint, (height, width) in [
        (0.0, 1.0, (90, 120)),
        (0.2, 1.0, (90, 120)),
        (0.1, 1.0, (60, 70)),
        (0.35, 1.0, (90, 120)),
        (0.0, 0.45, (90, 120)),
        (0.09, 1.0, (90, 120)),
    ]:
        index = np.zeros((height, width), np.int64)
        disc(index, 1, 25, 30, 18)
        disc(index, 2, 50, 32, 14)
        disc(index, 3, 95, 60, 12)
        code, logits = heads(index, [0, 1, 1][: int(index.max())])
        code[:, torch.from_numpy(index == 1)] *= faint
        found.append((code + noise * torch.randn(code.shape, generator=generator), logits))
    found.insert(2, heads(np.zeros((90, 120), np.int64), []))
    return found


def decode_scenes(
    pairs: list[tuple[Tensor, Tensor]],
) -> list[PanopticMap]:
    return decode(
        [code for code, _ in pairs],
        [logits for _, logits in pairs],
        encoding=CODE,
        isthing=ISTHING,
        sizes=[(200 + number, 300) for number in range(len(pairs))],
    )


def test_a_batch_decodes_as_its_images_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = scenes()
    alone = decode_scenes(pairs)
    monkeypatch.setattr(
        f"{DECODE}.together",
        lambda sizes, **_: together(sizes, on_gpu=True),
    )
    found = decode_scenes(pairs)
    for one, other in zip(found, alone, strict=True):
        check(one)
        assert_same(one, other)
    assert [sum(s.isthing for s in one.segments) for one in found] == [3, 3, 0, 2, 3, 3, 3]


def test_another_device_decodes_as_the_processor_does() -> None:
    """It mixes no devices, and waits no more often for a larger batch."""
    pairs = scenes()
    here = decode_scenes(pairs)
    with elsewhere.device() as device:
        away = [(code.to(elsewhere.DEVICE), logits.to(elsewhere.DEVICE)) for code, logits in pairs]
        there = decode_scenes(away)
        device.waits = 0
        decode_scenes(away * 2)
        twice, device.waits = device.waits, 0
        decode_scenes(away * 3)
        assert device.waits == twice > 0
    for one, other in zip(here, there, strict=True):
        assert_same(one, other)


def test_what_is_decoded_together_is_of_one_size_and_not_too_much() -> None:
    sizes = [(20, 30), (30, 20), (20, 30), (1500, 1500), (20, 30), (1500, 1500), (9000, 9000)]
    assert sorted(together(sizes, on_gpu=False)) == [[image] for image in range(7)]
    assert sorted(together(sizes, on_gpu=True)) == [[0, 2, 4], [1], [3], [5], [6]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_gpu_decodes_as_the_processor_does(noise: float) -> None:
    index = np.zeros((120, 160), np.int64)
    disc(index, 1, 50, 60, 35)
    disc(index, 2, 110, 60, 30)
    code, logits = heads(index, [0, 1])
    code = code + noise * torch.randn(code.shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        decode(
            code.expand(3, -1, -1, -1).to(device),
            logits.expand(3, -1, -1, -1).to(device),
            encoding=CODE,
            isthing=ISTHING,
            sizes=[(240, 320)] * 3,
        )
        for device in ("cpu", "cuda")
    )
    for one, other in zip(ours, theirs, strict=True):
        assert (one.ids == other.ids).mean() > 0.999
        assert len(one.segments) == len(other.segments)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("encoding", [CODE, DirectCode(), ClassificationCode()])
@pytest.mark.parametrize("head", [0, 1])
def test_what_is_not_finite_is_an_error(bad: float, encoding: Encoding, head: int) -> None:
    index = np.zeros((20, 20), np.int64)
    both = heads(index + 1, [0], encoding)
    if bad < 0 and head == 0 and isinstance(encoding, ClassificationCode):
        pytest.skip("this logit is a class of probability 0, and means no harm")
    both[head][1, 7, 9] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        decode(both[0][None], both[1][None], encoding=encoding, isthing=ISTHING, sizes=[(20, 20)])


@pytest.mark.parametrize("on_gpu", [False, True])
def test_an_error_says_which_image_is_not_finite(
    on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        f"{DECODE}.together",
        lambda sizes, **_: together(sizes, on_gpu=on_gpu),
    )
    pairs = [scenes()[number] for number in (0, 3, 1, 2)]  # the second is of another size
    pairs[2][0][3, 4, 5] = torch.nan
    with pytest.raises(InputError, match="image 3 of 4"):
        decode_scenes(pairs)


def test_heads_may_want_gradients_or_be_of_inference() -> None:
    pairs = scenes()
    plain = decode_scenes(pairs)
    with torch.inference_mode():
        inference = [(code.clone(), logits.clone()) for code, logits in pairs]
        found = [decode_scenes(pairs), decode_scenes(inference)]
    found.append(decode_scenes(inference))
    for code, logits in pairs:
        code.requires_grad_()
        logits.requires_grad_()
    found.append(decode_scenes(pairs))
    for maps in found:
        for one, other in zip(plain, maps, strict=True):
            assert_same(one, other)


def test_a_crowd_without_codes_stays_empty() -> None:
    index = np.zeros((210, 210), np.int64)
    index[:, :40] = 1
    code, logits = heads(index, [0])
    logits[0] = 8.0
    for level in (0, 1, 2, 3):
        noisy = corrupt(code, level, torch.Generator().manual_seed(0))
        (found,) = decode(
            noisy[None], logits[None], encoding=CODE, isthing=ISTHING, sizes=[(210, 210)]
        )
        assert sum(segment.isthing for segment in found.segments) == 1


def test_short_codes_are_instances_where_all_are_short() -> None:
    """As those of a network that is unsure of its centroids."""
    index = np.zeros((100, 100), np.int64)
    disc(index, 1, 30, 30, 12)
    disc(index, 2, 75, 70, 12)
    code, logits = heads(index, [0, 1])
    (found,) = decode(
        0.3 * code[None], logits[None], encoding=CODE, isthing=ISTHING, sizes=[(100, 100)]
    )
    assert_recovers(found, index, [0, 1])


def test_a_score_tells_length_and_chance() -> None:
    index = np.zeros((60, 80), np.int64)
    disc(index, 1, 20, 20, 12)
    disc(index, 2, 55, 30, 15)
    code, logits = heads(index, [0, 1])
    code[:, torch.from_numpy(index == 2)] *= 0.8
    logits[:, torch.from_numpy(index == 1)] /= 4  # 2 for its category, 0 for three others
    (found,) = decode(code[None], logits[None], encoding=CODE, isthing=ISTHING, sizes=[(60, 80)])
    assert_recovers(found, index, [0, 1])
    first, second, stuff = (
        next(s.score for s in found.segments if s.label == label) for label in (0, 1, 2)
    )
    assert stuff == 1
    assert first == pytest.approx(np.exp(2) / (np.exp(2) + 1), abs=0.03)
    assert second == pytest.approx(0.8, abs=0.06)
    everything = DecodeConfig(least_score=0.9)
    (none,) = decode(
        code[None],
        logits[None],
        encoding=CODE,
        isthing=ISTHING,
        sizes=[(60, 80)],
        config=everything,
    )
    assert not any(segment.isthing for segment in none.segments)


def test_no_image_no_map() -> None:
    assert decode_scenes([]) == []


@pytest.mark.parametrize("cells", [20, 64, 256])
def test_any_grid_finds_the_instances(cells: int) -> None:
    """Clean and noisy."""
    index = np.zeros((120, 160), np.int64)
    disc(index, 1, 50, 60, 35)
    disc(index, 2, 110, 60, 25)
    for noise in (0.0, 0.2):
        found = run(index, [0, 1], noise=noise, config=DecodeConfig(cells=cells))
        assert_recovers(found, index, [0, 1], iou=0.95)


@pytest.mark.parametrize("cells", [0, 19, 257])
def test_a_grid_has_sensible_cells(cells: int) -> None:
    with pytest.raises(InputError, match=f"{cells} cells.*give 20 to 256"):
        DecodeConfig(cells=cells)
