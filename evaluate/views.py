"""The network's output for one photo, and its mean over several views of the photo.

A view is the photo at one input size, mirrored or not. Each view costs one run of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from panoptic_cache.train.encoding import Encoding


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
    return Heads(encoding.mirrored(heads.instance.flip(-1)), heads.semantic.flip(-1))


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


def _resized(maps: Tensor, height: int, width: int) -> Tensor:
    if maps.shape[-2:] == (height, width):
        return maps
    return F.interpolate(maps[None], (height, width), mode="bilinear", align_corners=False)[0]
