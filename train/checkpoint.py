"""Checkpoints written: complete or ignored. `train/restore.py` reads them.

A checkpoint is a folder `step_%07d`:

    model.safetensors   the weights
    ema.safetensors     their moving average, where the run keeps one
    backbone.json       the encoder's architecture: no hub is needed to load it
    optimizer.pt        the optimizer's state
    rng_RANK.pt         the random number generators of each rank
    state.json          step, configuration, categories; can be read with cat
    complete.json       size and SHA-256 of every file above; written last

It is written under a temporary name and renamed when `complete.json` is in place, so a kill at any
moment leaves the earlier checkpoints untouched.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.train.generators import rng_state
from panoptic_cache.train.model import PanopticModel
from panoptic_cache.train.restore import (
    ARCHITECTURE,
    TrainState,
    Weights,
    file_sha256,
    incomplete,
    latest_checkpoint,
    weights_file,
)

_TEMPORARY = ".tmp-"


def step_folder(checkpoints: Path, step: int) -> Path:
    """`checkpoints/step_%07d`."""
    return checkpoints / f"step_{step:07d}"


def begun_folder(checkpoints: Path, step: int) -> Path:
    """The temporary folder that every rank writes into."""
    return checkpoints / f"{_TEMPORARY}step_{step:07d}"


def begin_checkpoint(checkpoints: Path, step: int) -> Path:
    """Makes the temporary folder; call on the main rank."""
    folder = begun_folder(checkpoints, step)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def save_checkpoint(
    accelerator: Accelerator,
    checkpoints: Path,
    state: TrainState,
    *,
    model: PanopticModel,
    optimizer: torch.optim.Optimizer,
    ema: PanopticModel | None,
    keep: int,
) -> Path:
    """Writes a checkpoint, whole or not at all; call on every rank.

    Raises:
        InputError: It cannot be written; what there is of it is removed, earlier ones stay.
    """
    folder = begun_folder(checkpoints, state.step)
    with _writing(folder):
        if accelerator.is_main_process:
            begin_checkpoint(checkpoints, state.step)
            write_checkpoint(folder, state, model, optimizer, ema)
        accelerator.wait_for_everyone()
        _save(rng_state(), folder / f"rng_{accelerator.process_index}.pt")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            finish_checkpoint(folder, keep)
    accelerator.wait_for_everyone()
    return step_folder(checkpoints, state.step)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Makes one line of a full disk, and room on it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        shutil.rmtree(folder, ignore_errors=True)
        before = latest_checkpoint(folder.parent)
        raise InputError(
            f"cannot write the checkpoint: {reason}",
            where=folder.parent,
            remedy=f"make room or rights, then --resume; {before.name if before else 'none'} is"
            " the last complete one",
            code="write",
        ) from None


def _save(values: Any, path: Path) -> None:
    try:
        torch.save(values, path)
    except RuntimeError as error:  # of many kinds; the system's own reason is lost
        if "CUDA" in str(error):
            raise
        raise OSError(f"{path.name} was cut short, as where a disk is full") from None


def write_checkpoint(
    folder: Path,
    state: TrainState,
    model: PanopticModel,
    optimizer: torch.optim.Optimizer,
    ema: PanopticModel | None = None,
) -> None:
    """Writes weights, optimizer and state; call on the main rank."""
    kinds: list[tuple[Weights, PanopticModel | None]] = [("model", model), ("ema", ema)]
    for kind, module in kinds:
        if module is not None:
            weights = {name: value.contiguous() for name, value in module.state_dict().items()}
            save_file(weights, weights_file(folder, kind))
    model.encoder.config.to_json_file(folder / ARCHITECTURE, use_diff=False)
    _save(optimizer.state_dict(), folder / "optimizer.pt")
    (folder / "state.json").write_text(json.dumps(asdict(state), indent=1) + "\n")


def finish_checkpoint(folder: Path, keep: int) -> Path:
    """Vouches for the files, renames the folder and prunes older ones; call on the main rank."""
    files = {
        file.name: {"size": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(folder.iterdir())
    }
    (folder / "complete.json").write_text(json.dumps(files, indent=1) + "\n")
    for file in folder.iterdir():
        _sync(file)
    _sync(folder)
    final = folder.with_name(folder.name.removeprefix(_TEMPORARY))
    if final.exists():
        shutil.rmtree(final)
    folder.rename(final)
    _sync(final.parent)
    folders = sorted(final.parent.glob("step_*"))
    # What is newer is damaged: the run would have gone on from there.
    kept = [folder for folder in folders if folder <= final and not incomplete(folder)][-keep:]
    # What goes is older, damaged, or was left half written by a kill.
    for old in {*folders, *final.parent.glob(f"{_TEMPORARY}*")} - {*kept}:
        shutil.rmtree(old)
    return final


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
