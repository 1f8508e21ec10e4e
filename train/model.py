"""Four taps of a backbone, four transposed convolutions, two heads (section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.train.backbone import make_backbone, own_weights, their_weights
from panoptic_cache.train.config import ModelConfig, TrainConfig
from panoptic_cache.train.encoding import make_encoding

Task = Literal["instance", "semantic", "both"]

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What a model computes in, by the name of a precision; else in float32."""
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
LEAST_STD = 0.02
"""Of a picture's own deviation, with which its pixels are scaled: five steps of 255."""


@dataclass(frozen=True)
class Prediction:
    """The heads' outputs at the decoder's size; a head that was not asked for is None.

    Maps at the input's size would be the largest tensors there are, and what follows needs them for
    some rows or some images at a time only: who uses a prediction resizes it.
    """

    instance: Tensor | None  # (B, channels, h, w) codes
    semantic: Tensor | None  # (B, C, h, w) logits

    def resized(self, size: Sequence[int]) -> Prediction:
        """Both at (H, W), in float32."""
        heads = (self.instance, self.semantic)
        return Prediction(*(None if m is None else resize_maps(m.float(), size) for m in heads))


def resize_maps(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(B, channels, h, w) maps at (H, W), bilinear."""
    if maps.shape[2:] == tuple(size):
        return maps
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


class PanopticModel(nn.Module):
    """Photos to centroid codes and category logits.

    Without `load_weights`, a pretrained backbone is built but not loaded, as when a checkpoint
    follows; `architecture` is a checkpoint's `backbone.json`, which needs neither hub nor folder.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        config: ModelConfig,
        code_channels: int,
        classes: int,
        *,
        load_weights: bool = True,
        architecture: Path | None = None,
    ) -> None:
        super().__init__()
        self.encoder = make_backbone(config, load_weights=load_weights, architecture=architecture)
        self.patch_size: int = self.encoder.config.patch_size
        self.own_scale = config.normalise == "input"
        self.decoder = Decoder(
            len(config.taps) * self.encoder.config.hidden_size, config.channels, config.strides
        )
        self.instance_head = nn.Conv2d(config.channels, code_channels, 3, padding=1)
        self.semantic_head = nn.Conv2d(config.channels, classes, 3, padding=1)
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(3, 1, 1), persistent=False)

    def forward(self, photo: Tensor, task: Task = "both") -> Prediction:
        """Of (B, 3, S, T) uint8 RGB, or float in [0, 1]; sides are multiples of the patch size."""
        features = self.features(photo)
        return Prediction(
            instance=None if task == "semantic" else self.instance_head(features),
            semantic=None if task == "instance" else self.semantic_head(features),
        )

    def features(self, photo: Tensor) -> Tensor:
        """The shared decoder's output, (B, channels, h, w)."""
        check_size(photo.shape[-2], photo.shape[-1], self.patch_size)
        scaled = photo.float() / 255 if photo.dtype == torch.uint8 else photo
        mean, std = self.mean, self.std
        if self.own_scale:  # (B, 1, 1, 1); an empty picture's noise is not blown up
            mean = scaled.mean((1, 2, 3), keepdim=True)
            std = (scaled - mean).square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(LEAST_STD)
        taps = self.encoder((scaled - mean) / std).feature_maps  # (B, e, S / p, T / p)
        # Channels last is what the encoder makes, what a norm over channels wants, and what
        # convolutions on tensor cores take.
        joined = torch.cat(taps, dim=1).contiguous(memory_format=torch.channels_last)
        features: Tensor = self.decoder(joined)
        return features

    def weights(self) -> dict[str, Tensor]:
        """Its tensors by the names that files know."""
        return {name: v.contiguous() for name, v in own_weights(self.state_dict()).items()}

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Loads tensors by the names of files, all of them and no others."""
        if extra := weights.keys() - self.weights().keys():
            raise ValueError(f"{min(extra)} is one too many")
        self.load_state_dict(their_weights(weights, self.state_dict()))


def new_model(config: TrainConfig, classes: int, **settings: Any) -> PanopticModel:
    """The model of a run over so many categories; see `PanopticModel` for the settings."""
    channels = make_encoding(config.loss.encoding, config.loss.harmonics).channels
    return PanopticModel(config.model, channels, classes, **settings)


class Decoder(nn.Module):
    """Four transposed convolutions: the first 2x2 over all taps, then three 3x3.

    Their sizes are those that meet the paper's parameter totals (Table 1).
    """

    def __init__(self, inputs: int, channels: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, stride in enumerate(strides):
            kernel = max(3, stride) if number else stride
            layers += [
                nn.ConvTranspose2d(
                    channels if number else inputs,
                    channels,
                    kernel,
                    stride=stride,
                    padding=(kernel - stride + 1) // 2,
                    output_padding=(kernel - stride) % 2,  # the output is `stride` times as large
                ),
                ChannelNorm(channels),
                nn.GELU(),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, taps: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, channels, h * product of strides, ...)."""
        output: Tensor = self.layers(taps)
        return output


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each pixel: independent of batch and size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        normed: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


def check_size(height: int, width: int, patch_size: int, *, where: str = "data.size") -> None:
    """Raises InputError for a size that patches do not tile: it would be floored silently."""
    for side in (height, width):
        if side % patch_size or side < patch_size:
            near = max(1, round(side / patch_size)) * patch_size
            raise InputError(
                f"{side} pixels are no multiple of the patch size {patch_size}",
                where=where,
                remedy=f"{near} is",
            )
