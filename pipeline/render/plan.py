"""What will be rendered, before anything is: a pure function of the input and the settings."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from panoptic_cache.pipeline.base.config import RenderConfig, fingerprint
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.cache.index import shard_name
from panoptic_cache.pipeline.cache.sample import FORMAT_VERSION
from panoptic_cache.pipeline.coco import CocoPanoptic, PanopticRecord, Rejection


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

    @property
    def settings(self) -> dict[str, Any]:
        """The split and the settings as plain values."""
        return {"split": self.split, **asdict(self.config)}


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
