"""The losses: edge distance sampling, total variation, DICE (sections 3.2 and 3.3, appendix A).

A head's output has the decoder's size (h, w); losses count pixels of the input's size (H, W), in
float32. Every term is computed for each image and then averaged over images, so a batch has the
same loss however it is split into micro-batches and ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from panoptic_cache.pipeline.cache.sample import EDS_FAR, EDS_STEP
from panoptic_cache.pipeline.targets import CROWD, UNLABELLED
from panoptic_cache.train.augment import PADDING
from panoptic_cache.train.class_losses import PixelTerms, class_losses
from panoptic_cache.train.config import LossConfig
from panoptic_cache.train.data import Batch
from panoptic_cache.train.encoding import ClassificationCode, Encoding, PositionalCode
from panoptic_cache.train.model import resize_maps

Distance = Literal["norm", "squared"]

DICE_VALUES = 1 << 24
"""Values, images x table rows x pixels, that DICE computes at once: 64 MiB of float32."""


@dataclass(frozen=True)
class Losses:
    """Scalars of a micro-batch: the weighted total, to differentiate, and its terms as they are."""

    total: Tensor
    pixel: Tensor
    tv: Tensor
    dice: Tensor


def instance_loss(
    prediction: Tensor,
    batch: Batch,
    encoding: Encoding,
    config: LossConfig,
    distance: Distance,
    *,
    compiled: bool = False,
) -> Losses:
    """The instance task's losses of a (B, channels, h, w) output of the instance head.

    The `distance` is the Euclidean one or its square; `compiled` uses `torch.compile` where it
    pays.
    """
    target = gather_rows(encoding.encode(batch.centroid, batch.instance), batch.segment_map)
    weight = pixel_weight(instance_weight(batch, config), config.reduction)  # (B, H, W)
    inside = batch.void != PADDING
    if isinstance(encoding, ClassificationCode):
        # Two distributions a pixel, of the column and of the row, averaged: as 2 B images.
        logits = prediction.reshape(-1, encoding.cells + 1, *prediction.shape[2:])
        target, weight = target.flatten(0, 1), weight.repeat_interleave(2, 0) / 2
        inside = inside.repeat_interleave(2, 0)
        return _class_losses(logits, target, weight, inside, config, compiled=compiled)
    code = resize_maps(prediction.float(), target.shape[2:])  # (B, channels, H, W)
    pixel = (code_distance(code - target, encoding, distance) * weight).sum()
    smoothness = code_variation(code, encoding, inside.float())
    overlap = code.new_zeros(())
    if isinstance(encoding, PositionalCode) and config.dice:
        overlap = dice(code, batch, encoding)
    total = pixel + config.tv * smoothness + config.dice * overlap
    return Losses(total, pixel, smoothness, overlap)


def semantic_loss(
    prediction: Tensor,
    batch: Batch,
    config: LossConfig,
    class_weight: Tensor | None = None,
    *,
    compiled: bool = False,
) -> Losses:
    """The semantic task's losses of (B, C, h, w) logits; see `instance_loss`.

    `class_weight`, (C,), multiplies the cross-entropy of pixels by their true category.
    """
    label = gather_rows(batch.label[..., None], batch.segment_map)[:, 0]  # (B, H, W)
    weight = pixel_weight(eds_weight(batch, config) * (label >= 0), config.reduction)
    label, inside = label.clamp_min(0), batch.void != PADDING
    if class_weight is not None:
        weight = weight * class_weight[label]
    return _class_losses(prediction, label, weight, inside, config, compiled=compiled)


def _class_losses(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    inside: Tensor,
    config: LossConfig,
    *,
    compiled: bool,
) -> Losses:
    """Cross-entropy and the total variation of distributions (appendix A).

    1/2 (H(P_ij, P_i+1,j) + H(P_ij, P_i,j+1)), H(a, b) = -sum a log b; a mean over the image's
    pixels.
    """
    # (N, 1, 1): the weight of a pair, so that the sum over pairs is the term of the total.
    scale = config.tv / 2 / len(inside) / inside.sum((1, 2)).clamp_min(1)[:, None, None]
    terms = PixelTerms(
        target,
        weight,
        down=(inside[:, 1:] & inside[:, :-1]) * scale,
        right=(inside[..., 1:] & inside[..., :-1]) * scale,
    )
    total, pixel, variation = class_losses(logits, terms, compiled=compiled)
    smoothness = variation / config.tv if config.tv else variation
    return Losses(total, pixel, smoothness, total.new_zeros(()))


def gather_rows(table: Tensor, segment_map: Tensor) -> Tensor:
    """Looks up a segment map in each image's table: (B, R, K), (B, H, W) -> (B, K, H, W)."""
    rows = segment_map.flatten(1).long()[:, None].expand(-1, table.shape[2], -1)  # (B, K, H W)
    return torch.unflatten(table.transpose(1, 2).gather(2, rows), 2, segment_map.shape[1:])


def eds_weight(batch: Batch, config: LossConfig) -> Tensor:
    """(B, H, W) float32 weights of edge distance sampling (section 3.2); ones without it.

    w = w_min + (1 - w_min) exp(-(d / D)^2), d in pixels of the network's input.
    """
    if not config.eds:
        return torch.ones_like(batch.eds, dtype=torch.float32)
    # The 256 codes of each image mean as many weights: looked up, not computed at every pixel.
    codes = torch.arange(256, device=batch.eds.device, dtype=torch.float32)
    distance = codes * (batch.eds_scale[:, None] * EDS_STEP)  # (B, 256)
    table = config.w_min + (1 - config.w_min) * torch.exp(-(distance / config.d).square())
    table[:, EDS_FAR] = config.w_min
    weights: Tensor = table.gather(1, batch.eds.flatten(1).long()).view(batch.eds.shape)
    return weights


def instance_weight(batch: Batch, config: LossConfig) -> Tensor:
    """(B, H, W) weights of the instance task: crowd and padding never count."""
    counted = (batch.void != CROWD) & (batch.void != PADDING)
    if not config.include_void:
        counted &= batch.void != UNLABELLED
    return eds_weight(batch, config) * counted


def pixel_weight(weight: Tensor, reduction: str) -> Tensor:
    """What each pixel's loss is multiplied by, so that the sum is the loss of a batch.

    The mean over images of each image's weighted mean, or of its weighted sum (`reduction`). An
    image without weight contributes 0.
    """
    if reduction == "mean":
        weight = weight / weight.sum((1, 2), keepdim=True).clamp_min(1e-6)
    return weight / len(weight)


def code_distance(difference: Tensor, encoding: Encoding, distance: Distance) -> Tensor:
    """L_inst (section 3.3): the mean over u and v of the Euclidean distance, or of its square.

    Of a (B, channels, ...) difference of two codes, (B, ...). A direct code is one vector, not two.
    """
    parts = 2 if isinstance(encoding, PositionalCode) else 1
    squared = torch.unflatten(difference, 1, (parts, -1)).square().sum(2)  # (B, parts, ...)
    return (squared if distance == "squared" else safe_sqrt(squared)).mean(1)


def safe_sqrt(squared: Tensor) -> Tensor:
    """Square root with gradient 0 at 0, a subgradient of the norm; autograd's is infinite."""
    positive = squared > 0
    return torch.where(positive, squared, 1.0).sqrt() * positive


def code_variation(code: Tensor, encoding: Encoding, inside: Tensor) -> Tensor:
    """Total variation of codes (appendix A): distances to the pixels below and on the right.

    Void counts; padding, where `inside` (B, H, W) is 0, does not. Mean over each image's pixels,
    then over images.
    """
    down = code_distance(code[:, :, 1:] - code[:, :, :-1], encoding, "norm")  # (B, H - 1, W)
    right = code_distance(code[..., 1:] - code[..., :-1], encoding, "norm")  # (B, H, W - 1)
    down = (down * (inside[:, 1:] * inside[:, :-1])).sum((1, 2))
    right = (right * (inside[..., 1:] * inside[..., :-1])).sum((1, 2))
    return ((down + right) / inside.sum((1, 2)).clamp_min(1)).mean()


def dice(prediction: Tensor, batch: Batch, encoding: PositionalCode) -> Tensor:
    """Generalised DICE over the labelled instances (appendix A).

    1 - 2 sum_l w_l sum_ij r p / sum_l w_l sum_ij (r + p), w_l = 1 / area_l,
    p_l = exp(-dx^2) exp(-dy^2), where dx and dy are the distances of the prediction's halves to
    the instance's code. Sums go over all pixels but padding and crowd. An image without instance
    contributes 0. The prediction is (B, 4L, H, W).
    """
    counted = ((batch.void != PADDING) & (batch.void != CROWD)).flatten(1)  # (B, P)
    code = encoding.encode(batch.centroid, batch.instance)  # (B, R, 4L)
    row = batch.segment_map.flatten(1).long()  # (B, P)
    area = torch.zeros_like(batch.label, dtype=torch.float32)
    area.scatter_add_(1, row, counted.float())  # (B, R)
    weight = batch.instance / area.clamp_min(1)  # (B, R), w_l, and 0 for what is no instance

    def sums(codes: Tensor, row: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) sums of w r p and of w p over some pixels."""
        # |x - c|^2 over both halves is |x|^2 + 2 L - 2 x . c, as |gamma|^2 = L.
        norm = codes.square().sum(1)[:, None] + 2 * encoding.harmonics  # (B, 1, pixels)
        squared = torch.baddbmm(norm, code, codes, alpha=-2)  # (B, R, pixels)
        p = torch.exp(-squared.clamp_min(0)) * counted[:, None]
        own = p.gather(1, row[:, None]).squeeze(1)  # (B, pixels), where r is 1
        return (own * weight.gather(1, row)).sum(1), (p.sum(2) * weight).sum(1)

    # (B, R, P) would be the largest tensor of the step, so p is computed for some pixels at a
    # time, and once more in the backward pass instead of being kept.
    size = max(1, DICE_VALUES // weight.numel())
    pixels = zip(
        prediction.flatten(2).split(size, 2),
        row.split(size, 1),
        counted.split(size, 1),
        strict=True,
    )
    parts = [
        checkpoint(sums, *part, use_reentrant=False, preserve_rng_state=False) for part in pixels
    ]
    overlap, spread = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
    extent = (weight * area).sum(1) + spread  # (B,) sum of w (r + p)
    present = batch.instance.any(1)
    loss = 1 - 2 * overlap / torch.where(present, extent, 1.0)
    return (loss * present).mean()
