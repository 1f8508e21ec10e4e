"""The decoders that ours is compared with do what their sources say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from panoptic_cache.evaluate.decoder.decode import PanopticMap
from panoptic_cache.evaluate.study.bench import RIVALS, DecodeBench, bench_decode
from panoptic_cache.evaluate.study.ceiling import Decoder
from panoptic_cache.evaluate.study.rivals import (
    grid_codes,
    matrix_nms,
    nearest_code,
    strict_maxima,
    vote,
)
from panoptic_cache.train.encoding import GRID_CELLS, PositionalCode, cell_centres, gamma

ISTHING = torch.tensor([True, True, False])


def scene() -> tuple[torch.Tensor, torch.Tensor, NDArray[np.int64]]:
    """Two far-apart things and stuff of 32 x 32, with the truth as 1, 2 and 0."""
    truth = torch.zeros(32, 32, dtype=torch.int64)
    truth[4:14, 4:14], truth[16:28, 18:30] = 1, 2
    centroids = torch.tensor([[0.0, 0.0], [-0.44, -0.44], [0.5, 0.375]])
    codes = PositionalCode().encode(centroids, torch.tensor([False, True, True]))
    labels = torch.tensor([2, 0, 1])[truth]
    logits = 10.0 * torch.nn.functional.one_hot(labels, 3).permute(2, 0, 1).float()
    return codes[truth].permute(2, 0, 1), logits, truth.numpy()


@pytest.mark.parametrize("rival", RIVALS.values(), ids=RIVALS)
def test_a_clear_scene_is_decoded_right(rival: Decoder) -> None:
    code, logits, truth = scene()
    found: PanopticMap = rival(code, logits, ISTHING, (32, 32))
    assert [s.label for s in found.segments if s.isthing] == [0, 1]
    by_label = {s.label: s.id for s in found.segments}
    wanted = np.array([by_label[2], by_label[0], by_label[1]])[truth]
    assert np.array_equal(found.ids, wanted)


@pytest.mark.parametrize("rival", RIVALS.values(), ids=RIVALS)
@pytest.mark.parametrize("fill", [0.0, 1.0], ids=["void", "things"])
def test_one_kind_of_pixel_only(rival: Decoder, fill: float) -> None:
    code = fill * PositionalCode().encode(torch.zeros(1, 2), torch.tensor([True]))
    logits = torch.tensor([9.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 12, 12)
    found = rival(code.view(16, 1, 1).expand(16, 12, 12), logits, ISTHING, (12, 12))
    assert (found.ids > 0).all() == bool(fill)
    assert len(found.segments) == int(fill)


def test_the_full_search_is_the_search_through_all() -> None:
    torch.manual_seed(0)
    code = torch.randn(16, 5, 7)
    cells = grid_codes(4)
    assert len(cells) == GRID_CELLS**2
    centres = cell_centres(GRID_CELLS)
    row, column = 7, 31
    wanted = torch.cat([gamma(centres[column], 4), gamma(centres[row], 4)])
    assert torch.equal(cells[row * GRID_CELLS + column], wanted)
    found = nearest_code(code, cells)
    for y in range(5):
        for x in range(7):
            distances = (cells - code[:, y, x]).square().sum(1)
            assert distances[found[y, x]] == pytest.approx(distances.min().item())


@pytest.mark.parametrize("sharpness", [1.0, 2.0])
def test_votes_are_a_product_of_kernels(sharpness: float) -> None:
    torch.manual_seed(0)
    code = torch.randn(16, 2, 3)
    votes = vote(code, sharpness)
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


def test_the_benchmark_compares_all_on_the_same_images() -> None:
    found: DecodeBench = bench_decode(images=2, size=56)
    assert [t.name for t in found.timings] == ["ours", "ours, one by one", *RIVALS]
    assert all(len(row) == len(found.columns) for row in found.rows())
    assert all(t.ms > 0 and len(t.pq) == len(t.things) == 4 for t in found.timings)
    assert found.to_json()["ratios"].keys() == {
        f"{name} against ours" for name in ("ours, one by one", *RIVALS)
    }
