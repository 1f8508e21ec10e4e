"""Losses of distributions at full size, without ever holding a map of them.

A head of 133 classes predicts on the decoder's grid, and its losses count pixels of the input: the
resized logits, their softmax and the gradients of both are by far the largest tensors of a step.
Yet the loss is a sum over pixels and pairs of neighbours. So it is taken strip by strip: some rows
are resized, and their part of the loss and of the gradient is computed at once, in closed form and
while they are in the cache; only the gradient on the decoder's grid is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

STRIP_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}
"""Of resized logits in a strip: what the processor's cache holds; many kernels' worth of a GPU."""


@dataclass(frozen=True)
class PixelTerms:
    """What the losses of N maps of distributions count, at full size.

    Attributes:
        target: (N, H, W) int64 true class; any class where `weight` is 0.
        weight: (N, H, W) float32 of each pixel's cross-entropy.
        down: (N, H - 1, W) float32 of the cross-entropy of a pixel and the one below it.
        right: (N, H, W - 1) float32 of the cross-entropy of a pixel and the one on its right.
    """

    target: Tensor
    weight: Tensor
    down: Tensor
    right: Tensor


def class_losses(
    logits: Tensor, terms: PixelTerms, *, compiled: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy and total variation of logits resized to full size.

        pixel = sum weight H(target, P)
        variation = sum down H(P_ij, P_i+1,j) + sum right H(P_ij, P_i,j+1), H(a, b) = -sum a log b

    Args:
        logits: (N, K, h, w), any floating-point type; resized bilinearly to (H, W).
        terms: What counts how much.
        compiled: Let `torch.compile` fuse what a strip computes, some twenty passes over memory.

    Returns:
        pixel + variation, which alone has a gradient; pixel; variation: float32 scalars.
    """
    total, pixel, variation = _ClassLosses.apply(  # type: ignore[no-untyped-call]
        logits, terms, logits.requires_grad and torch.is_grad_enabled(), compiled
    )
    return total, pixel, variation


class _ClassLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, terms: PixelTerms, differentiate: bool, compiled: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient = torch.zeros_like(logits, dtype=torch.float32) if differentiate else None
        sums = logits.new_zeros(2, dtype=torch.float32)
        count = _compiled() if compiled else _count
        (maps, classes), (height, width) = logits.shape[:2], terms.target.shape[1:]
        rows = STRIP_BYTES.get(logits.device.type, STRIP_BYTES["cuda"]) // (4 * classes * width)
        together, rows = max(1, rows // height), max(1, rows)
        for first in range(0, maps, together):
            some = slice(first, first + together)
            for top in range(0, height, rows):
                strip = slice(top, min(top + rows, height))
                sums += _strip(logits[some], terms, some, strip, gradient=gradient, count=count)
        ctx.save_for_backward(None if gradient is None else gradient.to(logits.dtype))
        pixel, variation = sums.unbind()
        ctx.mark_non_differentiable(pixel, variation)
        return pixel + variation, pixel, variation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * total, None, None, None


def _strip(
    logits: Tensor,
    terms: PixelTerms,
    maps: slice,
    strip: slice,
    *,
    gradient: Tensor | None,
    count: Callable[..., tuple[Tensor, Tensor]],
) -> Tensor:
    """(2,) pixel and variation terms of some rows of some maps; adds to the gradient of the maps.

    The row below the strip takes part in the pairs of its last row.
    """
    height, width = terms.target.shape[1:]
    shown = slice(strip.start, min(strip.stop + 1, height))
    inner = slice(0, strip.stop - strip.start)
    source, upper, lower, part = _rows_between(
        shown.start, shown.stop, logits.shape[2], height, logits.device
    )
    with torch.enable_grad():
        coarse = logits[:, :, source].float().detach().requires_grad_()
        size = (coarse.shape[2], width)
        wide = F.interpolate(coarse, size, mode="bilinear", align_corners=False).movedim(1, 3)
        full = torch.lerp(wide.index_select(1, upper), wide.index_select(1, lower), part)
    with torch.no_grad():
        weight = torch.zeros_like(terms.weight[maps, shown])
        weight[:, inner] = terms.weight[maps, strip]
        down = terms.down[maps, shown.start : shown.stop - 1]
        right = torch.zeros_like(terms.right[maps, shown])
        right[:, inner] = terms.right[maps, strip]
        target = terms.target[maps, shown]
        sums, slope = count(full.detach(), target, weight, down, right)
        if gradient is not None:
            (change,) = torch.autograd.grad(full, coarse, slope)
            gradient[maps, :, source] += change
    return sums


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_count, dynamic=True)  # strips differ in height


@cache
def _rows_between(
    start: int, stop: int, coarse: int, full: int, device: torch.device
) -> tuple[slice, Tensor, Tensor, Tensor]:
    """The coarse rows that full-size rows lie between, as `F.interpolate` has it.

    Returns:
        The coarse rows needed; the row above and the one below each full-size row, counted from
        the first of them; (rows, 1, 1) float32, how far towards the one below.
    """
    place = torch.arange(start, stop, dtype=torch.float64)
    place = ((place + 0.5) * (coarse / full) - 0.5).clamp_min(0)
    upper = place.long().clamp_max(coarse - 1)
    lower = (upper + 1).clamp_max(coarse - 1)
    source = slice(int(upper[0]), int(lower[-1]) + 1)
    part = (place - upper).float()[:, None, None]
    upper, lower = upper - source.start, lower - source.start
    return source, upper.to(device), lower.to(device), part.to(device)


def _count(
    logits: Tensor, target: Tensor, weight: Tensor, down: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """Both terms and their gradient.

    With P the softmax and H the cross-entropies, the gradient at a pixel is that of its own
    cross-entropy, weight (P - onehot); as the second of a pair, which the first one predicts,
    down (P - P_first); and as the first, -down P (log P_second + H).

    Args:
        logits: (n, h, W, K) float32.
        target: (n, h, W) int64.
        weight: (n, h, W).
        down: (n, h - 1, W).
        right: (n, h, W - 1).

    Returns:
        (2,) sums; (n, h, W, K) gradient of their sum.
    """
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    own = -log_p.gather(-1, target[..., None])[..., 0]
    below = -torch.linalg.vecdot(p[:, :-1], log_p[:, 1:])
    beside = -torch.linalg.vecdot(p[:, :, :-1], log_p[:, :, 1:])
    sums = torch.stack([(weight * own).sum(), (down * below).sum() + (right * beside).sum()])
    share = weight.clone()  # what multiplies P alone
    share[:, 1:] += down
    share[:, :-1] -= down * below
    share[:, :, 1:] += right
    share[:, :, :-1] -= right * beside
    down, right = down[..., None], right[..., None]
    slope = share[..., None].expand_as(p).clone()
    slope[:, :-1].addcmul_(log_p[:, 1:], down, value=-1)
    slope[:, :, :-1].addcmul_(log_p[:, :, 1:], right, value=-1)
    slope *= p
    slope[:, 1:].addcmul_(p[:, :-1], down, value=-1)
    slope[:, :, 1:].addcmul_(p[:, :, :-1], right, value=-1)
    slope.scatter_add_(-1, target[..., None], -weight[..., None])
    return sums, slope
