"""What trains and how fast: frozen parts, layer decay, the schedule, the average of the weights."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.train.backbone import own_name
from panoptic_cache.train.config import ModelConfig, OptimConfig
from panoptic_cache.train.model import PanopticModel

_UNDECAYED = ("pos_embed", "_token", "_tokens")
"""How the names of matrices end that no weight decay may pull towards zero."""


def layer_id(name: str, blocks: int) -> int:
    """0 for the embeddings, i + 1 for block i, blocks + 1 for whatever comes after."""
    part, *rest = own_name(name).split(".")
    if part != "encoder" or rest[0] == "norm":
        return blocks + 1
    return int(rest[1]) + 1 if rest[0] == "blocks" else 0


def set_trainable(model: PanopticModel, config: ModelConfig, *, thawed: bool = False) -> None:
    """Freezes what a configuration freezes; `thawed`, once `freeze_epochs` are over."""
    blocks = model.encoder.config.num_hidden_layers
    training = blocks + 1 if config.trainable_blocks is None else config.trainable_blocks
    if config.trainable_blocks is not None and training > blocks:
        raise InputError(
            f"{training} blocks cannot train, the encoder has {blocks} up to its last tap",
            where="model.trainable_blocks",
            remedy=f"choose from 1..{blocks}",
        )
    for name, parameter in model.named_parameters():
        frozen = name.startswith(f"{config.freeze}.") and not thawed
        below = layer_id(name, blocks) <= blocks - training  # of all blocks that train
        # The mask token is never used: without a gradient it would stop DDP.
        parameter.requires_grad_(not (frozen or below or name.endswith("mask_token")))


def parameter_groups(model: nn.Module, blocks: int, config: OptimConfig) -> list[dict[str, Any]]:
    """AdamW groups of what trains; `scale` is layer_decay^(blocks + 1 - id), 1 after the encoder.

    With a rate of its own, the encoder's norm and last block have that, and decay begins below. No
    weight decay on vectors (biases, norms, LayerScale), position embeddings and tokens.
    """
    share = 1.0 if config.encoder_lr is None else config.encoder_lr / config.lr
    groups: dict[tuple[int, bool, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and not own_name(name).endswith(_UNDECAYED)
            own = config.encoder_lr is not None and name.startswith("encoder.")
            groups[layer_id(name, blocks), decayed, own].append(parameter)
    return [
        {
            "params": parameters,
            "scale": (share if own else 1.0)
            * config.layer_decay ** (max(0, blocks - layer) if own else blocks + 1 - layer),
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for (layer, decayed, own), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]


def learning_rate(config: OptimConfig, step: int, steps: int, warmup: int) -> float:
    """Of a 0-based step: linear warm-up, then a cosine to `min_lr` at the last step."""
    if step < warmup:
        return config.lr * (step + 1) / warmup
    part = (step - warmup) / max(1, steps - 1 - warmup)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * part)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets every group's rate, scaled by its layer."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


class Ema:
    """An exponential moving average of the weights, which often predicts better than the last ones.

    `Ema.model` holds it, in evaluation mode. A decay of 0.9999 looks back over 10,000 steps. Every
    rank keeps its own: weights are the same on all of them, so averages are too, bit for bit.
    """

    def __init__(self, model: PanopticModel, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, model: PanopticModel, step: int) -> None:
        """Takes the weights after 0-based `step` into the average."""
        # Early averages look back over few steps, so that they forget the weights at the start.
        decay = min(self._decay, (step + 1) / (step + 10))
        average = [value.data for value in self.model.parameters()]
        current = [value.data for value in model.parameters()]
        torch._foreach_lerp_(average, current, 1 - decay)
