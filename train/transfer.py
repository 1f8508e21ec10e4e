"""`model.init`: a run that starts from the weights of an earlier one.

Encoder, decoder and heads come in where they fit. The rows of the semantic head are matched by the
names of categories, the position embeddings are resized, and what does not fit starts anew.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.terminal import table
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.train.config import TrainConfig
from panoptic_cache.train.encoding import make_encoding
from panoptic_cache.train.model import PanopticModel
from panoptic_cache.train.restore import ARCHITECTURE, TrainState, find_checkpoint, load_model

log = logging.getLogger(__name__)

POSITIONS = "encoder.pos_embed"
LISTED = 8
"""Names of categories that a line of the table has room for."""


def first_model(config: TrainConfig, categories: Sequence[Category]) -> PanopticModel:
    """The model that a run begins with: pretrained, random, or from `model.init`.

    Raises:
        InputError: There is no such checkpoint, its backbone is another, or it has no category of
            this run.
    """
    code = make_encoding(config.loss.encoding, config.loss.harmonics)
    if not config.model.init:
        return PanopticModel(config.model, code.channels, len(categories))
    folder = find_checkpoint(Path(config.model.init))
    with torch.random.fork_rng(devices=[]):  # what starts anew starts as it would have without
        earlier, state = load_model(folder)
    published = config.model.backbone == state.config.model.backbone != "random"
    model = PanopticModel(
        config.model,
        code.channels,
        len(categories),
        load_weights=False,
        architecture=folder / ARCHITECTURE if published else None,  # then no hub is asked
    )
    where = f"model.init = {folder}"
    check_backbone(model, earlier, where)
    rows = transfer(model, earlier, config=config, state=state, categories=categories, where=where)
    log.info("weights of %s, step %d\n%s", folder, state.step, table(("", ""), rows, left=2))
    return model


def transfer(
    model: PanopticModel,
    earlier: PanopticModel,
    *,
    config: TrainConfig,
    state: TrainState,
    categories: Sequence[Category],
    where: str,
) -> list[tuple[str, str]]:
    """Puts the weights of an earlier model into a new one; a table of what came in."""
    mine, theirs = model.weights(), earlier.weights()
    taken = {name: theirs[name] for name in mine if name.startswith("encoder.")}
    rows = [("encoder", f"{len(taken)} tensors come in")]
    if POSITIONS in mine and mine[POSITIONS].shape != theirs[POSITIONS].shape:
        side = math.isqrt(mine[POSITIONS].shape[1] - 1)
        taken[POSITIONS] = resize_positions(theirs[POSITIONS], side)
        rows.append(("", f"position embeddings are resized to {side} x {side}"))

    names = [name for name in mine if name.startswith("decoder.")]
    same = [n for n in names if n in theirs and mine[n].shape == theirs[n].shape]
    taken |= {name: theirs[name] for name in same}
    rows.append(("decoder", f"{len(same)} tensors come in, {len(names) - len(same)} are new"))

    now, then = config.loss, state.config.loss
    codes = [make_encoding(loss.encoding, loss.harmonics) for loss in (now, then)]
    width = model.instance_head.in_channels == earlier.instance_head.in_channels
    heads = width and config.model.init_heads
    why = "the decoder has another width" if config.model.init_heads else "init_heads is off"
    if heads and codes[0] == codes[1]:
        taken |= {name: theirs[name] for name in mine if name.startswith("instance_head.")}
        rows.append(("instance head", "comes in"))
    else:
        rows.append(("instance head", f"is new: {'the code is another' if heads else why}"))
    if not heads:
        rows.append(("semantic head", f"is new: {why}"))
    else:
        label_of = {category.name: category.label for category in state.categories}
        common = [category for category in categories if category.name in label_of]
        if not common:
            raise InputError(
                f"no category in common: it knows {_listed(label_of)}, this run "
                f"{_listed([category.name for category in categories])}",
                where=where,
                remedy="rename the categories, or --set model.init_heads=false for new heads",
            )
        here = [category.label for category in common]
        there = [label_of[category.name] for category in common]
        for name in ("semantic_head.weight", "semantic_head.bias"):
            taken[name] = mine[name].clone()
            taken[name][here] = theirs[name][there]
        known = [category.name for category in common]
        fresh = [category.name for category in categories if category.name not in known]
        dropped = [name for name in label_of if name not in known]
        parts = (("come in", known), ("are new", fresh), ("are dropped", dropped))
        rows += [
            ("" if number else "semantic head", f"{len(which)} categories {what}: {_listed(which)}")
            for number, (what, which) in enumerate(parts)
            if which
        ]
    model.take({name: taken.get(name, value) for name, value in mine.items()})
    return rows


def check_backbone(model: PanopticModel, earlier: PanopticModel, where: str) -> None:
    """Raises InputError where a model's encoder is not the earlier one, or less of its blocks."""
    designs = [each.encoder.config.to_dict() for each in (model, earlier)]
    names = ("model_type", "hidden_size", "num_attention_heads", "patch_size")
    differences = [
        f"{name} is {designs[1][name]}, here {designs[0][name]}"
        for name in names
        if designs[0][name] != designs[1][name]
    ]
    blocks = [design["num_hidden_layers"] for design in designs]
    if blocks[0] > blocks[1]:
        differences.append(f"it has {blocks[1]} blocks, model.taps ask for {blocks[0]}")
    theirs = earlier.weights()
    differences += [
        f"{name} is {list(theirs[name].shape) if name in theirs else 'absent'}, here {[*v.shape]}"
        for name, v in model.weights().items()
        if name.startswith("encoder.") and name != POSITIONS
        if name not in theirs or theirs[name].shape != v.shape
    ]
    if differences:
        raise InputError(
            f"its backbone is another: {differences[0]}",
            where=where,
            remedy="give model.backbone and model.random as its state.json has them",
        )


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Position embeddings (1, 1 + n * n, hidden) as (1, 1 + side * side, hidden)."""
    first, grid = positions[:, :1], positions[:, 1:]
    n = math.isqrt(grid.shape[1])
    maps = grid.reshape(1, n, n, -1).permute(0, 3, 1, 2)  # (1, hidden, n, n)
    maps = F.interpolate(maps, (side, side), mode="bicubic", antialias=True)
    return torch.cat([first, maps.flatten(2).transpose(1, 2)], dim=1)


def _listed(names: Sequence[str] | dict[str, int]) -> str:
    shown = ", ".join(list(names)[:LISTED])
    return f"{shown} and {len(names) - LISTED} more" if len(names) > LISTED else shown
