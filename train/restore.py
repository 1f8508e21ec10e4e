"""Models of checkpoints: loaded to predict, to go on, or to begin another run (`model.init`).

A run that begins from an earlier one takes its encoder, decoder and heads where they fit. Rows of
the semantic head go by the names of categories, position embeddings are resized, and what does not
fit starts anew. `train/checkpoint.py` says what is in a checkpoint.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from panoptic_cache.pipeline.base.config import decode_json
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.terminal import table
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.train.backbone import own_name, own_weights
from panoptic_cache.train.checkpoint import (
    ARCHITECTURE,
    VERSIONS,
    TrainState,
    Weights,
    file_sha256,
    find_checkpoint,
    read_state,
    read_tensors,
    set_rng_state,
    weights_file,
)
from panoptic_cache.train.config import TrainConfig
from panoptic_cache.train.encoding import make_encoding
from panoptic_cache.train.model import PanopticModel, new_model

log = logging.getLogger(__name__)

UNFIT = (
    *(ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    *(EOFError, SafetensorError, UnpicklingError),
)
"""What building or loading raises where a file is damaged or made up."""
POSITIONS = "encoder.pos_embed"
LISTED = 8
"""Names of categories that a line of the table has room for."""


def load_model(
    path: Path, device: torch.device | str = "cpu", *, weights: Weights | None = None
) -> tuple[PanopticModel, TrainState]:
    """The trained model of a checkpoint or run folder, in evaluation mode.

    The weights are the last ones or their moving average; by default the average if there is one.
    """
    folder = find_checkpoint(path)
    state = read_state(folder)
    model = build_model(folder, state.config, state.categories)
    kind = weights or ("ema" if weights_file(folder, "ema").exists() else "model")
    load_weights(model, folder, kind, checked=True)
    return model.to(device).eval(), state


def build_model(folder: Path, config: TrainConfig, categories: Sequence[Category]) -> PanopticModel:
    """The model that a checkpoint's weights fit, without them.

    A checkpoint may come from a stranger, and sizes of 10^9 would be built until memory ends: so
    the sizes are compared first with those that the weights have on disk.
    """
    file, architecture = weights_file(folder, "model"), folder / ARCHITECTURE
    try:
        with safe_open(file, "pt") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        shaped = {name: torch.empty(size, device="meta") for name, size in shapes.items()}
        found = {name: list(value.shape) for name, value in own_weights(shaped).items()}
        blocks = {name.split(".")[2] for name in found if name.startswith("encoder.blocks.")}
        if config.model.taps[-1] > len(blocks):
            raise ValueError(f"they have {len(blocks)} blocks, model.taps {config.model.taps}")
        with torch.device("meta"):
            fitting = new_model(
                config, len(categories), load_weights=False, architecture=architecture
            )
        wanted = {name: list(value.shape) for name, value in fitting.weights().items()}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                sizes = [str(each.get(name, "absent")) for each in (found, wanted)]
                raise ValueError(f"{name} is {sizes[0]}, by the configuration {sizes[1]}")
    except UNFIT as error:
        raise _misfit(error, file) from None
    return new_model(config, len(categories), load_weights=False, architecture=architecture)


def _misfit(error: Exception, file: Path) -> InputError:
    """What does not fit, and which versions wrote and read it."""
    try:
        wrote = read_state(file.parent).versions
    except InputError:
        wrote = {}
    then, now = (" ".join(f"{k} {v}" for k, v in each.items()) for each in (wrote, VERSIONS))
    return InputError(
        f"weights do not fit the model: {str(error).splitlines()[0]}",
        where=file,
        remedy="the checkpoint is damaged or of another configuration; written by "
        f"{then or 'versions that it does not name'}, read by {now}",
    )


def load_weights(
    model: PanopticModel, folder: Path, kind: Weights = "model", *, checked: bool = False
) -> None:
    """Loads weights strictly; `checked` compares their SHA-256 first: damaged ones predict."""
    path = weights_file(folder, kind)
    if kind == "ema" and not path.exists():
        raise InputError(
            "no moving average of the weights",
            where=folder,
            remedy="use weights `model`, or train with --set ema=0.9999",
        )
    facts = decode_json((folder / "complete.json").read_bytes(), dict) if checked else {}
    if path.name in facts and file_sha256(path) != facts[path.name]["sha256"]:
        raise InputError(
            "damaged: its SHA-256 is not the one in complete.json",
            where=path,
            remedy="copy it again, or use an earlier checkpoint",
            code="weights-damaged",
        )
    try:
        model.take(own_weights(load_file(path)))
    except UNFIT as error:
        raise _misfit(error, path) from None


# To go on


def load_training(
    folder: Path,
    model: PanopticModel,
    optimizer: torch.optim.Optimizer,
    rank: int,
    *,
    ema: PanopticModel | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> TrainState:
    """Puts a run back to where a checkpoint was taken."""
    load_weights(model, folder)
    if ema is not None:
        load_weights(ema, folder, "ema")
    try:
        saved = read_tensors(folder / "optimizer.pt")
        known = saved
        if "param_groups" not in saved:  # else version 0.1 saved it, by numbers
            names = {parameter: own_name(name) for name, parameter in model.named_parameters()}
            held = [names[p] for group in optimizer.param_groups for p in group["params"]]
            moments = {n: saved[name] for n, name in enumerate(held) if name in saved}
            known = {**optimizer.state_dict(), "state": moments}
        optimizer.load_state_dict(known)
        if scaler is not None and "scaler" in saved:  # else the run had another precision
            scaler.load_state_dict(saved["scaler"])
        generators = folder / f"rng_{rank}.pt"
        if generators.exists():  # with more ranks than before, the new ones draw afresh
            set_rng_state(read_tensors(generators))
    except UNFIT as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise InputError(
            f"cannot be resumed from: {reason[:160]}",
            where=folder,
            remedy="remove it to go on from an earlier one",
        ) from None
    return read_state(folder)


# To begin another run


def first_model(config: TrainConfig, categories: Sequence[Category]) -> PanopticModel:
    """The model that a run begins with: pretrained, random, or from `model.init`.

    InputError where that is no checkpoint, has another backbone, or no category of this run.
    """
    if not config.model.init:
        return new_model(config, len(categories))
    folder = find_checkpoint(Path(config.model.init))
    with torch.random.fork_rng(devices=[]):  # what starts anew starts as it would have without
        earlier, state = load_model(folder)
    published = config.model.backbone == state.config.model.backbone != "random"
    architecture = folder / ARCHITECTURE if published else None  # then no hub is asked
    model = new_model(config, len(categories), load_weights=False, architecture=architecture)
    where = f"model.init = {folder}"
    check_backbone(model, earlier, where)
    rows = transfer(model, earlier, (config, categories), state, where)
    log.info("weights of %s, step %d\n%s", folder, state.step, table(("", ""), rows, left=2))
    return model


def check_backbone(model: PanopticModel, earlier: PanopticModel, where: str) -> None:
    """Raises InputError where a model's encoder is not the earlier one, or less of its blocks."""
    here, there = (each.encoder.config.to_dict() for each in (model, earlier))
    names = ("model_type", "hidden_size", "num_attention_heads", "patch_size")
    problems = [
        f"{name} is {there[name]}, here {here[name]}" for name in names if here[name] != there[name]
    ]
    blocks, asked = there["num_hidden_layers"], here["num_hidden_layers"]
    if asked > blocks:
        problems.append(f"it has {blocks} blocks, model.taps ask for {asked}")
    mine, theirs = (
        {name: list(v.shape) for name, v in each.weights().items() if name.startswith("encoder.")}
        for each in (model, earlier)
    )
    problems += [
        f"{name} is {theirs.get(name, 'absent')}, here {shape}"
        for name, shape in mine.items()
        if name != POSITIONS and theirs.get(name) != shape
    ]
    if problems:
        raise InputError(
            f"its backbone is another: {problems[0]}",
            where=where,
            remedy="give model.backbone and model.random as its state.json has them",
        )


def transfer(
    model: PanopticModel,
    earlier: PanopticModel,
    run: tuple[TrainConfig, Sequence[Category]],
    state: TrainState,
    where: str,
) -> list[tuple[str, str]]:
    """Puts the weights of an earlier model into a new one; a table of what came in."""
    (config, categories), mine, theirs = run, model.weights(), earlier.weights()
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

    fresh = "" if config.model.init_heads else "is new: init_heads is off"
    if not fresh and model.instance_head.in_channels != earlier.instance_head.in_channels:
        fresh = "is new: the decoder has another width"
    codes = [
        make_encoding(each.encoding, each.harmonics) for each in (config.loss, state.config.loss)
    ]
    other = "" if codes[0] == codes[1] else "is new: the code is another"
    rows.append(("instance head", fresh or other or "comes in"))
    if not (fresh or other):
        taken |= {name: theirs[name] for name in mine if name.startswith("instance_head.")}
    if fresh:
        rows.append(("semantic head", fresh))
    else:
        label_of = {category.name: category.label for category in state.categories}
        now = {category.name: category.label for category in categories}
        parts = {
            "come in": [name for name in now if name in label_of],
            "are new": [name for name in now if name not in label_of],
            "are dropped": [name for name in label_of if name not in now],
        }
        known = parts["come in"]
        if not known:
            raise InputError(
                f"no category in common: it knows {_listed([*label_of])}, this run "
                f"{_listed([*now])}",
                where=where,
                remedy="rename the categories, or --set model.init_heads=false for new heads",
            )
        for name in ("semantic_head.weight", "semantic_head.bias"):
            taken[name] = mine[name].clone()
            taken[name][[now[k] for k in known]] = theirs[name][[label_of[k] for k in known]]
        lines = [f"{len(n)} categories {what}: {_listed(n)}" for what, n in parts.items() if n]
        rows += zip(("semantic head", "", ""), lines, strict=False)
    model.take({**mine, **taken})
    return rows


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Position embeddings (1, 1 + n * n, hidden) as (1, 1 + side * side, hidden)."""
    first, grid = positions[:, :1], positions[:, 1:]
    n = math.isqrt(grid.shape[1])
    maps = grid.reshape(1, n, n, -1).permute(0, 3, 1, 2)  # (1, hidden, n, n)
    maps = F.interpolate(maps, (side, side), mode="bicubic", antialias=True)
    return torch.cat([first, maps.flatten(2).transpose(1, 2)], dim=1)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
