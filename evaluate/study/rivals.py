"""Decoders of centroid codes as others have built them, to compare ours with.

Each says which instance owns each pixel of one image, (h, w) int64 with 0 for none; `finished` does
the rest. What the sources leave open was chosen with a few trials on real images.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from skimage.measure import label as connected
from torch import Tensor
from torch.nn import functional as F

from panoptic_cache.evaluate.decoder.decode import PanopticMap
from panoptic_cache.evaluate.decoder.segments import Painting, number, resize_values
from panoptic_cache.evaluate.study.heads import ImageHeads
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.pipeline.targets import make_segment_map, resize_segment_map
from panoptic_cache.train.encoding import GRID_CELLS, PositionalCode, cell_centres, gamma

Categories = tuple[Category, ...]
"""By label."""
Rival = Callable[[ImageHeads, Categories], PanopticMap]
"""Of an image's heads, with positional codes."""
CHUNK = 2048
"""Pixels compared to the whole grid at once: 52 MB of distances."""
MIN_AREA = 4
"""Pixels of the network's output below which an instance is dropped."""
MIN_STUFF = 64
"""Native pixels below which a stuff segment is dropped."""
REACH, ENTER, LEAVE, LEAST_SCORE = 1.6, 2000, 100, 0.55
"""Painter: distance of codes in a mask, masks before and after suppression, score of one that is
laid down."""


def rivals(size: int) -> dict[str, dict[str, Rival]]:
    """By name and setting; a grid may have a fifth of `size`, the side of the network's input."""
    grids = sorted({20, 40, GRID_CELLS, min(GRID_CELLS, max(1, size // 5))})
    on_grid: dict[str, Callable[..., Tensor]] = {
        "full search": full_search,
        "grid": grid_peaks,
        "grid, wider": partial(grid_peaks, reach=2),
        "soft votes": soft_votes,
        "soft votes, sharper": partial(soft_votes, sharpness=2.0),
        "Painter's masks": painter,
    }
    found: dict[str, dict[str, Rival]] = {
        name: {f"{cells} cells": partial(finished, partial(owner, cells=cells)) for cells in grids}
        for name, owner in on_grid.items()
    }
    found["components"] = {
        f"{area} px": partial(finished, partial(components, least_area=area))
        for area in (4, 16, 24, 64)
    }
    found["known instances"] = {"": partial(finished, known_instances)}
    return found


def full_search(image: ImageHeads, _: Categories, *, cells: int) -> Tensor:
    """Every pixel to the nearest cell or to void, and each cell is an instance."""
    return nearest_cell_or_void(image.instance, cells)


def grid_peaks(image: ImageHeads, _: Categories, *, cells: int, reach: int = 1) -> Tensor:
    """The cells of the most pixels, at least 8, without those within `reach` (section 5.2)."""
    owner = nearest_cell_or_void(image.instance, cells)
    votes = owner.flatten().bincount(minlength=cells**2 + 1)[1:].view(cells, cells)
    kept = torch.zeros(cells, cells, dtype=torch.bool)
    for place in votes.flatten().argsort(descending=True, stable=True).tolist():
        row, column = divmod(place, cells)
        if votes[row, column] < 8:
            break
        around = slice(max(0, row - reach), row + reach + 1)
        if not kept[around, max(0, column - reach) : column + reach + 1].any():
            kept[row, column] = True
    prototypes = grid_codes(len(image.instance) // 4, cells)[kept.flatten()]
    return nearest_code(image.instance, prototypes)


def nearest_cell_or_void(code: Tensor, cells: int) -> Tensor:
    """0 where void is nearest to a pixel's code, else 1 + row * cells + column."""
    costs = PositionalCode(len(code) // 4).axis_costs(code.flatten(1), cells)
    (u_cost, u), (v_cost, v) = costs.u.min(-1), costs.v.min(-1)
    owner = torch.where(u_cost + v_cost < costs.void, v * cells + u + 1, 0)
    return owner.view(code.shape[1:])


def soft_votes(image: ImageHeads, _: Categories, *, cells: int, sharpness: float = 1.0) -> Tensor:
    """Soft votes on the grid, strict maxima above 5, every pixel to the nearest (arXiv 2609.16874).

    `sharpness` 1 is the paper's kernel, exp(-distance) an axis; above, exp(-sharpness distance^2).
    """
    peaks = strict_maxima(vote(image.instance, cells, sharpness), 5.0)
    prototypes = grid_codes(len(image.instance) // 4, cells)[peaks.flatten()]
    return nearest_code(image.instance, prototypes)


def vote(code: Tensor, cells: int, sharpness: float) -> Tensor:
    """(rows, columns) votes of (4L, h, w) codes: the product of the kernels of both axes."""
    harmonics = code.shape[0] // 4
    grid = gamma(cell_centres(cells), harmonics)  # (cells, 2L)
    candidates = torch.cat([grid, grid.new_zeros(1, grid.shape[1])])
    axes = code.view(2, 2 * harmonics, -1).transpose(1, 2)  # (2, P, 2L)
    distance = torch.cdist(axes, candidates)
    kernel = torch.exp(-distance if sharpness == 1 else -sharpness * distance.square())
    columns, rows = kernel[..., :-1]  # void's bins are no peaks
    votes: Tensor = rows.T @ columns
    return votes


def strict_maxima(votes: Tensor, least: float) -> Tensor:
    """(rows, columns) bool: above `least` and above each of the eight neighbours."""
    around = F.unfold(F.pad(votes[None, None], (1, 1, 1, 1), value=-torch.inf), 3)[0]
    neighbours = torch.cat([around[:4], around[5:]]).amax(0).view(votes.shape)
    return (votes > neighbours) & (votes > least)


def painter(image: ImageHeads, categories: Categories, *, cells: int) -> Tensor:
    """After Painter's decoder (CVPR 2023): a mask for every cell, matrix NMS, merging by score.

    A mask is what lies closer to the cell's code than `REACH`, on every second pixel each way.
    Masks are laid down by score, those more than half taken already are skipped. Painter scores by
    mean distance and suppresses across classes, which loses most instances of a noisy code: here
    the largest are kept, the score is the class's share times closeness, each class for itself. Its
    least area of stuff is left out: it costs 15 PQ where the semantic head is right.
    """
    code, isthing = image.instance, torch.tensor([category.isthing for category in categories])
    grid = grid_codes(len(code) // 4, cells)
    owner = torch.zeros(code.shape[1:], dtype=torch.int64)
    coarse = code[:, ::2, ::2].flatten(1).split(CHUNK, 1)  # chunks of (4L, P')
    area, total = torch.zeros(len(grid)), torch.zeros(len(grid))
    for part in coarse:
        closeness = (1 - torch.cdist(grid, part.T) / REACH).clamp_min(0)
        area += (closeness > 0).sum(1)
        total += closeness.sum(1)
    best = area.argsort(descending=True, stable=True)[:ENTER]
    best = best[area[best] > 0]
    if len(best) == 0 or not isthing.any():
        return owner
    masks = torch.cat([torch.cdist(grid[best], part.T) < REACH for part in coarse], 1)  # (N, P')
    thing = image.semantic[isthing].softmax(0)[:, ::2, ::2].flatten(1)  # (things, P')
    votes = torch.zeros(len(best), len(thing))
    for part in torch.arange(masks.shape[1]).split(CHUNK * 4):
        votes += masks[:, part].float() @ thing[:, part].T
    confidence, classes = (votes / area[best, None]).max(1)
    scores = confidence * (0.5 + 0.5 * total[best] / area[best])
    scores = matrix_nms(masks, classes, scores)
    order = scores.argsort(descending=True, stable=True)[:LEAVE]
    flat, pixels, laid = owner.view(-1), code.flatten(1), 0
    for choice in order[scores[order] > LEAST_SCORE].tolist():
        mask = torch.cdist(grid[best[choice], None], pixels.T)[0] < REACH
        free = mask & (flat == 0)
        if free.sum() * 2 >= mask.sum():
            laid += 1
            flat[free] = laid
    return owner


def matrix_nms(masks: Tensor, classes: Tensor, scores: Tensor, sigma: float = 2.0) -> Tensor:
    """(N,) scores after SOLOv2's matrix NMS of (N, P) bool masks, within a class.

    score_j min_i exp(-sigma iou_ij^2) / exp(-sigma max_k iou_ki^2), of i better than j, k than i.
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


def components(image: ImageHeads, categories: Categories, *, least_area: int) -> Tensor:
    """Connected regions of each thing class of the semantic head; the codes are not looked at."""
    labels = image.semantic.argmax(0).numpy()
    isthing = np.array([category.isthing for category in categories])
    owner = connected(np.where(isthing[labels], labels + 1, 0), connectivity=1)
    owner[np.bincount(owner.flat)[owner] < least_area] = 0
    return torch.from_numpy(owner)


def known_instances(image: ImageHeads, categories: Categories) -> Tensor:
    """What is left to gain: a thing pixel goes to the nearest true mean code, or to void."""
    things = {category.id for category in categories if category.isthing}
    true = [s.id for s in image.segments if s.category_id in things and not s.iscrowd]
    size = image.instance.shape[1], image.instance.shape[2]
    map_ = resize_segment_map(make_segment_map(image.ids, true), size)
    rows = torch.from_numpy(map_.astype(np.int64)).flatten()
    sums = torch.zeros(len(image.instance), len(true) + 1)
    sums.index_add_(1, rows, image.instance.flatten(1))
    count = rows.bincount(minlength=len(true) + 1)
    means = (sums / count.clamp_min(1)).T[1:][count[1:] > 0]
    isthing = torch.tensor([category.isthing for category in categories])
    return nearest_code(image.instance, means) * isthing[image.semantic.argmax(0)]


def grid_codes(harmonics: int, cells: int) -> Tensor:
    """(cells^2, 4L) codes of all cells, row by row."""
    axis = gamma(cell_centres(cells), harmonics)
    rows, columns = torch.meshgrid(*[torch.arange(cells)] * 2, indexing="ij")
    return torch.cat([axis[columns.flatten()], axis[rows.flatten()]], dim=1)


def nearest_code(code: Tensor, prototypes: Tensor) -> Tensor:
    """0 where void is nearest to a pixel's code, k where prototype k - 1 is."""
    candidates = torch.cat([prototypes.new_zeros(1, len(code)), prototypes])
    pixels = code.flatten(1).T
    found = [torch.cdist(part, candidates).argmin(1) for part in pixels.split(CHUNK)]
    return torch.cat(found).view(code.shape[1:])


def finished(
    find_owner: Callable[[ImageHeads, Categories], Tensor],
    image: ImageHeads,
    categories: Categories,
) -> PanopticMap:
    """Classes by majority vote, stuff, native size."""
    numbers, member = find_owner(image, categories).unique(return_inverse=True)
    member += int(numbers[0] > 0)  # 0 stays void, also where there is none
    owner, labels = member.numpy(), image.semantic.argmax(0).numpy()
    things = np.array([category.isthing for category in categories])
    count, classes = int(owner.max()) + 1, len(things)
    ballots = np.bincount((owner * classes + labels).ravel(), minlength=count * classes)
    votes = (ballots := ballots.reshape(count, classes)) * things
    valid = (ballots.sum(1) >= MIN_AREA) & (votes.max(1) > 0)
    valid[0] = False
    stuff = np.where(things, 0, np.arange(classes) + 1)
    values = np.where(valid[owner], owner + classes, stuff[labels]).astype(np.int32)
    rows = np.concatenate([np.arange(classes), votes.argmax(1)[1:]])
    painting = Painting(values, rows, np.ones(len(rows)), classes)  # nobody ranks them
    return number(painting, resize_values(values, image.size), min_stuff_area=MIN_STUFF)
