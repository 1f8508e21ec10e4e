"""Small and adjacent instances of a blurred prediction are found, and nothing is made up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from panoptic_cache.evaluate.decoder.cells import nearest_cells
from panoptic_cache.evaluate.decoder.decode import DecodeConfig, PanopticMap, decode
from panoptic_cache.evaluate.decoder.faint import at_home, split
from panoptic_cache.evaluate.decoder.peaks import Instances, Rules
from panoptic_cache.evaluate.decoder.rescue import lost_regions
from panoptic_cache.evaluate.decoder.votes import Bins
from panoptic_cache.evaluate.study.corruption import LOGIT, corrupt
from panoptic_cache.train.encoding import PositionalCode

CODE = PositionalCode()
ISTHING = torch.tensor([False, True])
SIZE = 210
WITHOUT = DecodeConfig(faint_gap=99.0, split_gap=99.0)


def encoded(truth: Tensor) -> Tensor:
    """(16, h, w) codes of (h, w) instance numbers, 0 = none."""
    count, height, width = int(truth.max()), *truth.shape
    centroids = torch.zeros(count + 1, 2)
    for number in range(1, count + 1):
        rows, columns = (truth == number).nonzero().float().mean(0).add(0.5).tolist()
        centroids[number] = torch.tensor([columns * 2 / width - 1, rows * 2 / height - 1])
    return CODE.encode(centroids, torch.arange(count + 1) > 0)[truth].permute(2, 0, 1)


def decoded(
    truth: Tensor, thing: Tensor, level: float = 1.0, config: DecodeConfig | None = None
) -> PanopticMap:
    """The map of codes corrupted at `level`, with logits that say where the thing class is."""
    code = corrupt(encoded(truth), level, torch.Generator().manual_seed(0))
    logits = LOGIT * torch.stack([~thing, thing]).float()
    found = decode(
        code[None],
        logits[None],
        encoding=CODE,
        isthing=ISTHING,
        sizes=[(truth.shape[0], truth.shape[1])],
        config=config,
    )
    return found[0]


def matched(found: PanopticMap, truth: Tensor) -> tuple[int, int]:
    """Instances found, and how many of them have an IoU above one half."""
    things = [s.id for s in found.segments if s.isthing]
    ids = torch.from_numpy(found.ids)
    good = 0
    for segment in things:
        mask = ids == segment
        for number in truth[mask].unique().tolist():
            other = truth == number
            iou = (mask & other).sum() / (mask | other).sum()
            good += bool(number > 0 and iou > 0.5)
    return len(things), good


def small_ones(side: int) -> Tensor:
    """Squares every 21 pixels, and one large instance that says how noisy the codes are."""
    truth = torch.zeros(SIZE, SIZE, dtype=torch.int64)
    truth[5:95, 115:205] = 1
    for number, place in enumerate(
        (y, x) for y in range(10, SIZE - 10, 21) for x in range(10, SIZE - 10, 21)
    ):
        y, x = place
        if not (y < 110 and x > 95):
            truth[y : y + side, x : x + side] = number + 2
    numbers: Tensor = truth.unique(return_inverse=True)[1]
    return numbers


@pytest.mark.parametrize("crowd", [False, True], ids=["on stuff", "in a crowd"])
def test_small_ones_are_found_after_a_blur(crowd: bool) -> None:
    truth = small_ones(4)
    thing = torch.ones_like(truth, dtype=torch.bool) if crowd else truth > 0
    wanted = int(truth.max())
    found, right = matched(decoded(truth, thing), truth)
    _, before = matched(decoded(truth, thing, config=WITHOUT), truth)
    assert right > 0.7 * wanted
    assert right > before + wanted // 4
    assert found - right < 0.2 * wanted


def test_a_crowd_without_codes_stays_empty() -> None:
    truth = torch.zeros(SIZE, SIZE, dtype=torch.int64)
    truth[:, :40] = 1
    for level in (1, 2, 3):
        found = decoded(truth, torch.ones_like(truth, dtype=torch.bool), level)
        assert sum(segment.isthing for segment in found.segments) == 1


def test_neighbouring_cells_can_be_two() -> None:
    truth = torch.zeros(SIZE, SIZE, dtype=torch.int64)
    truth[20:80, 20:80] = 1
    truth[120:160, 60:160] = 2
    truth[130:150, 103:124] = 3  # their centroids are less than two cells apart
    assert matched(decoded(truth, truth > 0), truth) == (3, 3)
    assert matched(decoded(truth, truth > 0, config=WITHOUT), truth) == (2, 2)


def test_at_home_by_a_loop() -> None:
    torch.manual_seed(0)
    height, width, cells, reach = 30, 50, 20, 4.0
    pixels = torch.randint(0, height * width, (300,))
    nearest = nearest_cells(torch.randn(16, 300), cells)
    near = at_home(pixels, nearest, (height, width), cells, reach)
    for k, pixel in enumerate(pixels.tolist()):
        y, x = divmod(pixel, width)
        row, column = int(nearest.row[k]), int(nearest.column[k])
        down = abs(y + 0.5 - (row + 0.5) * height / cells)
        across = abs(x + 0.5 - (column + 0.5) * width / cells)
        assert near[k] == (down <= reach and across <= reach)


def bins_at(columns: list[int], weights: list[float]) -> Bins:
    """Bins of clean codes in one row."""
    place = np.array(columns)
    middle = torch.from_numpy((2 * place + 1) / 80 - 1).float()
    centroids = torch.stack([middle, torch.zeros_like(middle)], 1)
    codes = CODE.encode(centroids, torch.ones(len(columns), dtype=torch.bool)).numpy()
    weight, rows = np.array(weights, np.float32), np.full_like(place, 40)
    return Bins(weight, codes, np.ones_like(place), rows, place, drift=0.0)


def test_a_split_needs_more_than_scatter() -> None:
    rules = Rules(cap=4.0, label_cost=0.1, gap=0.6, saved=5.0)
    two = bins_at([10, 12], [100.0, 40.0])
    one = Instances(two.code[:1], np.ones(1, np.int64))
    assert len(split(two, one, rules, cells=80, gap=0.5).labels) == 2
    assert len(split(bins_at([10, 12], [100.0, 1.0]), one, rules, cells=80, gap=0.5).labels) == 1
    sweep = bins_at([8, 9, 10, 11, 12], [20.0] * 5)
    one = Instances(sweep.code[2:3], np.ones(1, np.int64))
    assert len(split(sweep, one, rules, cells=80, gap=0.5).labels) == 1
    none = Instances(np.zeros((0, 16), np.float32), np.zeros(0, np.int64))
    assert len(split(two, none, rules, cells=80, gap=0.5).labels) == 0


def test_regions_of_one_faint_instance_are_instances() -> None:
    things = np.array([False, True])
    labels = np.zeros((20, 40), np.int32)
    labels[2:10, 2:10] = labels[2:10, 14:22] = 1  # both of faint instance 3
    labels[12:18, 2:20] = 1  # of two faint ones
    labels[12:18, 24:36] = 1  # of a clear one
    member = np.zeros_like(labels)
    member[2:10, 2:9] = member[2:10, 14:22] = 3
    member[12:18, 2:9], member[12:18, 9:20] = 3, 4
    member[12:18, 24:36] = 1
    lost = lost_regions(member, labels, things, least=40, clear=2)
    owner = np.full(labels.size, -1)
    owner[lost.pixels] = lost.owner
    owner = owner.reshape(labels.shape)
    assert (owner[2:10, 2:10] == 0).all()
    assert (owner[2:10, 14:22] == 1).all()
    assert (owner >= 0).sum() == 2 * 64
    assert len(lost_regions(member, labels, things, least=65, clear=2).pixels) == 0
    member[:] = 1
    assert len(lost_regions(member, labels, things, least=1, clear=2).pixels) == 0


def test_regions_join_at_corners_and_classes_do_not() -> None:
    things, labels = np.array([False, True, True]), np.zeros((9, 9), np.int32)
    labels[:3, :3] = labels[3:6, 3:6] = 1  # touch at a corner: 18 pixels
    labels[7:, :4], labels[7:, 4:8] = 1, 2  # side by side: 8 pixels each
    member = np.zeros_like(labels)
    lost = lost_regions(member, labels, things, least=18, clear=0)
    assert lost.owner.tolist() == [0] * 18
    assert set(labels.ravel()[lost.pixels]) == {1}
    for least, regions in ((8, 3), (1, 3), (0, 3), (19, 0)):
        lost = lost_regions(member, labels, things, least=least, clear=0)
        assert len(np.unique(lost.owner)) == regions
    member[labels == 2] = 1
    assert len(np.unique(lost_regions(member, labels, things, least=0, clear=1).owner)) == 2


def test_two_that_share_a_centroid_cell_in_regions_of_their_own_stay_two() -> None:
    """As two traffic lights: too close for their codes after a blur, apart on the semantic map."""
    truth = torch.zeros(SIZE, SIZE, dtype=torch.int64)
    truth[20:110, 20:110] = 1
    truth[150:160, 100:105] = 2
    truth[150:160, 107:112] = 3
    for level in (1, 2):
        assert matched(decoded(truth, truth > 0, level), truth) == (3, 3)
