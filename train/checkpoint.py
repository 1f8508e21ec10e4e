"""Checkpoints written: complete or ignored. `train/restore.py` reads them.

A checkpoint is a folder `step_%07d`:

    model.safetensors   the weights, by the names of `backbone.own_name`
    ema.safetensors     their moving average, if the run keeps one
    backbone.json       the encoder's architecture, so that loading needs no hub
    optimizer.pt        the optimizer's state, by the same names; with fp16 the scale of the loss
    rng_RANK.pt         the random number generators of each rank
    state.json          step, configuration, categories, versions; can be read with cat
    complete.json       size and SHA-256 of every file above; written last

It is written under a temporary name and renamed once `complete.json` is in place, so a kill at any
moment leaves the earlier checkpoints untouched.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import sync_folder
from panoptic_cache.train.backbone import own_name
from panoptic_cache.train.model import PanopticModel
from panoptic_cache.train.ranks import Ranks
from panoptic_cache.train.restore import (
    ARCHITECTURE,
    TrainState,
    file_sha256,
    incomplete,
    latest_checkpoint,
    weights_file,
)

_TEMPORARY = ".tmp-"


def save_checkpoint(
    ranks: Ranks,
    checkpoints: Path,
    state: TrainState,
    *,
    model: PanopticModel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
    ema: PanopticModel | None = None,
    keep: int,
) -> Path:
    """Writes a checkpoint, whole or not at all; call on every rank.

    Of the complete ones, `keep` stay, this one included. Where it cannot be written, InputError:
    what there is of it is removed, earlier ones stay.
    """
    folder = checkpoints / f"{_TEMPORARY}step_{state.step:07d}"

    def whole_or_not(write: Callable[[], Path]) -> Path:
        try:
            return write()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)  # makes room on a full disk
            before = latest_checkpoint(checkpoints)
            raise InputError(
                f"cannot write the checkpoint: {str(error).splitlines()[0]}",
                where=checkpoints,
                remedy=f"make room or rights, then --resume; {before.name if before else 'none'} is"
                " the last complete one",
                code="write",
            ) from None

    def write_shared() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_file(model.weights(), weights_file(folder, "model"))
        if ema is not None:
            save_file(ema.weights(), weights_file(folder, "ema"))
        model.encoder.config.to_json_file(folder / ARCHITECTURE, use_diff=False)
        (folder / "state.json").write_text(state.to_json())
        known = optimizer_state(model, optimizer)
        if scaler is not None:
            known["scaler"] = scaler.state_dict()
        return _save(known, folder / "optimizer.pt")

    ranks.first(lambda: whole_or_not(write_shared))
    own = folder / f"rng_{ranks.rank}.pt"
    ranks.gather(lambda: whole_or_not(lambda: _save(rng_state(), own)))
    return ranks.first(lambda: whole_or_not(lambda: _finish(folder, keep)))


def rng_state() -> dict[str, Any]:
    """The state of this process' random number generators, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - libraries draw from the global one
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def optimizer_state(model: PanopticModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What the optimizer knows of each parameter that it has changed, by name."""
    states = ((own_name(name), optimizer.state.get(p)) for name, p in model.named_parameters())
    return {name: state for name, state in states if state}


def _save(values: Any, path: Path) -> Path:
    try:
        torch.save(values, path)
    except RuntimeError as error:  # torch loses the system's own reason
        if "CUDA" in str(error):
            raise
        raise OSError(f"{path.name} was cut short, as on a full disk") from None
    return path


def _finish(folder: Path, keep: int) -> Path:
    """Vouches for the files, renames the folder and prunes older ones."""
    files = {
        file.name: {"size": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(folder.iterdir())
    }
    (folder / "complete.json").write_text(json.dumps(files, indent=1) + "\n")
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
    final = folder.with_name(folder.name.removeprefix(_TEMPORARY))
    if final.exists():
        shutil.rmtree(final)
    folder.rename(final)
    sync_folder(final.parent)
    folders = sorted(final.parent.glob("step_*"))
    # The run began at the newest complete checkpoint, so a newer one than `final` is damaged.
    kept = [folder for folder in folders if folder <= final and not incomplete(folder)][-keep:]
    left_over = final.parent.glob(f"{_TEMPORARY}*")  # by a kill
    for old in {*folders, *left_over} - {*kept}:
        shutil.rmtree(old)
    return final
