"""Checkpoints as folders: written whole or not at all, found again, told apart from damaged ones.

A checkpoint is a folder `step_%07d`:

    model.safetensors   the weights, by the names of `backbone.own_name`
    ema.safetensors     their moving average, if the run keeps one
    backbone.json       the encoder's architecture, so that loading needs no hub
    optimizer.pt        the optimizer's state, by the same names; with fp16 the scale of the loss
    rng_RANK.pt         the random number generators of each rank
    state.json          step, configuration, categories, versions; can be read with cat
    complete.json       size and SHA-256 of every file above; written last

It is written under a temporary name and renamed once `complete.json` is in place, so a kill at any
moment leaves the earlier checkpoints untouched. `train/restore.py` makes models of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file

from panoptic_cache.pipeline.base.config import build_config, decode_json
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import sync_folder
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.train.backbone import own_name
from panoptic_cache.train.config import TrainConfig, ValidationConfig
from panoptic_cache.train.model import PanopticModel
from panoptic_cache.train.ranks import Ranks

log = logging.getLogger(__name__)

ARCHITECTURE = "backbone.json"
BEST = "best"
"""Folder of the run that holds the checkpoint of the highest PQ."""
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}
Weights = Literal["model", "ema"]
"""Which weights of a checkpoint: the last ones, or their moving average."""
_TEMPORARY = ".tmp-"
MAY_CHANGE = frozenset(
    {
        *("out", "epochs", "steps", "precision", "compile"),
        *("checkpoint_every", "keep", "log_every", "pictures_every", "trackers"),
        *("data.cache", "data.reader", "data.micro_batch", "data.workers", "data.upscale"),
        *("data.caches", "model.gradient_checkpointing"),
        *("optim.lr", "optim.encoder_lr", "optim.min_lr", "optim.warmup_epochs", "optim.clip_norm"),
        *(f"validation.{field.name}" for field in fields(ValidationConfig)),
    }
)
"""Settings that may change when a run goes on; any other change makes it another run."""


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a run stands."""

    step: int  # Optimizer steps done; the next one is this number
    cache_fingerprint: str  # Of the cache it trains from
    config: TrainConfig  # Of the run
    categories: tuple[Category, ...]  # By label
    # Of the libraries that wrote it; version 0.1 did not note them.
    versions: dict[str, str] = field(default_factory=dict, compare=False)

    def to_json(self) -> str:
        """The text of `state.json`, as these versions write it."""
        return json.dumps({**asdict(self), "versions": VERSIONS}, indent=1) + "\n"


def read_state(folder: Path) -> TrainState:
    """The `state.json` of a checkpoint; InputError if it cannot be read."""
    path = folder / "state.json"
    try:
        values = decode_json(path.read_bytes(), dict)
    except (OSError, ValueError) as error:
        raise InputError(f"unreadable: {error}", where=path) from None
    return build_config(TrainState, values, where=str(path))


def weights_file(folder: Path, kind: Weights) -> Path:
    """Where a checkpoint keeps weights."""
    return folder / f"{kind}.safetensors"


def read_tensors(path: Path) -> Any:
    """Unpickles tensors and plain values; in `rng_*.pt` of version 0.1 also a NumPy array."""
    make_array = np.empty(0).__reduce__()[0]
    modules = ("numpy._core.multiarray", "numpy.core.multiarray")  # of NumPy 2 and 1
    safe: list[Any] = [np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    safe += [(make_array, f"{module}._reconstruct") for module in modules]
    with torch.serialization.safe_globals(safe):
        return torch.load(path, map_location="cpu", weights_only=True)


def check_same_run(state: TrainState, config: TrainConfig, cache_fingerprint: str) -> None:
    """Raises InputError where a checkpoint belongs to another model or another cache."""
    if state.cache_fingerprint != cache_fingerprint:
        raise InputError(
            "the cache is not the one this run began with",
            where=", ".join(config.data.paths),
            remedy="resume with its cache, or start another run",
        )
    before, now = fixed_settings(state.config), fixed_settings(config)
    changed = [
        f"{name} was {before.get(name)}, now {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)  # what is None is left out
    ]
    if changed:
        raise InputError(
            f"the checkpoint is of another configuration: {'; '.join(changed)}",
            where=config.out,
            remedy="resume with its config.toml, or start another run",
        )


def fixed_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that make a run what it is, by their dotted names, as `--set` takes them."""
    found: dict[str, Any] = {}
    pending = [*config.to_dict().items()]
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{name}.{key}", inner) for key, inner in value.items()]
        elif name not in MAY_CHANGE:
            found[name] = value
    return found


# Finding


def find_checkpoint(path: Path) -> Path:
    """A checkpoint from its folder, or the newest of a run's folder, of its last stage."""
    stages = sorted(path.glob("stage-*"), key=lambda stage: (len(stage.name), stage.name))
    for folder in (path / "checkpoints", path, *(s / "checkpoints" for s in reversed(stages))):
        if found := latest_checkpoint(folder):
            return found
    if path.name == BEST and (path.parent / "checkpoints").is_dir():
        raise InputError(
            "no checkpoint was measured as the best",
            where=path,
            remedy=f"give {path.parent}, or train with --set validation.keep_best=true",
        )
    if problem := incomplete(path) if path.is_dir() else "no such folder":
        raise InputError(
            f"no complete checkpoint: {problem}",
            where=path,
            remedy="give a run's folder or one of its checkpoints/step_*",
        )
    return path


def checkpoint_to_resume(run: Path, resume: bool | int) -> Path | None:
    """A run's newest checkpoint, or that of a step; every byte of it is read."""
    if resume is True:
        return latest_checkpoint(run / "checkpoints", deep=True)
    found = sorted([*(run / "checkpoints").glob("step_*"), *(run / BEST).glob("step_*")])
    for folder in found:
        if folder.name == f"step_{resume:07d}" and not incomplete(folder, deep=True):
            return folder
    there = ", ".join(f"{int(folder.name[5:])}" for folder in found)
    raise InputError(
        f"no complete checkpoint of step {resume}",
        where=run,
        remedy=f"there are: {there or 'none'}",
    )


def latest_checkpoint(checkpoints: Path, *, deep: bool = False) -> Path | None:
    """The newest complete checkpoint, or None; newer ones that are incomplete are logged."""
    for folder in sorted(checkpoints.glob("step_*"), reverse=True):
        problem = incomplete(folder, deep=deep)
        if not problem:
            return folder
        log.warning("%s is ignored: %s", folder, problem)
    return None


def incomplete(folder: Path, *, deep: bool = False) -> str | None:
    """What makes a checkpoint unusable, or None; `deep` compares SHA-256 too, not only sizes."""
    try:
        files = decode_json((folder / "complete.json").read_bytes(), dict)
        for name, facts in files.items():
            if (folder / name).stat().st_size != facts["size"]:
                return f"{name} has another size than complete.json says"
            if deep and file_sha256(folder / name) != facts["sha256"]:
                return f"{name} is damaged: its SHA-256 is not the one in complete.json"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "complete.json is damaged"
    return None


def file_sha256(path: Path) -> str:
    """Hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Writing


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
        # By name, and only of what has changed.
        moments = ((own_name(name), optimizer.state.get(p)) for name, p in model.named_parameters())
        known: dict[str, Any] = {name: found for name, found in moments if found}
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


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Puts back what `rng_state` gave."""
    name, keys, *rest = state["numpy"]
    torch.set_rng_state(state["torch"])
    np.random.set_state((name, np.asarray(keys, np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


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
    shutil.rmtree(final, ignore_errors=True)  # a damaged one, else the rename says so
    folder.rename(final)
    sync_folder(final.parent)
    folders = sorted(final.parent.glob("step_*"))
    # The run began at the newest complete checkpoint, so a newer one than `final` is damaged.
    kept = [folder for folder in folders if folder <= final and not incomplete(folder)][-keep:]
    left_over = final.parent.glob(f"{_TEMPORARY}*")  # by a kill
    for old in {*folders, *left_over} - {*kept}:
        shutil.rmtree(old)
    return final
