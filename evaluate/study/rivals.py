"""Decoders of centroid codes as others have built them, to compare ours with.

They are references, written to be read: each takes the heads of one image and returns a map, as
`ceiling.Decoder` says. What the sources leave open was chosen with a few trials on real images, in
favour of the rival but without a thorough search.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from panoptic_cache.evaluate.decoder.segments import Painting, PanopticMap, number, resize_values
from panoptic_cache.train.encoding import GRID_CELLS, cell_centres, gamma

CHUNK = 2048
"""Pixels compared to the whole grid at once: 52 MB of distances."""
MIN_AREA = 4
"""Pixels of the network's output below which an instance is dropped."""
MIN_STUFF = 64
"""Native pixels below which a stuff segment is dropped."""


def full_search(
    code: Tensor, logits: Tensor, isthing: Tensor, size: tuple[int, int]
) -> PanopticMap:
    """The obvious way: every pixel to the nearest of 6,400 cells or void, each cell an instance.

    Args:
        code: (4L, h, w) float32.
        logits: (C, h, w) float32.
        isthing: (C,) bool.
        size: Native (H, W).
    """
    cells = grid_codes(code.shape[0] // 4)
    void = cells.new_zeros(1, cells.shape[1])
    member = nearest_code(code, torch.cat([void, cells]))
    return _finish(member, logits, isthing, size)


def soft_votes(
    code: Tensor,
    logits: Tensor,
    isthing: Tensor,
    size: tuple[int, int],
    *,
    least_votes: float = 5.0,
    sharpness: float = 1.0,
) -> PanopticMap:
    """Soft votes on the grid, its strict maxima, every pixel to the nearest (arXiv 2609.16874).

    Args:
        code: (4L, h, w) float32.
        logits: (C, h, w) float32.
        isthing: (C,) bool.
        size: Native (H, W).
        least_votes: A peak must exceed it.
        sharpness: 1 for the paper's kernel, exp(-distance) an axis; above 1, exp(-sharpness
            distance^2), which is better on every level.
    """
    peaks = strict_maxima(vote(code, sharpness), least_votes)
    cells = grid_codes(code.shape[0] // 4)[peaks.flatten()]
    # Nearer to a peak than to void, which the second threshold amounts to.
    void = cells.new_zeros(1, cells.shape[1])
    return _finish(nearest_code(code, torch.cat([void, cells])), logits, isthing, size)


def soft_votes_squared(
    code: Tensor, logits: Tensor, isthing: Tensor, size: tuple[int, int]
) -> PanopticMap:
    """`soft_votes` with the sharper kernel exp(-2 distance^2)."""
    return soft_votes(code, logits, isthing, size, sharpness=2.0)


def vote(code: Tensor, sharpness: float) -> Tensor:
    """Votes of all pixels for each cell, (rows, columns), by one matrix product.

    Per axis a pixel votes for each cell, and for void, with the kernel of its distance.

    Args:
        code: (4L, h, w).
        sharpness: See `soft_votes`.
    """
    harmonics = code.shape[0] // 4
    grid = gamma(cell_centres(GRID_CELLS), harmonics)  # (cells, 2L)
    candidates = torch.cat([grid, grid.new_zeros(1, grid.shape[1])])
    axes = code.view(2, 2 * harmonics, -1).transpose(1, 2)  # (2, P, 2L)
    distance = torch.cdist(axes, candidates)
    kernel = torch.exp(-distance if sharpness == 1 else -sharpness * distance.square())
    columns, rows = kernel[..., :-1]  # void's bins are no peaks
    votes: Tensor = rows.T @ columns
    return votes


def strict_maxima(votes: Tensor, least: float) -> Tensor:
    """(rows, columns) bool: above `least` and above each of the eight neighbours."""
    around = F.pad(votes[None, None], (1, 1, 1, 1), value=-torch.inf)
    windows = F.unfold(around, 3)[0].view(9, *votes.shape)
    neighbours = torch.cat([windows[:4], windows[5:]]).amax(0)
    return (votes > neighbours) & (votes > least)


def painter(
    code: Tensor,
    logits: Tensor,
    isthing: Tensor,
    size: tuple[int, int],
    *,
    reach: float = 1.6,
    kept: int = 2000,
    final: int = 100,
    least_score: float = 0.55,
) -> PanopticMap:
    """After Painter's decoder (CVPR 2023): a mask for every cell, matrix NMS, merging by score.

    A mask is what lies closer to the cell's code than `reach`. The class is a soft vote over thing
    classes. Masks are laid down by score, those more than half taken already are skipped. The
    masks are compared on every second pixel each way.

    Painter keeps and scores masks by mean distance alone and suppresses across classes, which
    loses most instances of a noisy code to masks of a few pixels. Here the largest are kept, the
    score is the class's share times closeness, and suppression is within a class. Its least area
    of stuff, 8,192 px, is left out: it costs 15 PQ where the semantic head is right.

    Args:
        code: (4L, h, w) float32.
        logits: (C, h, w) float32.
        isthing: (C,) bool.
        size: Native (H, W).
        reach: Distance of codes.
        kept: Masks that enter the suppression.
        final: Masks that leave it.
        least_score: Of a mask that is laid down.
    """
    cells = grid_codes(code.shape[0] // 4)
    coarse = code[:, ::2, ::2].flatten(1)  # (4L, P')
    count = coarse.shape[1]
    area, total = torch.zeros(len(cells)), torch.zeros(len(cells))
    for part in coarse.split(CHUNK, 1):
        closeness = (1 - torch.cdist(cells, part.T) / reach).clamp_min(0)
        area += (closeness > 0).sum(1)
        total += closeness.sum(1)
    best = area.argsort(descending=True, stable=True)[:kept]
    best = best[area[best] > 0]
    if len(best) == 0:
        return _finish(torch.zeros(code.shape[1:], dtype=torch.int64), logits, isthing, size)
    masks = torch.empty(len(best), count, dtype=torch.bool)
    for start in range(0, count, CHUNK):
        part = slice(start, start + CHUNK)
        masks[:, part] = torch.cdist(cells[best], coarse[:, part].T) < reach
    thing = logits[isthing].softmax(0)[:, ::2, ::2].flatten(1)  # (things, P')
    votes = torch.zeros(len(best), len(thing))
    for part in torch.arange(count).split(CHUNK * 4):
        votes += masks[:, part].float() @ thing[:, part].T
    confidence, classes = (votes / area[best, None]).max(1)
    scores = confidence * (0.5 + 0.5 * total[best] / area[best])
    scores = matrix_nms(masks, classes, scores)
    order = scores.argsort(descending=True, stable=True)[:final]
    member = torch.zeros(code.shape[1:], dtype=torch.int64)
    flat, pixels, laid = member.view(-1), code.flatten(1), 0
    for choice in order[scores[order] > least_score].tolist():
        mask = torch.cdist(cells[best[choice], None], pixels.T)[0] < reach
        free = mask & (flat == 0)
        if free.sum() * 2 >= mask.sum():
            laid += 1
            flat[free] = laid
    return _finish(member, logits, isthing, size)


def matrix_nms(masks: Tensor, classes: Tensor, scores: Tensor, sigma: float = 2.0) -> Tensor:
    """Scores after SOLOv2's matrix NMS with the Gaussian kernel.

    A mask decays by each better one of its class, the more they overlap, and the less that one was
    itself suppressed: score_j min_i exp(-sigma iou_ij^2) / exp(-sigma max_k iou_ki^2).

    Args:
        masks: (N, P) bool.
        classes: (N,) int64.
        scores: (N,) float32.
        sigma: Of the kernel.
    """
    order = scores.argsort(descending=True, stable=True)
    inter = torch.zeros(len(order), len(order))
    for part in masks[order].split(CHUNK * 4, 1):
        inter += part.float() @ part.T.float()
    area = inter.diagonal()
    iou = inter / (area[:, None] + area - inter).clamp_min(1)
    same = classes[order][:, None] == classes[order]
    iou = (iou * same).triu(1)  # row i is better than column j
    worst = iou.amax(0)  # how much each mask was overlapped by a better one
    decay = torch.exp(-sigma * (iou.square() - worst[:, None].square()))
    decay = torch.where(torch.ones_like(iou, dtype=torch.bool).triu(1), decay, 1.0)
    found = torch.empty_like(scores)
    found[order] = scores[order] * decay.amin(0).clamp_max(1)
    return found


def grid_codes(harmonics: int) -> Tensor:
    """(6400, 4L) codes of all cells, row by row."""
    axis = gamma(cell_centres(GRID_CELLS), harmonics)
    rows, columns = torch.meshgrid(*[torch.arange(GRID_CELLS)] * 2, indexing="ij")
    return torch.cat([axis[columns.flatten()], axis[rows.flatten()]], dim=1)


def nearest_code(code: Tensor, candidates: Tensor) -> Tensor:
    """(h, w) int64, the candidate at the smallest distance from each pixel's whole code."""
    pixels = code.flatten(1).T
    found = [torch.cdist(part, candidates).argmin(1) for part in pixels.split(CHUNK)]
    return torch.cat(found).view(code.shape[1:])


def _finish(member: Tensor, logits: Tensor, isthing: Tensor, size: tuple[int, int]) -> PanopticMap:
    """Classes by majority vote, stuff, native size: the same for all."""
    numbers, member = member.unique(return_inverse=True)  # few of many cells
    member += int(numbers[0] > 0)  # 0 stays void, also where there is none
    owner, labels = (map_.numpy().astype(np.int64) for map_ in (member, logits.argmax(0)))
    things, count = isthing.numpy(), int(owner.max()) + 1
    classes = len(things)
    ballots = np.bincount((owner * classes + labels).ravel(), minlength=count * classes)
    ballots = ballots.reshape(count, classes)
    votes = ballots * things
    valid = (ballots.sum(1) >= MIN_AREA) & (votes.max(1) > 0)
    valid[0] = False
    stuff = np.where(things, 0, np.arange(classes) + 1)
    values = np.where(valid[owner], owner + classes, stuff[labels]).astype(np.int32)
    rows = np.concatenate([np.arange(classes), votes.argmax(1)[1:]])
    painting = Painting(values, rows, np.ones(len(rows)), classes)  # nobody ranks them
    return number(painting, resize_values(values, size), min_stuff_area=MIN_STUFF)
