"""The caches that a run trains from: opened, compared and mixed; their categories' weights."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, zip_longest
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from panoptic_cache.pipeline.base.config import fingerprint
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.cache.index import ShardIndex, read_index
from panoptic_cache.pipeline.cache.shards import ShardReader
from panoptic_cache.pipeline.coco import Category
from panoptic_cache.train.config import DataConfig, TrainConfig

log = logging.getLogger(__name__)


class Mix(NamedTuple):
    """Caches by number: how many samples each holds, and how many of an epoch's come from it."""

    sizes: tuple[int, ...]
    parts: tuple[int, ...]


def mix_caches(config: DataConfig, sizes: Sequence[int]) -> Mix:
    """The parts that the ratios give caches of these sizes; together they are all samples."""
    ratios = [part.ratio or size for part, size in zip(config.caches, sizes, strict=False)] or [1]
    sums = [*accumulate(ratios)]
    ends = [round(sum(sizes) * end / sums[-1]) for end in sums]
    return Mix(tuple(sizes), tuple(end - start for start, end in pairwise([0, *ends])))


@dataclass(frozen=True)
class Caches:
    """The training caches of a run by their indexes, opened and checked."""

    indexes: tuple[ShardIndex, ...]
    mix: Mix
    samples: int  # Of an epoch
    categories: tuple[Category, ...]  # By label; ids are those of the first cache
    fingerprint: str  # Of the cache, or of several and their parts


def open_caches(config: DataConfig) -> Caches:
    """The training caches; InputError where one is missing, empty or too small, or they differ."""
    if not config.paths[0]:
        raise InputError("no cache is named", where="data.cache", remedy="--set data.cache=DIR")
    indexes = [read_index(Storage(path)) for path in config.paths]
    mix = mix_caches(config, [index.samples for index in indexes])
    for path, index, part in zip(config.paths, indexes, mix.parts, strict=True):
        if index.samples == 0:
            raise InputError("the cache is empty", where=path)
        if part == 0:
            raise InputError("not one sample of an epoch", where=path, remedy="raise its ratio")
        check_rendered_size(config, index.settings, path)
        for label, pair in enumerate(zip_longest(indexes[0].categories, index.categories)):
            first, here = (c and (c.name, "thing" if c.isthing else "stuff") for c in pair)
            if first != here:
                raise InputError(
                    f"label {label} is {here}; in {config.paths[0]} it is {first}",
                    where=path,
                    remedy="make both of annotations with the same categories in the same order",
                )
    marks = [index.fingerprint for index in indexes]
    mark = marks[0] if len(marks) == 1 else fingerprint(marks, mix.parts)
    return Caches(tuple(indexes), mix, sum(mix.parts), indexes[0].categories, mark)


def follow_tiles(config: TrainConfig, indexes: Sequence[ShardIndex]) -> TrainConfig:
    """The configuration with the side of the caches' tiles, unless it names another one."""
    tiles = [index.settings.get("tile") or 0 for index in indexes]
    if len({*tiles}) > 1 and not config.data.tile:
        raise InputError(
            f"tiles of {', '.join(map(str, tiles))} px, where 0 is the whole image",
            where="data.caches",
            remedy=f"--set data.tile={max(tiles)} takes so much of each",
        )
    return replace(config, data=replace(config.data, tile=config.data.tile or tiles[0]))


def check_rendered_size(config: DataConfig, settings: Mapping[str, Any], cache: str) -> None:
    """Raises InputError where training would enlarge a cache, rendered with `settings`."""
    fit, size = settings.get("fit"), settings.get("size")
    if size is not None and size < config.size and not config.upscale:
        raise InputError(
            f"rendered at {size} px, trained at {config.size} px",
            where=cache,
            remedy=f"preprocess with --size {config.size}, lower data.size, or accept the blur"
            " with --set data.upscale=true",
            code="cache-size",
        )
    if fit == "squash" and config.fit != "squash":
        log.warning("%s: squashed already; data.fit = %s changes nothing", cache, config.fit)


def class_weights(config: TrainConfig, caches: Caches) -> list[float] | None:
    """The weight of each label in the semantic loss; None where all weigh the same.

    InputError where a table names no category, or pixels are to be counted in a remote cache.
    """
    chosen, names = config.loss.class_weights, [category.name for category in caches.categories]
    if chosen == "none":
        return None
    if chosen == "inverse_sqrt":
        part = pixel_parts(config.data, caches)  # (C,)
        scale = np.sqrt(part).sum()
        weights = [1 / (root * scale) if root else 1.0 for root in np.sqrt(part).tolist()]
        listed = sorted(zip(weights, names, strict=True))
        for weight, name in (listed[0], listed[-1]):
            log.info("class weight %.3g of %s", weight, name)
        return weights
    for name in chosen:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise InputError(
                f"no category {name}",
                where="loss.class_weights",
                remedy=f"did you mean {near[0]}?" if near else f"there are {', '.join(names[:20])}",
            )
    return [chosen.get(name, 1.0) for name in names]


def pixel_parts(config: DataConfig, caches: Caches) -> NDArray[np.float64]:
    """(C,) the part of each label in the labelled pixels of an epoch, by the segment tables."""
    pixels = np.zeros(len(caches.categories))
    for path, size, part in zip(config.paths, *caches.mix, strict=True):
        if (local := Storage(path).local) is None:
            raise InputError(
                "pixels of categories are counted in local caches only",
                where=path,
                remedy="give loss.class_weights as a table of names",
            )
        reader = ShardReader(local)
        for position in range(size):
            for segment in reader.table(position).segments:
                if segment.label < len(pixels):  # a damaged one is told of when it is trained on
                    pixels[segment.label] += segment.area * part / size
    return np.asarray(pixels / max(pixels.sum(), 1))
