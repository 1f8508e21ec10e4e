"""Decoding: exact against literal searches, sound on hard and on degenerate pictures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from threading import Barrier, Event, Thread, current_thread
from time import sleep
from typing import Any

import elsewhere
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from panoptic_cache.evaluate.decoder.assign import Banks, spread
from panoptic_cache.evaluate.decoder.cells import (
    nearest_cells,
    neighbour_distance,
    off_grid,
    packed_argmax,
)
from panoptic_cache.evaluate.decoder.confidence import SAMPLES, sample
from panoptic_cache.evaluate.decoder.decode import DecodeConfig, PanopticMap, decode, together
from panoptic_cache.evaluate.decoder.instances import find_instances
from panoptic_cache.evaluate.decoder.parallel import each_image, in_parallel
from panoptic_cache.evaluate.decoder.peaks import Instances, Rules, choose, find_candidates
from panoptic_cache.evaluate.decoder.pixels import Pixels, places, to_positional
from panoptic_cache.evaluate.decoder.segments import Painting, number, resize_values
from panoptic_cache.evaluate.decoder.smoothing import Smoother
from panoptic_cache.evaluate.decoder.votes import Bins, Votes, bin_votes
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.targets import geometry
from panoptic_cache.train.encoding import (
    ClassificationCode,
    DirectCode,
    Encoding,
    PositionalCode,
    cell_centres,
    gamma,
    nearest_cell,
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


# Literal searches.


def full_search(code: Tensor, cells: int) -> Tensor:
    """(P, cells^2) squared distance to the whole code of each cell, row by row."""
    axis = gamma(cell_centres(cells), code.shape[0] // 4)
    rows, columns = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
    grid = torch.cat([axis[columns.flatten()], axis[rows.flatten()]], dim=1)
    return torch.cdist(code.T.double(), grid.double()).square()


def test_nearest_cells_are_those_of_a_full_search() -> None:
    code = torch.randn(16, 300, generator=torch.Generator().manual_seed(1))
    found = nearest_cells(code, 80)
    distance = full_search(code, 80)
    chosen = distance.gather(1, (found.row * 80 + found.column)[:, None])[:, 0]
    assert torch.allclose(chosen, distance.min(1).values, atol=1e-2)
    assert ((found.row * 80 + found.column) == distance.argmin(1)).float().mean() > 0.98
    costs = CODE.axis_costs(code, 80)
    best = costs.u.min(1).values + costs.v.min(1).values
    # |x - gamma|^2 = |x|^2 + 2L - 2 x . gamma, and an amplitude is x . gamma / L.
    ours = code.square().sum(0) + 8 - 8 * found.amplitude.sum(0)
    assert torch.allclose(ours, best, atol=1e-2)


def test_every_cell_finds_itself() -> None:
    centres = cell_centres(80)
    uv = torch.stack([centres, centres.flip(0)], dim=1)
    code = CODE.encode(uv, torch.ones(80, dtype=torch.bool)).T
    found = nearest_cells(code, 80)
    assert found.column.tolist() == list(range(80))
    assert found.row.tolist() == list(range(79, -1, -1))
    assert torch.allclose(found.amplitude, torch.ones(2, 80), atol=1e-4)
    assert off_grid(code, found).max() < 1e-4


@pytest.mark.parametrize("count", [1, 2, 80, 133, 300])
def test_packed_argmax_is_argmax(count: int) -> None:
    scores = torch.randn(count, 20_000, generator=torch.Generator().manual_seed(count))
    best, index = packed_argmax(scores)
    assert torch.allclose(best, scores.max(0).values, rtol=1e-4)
    assert (index == scores.argmax(0)).float().mean() > 0.999
    assert torch.allclose(scores.gather(0, index[None])[0], scores.max(0).values, rtol=1e-3)


def test_packed_argmax_takes_the_first_of_equals_and_shows_what_is_not_finite() -> None:
    assert packed_argmax(torch.zeros(5, 3))[1].tolist() == [0, 0, 0]
    for bad in (torch.nan, torch.inf, -torch.inf):
        scores = torch.zeros(5, 3)
        scores[2, 1] = bad
        finite = packed_argmax(scores)[0].isfinite().tolist()
        assert finite[0]
        assert finite[2]
        assert not finite[1]


def literal_peaks(votes: NDArray[np.float64]) -> set[tuple[int, int]]:
    """Cells with votes, none of whose neighbours in the picture has more, by loops."""
    cells = len(votes)
    blurred = np.zeros_like(votes)
    for row in range(cells):
        for column in range(cells):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    y, x = row + dy, column + dx
                    if 0 <= y < cells and 0 <= x < cells:
                        blurred[row, column] += votes[y, x] * 0.5 ** (abs(dy) + abs(dx))
    peaks = set()
    for row in range(cells):
        for column in range(cells):
            block = blurred[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            if votes[row, column] > 0 and blurred[row, column] == block.max():
                peaks.add((row, column))
    return peaks


def make_bins(votes: NDArray[np.float64]) -> Bins:
    row, column = np.nonzero(votes)
    centres = cell_centres(len(votes))
    uv = torch.stack([centres[column], centres[row]], dim=1)
    return Bins(
        weight=votes[row, column].astype(np.float32),
        code=CODE.encode(uv, torch.ones(len(row), dtype=torch.bool)).numpy(),
        label=np.zeros(len(row), np.int64),
        row=row,
        column=column,
        drift=0.0,
    )


@pytest.mark.parametrize("seed", range(4))
def test_candidates_are_those_of_a_literal_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    votes = np.where(rng.random((20, 20)) < 0.2, rng.integers(1, 50, (20, 20)), 0).astype(float)
    bins = make_bins(votes)
    peaks = find_candidates(bins, 20, radius=1)
    found = {(int(bins.row[i]), int(bins.column[i])) for i in peaks}
    assert found == literal_peaks(votes)
    assert len(find_candidates(bins, 20, radius=0)) == (votes > 0).sum()


def test_the_ends_of_the_grid_are_not_neighbours() -> None:
    """In code space the first and the last cell are as close as any two neighbours."""
    votes = np.zeros((80, 80))
    votes[40, 0], votes[40, 79] = 100, 60
    assert len(find_candidates(make_bins(votes), 80, radius=1)) == 2
    ends = gamma(cell_centres(80)[[0, -1]], 4)
    assert float((ends[0] - ends[1]).norm()) == pytest.approx(0.715, abs=2e-3)
    assert neighbour_distance(4, 80) == pytest.approx(0.715**2, abs=2e-3)


def test_choice_is_that_of_a_literal_loop() -> None:
    generator = torch.Generator().manual_seed(3)
    uv = torch.rand(30, 2, generator=generator) * 2 - 1
    code = CODE.encode(uv, torch.ones(30, dtype=torch.bool))
    bins = Bins(
        # No two the same: which of two equal candidates is first, rounding decides.
        weight=(torch.rand(30, generator=generator) * 40).numpy(),
        code=code.numpy(),
        label=torch.randint(0, 2, (30,), generator=generator).numpy(),
        row=nearest_cell(uv[:, 1], 80).numpy(),
        column=nearest_cell(uv[:, 0], 80).numpy(),
        drift=0.0,
    )
    rules = Rules(cap=4.0, label_cost=0.1, gap=1.0, saved=30.0)
    chosen = choose(bins, Instances(bins.code, bins.label), rules)

    def cost(vote: int, k: int) -> float:
        far = float((code[vote] - code[k]).square().sum())
        return min(far + 0.1 * bool(bins.label[vote] != bins.label[k]), 4.0)

    costs = [[cost(vote, k) for k in range(30)] for vote in range(30)]
    taken: list[int] = []
    while True:
        best, worth = -1, 0.0
        for candidate in range(30):
            total = helped = 0.0
            for vote, row in enumerate(costs):
                relief = min([row[k] for k in taken], default=4.0) - row[candidate]
                if relief > 1e-4:
                    total += float(bins.weight[vote]) * relief
                    helped += float(bins.weight[vote])
            if helped and total >= helped and total >= 30 and total > worth:
                best, worth = candidate, total
        if best < 0:
            break
        taken.append(best)
    assert np.array_equal(chosen.prototypes, bins.code[taken])


def test_a_vote_between_two_instances_speaks_against_neither() -> None:
    """Which of them is nearer to it, rounding decides, and that differs between machines."""
    codes = np.array([[1, 0, 0, 0], [-1, 0, 0, 0], [-1e-6, 1, 0, 0]], np.float32)
    at = np.zeros(3, np.int64)
    weight = np.array([20, 10, 1000], np.float32)
    bins = Bins(weight, codes, label=at, row=at, column=at, drift=0.0)
    rules = Rules(cap=10.0, label_cost=0.0, gap=1.0, saved=30.0)
    assert len(choose(bins, Instances(codes[:2], at[:2]), rules).labels) == 2


def test_votes_add_up() -> None:
    generator = torch.Generator().manual_seed(2)
    code = torch.randn(16, 500, generator=generator)
    labels, image = torch.randint(0, 3, (2, 500), generator=generator)
    rows, columns = torch.randint(0, 4, (2, 500), generator=generator)
    batch = bin_votes(Votes(code, labels, rows, columns, image), 4, 80)
    assert [int(bins.weight.sum()) for bins in batch] == torch.bincount(image, minlength=4).tolist()
    for which, bins in enumerate(batch):
        assert (np.diff(bins.weight) <= 0).all()
        for i in range(len(bins.weight)):
            mask = (image == which) & (labels == int(bins.label[i]))
            mask &= (rows == int(bins.row[i])) & (columns == int(bins.column[i]))
            assert mask.sum() == bins.weight[i]
            assert np.allclose(bins.code[i], code[:, mask].mean(1), atol=1e-5)


def test_smoothing_is_the_mean_along_rows_then_columns_within_a_label() -> None:
    """Of two images, whose radii may differ."""
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 3, (2, 5, 6)).repeat(2, 1).repeat(2, 2))
    member = labels > 0
    values = torch.from_numpy(rng.normal(size=(2, 2, 10, 12))).float()

    def literal(values: Tensor, labels: Tensor, radius: int) -> Tensor:
        """Along the rows."""
        result = values.clone()
        height, width = labels.shape
        for y in range(height):
            for x in range(width):
                low = high = x
                while low > max(0, x - radius) and labels[y, low - 1] == labels[y, x]:
                    low -= 1
                while high < min(width - 1, x + radius) and labels[y, high + 1] == labels[y, x]:
                    high += 1
                result[:, y, x] = values[:, y, low : high + 1].mean(1)
        return result

    # Semantic labels of which the first is stuff, and codes that lie in no other pixels.
    logits = torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2).float()
    codes = torch.zeros(2, 16, 10, 12)
    codes[:, :2] = values
    pixels = Pixels.of(
        list(codes), list(logits), encoding=CODE, isthing=torch.tensor([False, True, True])
    )
    smoother, products = Smoother.of(pixels), torch.from_numpy(rng.normal(size=(2, 3, 16))).float()
    y, x = torch.arange(10)[:, None], torch.arange(12)
    for step in ((1, 1), (1, 3), (2, 4)):
        wanted = member & (y % step[0] == 0) & (x % step[1] == 0)
        for radii in ((0, 0), (1, 1), (3, 3), (0, 3), (2, 1)):
            expected = []
            for image, label, radius in zip(codes, labels, radii, strict=True):
                once = literal(image, label, radius)
                twice = literal(once.transpose(1, 2), label.T, radius).transpose(1, 2)
                expected.append(twice.flatten(1))
            found = smoother.means(radii, step=step)
            assert sorted(found.pixels.tolist()) == places(wanted).tolist()
            assert [found.pixels[span].min() // 120 for span in found.spans] == [0, 1]
            assert [found.pixels[span].max() // 120 for span in found.spans] == [0, 1]
            means = torch.cat(expected, dim=1)[:, found.pixels]
            assert torch.allclose(found.values, means, atol=1e-5)
            multiplied = smoother.means(radii, along=products, step=step)
            assert torch.equal(multiplied.pixels, found.pixels)
            for product, span in zip(products, found.spans, strict=True):
                expected_products = product @ means[:, span]
                assert torch.allclose(multiplied.values[:, span], expected_products, atol=1e-4)


@pytest.mark.parametrize(("large", "limit"), [(1 << 20, 1e-2), (700 * 700 - 1, 1e-6)])
def test_means_are_exact_on_large_images_and_in_batches(
    large: int, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single precision holds a million codes of one sign, and images do not add up."""
    monkeypatch.setattr("panoptic_cache.evaluate.decoder.smoothing.LARGE", large)
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(2, 16, 700, 700, generator=generator)
    logits = torch.zeros(2, 2, 700, 700)
    isthing = torch.tensor([True, False])

    def means(images: list[int]) -> Tensor:
        some = [codes[image] for image in images]
        pixels = Pixels.of(some, list(logits[images]), encoding=CODE, isthing=isthing)
        products = torch.ones(len(images), 1, 16) / 16
        return Smoother.of(pixels).means([1] * len(images), along=products).values[0]

    both = means([0, 1])
    for image in (0, 1):
        alone = means([image])
        assert torch.equal(both.view(2, -1)[image], alone)
        exact = torch.nn.functional.avg_pool2d(codes[image].double().mean(0)[None], 3, 1)[0]
        found = alone.view(700, 700).T[1:-1, 1:-1]  # they come column by column
        assert (found - exact).abs().max() < limit


def test_smoothing_grows_with_the_noise() -> None:
    config = DecodeConfig(clean=0.01, smooth_votes=20, max_smooth=5)
    radii = [config.smoothing_radius(noise) for noise in (0, 0.01, 0.011, 0.05, 0.16, 0.5)]
    assert radii == [0, 0, 1, 1, 3, 5]
    assert DecodeConfig(max_smooth=0).smoothing_radius(0.2) == 0


@pytest.mark.parametrize("width", [1, 2, 7, 8])
def test_pixels_between_columns_take_a_neighbour_of_their_label(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    labels = torch.randint(0, 3, (2, 6, width), generator=generator)
    logits = torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2).float()
    pixels = Pixels.of(
        list(torch.zeros(2, 16, 6, width)),
        list(logits),
        encoding=CODE,
        isthing=torch.tensor([False, True, True]),
    )
    before = torch.randint(0, 50, labels.shape, generator=generator).int()
    member = before.clone()
    lonely: list[int] = []
    found = spread(member.view(-1), pixels).tolist()
    for image, y, x in np.ndindex(*labels.shape):
        label, beside = labels[image, y, x], [x - 1, x + 1]
        same = [n for n in beside if 0 <= n < width and labels[image, y, n] == label]
        if x % 2 == 0 or label == 0:
            assert member[image, y, x] == before[image, y, x]
        elif same:
            assert member[image, y, x] == before[image, y, same[0]]
        else:
            lonely.append((image * 6 + y) * width + x)
    assert found == lonely


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
    painting = Painting(values, np.array([0, 1, 2, 3, 0, 1, 0, 1]), 4)
    whole = number(painting, resize_values(values, (61, 77)), np.ones(8), min_stuff_area=400)
    check(whole)
    monkeypatch.setattr("panoptic_cache.evaluate.decoder.segments.STRIP", 100)
    strips = number(painting, resize_values(values, (61, 77)), np.ones(8), min_stuff_area=400)
    assert np.array_equal(whole.ids, strips.ids)
    assert whole.segments == strips.segments


# Pictures.


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


def test_drift_is_the_scatter_within_cells() -> None:
    uv = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.3
    everywhere = torch.ones(len(uv), dtype=torch.bool)
    columns, rows = nearest_cell(uv, 80).T
    nought = torch.zeros(len(uv), dtype=torch.int64)
    swept = CODE.encode(uv, everywhere).T
    still = CODE.encode(cell_centres(80)[nearest_cell(uv, 80)] + 0.004, everywhere).T
    faint = still * torch.linspace(0.6, 1, len(uv))  # mixed with void

    def drift(code: Tensor) -> float:
        return bin_votes(Votes(code, nought, rows, columns, nought), 1, 80)[0].drift

    assert drift(swept) == pytest.approx(1 / 6, rel=0.05)
    assert drift(still) < 1e-6
    assert drift(faint) < 1e-2
    both = Votes(
        torch.cat([still, swept], dim=1),
        torch.cat([nought, nought]),
        torch.cat([rows, rows]),
        torch.cat([columns, columns]),
        torch.cat([nought, nought + 2]),
    )
    one, none, other = (bins.drift for bins in bin_votes(both, 3, 80))
    assert one < 1e-6
    assert none == 0
    assert other == pytest.approx(1 / 6, rel=0.05)


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


def test_a_faint_object_is_rescued_but_no_crowd() -> None:
    index = np.zeros((100, 100), np.int64)
    disc(index, 1, 30, 30, 12)
    disc(index, 2, 75, 70, 12)
    code, logits = heads(index, [0, 0])
    code[:, torch.from_numpy(index == 1)] *= 0.45
    code[:, torch.from_numpy(index == 2)] = 0.0
    code[:, :, 60:] = torch.where(torch.from_numpy(index == 2)[:, 60:], 0.0, code[:, :, 60:])
    config = DecodeConfig(trust=0.0)
    result = decode(
        code[None],
        logits[None],
        encoding=CODE,
        isthing=ISTHING,
        sizes=[(100, 100)],
        config=config,
    )[0]
    things = [s for s in result.segments if s.isthing]
    assert [s.area for s in things] == [(index == 1).sum()]
    assert (result.ids[index == 2] == 0).all()


@pytest.mark.parametrize("encoding", [CODE, PositionalCode(5), DirectCode(), ClassificationCode()])
def test_every_encoding_decodes(encoding: Encoding) -> None:
    index = np.zeros((80, 80), np.int64)
    disc(index, 1, 20, 40, 15)
    disc(index, 2, 58, 40, 18)
    assert_recovers(run(index, [0, 1], encoding), index, [0, 1])
    code, _ = heads(index, [0, 1], encoding)
    amplitude = nearest_cells(to_positional(code.flatten(1), encoding), 80).amplitude
    inside = torch.from_numpy(index > 0).flatten()
    assert amplitude[:, inside].min() > 0.9
    assert amplitude[:, ~inside].max() < 0.1


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
    single = run(np.ones(size, np.int64), [1], config=DecodeConfig(saved=0, min_instance_area=1))
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
    pairs: list[tuple[Tensor, Tensor]], config: DecodeConfig | None = None
) -> list[PanopticMap]:
    return decode(
        [code for code, _ in pairs],
        [logits for _, logits in pairs],
        encoding=CODE,
        isthing=ISTHING,
        sizes=[(200 + number, 300) for number in range(len(pairs))],
        config=config or DecodeConfig(trust=0.0),
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


@pytest.mark.parametrize("max_smooth", [0, 18])
def test_clean_images_and_noisy_ones_vote_apart(
    max_smooth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing is smoothed."""
    config, sizes = DecodeConfig(max_smooth=max_smooth), []

    def vote(pixels: Pixels, smoother: Smoother | None, noise: list[float], _: Any) -> Any:
        assert {config.is_clean(each) for each in noise} == {smoother is None}
        sizes.append(len(noise))
        return find_instances(pixels, smoother, noise, config)

    monkeypatch.setattr(
        f"{DECODE}.together",
        lambda sizes, **_: together(sizes, on_gpu=True),
    )
    monkeypatch.setattr("panoptic_cache.evaluate.decoder.decode.find_instances", vote)
    decode_scenes([scenes()[number] for number in (0, 1, 5)], config)
    assert sorted(sizes) == [1, 2]


def test_one_that_is_smoothed_less_decodes_alike_beside_noisier_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = []
    for seed, noise in enumerate((0.11, 0.12, 0.35)):
        rng, index = np.random.default_rng(seed), np.zeros((200, 200), np.int64)
        for instance in range(1, 13):
            x, y = rng.uniform(20, 180, 2)
            disc(index, instance, x, y, rng.uniform(8, 35))
        index = np.unique(index, return_inverse=True)[1].reshape(index.shape)
        code, logits = heads(index, [0] * int(index.max()))
        generator = torch.Generator().manual_seed(seed)
        pairs.append((code + noise * torch.randn(code.shape, generator=generator), logits))
    alone = decode_scenes(pairs)
    monkeypatch.setattr(
        f"{DECODE}.together",
        lambda sizes, **_: together(sizes, on_gpu=True),
    )
    for one, other in zip(decode_scenes(pairs), alone, strict=True):
        assert_same(one, other)


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


def test_some_images_of_a_batch_are_those_images() -> None:
    pairs = [scenes()[number] for number in (0, 1, 2, 4)]

    def pixels(numbers: list[int]) -> Pixels:
        return Pixels.of(
            [pairs[number][0] for number in numbers],
            [pairs[number][1] for number in numbers],
            encoding=CODE,
            isthing=ISTHING,
        )

    batch = pixels([0, 1, 2, 3])
    assert batch.take([0, 1, 2, 3]) is batch
    for numbers in ([0], [3, 1], [2], [1, 2, 3]):
        some, same = batch.take(numbers), pixels(numbers)
        for name in ("codes", "labels", "thing", "inside"):
            assert torch.equal(getattr(some, name), getattr(same, name)), name
        assert torch.allclose(some.strength, same.strength)
        assert (some.spans, some.shape) == (same.spans, same.shape)


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


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_an_error_says_which_image_is_not_finite(
    on_gpu: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        f"{DECODE}.together",
        lambda sizes, **_: together(sizes, on_gpu=on_gpu),
    )
    pairs = [scenes()[number] for number in (0, 3, 1, 2)]  # the second is of another size
    pairs[2][0][3, 4, 5] = torch.nan
    with threads_of_torch(threads), pytest.raises(InputError, match="image 3 of 4"):
        decode_scenes(pairs)


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        after = torch.get_num_threads()
        torch.set_num_threads(before)
        assert after == count


@pytest.mark.parametrize("images", [1, 7])
def test_threads_change_nothing(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "panoptic_cache.evaluate.decoder.cells.CHUNK", 1000
    )  # an image has a part for each of them
    pairs, found = scenes()[-images:], []
    for threads in (1, 4):
        with threads_of_torch(threads):
            found.append(decode_scenes(pairs))
    for one, other in zip(*found, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("own", [1, 3])
def test_callers_keep_the_number_of_threads_that_they_have_set(own: int) -> None:
    pairs = scenes()

    def call(_: int) -> tuple[list[PanopticMap], int]:
        return decode_scenes(pairs), torch.get_num_threads()

    with threads_of_torch(2):
        alone = decode_scenes(pairs)
        with ThreadPoolExecutor(3, "caller", torch.set_num_threads, (own,)) as pool:
            for maps, after in pool.map(call, range(6)):
                assert after == own
                for one, other in zip(alone, maps, strict=True):
                    assert_same(one, other)


def test_each_thread_has_pytorch_for_itself_and_later_ones_do_not() -> None:
    with threads_of_torch(3):
        assert each_image(lambda _: torch.get_num_threads(), range(9)) == [1] * 9
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3


def test_a_thread_that_outlives_the_main_one_decodes() -> None:
    script = """
import threading, time, torch
from panoptic_cache.evaluate.decoder.decode import decode
from panoptic_cache.train.encoding import PositionalCode

def late(images):
    time.sleep(1)  # by now the interpreter waits for this thread alone
    sizes = [(20, 20)] * images
    code, logits = torch.zeros(images, 16, 20, 20), torch.zeros(images, 2, 20, 20)
    isthing = torch.tensor([False, True])
    maps = decode(code, logits, encoding=PositionalCode(), isthing=isthing, sizes=sizes)
    print(f"{len(maps)} {maps[0].ids.shape}\\n", end="")

torch.set_num_threads(2)
for images in (1, 3):
    threading.Thread(target=late, args=(images,)).start()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=99
    )
    assert sorted(done.stdout.split("\n")) == ["", "1 (20, 20)", "3 (20, 20)"], done.stderr


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


def test_idle_threads_help_and_every_part_is_done_once() -> None:
    done: list[int] = []
    names: set[str] = set()
    both = Barrier(2)

    def begin() -> Callable[[int], None]:
        first = True

        def work(part: int) -> None:
            nonlocal first
            if first:
                both.wait(timeout=30)  # until two threads have one
                first = False
            names.add(current_thread().name)
            done.append(part)

        return work

    with threads_of_torch(2):
        each_image(lambda _: in_parallel(begin, range(100)), [0])
    assert sorted(done) == list(range(100))
    assert len(names) == 2


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_a_part_is_that_of_its_image(threads: int) -> None:
    def decode_one(image: int) -> None:
        def begin() -> Callable[[int], None]:
            def work(part: int) -> None:
                if part == 17 and image in (2, 4):
                    raise ValueError(f"image {image}")

            return work

        in_parallel(begin, range(20))

    with threads_of_torch(threads), pytest.raises(ValueError, match="image 2"):
        each_image(decode_one, range(6))


def test_nothing_goes_on_after_an_error() -> None:
    """A helper that is still at work would write into what its caller has given up."""
    both_there, finished, callers = Barrier(2), Event(), list[Thread]()

    def begin() -> Callable[[str], None]:
        mine = current_thread() in callers

        def work(part: str) -> None:
            both_there.wait(timeout=30)
            if mine:
                raise ValueError("the caller's")
            sleep(0.2)
            finished.set()

        return work

    def decode_one(_: int) -> None:
        callers.append(current_thread())
        with pytest.raises(ValueError, match="the caller's"):
            in_parallel(begin, ["one", "other"])
        assert finished.is_set()

    with threads_of_torch(2):
        each_image(decode_one, [0])


def test_no_pixel_is_copied_before_the_claims_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads claim pixels inside and outside of thing classes; `spread` rewrites columns."""
    outside = Event()
    claim = Banks.claim

    def slow(banks: Banks, *arguments: Any, labels: Tensor | None = None, **options: Any) -> None:
        if labels is None:
            sleep(0.1)
        claim(banks, *arguments, labels=labels, **options)
        if labels is None:
            outside.set()

    def late(member: Tensor, pixels: Pixels) -> Tensor:
        assert outside.is_set()
        outside.clear()
        return spread(member, pixels)

    monkeypatch.setattr(Banks, "claim", slow)
    monkeypatch.setattr("panoptic_cache.evaluate.decoder.assign.spread", late)
    with threads_of_torch(2):
        decode_scenes(scenes()[4:5])
    assert not outside.is_set()


# Confidence.


def test_confidence_is_probability_times_length() -> None:
    index = np.zeros((60, 80), np.int64)
    disc(index, 1, 20, 20, 12)
    disc(index, 2, 55, 30, 15)
    code, logits = heads(index, [0, 1])
    code[:, torch.from_numpy(index == 2)] *= 0.8
    logits[:, torch.from_numpy(index == 1)] /= 4  # 2 for its category, 0 for three others
    result = decode(code[None], logits[None], encoding=CODE, isthing=ISTHING, sizes=[(60, 80)])[0]
    assert_recovers(result, index, [0, 1])
    first, second, stuff = (
        next(s.score for s in result.segments if s.label == label) for label in (0, 1, 2)
    )
    assert stuff == 1
    assert first == pytest.approx(np.exp(2) / (np.exp(2) + 3), abs=1e-4)
    assert second == pytest.approx(0.8 * np.exp(8) / (np.exp(8) + 3), abs=1e-4)


def test_samples_are_some_of_each_instance() -> None:
    values = np.random.default_rng(0).integers(0, 9, (41, 30)).repeat(3, 0).repeat(3, 1)
    places, rows = sample(Painting(values.astype(np.int32), np.arange(8), 4))
    assert (values.ravel()[places] == rows + 1).all()
    assert len(set(places.tolist())) == len(places)
    assert np.unique(rows).tolist() == [4, 5, 6, 7]
    assert all(SAMPLES <= count < 2 * SAMPLES for count in np.bincount(rows)[4:])
    for row in (4, 7):  # from top to bottom
        y = places[rows == row] // values.shape[1]
        assert y.max() - y.min() > values.shape[0] * 0.8


def test_an_instance_too_thin_to_be_sampled_is_looked_at_all_the_same() -> None:
    values = np.zeros((40, 50), np.int32)
    values[7, 3:20], values[9:30, 21], values[10, 30:40] = 5, 6, 8
    places, rows = sample(Painting(values, np.arange(9), 4))
    assert (values.ravel()[places] == rows + 1).all()
    assert np.unique(rows).tolist() == [4, 5, 7]


def test_no_image_no_map() -> None:
    assert decode_scenes([]) == []
