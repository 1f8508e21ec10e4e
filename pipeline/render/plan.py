"""What will be rendered, before anything is: a pure function of the input and the settings."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from panoptic_cache.pipeline.base.config import fingerprint
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import stamp
from panoptic_cache.pipeline.cache.sample import FORMAT_VERSION
from panoptic_cache.pipeline.coco import Category, CocoPanoptic, PanopticRecord, Rejection
from panoptic_cache.pipeline.tiles import check_tile


@dataclass(frozen=True, slots=True)
class RenderConfig:
    """Everything besides the input that decides the bytes of a cache."""

    # `native` keeps COCO's own size and the photo's own bytes; `squash` resizes to a square of
    # `size` and computes the targets after it, as the paper trains; `longest` scales the longer
    # side to `size`.
    fit: Literal["native", "squash", "longest"] = "native"
    size: int | None = None  # Pixels; none with `native`
    samples_per_shard: int = 256  # Images planned into one tar
    jpeg_quality: int = 95  # Of photos that were resized or converted
    seed: int = 0  # Of the fixed permutation that spreads the images over the shards
    tile: int | None = None  # Side of the tiles that images are cut into, pixels; none: not cut
    overlap: int = 0  # Pixels that neighbouring tiles share at least

    def __post_init__(self) -> None:
        fit = f"--fit {self.fit}"
        if self.fit == "native" and self.size is not None:
            remedy = "add --fit squash or --fit longest, or leave the size out"
            raise InputError("a size goes with another fit", f"{fit} --size {self.size}", remedy)
        if self.fit != "native" and (self.size is None or self.size < 1):
            raise InputError("this fit needs a size in pixels", fit, "add --size 420")
        if self.samples_per_shard < 1:
            raise InputError("a shard holds at least one sample", "--samples-per-shard")
        if not 1 <= self.jpeg_quality <= 100:
            raise InputError("JPEG quality is 1 to 100", f"jpeg_quality={self.jpeg_quality}")
        if self.seed < 0:
            raise InputError("a seed is 0 or more", f"seed={self.seed}")
        if self.tile is None and self.overlap:
            raise InputError("an overlap goes with tiles", "--overlap", "add --tile")
        if self.tile is not None:
            check_tile(self.tile, self.overlap, where="--tile and --overlap")
            if self.fit != "native":
                remedy = "leave --fit and --size out, or --tile"
                raise InputError("tiles are cut at native size", fit, remedy)

    def settings(self) -> dict[str, Any]:
        """Plain values; without those of tiles where there are none, as caches always were."""
        values = asdict(self)
        if self.tile is None:
            del values["tile"], values["overlap"]
        return values


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One job: a shard and the records that go into it, in this order."""

    name: str
    records: tuple[PanopticRecord, ...]

    def inputs(self) -> str:
        """Differs once the size or the time of a photo or PNG has changed."""
        return fingerprint([stamp(record.photo, record.png) for record in self.records])


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be rendered, before anything is."""

    split: str  # Names the shards
    config: RenderConfig  # The settings
    categories: tuple[Category, ...]  # By label
    images: int  # Annotated images of the split
    # Of settings, annotation file, format version and the images to be tried: which ones lie on the
    # disk decides what goes into which shard.
    fingerprint: str
    shards: tuple[ShardPlan, ...]  # By name
    rejections: tuple[Rejection, ...]  # Images that are left out already

    @property
    def settings(self) -> dict[str, Any]:
        """The split and the settings as plain values."""
        return {"split": self.split, **self.config.settings()}


def make_plan(dataset: CocoPanoptic, split: str, config: RenderConfig) -> Plan:
    """Cuts the images, in a fixed permutation of their sorted keys, into shards.

    InputError where shards cannot bear the split's name.
    """
    if split.startswith(".") or "/" in split:
        what = "shards are named after the split: no / and no leading dot"
        raise InputError(what, f"--split {split}")
    order = np.random.default_rng(config.seed).permutation(len(dataset.records))
    records = [dataset.records[position] for position in order]
    step = config.samples_per_shard
    shards = tuple(
        ShardPlan(f"{split}-{number:05d}", tuple(records[start : start + step]))
        for number, start in enumerate(range(0, len(records), step))
    )
    keys = [record.key for record in dataset.records]
    mark = fingerprint(FORMAT_VERSION, split, dataset.digest, config.settings(), keys)
    images = len(records) + len(dataset.rejections)
    return Plan(split, config, dataset.categories, images, mark, shards, dataset.rejections)


def allowed(max_bad: float, images: int) -> int:
    """Images that may be left out: a fraction below 1, else a count."""
    if not 0 <= max_bad < math.inf:
        raise InputError(f"{max_bad} is neither a part nor a count of images", "--max-bad")
    return int(max_bad * images) if max_bad < 1 else int(max_bad)
