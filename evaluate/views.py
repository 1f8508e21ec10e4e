"""The network's output for one photo, and its mean over several views of the photo.

A view is the photo at one input size, mirrored or not. Each view costs one run of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from panoptic_cache.train.encoding import ClassificationCode, DirectCode, Encoding


@dataclass(frozen=True)
class Heads:
    """The network's output for one photo, before decoding.

    Attributes:
        instance: (channels, h, w) codes, at the network's input size without padding.
        semantic: (C, h, w) logits.
    """

    instance: Tensor
    semantic: Tensor


def mirrored(heads: Heads, encoding: Encoding) -> Heads:
    """Turns the heads of a mirrored photo back: what the unmirrored photo would give."""
    return Heads(mirrored_code(heads.instance.flip(-1), encoding), heads.semantic.flip(-1))


def mirrored_code(code: Tensor, encoding: Encoding) -> Tensor:
    """Turns codes of centroids (u, v) into codes of (-u, v); void stays void.

    The map is linear, so it also holds for predictions that are not exact codes.

    Args:
        code: (channels, ...).
        encoding: Of the codes.
    """
    match encoding:
        case DirectCode():
            # (u', v', 1) with u' in [0, 1] becomes (1 - u', v', 1); void (0, 0, 0) stays.
            return torch.stack([code[2] - code[0], code[1], code[2]])
        case ClassificationCode():
            # u comes first: its cells from left to right, then void; only the cells change places.
            return torch.cat([code[: encoding.cells].flip(0), code[encoding.cells :]])
        case _:
            # The first half holds sine and cosine of u in turn; the sines change their sign.
            turned = code.clone()
            turned[: len(code) // 2 : 2] *= -1
            return turned


def average(views: Sequence[Heads]) -> Heads:
    """Mean of codes and of probabilities over the views of one photo, at the largest view's size.

    Args:
        views: Already turned back; a single view is returned as it is.

    Returns:
        Mean codes, and the logarithms of the mean probabilities.
    """
    if len(views) == 1:
        return views[0]
    height, width = max((v.instance.shape[-2:] for v in views), key=lambda size: size.numel())
    codes = [_resized(view.instance, height, width) for view in views]
    chances = [_resized(view.semantic.softmax(0), height, width) for view in views]
    # A probability of zero would become -inf.
    chance = torch.stack(chances).mean(0).clamp_min(torch.finfo(torch.float32).tiny)
    return Heads(torch.stack(codes).mean(0), chance.log())


def network_cost(size: int, sizes: Sequence[int], *, flip: bool) -> float:
    """Pixels that go through the network, as a multiple of one trained-size input."""
    return (2 if flip else 1) * sum(side**2 for side in sizes) / size**2


def _resized(maps: Tensor, height: int, width: int) -> Tensor:
    if maps.shape[-2:] == (height, width):
        return maps
    return F.interpolate(maps[None], (height, width), mode="bilinear", align_corners=False)[0]
