"""Backbone with four taps, four transposed convolutions, two heads (section 3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import InputError
from train.config import ModelConfig, RandomBackbone
from train.encoding import cell_centres

try:
    from transformers import Dinov2Backbone, Dinov2Config
except (ImportError, RuntimeError) as error:
    raise InputError(
        f"transformers cannot load its DINOv2: {str(error).splitlines()[0]}",
        remedy="a torchvision that does not match torch causes this: pip uninstall torchvision",
    ) from error

Task = Literal["instance", "semantic", "both"]

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Prediction:
    """The heads' outputs at the input's size; a head that was not asked for is None.

    Attributes:
        instance: (B, channels, S, S) codes.
        semantic: (B, C, S, S) logits.
    """

    instance: Tensor | None
    semantic: Tensor | None


class PanopticModel(nn.Module):
    """Photos to centroid codes and category logits.

    Args:
        config: The architecture.
        code_channels: Channels of the instance head.
        classes: Categories.
        load_weights: Load a pretrained backbone's weights; else only its architecture, as when a
            checkpoint follows.
        architecture: A checkpoint's `backbone.json`, which needs neither hub nor folder.
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
        self.decoder = Decoder(
            len(config.taps) * self.encoder.config.hidden_size, config.channels, config.strides
        )
        self.instance_head = nn.Conv2d(config.channels, code_channels, 3, padding=1)
        self.semantic_head = nn.Conv2d(config.channels, classes, 3, padding=1)
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(3, 1, 1), persistent=False)

    def forward(self, photo: Tensor, task: Task = "both") -> Prediction:
        """Predicts.

        Args:
            photo: (B, 3, S, T) uint8 RGB, or float in [0, 1]; S and T multiples of the patch size.
            task: Which heads to run.
        """
        size = photo.shape[-2:]
        features = self.features(photo)
        return Prediction(
            instance=None if task == "semantic" else self._head(self.instance_head, features, size),
            semantic=None if task == "instance" else self._head(self.semantic_head, features, size),
        )

    def features(self, photo: Tensor) -> Tensor:
        """The shared decoder's output, (B, channels, h, w)."""
        check_size(photo.shape[-2], photo.shape[-1], self.patch_size)
        scaled = photo.float() / 255 if photo.dtype == torch.uint8 else photo
        taps = self.encoder((scaled - self.mean) / self.std).feature_maps
        features: Tensor = self.decoder(torch.cat(taps, dim=1))
        return features

    @staticmethod
    def _head(head: nn.Module, features: Tensor, size: torch.Size) -> Tensor:
        # The head runs before the last resize: the same for a linear head up to its padding, and
        # cheaper by the square of the factor.
        output: Tensor = head(features)
        if output.shape[-2:] == size:
            return output
        return F.interpolate(output, size=size, mode="bilinear", align_corners=False)


class Decoder(nn.Module):
    """Four transposed convolutions: the first 2x2 over all taps, then three 3x3.

    Their sizes are those that meet the paper's parameter totals (Table 1).
    """

    def __init__(self, inputs: int, channels: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        first, *rest = strides
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(inputs, channels, first, stride=first),
            ChannelNorm(channels),
            nn.GELU(),
        ]
        for stride in rest:
            kernel = max(3, stride)
            layers += [
                nn.ConvTranspose2d(
                    channels,
                    channels,
                    kernel,
                    stride=stride,
                    padding=(kernel - stride + 1) // 2,
                    output_padding=(kernel - stride) % 2,
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
    """LayerNorm over the channels of a picture, which knows no batch and no size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        normed: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


def check_size(height: int, width: int, patch_size: int) -> None:
    """Raises InputError for a size that patches do not tile: it would be floored silently."""
    for side in (height, width):
        if side % patch_size or side < patch_size:
            near = max(1, round(side / patch_size)) * patch_size
            raise InputError(
                f"{side} pixels are no multiple of the patch size {patch_size}",
                where="data.size",
                remedy=f"{near} is",
            )


def make_backbone(
    config: ModelConfig, *, load_weights: bool = True, architecture: Path | None = None
) -> Any:
    """A `Dinov2Backbone` whose feature maps are the taps; see `PanopticModel` for the arguments.

    Raises:
        InputError: No such backbone, no weights, or taps beyond its last block.
    """
    random = config.backbone == "random"
    if architecture is not None:
        design = Dinov2Config.from_json_file(architecture)
    elif random:
        design = _random_config(config.random)
    else:
        design = _named_config(config.backbone)
    blocks, last = design.num_hidden_layers, max(config.taps)
    if last > blocks:
        raise InputError(
            f"tap {last} lies beyond the backbone's {blocks} blocks",
            where="model.taps",
            remedy=f"choose from 1..{blocks}",
        )
    # Blocks above the last tap would compute for nothing, and without gradient stop DDP.
    design.num_hidden_layers = last
    design.drop_path_rate = config.drop_path
    design.stage_names = ["stem", *(f"stage{block}" for block in range(1, last + 1))]
    design.set_output_features_output_indices(out_features=None, out_indices=list(config.taps))
    if load_weights and not random:
        backbone = _load_weights(config.backbone, design)
    else:
        backbone = Dinov2Backbone(design)
    if load_weights and random:
        start_from_sincos(backbone)
    backbone.embeddings.mask_token.requires_grad_(False)  # never used: it would stop DDP
    if config.gradient_checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
    return backbone


def _random_config(random: RandomBackbone) -> Any:
    if random.hidden_size % random.heads or random.hidden_size % 4:
        raise InputError(
            f"hidden_size {random.hidden_size} must be a multiple of 4 and of heads {random.heads}",
            where="model.random",
        )
    return Dinov2Config(
        hidden_size=random.hidden_size,
        num_hidden_layers=random.layers,
        num_attention_heads=random.heads,
        patch_size=random.patch_size,
        image_size=random.grid * random.patch_size,
    )


_PUBLISHED = {
    "facebook/dinov2-small": (384, 12, 6),
    "facebook/dinov2-base": (768, 12, 12),
    "facebook/dinov2-large": (1024, 24, 16),
}
"""(hidden size, blocks, heads) of published DINOv2s: enough to build one without a network."""


def _named_config(name: str) -> Any:
    if name in _PUBLISHED:
        hidden, blocks, heads = _PUBLISHED[name]
        return Dinov2Config(
            hidden_size=hidden,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            patch_size=14,
            image_size=518,
        )
    try:
        return Dinov2Config.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no backbone of this name or folder: {str(error).splitlines()[0]}",
            where=name,
            remedy="give a hub name (and a network) or a folder that save_pretrained wrote",
        ) from None


def _load_weights(name: str, architecture: Any) -> Any:
    try:
        backbone, found = Dinov2Backbone.from_pretrained(
            name, config=architecture, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        where = "folder" if Path(name).is_dir() else "hub"
        raise InputError(
            f"weights cannot be loaded from the {where}: {str(error).splitlines()[0]}", where=name
        ) from None
    unused = {"embeddings.mask_token"}
    if missing := sorted({*found["missing_keys"]} - unused):  # they would stay random
        raise InputError(
            f"{len(missing)} weights are missing, {missing[0]} first",
            where=name,
            remedy="give weights of a DINOv2",
        )
    return backbone.float()  # whatever precision they were saved in


def start_from_sincos(backbone: Any, scale: float = 0.5) -> None:
    """Starts the position embeddings as 2-D sines and cosines.

    Centroids are absolute positions, which a random embedding hides from an encoder that has
    everything to learn.
    """
    positions = backbone.embeddings.position_embeddings  # (1, 1 + n * n, hidden)
    side = math.isqrt(positions.shape[1] - 1)
    quarter = positions.shape[2] // 4
    # From half a period over the picture to one over two patches, the finest a grid can hold.
    finest = math.log2(max(side, 2))
    frequencies = math.pi / 2 * 2 ** torch.linspace(0, finest, quarter)
    angles = cell_centres(side)[:, None] * frequencies  # (n, hidden / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (n, hidden / 2)
    grid = torch.cat(
        [
            axis[:, None].expand(side, side, -1),  # rows
            axis[None].expand(side, side, -1),  # columns
        ],
        dim=-1,
    )
    with torch.no_grad():
        positions.zero_()
        positions[0, 1:] = scale * grid.reshape(side * side, -1)
