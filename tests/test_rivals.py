"""The decoders that ours is compared with do what their sources say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from panoptic_cache.evaluate.study import bench
from panoptic_cache.evaluate.study.bench import OURS, bench_decode
from panoptic_cache.evaluate.study.corruption import Corruption
from panoptic_cache.evaluate.study.heads import ImageHeads
from panoptic_cache.evaluate.study.rivals import (
    Rival,
    grid_codes,
    matrix_nms,
    nearest_cell_or_void,
    nearest_code,
    rivals,
    strict_maxima,
    vote,
)
from panoptic_cache.pipeline.annotations import SegmentInfo
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.train.encoding import GRID_CELLS, PositionalCode, cell_centres, gamma

CATEGORIES = (
    Category(1, "disc", True, 0),
    Category(2, "box", True, 1),
    Category(3, "sky", False, 2),
)
RIVALS = {
    f"{name}, {setting}": rival
    for name, settings in rivals(420).items()
    for setting, rival in settings.items()
    if not setting.startswith("20 ")  # cells too wide for the small scene
}


def scene() -> ImageHeads:
    """Two things far apart and stuff, of 32 x 32; their true ids are 1, 2 and 3."""
    truth = torch.zeros(32, 32, dtype=torch.int64)
    truth[4:14, 4:14], truth[16:28, 18:30] = 1, 2
    centroids = torch.tensor([[0.0, 0.0], [-0.44, -0.44], [0.5, 0.375]])
    codes = PositionalCode().encode(centroids, torch.tensor([False, True, True]))
    labels = torch.tensor([2, 0, 1])[truth]
    logits = 10.0 * torch.nn.functional.one_hot(labels, 3).permute(2, 0, 1).float()
    segments = (SegmentInfo(1, 1, False), SegmentInfo(2, 2, False), SegmentInfo(3, 3, False))
    ids = truth.where(truth > 0, 3).numpy().astype(np.int32)
    return ImageHeads("one", codes[truth].permute(2, 0, 1), logits, ids, segments)


@pytest.mark.parametrize("rival", RIVALS.values(), ids=RIVALS)
def test_a_clear_scene_is_decoded_right(rival: Rival) -> None:
    image = scene()
    found = rival(image, CATEGORIES)
    assert [s.label for s in found.segments if s.isthing] == [0, 1]
    by_label = {s.label: s.id for s in found.segments}
    wanted = np.array([0, by_label[0], by_label[1], by_label[2]])[image.ids]
    assert np.array_equal(found.ids, wanted)


@pytest.mark.parametrize("rival", RIVALS.values(), ids=RIVALS)
@pytest.mark.parametrize("fill", [0.0, 1.0], ids=["void", "things"])
def test_one_kind_of_pixel_only(rival: Rival, fill: float) -> None:
    code = fill * PositionalCode().encode(torch.full((1, 2), 0.11), torch.tensor([True]))
    logits = torch.tensor([9.0, 0.0, 0.0] if fill else [0.0, 0.0, 9.0]).view(3, 1, 1)
    image = ImageHeads(
        "one",
        code.view(16, 1, 1).repeat(1, 12, 12),
        logits.repeat(1, 12, 12),
        np.full((12, 12), int(fill), np.int32),
        (SegmentInfo(1, 1, False),) if fill else (),
    )
    found = rival(image, CATEGORIES)
    assert [s.isthing for s in found.segments] == [bool(fill)]
    assert (found.ids > 0).all()


def test_the_full_search_is_the_search_through_all() -> None:
    torch.manual_seed(0)
    code = torch.randn(16, 5, 7)
    cells = grid_codes(4, GRID_CELLS)
    assert len(cells) == GRID_CELLS**2
    centres = cell_centres(GRID_CELLS)
    row, column = 7, 31
    wanted = torch.cat([gamma(centres[column], 4), gamma(centres[row], 4)])
    assert torch.equal(cells[row * GRID_CELLS + column], wanted)
    code[:, 0, 0] = 0.1
    candidates = torch.cat([torch.zeros(1, 16), cells])
    for found in (nearest_code(code, cells), nearest_cell_or_void(code, GRID_CELLS)):
        assert found[0, 0] == 0
        for y in range(5):
            for x in range(7):
                distances = (candidates - code[:, y, x]).square().sum(1)
                assert distances[found[y, x]] == pytest.approx(distances.min().item(), rel=1e-4)


@pytest.mark.parametrize("sharpness", [1.0, 2.0])
def test_votes_are_a_product_of_kernels(sharpness: float) -> None:
    torch.manual_seed(0)
    code = torch.randn(16, 2, 3)
    votes = vote(code, GRID_CELLS, sharpness)
    grid = gamma(cell_centres(GRID_CELLS), 4)
    for row, column in ((0, 0), (79, 3), (40, 41)):
        total = 0.0
        for pixel in code.flatten(1).T:
            u = math.dist(pixel[:8].tolist(), grid[column].tolist())
            v = math.dist(pixel[8:].tolist(), grid[row].tolist())
            total += math.exp(-u - v) if sharpness == 1 else math.exp(-2 * (u * u + v * v))
        assert votes[row, column].item() == pytest.approx(total, rel=1e-4)


def test_maxima_are_strict() -> None:
    votes = torch.zeros(5, 6)
    votes[0, 0], votes[2, 2], votes[4, 4], votes[4, 5] = 3.0, 4.0, 6.0, 6.0
    found = strict_maxima(votes, 3.5)
    assert found.nonzero().tolist() == [[2, 2]]  # below the threshold; and a plateau
    assert strict_maxima(votes, 1.0).nonzero().tolist() == [[0, 0], [2, 2]]


def test_matrix_nms_by_a_double_loop() -> None:
    torch.manual_seed(0)
    masks = torch.rand(9, 50) < 0.5
    masks[3] = masks[5]
    classes = torch.tensor([0, 0, 1, 0, 1, 0, 1, 0, 0])
    scores = torch.rand(9)

    def iou(i: int, j: int) -> float:
        if classes[i] != classes[j]:
            return 0.0
        return float((masks[i] & masks[j]).sum() / (masks[i] | masks[j]).sum())

    wanted = []
    for j in range(9):
        decay = 1.0
        for i in range(9):
            if scores[i] > scores[j]:
                above = max((iou(k, i) for k in range(9) if scores[k] > scores[i]), default=0.0)
                decay = min(decay, math.exp(-2 * iou(i, j) ** 2) / math.exp(-2 * above**2))
        wanted.append(float(scores[j]) * decay)
    torch.testing.assert_close(matrix_nms(masks, classes, scores), torch.tensor(wanted))


def test_the_benchmark_compares_all_on_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: dict([*some.items()][:2]) for name, some in rivals(56).items()}
    monkeypatch.setattr(bench, "rivals", lambda _: few)
    found = bench_decode(images=2, corruption=Corruption(56, drift=2.0))
    names = [OURS, *rivals(56)]
    cases = [f"level {level}" for level in range(4)]
    values = found.values
    ran = [(row["case"], row["decoder"]) for row in values["rows"]]
    assert ran == [(case, name) for case in cases for name in names]
    assert all(len(row) == len(found.columns) for row in found.rows)
    assert values["ratios"].keys() == {f"{name} against ours" for name in names[1:]}
    assert [row["name"] for row in values["timings"]] == names
    assert all(row["ms"] > 0 and len(row["pq"]) == 4 for row in values["timings"])
    assert values["measured"]["level 0"]["noise"] < values["measured"]["level 3"]["noise"]
