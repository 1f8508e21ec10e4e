"""Checkpoints read back: which one is whole, its state, its weights, and whether a run may go on.

`train/checkpoint.py` writes them and says what is in one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from panoptic_cache.pipeline.base.config import build_config, decode_json
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.train.backbone import own_name, own_weights
from panoptic_cache.train.config import TrainConfig, ValidationConfig
from panoptic_cache.train.encoding import make_encoding
from panoptic_cache.train.model import PanopticModel

log = logging.getLogger(__name__)

ARCHITECTURE = "backbone.json"
BEST = "best"
"""Folder of the run that holds the checkpoint of the highest PQ."""
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}
Weights = Literal["model", "ema"]
"""Which weights of a checkpoint: the last ones, or their moving average."""

UNFIT = (
    *(ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    SafetensorError,
)
"""What building or loading raises where a file is damaged or made up."""

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
    problem = incomplete(path) if path.is_dir() else "no such folder"
    if problem:
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
    file = weights_file(folder, "model")
    encoding = make_encoding(config.loss.encoding, config.loss.harmonics)

    def build() -> PanopticModel:
        return PanopticModel(
            config.model,
            encoding.channels,
            len(categories),
            load_weights=False,
            architecture=folder / ARCHITECTURE,
        )

    try:
        with safe_open(file, "pt") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        shaped = {name: torch.empty(size, device="meta") for name, size in shapes.items()}
        found = {name: list(value.shape) for name, value in own_weights(shaped).items()}
        blocks = {name.split(".")[2] for name in found if name.startswith("encoder.blocks.")}
        if config.model.taps[-1] > len(blocks):
            raise ValueError(f"they have {len(blocks)} blocks, model.taps {config.model.taps}")
        with torch.device("meta"):
            wanted = {name: list(value.shape) for name, value in build().weights().items()}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                sizes = [str(each.get(name, "absent")) for each in (found, wanted)]
                raise ValueError(f"{name} is {sizes[0]}, by the configuration {sizes[1]}")
    except UNFIT as error:
        raise _misfit(error, file) from None
    return build()


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
        saved = _load(folder / "optimizer.pt")
        load_optimizer(optimizer, model, saved)
        if scaler is not None and "scaler" in saved:  # else the run had another precision
            scaler.load_state_dict(saved["scaler"])
        generators = folder / f"rng_{rank}.pt"
        if generators.exists():  # with more ranks than before, the new ones draw afresh
            set_rng_state(_load(generators))
    except (OSError, EOFError, RuntimeError, LookupError, ValueError, UnpicklingError) as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise InputError(
            f"cannot be resumed from: {reason[:160]}",
            where=folder,
            remedy="remove it to go on from an earlier one",
        ) from None
    return read_state(folder)


def load_optimizer(
    optimizer: torch.optim.Optimizer, model: PanopticModel, saved: dict[str, Any]
) -> None:
    """Puts back what `checkpoint.optimizer_state` gave; version 0.1 saved by numbers, not names."""
    if "param_groups" not in saved:
        names = {parameter: own_name(name) for name, parameter in model.named_parameters()}
        now = optimizer.state_dict()
        held = [names[p] for group in optimizer.param_groups for p in group["params"]]
        saved = {**now, "state": {n: saved[name] for n, name in enumerate(held) if name in saved}}
    optimizer.load_state_dict(saved)


def _load(path: Path) -> Any:
    """Unpickles tensors and plain values; in `rng_*.pt` of version 0.1 also a NumPy array."""
    make_array = np.empty(0).__reduce__()[0]
    modules = ("numpy._core.multiarray", "numpy.core.multiarray")  # of NumPy 2 and 1
    safe: list[Any] = [np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    safe += [(make_array, f"{module}._reconstruct") for module in modules]
    with torch.serialization.safe_globals(safe):
        return torch.load(path, map_location="cpu", weights_only=True)


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Puts back what `train.checkpoint.rng_state` gave."""
    name, keys, *rest = state["numpy"]
    torch.set_rng_state(state["torch"])
    np.random.set_state((name, np.asarray(keys, np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


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
    return {k: v for k, v in _flat(config.to_dict()).items() if k not in MAY_CHANGE}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        result |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return result


def file_sha256(path: Path) -> str:
    """Hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
