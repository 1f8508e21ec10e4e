"""Which settings a run may go on with, and which make it another run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.train.config import TrainConfig
from panoptic_cache.train.restore import TrainState

MAY_CHANGE = frozenset(
    {
        *("out", "epochs", "steps", "precision", "compile"),
        *("checkpoint_every", "keep", "log_every", "pictures_every", "trackers"),
        *("data.cache", "data.reader", "data.micro_batch", "data.workers", "data.upscale"),
        "model.gradient_checkpointing",
        *("optim.lr", "optim.min_lr", "optim.warmup_epochs", "optim.clip_norm"),
        *(f"validation.{name}" for name in ("cache", "every", "samples", "metric")),
    }
)
"""Settings that a run may be resumed with other values of; the rest makes it another run."""


def check_same_run(state: TrainState, config: TrainConfig, cache_fingerprint: str) -> None:
    """Raises InputError where a checkpoint belongs to another model or another cache."""
    if state.cache_fingerprint != cache_fingerprint:
        raise InputError(
            "the cache is not the one this run began with",
            where=config.data.cache,
            remedy="resume with its cache, or start another run",
        )
    before, now = flat(state.config.to_dict()), flat(config.to_dict())
    changed = [
        f"{name} was {before.get(name)}, now {now.get(name)}"
        for name in sorted((before.keys() | now.keys()) - MAY_CHANGE)
        if before.get(name) != now.get(name)  # what is None is left out
    ]
    if changed:
        raise InputError(
            f"the checkpoint is of another configuration: {'; '.join(changed)}",
            where=config.out,
            remedy="resume with its config.toml, or start another run",
        )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names, as `--set` takes them."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        result |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return result
