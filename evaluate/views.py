"""What the network says of one picture, averaged over several views of it.

A view is the picture at a size, mirrored or not. Each costs one more run of the network.
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
    """What the network says of one picture, before decoding.

    Attributes:
        instance: (channels, h, w) codes, at the network's size without padding.
        semantic: (C, h, w) logits.
    """

    instance: Tensor
    semantic: Tensor


def mirrored(heads: Heads, encoding: Encoding) -> Heads:
    """What the heads would be of the mirrored picture, left for right."""
    return Heads(mirrored_code(heads.instance.flip(-1), encoding), heads.semantic.flip(-1))


def mirrored_code(code: Tensor, encoding: Encoding) -> Tensor:
    """The codes of the centroids (-u, v), and void for void; linear, so good for any prediction.

    Positional: the sines of u change sign. Direct: u in [0, 1] becomes 1 - u, where the third
    channel, 1 for an instance and 0 for void, is the 1. Classification: the cells of u in reverse.

    Args:
        code: (channels, ...).
        encoding: What they are.
    """
    match encoding:
        case DirectCode():
            return torch.stack([code[2] - code[0], code[1], code[2]])
        case ClassificationCode():
            return torch.cat([code[: encoding.cells].flip(0), code[encoding.cells :]])
        case _:
            turned = code.clone()
            turned[: len(code) // 2 : 2] *= -1
            return turned


def average(views: Sequence[Heads]) -> Heads:
    """Mean of codes and of probabilities, at the size of the largest view.

    Args:
        views: Of one picture, turned back; returned as it is where there is only one.

    Returns:
        Codes, and the logarithms of the mean probabilities.
    """
    if len(views) == 1:
        return views[0]
    height, width = max((v.instance.shape[-2:] for v in views), key=lambda size: size.numel())
    codes, chances = [], []
    for view in views:
        codes.append(_resized(view.instance, height, width))
        chances.append(_resized(view.semantic.softmax(0), height, width))
    chance = torch.stack(chances).mean(0).clamp_min(torch.finfo(torch.float32).tiny)
    return Heads(torch.stack(codes).mean(0), chance.log())


def network_cost(size: int, sizes: Sequence[int], *, flip: bool) -> float:
    """How often the pixels of the trained size go through the network: 2.0 with a flip."""
    return (2 if flip else 1) * sum(side**2 for side in sizes) / size**2


def _resized(maps: Tensor, height: int, width: int) -> Tensor:
    if maps.shape[-2:] == (height, width):
        return maps
    return F.interpolate(maps[None], (height, width), mode="bilinear", align_corners=False)[0]
