"""Cross-entropy and total variation of class logits at full size, without a full-size map of them.

A head of 133 classes predicts on the decoder's grid, and its losses count pixels of the input. The
resized logits, their softmax and the gradients of both would be by far the largest tensors of a
step: 133 x 518 x 518 float32 values are 143 MB an image, each. But the loss is a sum over pixels
and pairs of neighbours, so it is computed in strips of rows: a strip's logits are resized, its part
of the loss and the gradient follow in closed form, and only the gradient on the decoder's grid is
kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

STRIP_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}
"""Resized logits of a strip: what a processor's cache holds, or enough to keep a GPU busy."""


@dataclass(frozen=True)
class PixelTerms:
    """What the losses of N maps of distributions count, at full size."""

    target: Tensor  # (N, H, W) int64 true class; any class where `weight` is 0
    weight: Tensor  # (N, H, W) float32 of each pixel's cross-entropy
    down: Tensor  # (N, H - 1, W) float32 of the cross-entropy of a pixel and the one below it
    right: Tensor  # (N, H, W - 1) float32 of the cross-entropy of a pixel and the one on its right


def class_losses(
    logits: Tensor, terms: PixelTerms, *, compiled: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy and total variation of logits resized to full size.

        pixel = sum weight H(target, P)
        variation = sum down H(P_ij, P_i+1,j) + sum right H(P_ij, P_i,j+1), H(a, b) = -sum a log b

    Args:
        logits: (N, K, h, w), any floating-point type; resized bilinearly to (H, W).
        terms: Targets and weights.
        compiled: Let `torch.compile` fuse what a strip computes, some twenty passes over memory.

    Returns:
        pixel + variation, which alone has a gradient; pixel; variation: float32 scalars.
    """
    total, pixel, variation = _ClassLosses.apply(  # type: ignore[no-untyped-call]
        logits, terms, logits.requires_grad and torch.is_grad_enabled(), compiled
    )
    return total, pixel, variation


class _ClassLosses(torch.autograd.Function):
    """Computes the gradient in the forward pass, strip by strip; the backward pass scales it."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, terms: PixelTerms, differentiate: bool, compiled: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient = torch.zeros_like(logits, dtype=torch.float32) if differentiate else None
        sums = logits.new_zeros(2, dtype=torch.float32)
        count = _compiled() if compiled else _count
        (maps, classes), (height, width) = logits.shape[:2], terms.target.shape[1:]
        # Small maps are taken several at a time, large ones some rows at a time.
        rows = STRIP_BYTES.get(logits.device.type, STRIP_BYTES["cuda"]) // (4 * classes * width)
        together, rows = max(1, rows // height), max(1, rows)
        for first in range(0, maps, together):
            some = slice(first, first + together)
            for top in range(0, height, rows):
                strip = slice(top, min(top + rows, height))
                sums += _strip(logits[some], terms, some, strip, gradient=gradient, count=count)
        # float16 would lose them before the scaler's factor comes with `total`.
        kept = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        ctx.save_for_backward(None if gradient is None else gradient.to(kept))
        ctx.kind = logits.dtype
        pixel, variation = sums.unbind()
        ctx.mark_non_differentiable(pixel, variation)
        return pixel + variation, pixel, variation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * total).to(ctx.kind), None, None, None


def _strip(
    logits: Tensor,
    terms: PixelTerms,
    maps: slice,
    strip: slice,
    *,
    gradient: Tensor | None,
    count: Callable[..., tuple[Tensor, Tensor]],
) -> Tensor:
    """(2,) pixel and variation terms of some rows of some maps; adds to the maps' gradient."""
    height, width = terms.target.shape[1:]
    # The row below the strip takes part in the pairs of its last row, and in nothing else.
    shown = slice(strip.start, min(strip.stop + 1, height))
    inner = slice(0, strip.stop - strip.start)
    source, upper, lower, part = _rows_between(
        shown.start, shown.stop, logits.shape[2], height, logits.device
    )
    # Bilinear resizing is separable: columns by `interpolate`, rows by hand, as it cannot resize
    # a part of a map. Autograd knows how to go back.
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
    """Which coarse rows the full-size rows `start` to `stop` lie between, as `interpolate` has it.

    The coarse rows needed; of these, the row above and the one below each full-size row; and
    (rows, 1, 1) float32, how far towards the one below.
    """
    place = ((np.arange(start, stop) + 0.5) * (coarse / full) - 0.5).clip(0)  # of pixel centres
    upper = place.astype(np.int64).clip(max=coarse - 1)
    lower = (upper + 1).clip(max=coarse - 1)
    source = slice(int(upper[0]), int(lower[-1]) + 1)
    part = (place - upper).astype(np.float32)[:, None, None]
    found = (torch.from_numpy(each) for each in (upper - source.start, lower - source.start, part))
    above, below, between = (each.to(device) for each in found)
    return source, above, below, between


def _count(
    logits: Tensor, target: Tensor, weight: Tensor, down: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """Both terms and their gradient.

    With P the softmax of a pixel and H a cross-entropy, the gradient at a pixel sums up

        weight (P - onehot)             its own cross-entropy,
        down (P - P_first)              as the second pixel of a vertical pair,
        -down P (log P_second + H)      as the first one; and the same for horizontal pairs.

    Of (n, h, W, K) float32 logits and `PixelTerms` of n maps: (2,) sums, and the (n, h, W, K)
    gradient of their sum.
    """
    log_p = logits.log_softmax(-1)  # (n, h, W, K)
    p = log_p.exp()
    own = -log_p.gather(-1, target[..., None])[..., 0]  # (n, h, W)
    below = -torch.linalg.vecdot(p[:, :-1], log_p[:, 1:])  # (n, h - 1, W), H of vertical pairs
    beside = -torch.linalg.vecdot(p[:, :, :-1], log_p[:, :, 1:])  # (n, h, W - 1)
    sums = torch.stack([(weight * own).sum(), (down * below).sum() + (right * beside).sum()])
    share = weight.clone()  # (n, h, W), what multiplies P alone
    share[:, 1:] += down
    share[:, :-1] -= down * below
    share[:, :, 1:] += right
    share[:, :, :-1] -= right * beside
    down, right = down[..., None], right[..., None]
    slope = share[..., None].expand_as(p).clone()  # becomes P (share - down log P_second - ...)
    slope[:, :-1].addcmul_(log_p[:, 1:], down, value=-1)
    slope[:, :, :-1].addcmul_(log_p[:, :, 1:], right, value=-1)
    slope *= p
    slope[:, 1:].addcmul_(p[:, :-1], down, value=-1)
    slope[:, :, 1:].addcmul_(p[:, :, :-1], right, value=-1)
    slope.scatter_add_(-1, target[..., None], -weight[..., None])
    return sums, slope
