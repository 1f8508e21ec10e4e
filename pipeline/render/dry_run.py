"""What rendering would do: counts, bytes, seconds, and all that headers and checksums tell."""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.base.terminal import progress
from panoptic_cache.pipeline.cache.index import is_claimed
from panoptic_cache.pipeline.cache.shards import pack_shard
from panoptic_cache.pipeline.coco import CocoPanoptic, PanopticRecord, Rejection
from panoptic_cache.pipeline.render.cluster import prepare_worker
from panoptic_cache.pipeline.render.driver import finished_shards, left_out
from panoptic_cache.pipeline.render.image import check_files, render_image
from panoptic_cache.pipeline.render.job import FinishedShard
from panoptic_cache.pipeline.render.plan import RenderConfig, allowed, make_plan

log = logging.getLogger(__name__)

SHOWN = 20
"""Images left out that have a line of their own."""


def dry_run(
    dataset: CocoPanoptic,
    config: RenderConfig,
    *,
    workers: int,
    max_bad: float,
    split: str = "",
    storage: Storage | None = None,
    retry: bool = False,
    tried: int = 8,
) -> dict[str, Any]:
    """What rendering would do, found by decoding only a few images.

    Every file is read, and its header and checksums are compared with the annotations. Only damage
    inside the pixels of a photo, and ids that the JSON does not list, are found later.

    Args:
        dataset: The annotated split.
        config: The settings.
        workers: Processes that would render.
        max_bad: See `render`.
        split: Its name.
        storage: The cache's folder; nothing is written there.
        retry: See `render`.
        tried: Images to render in memory, to estimate bytes and time.

    Returns:
        Counts of `images`, `quarantined` and `shards`, whether they are `too_many`, how many
        shards are `done` already, the `bytes` of the whole cache, the `seconds` left, and the
        `free_bytes` of the disk, null if unknown.

    Raises:
        InputError: The folder was begun with other settings.
    """
    records = dataset.records
    images = len(records) + len(dataset.rejections)
    plan, limit = make_plan(dataset, split, config), allowed(max_bad, images)
    done: dict[str, FinishedShard] = {}
    if storage is not None:
        is_claimed(storage, plan.fingerprint, plan.settings)  # raises if it holds another plan
        done = finished_shards(storage, plan, retry=retry)
    found = list(left_out(plan, list(done.values())))
    known = {rejection.image_id for rejection in found}
    found += [one for one in find_damage(records) if one.image_id not in known]
    for rejection in found[:SHOWN]:
        log.warning("left out: %s, image %s", rejection.message, rejection.image_id)
    if found[SHOWN:]:
        for code, count in sorted(Counter(rejection.code for rejection in found).items()):
            log.warning("left out: %s, %d images", code, count)
    bad = {rejection.image_id for rejection in found}
    good = [record for record in records if record.image_id not in bad]
    sizes, seconds = _try(good[:: max(1, len(good) // tried)][:tried], dataset, config)
    left = sum(len(shard.records) for shard in plan.shards if shard.name not in done)
    total = sum(sizes) * len(good) // max(1, len(sizes))
    free = free_bytes(storage) if storage is not None else None
    missing = total * left // max(1, len(records))
    if free is not None and free < missing:
        place = storage.url if storage is not None else ""
        log.warning("%s: %d MB are free, %d MB are needed", place, free >> 20, missing >> 20)
    return {
        "images": images,
        "quarantined": len(found),
        "too_many": len(found) > limit,
        "shards": len(plan.shards),
        "done": len(done),
        "bytes": total,
        "seconds": round(seconds * left / max(1, len(sizes)) / max(1, workers), 3),
        "free_bytes": free,
    }


def find_damage(records: Sequence[PanopticRecord]) -> list[Rejection]:
    """The images whose files are damaged or have another size, judged by their headers."""

    def check(record: PanopticRecord) -> Rejection | None:
        try:
            check_files(record)
        except InputError as error:
            return Rejection.of(record.image_id, record.file_name, error)
        return None

    found: list[Rejection] = []
    with ThreadPoolExecutor(16) as pool, progress("check", len(records), "images") as advance:
        for start in range(0, len(records), 1024):  # a bounded number of results under way
            for rejection in pool.map(check, records[start : start + 1024]):
                advance()
                if rejection is not None:
                    found.append(rejection)
    return found


def free_bytes(storage: Storage) -> int | None:
    """Free bytes on the disk where a cache lies or would lie; None if unknown."""
    folder = storage.absolute().local
    while folder is not None and not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return None if folder is None else shutil.disk_usage(folder).free


def _try(
    records: Sequence[PanopticRecord], dataset: CocoPanoptic, config: RenderConfig
) -> tuple[list[int], float]:
    """The bytes of each image's part of a shard, and the seconds for all of them."""
    prepare_worker()
    categories = {category.id: category for category in dataset.categories}
    start, sizes = time.monotonic(), []
    for record in records:
        try:
            sample = render_image(record, config, categories, Counter())
        except InputError as error:
            log.warning("left out: %s", error)
            continue
        sizes.append(pack_shard([sample])[1][0].size)
    return sizes, time.monotonic() - start
