"""What will be rendered, before anything is: a pure function of the input and the settings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from panoptic_cache.pipeline.base.config import RenderConfig, fingerprint
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage, cannot_read
from panoptic_cache.pipeline.cache.index import shard_name
from panoptic_cache.pipeline.cache.sample import FORMAT_VERSION
from panoptic_cache.pipeline.coco import CocoPanoptic, PanopticRecord, Rejection

PLAN_NAME = "plan.json"


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One task: a shard and the records that go into it, in this order."""

    name: str
    records: tuple[PanopticRecord, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be rendered, before anything is.

    Attributes:
        split: Names the shards.
        config: The settings.
        fingerprint: Of settings, annotation file, format version and the images to be tried:
            which ones lie on the disk decides what goes into which shard.
        shards: By name.
        rejections: Images that are left out already.
    """

    split: str
    config: RenderConfig
    fingerprint: str
    shards: tuple[ShardPlan, ...]
    rejections: tuple[Rejection, ...]


def make_plan(dataset: CocoPanoptic, split: str, config: RenderConfig) -> Plan:
    """Cuts the images, in a fixed permutation of their sorted keys, into shards.

    Raises:
        InputError: The split's name is none that shards could bear.
    """
    if split.startswith(".") or "/" in split:
        raise InputError(
            "shards are named after the split: no / and no leading dot", where=f"--split {split}"
        )
    order = np.random.default_rng(config.seed).permutation(len(dataset.records))
    records = [dataset.records[position] for position in order]
    step = config.samples_per_shard
    shards = tuple(
        ShardPlan(shard_name(split, number), tuple(records[start : start + step]))
        for number, start in enumerate(range(0, len(records), step))
    )
    keys = [record.key for record in dataset.records]
    mark = fingerprint(FORMAT_VERSION, split, dataset.digest, asdict(config), keys)
    return Plan(split, config, mark, shards, dataset.rejections)


def allowed(max_bad: float, images: int) -> int:
    """Images that may be left out: a fraction below 1, else a count."""
    if not 0 <= max_bad < math.inf:
        raise InputError(f"{max_bad} is neither a part nor a count of images", where="--max-bad")
    return int(max_bad * images) if max_bad < 1 else int(max_bad)


def encode_plan(mark: str, settings: Mapping[str, Any]) -> bytes:
    """The bytes of `plan.json`: a fingerprint, and the settings with the split before them."""
    values = {"fingerprint": mark, "settings": dict(settings)}
    return json.dumps(values, indent=1).encode() + b"\n"


def claim(storage: Storage, plan: Plan) -> None:
    """Writes the plan's settings, or refuses a folder that was begun with others."""
    if not is_claimed(storage, plan):
        settings = {"split": plan.split, **asdict(plan.config)}
        storage.write(PLAN_NAME, encode_plan(plan.fingerprint, settings))


def claimed_by(storage: Storage, file: str = PLAN_NAME) -> str | None:
    """The fingerprint of the plan that a folder or a shard is of; None where nothing says so.

    Args:
        storage: The folder.
        file: The plan, or a shard's sidecar.
    """
    try:
        return str(json.loads(storage.read(file))["fingerprint"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def is_claimed(storage: Storage, plan: Plan) -> bool:
    """Whether a folder was begun with this plan already; where its file is lost, it was not.

    Raises:
        InputError: It was begun with another one, or holds something else.
    """
    settings = {"split": plan.split, **asdict(plan.config)}
    try:
        found = json.loads(storage.read(PLAN_NAME))
        if found["fingerprint"] == plan.fingerprint:
            return True
        changed = [
            f"{name} was {found['settings'].get(name)}, now {value}"
            for name, value in settings.items()
            if found["settings"].get(name) != value
        ]
        raise InputError(
            "; ".join(changed)
            or "the annotation file, the set of images on the disk or the format changed",
            where=storage.url,
            remedy="the cache here was begun otherwise: use its settings or another folder",
            code="plan-changed",
        )
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise cannot_read(error, storage.path(PLAN_NAME)) from None
        what = "holds tars but no plan"
    except (ValueError, KeyError, TypeError, AttributeError):
        what = "plan damaged"
    names = [name for name in storage.sizes() if name.endswith(".tar")]
    if any(claimed_by(storage, name[:-3] + "json") != plan.fingerprint for name in names):
        raise InputError(what, where=storage.path(PLAN_NAME), remedy="use another folder")
    return False
