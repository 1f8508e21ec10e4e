"""Checkpoints: complete or ignored.

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

import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.coco import Category
from pipeline.config import build_config
from pipeline.errors import InputError
from train.config import TrainConfig
from train.encoding import make_encoding
from train.model import PanopticModel

log = logging.getLogger(__name__)

_TEMPORARY = ".tmp-"
ARCHITECTURE = "backbone.json"
Weights = Literal["model", "ema"]
"""Which weights of a checkpoint: the last ones, or their moving average."""


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a run stands.

    Attributes:
        step: Optimizer steps done; the next one is this number.
        cache_fingerprint: Of the cache it trains from.
        config: Of the run.
        categories: By label.
    """

    step: int
    cache_fingerprint: str
    config: TrainConfig
    categories: tuple[Category, ...]


def step_folder(checkpoints: Path, step: int) -> Path:
    """`checkpoints/step_%07d`."""
    return checkpoints / f"step_{step:07d}"


def rng_state() -> dict[str, Any]:
    """The state of this process' random number generators."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - libraries may draw from the global one
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """The inverse of `rng_state`."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


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
        file.name: {"size": file.stat().st_size, "sha256": _sha256(file)}
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


def latest_checkpoint(checkpoints: Path, *, deep: bool = False) -> Path | None:
    """The newest complete checkpoint, or None; a line names newer ones that are not.

    Args:
        checkpoints: Folder of checkpoints.
        deep: Read every byte, see `incomplete`.
    """
    for folder in sorted(checkpoints.glob("step_*"), reverse=True):
        problem = incomplete(folder, deep=deep)
        if not problem:
            return folder
        log.warning("%s is ignored: %s", folder, problem)
    return None


def incomplete(folder: Path, *, deep: bool = False) -> str | None:
    """What makes a checkpoint unusable; None where it is whole.

    Args:
        folder: The checkpoint.
        deep: Judge by SHA-256 too, not only by names and sizes.
    """
    try:
        files = json.loads((folder / "complete.json").read_text())
        for name, facts in files.items():
            if (folder / name).stat().st_size != facts["size"]:
                return f"{name} has another size than complete.json says"
            if deep and _sha256(folder / name) != facts["sha256"]:
                return f"{name} is damaged: its SHA-256 is not the one in complete.json"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "complete.json is damaged"
    return None


def find_checkpoint(path: Path) -> Path:
    """A checkpoint from its folder, or the newest of a run's folder.

    Raises:
        InputError: There is none, or it is not complete.
    """
    for folder in (path / "checkpoints", path):
        if found := latest_checkpoint(folder):
            return found
    problem = incomplete(path) if path.is_dir() else "no such folder"
    if problem:
        raise InputError(
            f"no complete checkpoint: {problem}",
            where=path,
            remedy="give a run's folder or one of its checkpoints/step_*",
        )
    return path


def read_state(folder: Path) -> TrainState:
    """The `state.json` of a checkpoint; InputError where it cannot be read."""
    path = folder / "state.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"unreadable: {error}", where=path) from None
    return build_config(TrainState, values, where=str(path))


def weights_file(folder: Path, kind: Weights) -> Path:
    """Where a checkpoint keeps weights."""
    return folder / f"{kind}.safetensors"


def load_model(
    path: Path, device: torch.device | str = "cpu", *, weights: Weights | None = None
) -> tuple[PanopticModel, TrainState]:
    """The trained model of a checkpoint or run folder, in evaluation mode.

    Args:
        path: Of the checkpoint or the run.
        device: To put it on.
        weights: The last ones or their moving average; by default the average where there is one.

    Raises:
        InputError: No complete checkpoint, none of those weights in it, or they are of another
            configuration.
    """
    folder = find_checkpoint(path)
    state = read_state(folder)
    config = state.config
    encoding = make_encoding(config.loss.encoding, config.loss.harmonics)
    model = PanopticModel(
        config.model,
        encoding.channels,
        len(state.categories),
        load_weights=False,
        architecture=folder / ARCHITECTURE,
    )
    kind = weights or ("ema" if weights_file(folder, "ema").exists() else "model")
    load_weights(model, folder, kind)
    return model.to(device).eval(), state


def load_weights(model: PanopticModel, folder: Path, kind: Weights = "model") -> None:
    """Loads weights strictly; InputError where there are none or they do not fit."""
    path = weights_file(folder, kind)
    if kind == "ema" and not path.exists():
        raise InputError(
            "no moving average of the weights",
            where=folder,
            remedy="use weights `model`, or train with --set ema=0.9999",
        )
    try:
        model.load_state_dict(load_file(path))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(
            f"weights do not fit the model: {str(error).splitlines()[0]}",
            where=path,
            remedy="the checkpoint is damaged or of another configuration",
        ) from None


def load_training(
    folder: Path,
    model: PanopticModel,
    optimizer: torch.optim.Optimizer,
    rank: int,
    ema: PanopticModel | None = None,
) -> TrainState:
    """Puts a run back where a checkpoint was taken.

    Raises:
        InputError: The weights do not fit the model, or the rest cannot be read.
    """
    state = read_state(folder)
    load_weights(model, folder)
    if ema is not None:
        load_weights(ema, folder, "ema")
    try:
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu"))
        generators = folder / f"rng_{rank}.pt"
        if generators.exists():  # another number of ranks draws afresh
            set_rng_state(torch.load(generators, weights_only=False))
    except (OSError, EOFError, RuntimeError, LookupError, ValueError, UnpicklingError) as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise InputError(
            f"cannot be resumed from: {reason[:160]}",
            where=folder,
            remedy="remove it to go on from an earlier one",
        ) from None
    return state


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
