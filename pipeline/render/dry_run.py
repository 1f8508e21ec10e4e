"""What rendering would do: counts, bytes, seconds, and all that headers and checksums tell."""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.base.terminal import progress
from panoptic_cache.pipeline.cache.index import claim
from panoptic_cache.pipeline.cache.shards import pack_shard
from panoptic_cache.pipeline.coco import CocoPanoptic, PanopticRecord, Rejection
from panoptic_cache.pipeline.photo import check_photo
from panoptic_cache.pipeline.png import read_png
from panoptic_cache.pipeline.render.driver import finished_shards, left_out
from panoptic_cache.pipeline.render.job import prepare_worker, render_image
from panoptic_cache.pipeline.render.plan import RenderConfig, allowed, make_plan

log = logging.getLogger(__name__)

TRIED = 8
"""Images to render in memory, which tells bytes and time."""
SHOWN = 20
"""Images left out that have a line of their own."""


def dry_run(
    dataset: CocoPanoptic,
    split: str,
    storage: Storage,
    config: RenderConfig,
    *,
    workers: int = 1,
    max_bad: float = 0.01,
    retry: bool = False,
) -> dict[str, Any]:
    """What `render` would do with the same arguments; nothing is written.

    Every file is read, and its header and checksums are compared with the annotations; a few images
    are decoded. Of the others, damage inside the pixels of a photo, and ids that the JSON does not
    list, are found later.

    Returns:
        Counts of `images`, `quarantined` and `shards`, whether they are `too_many`, how many
        shards are `done` already, the `bytes` of the whole cache, the `seconds` left, and the
        `free_bytes` of the disk, null if unknown.

    Raises:
        InputError: The folder was begun with other settings.
    """
    plan, records = make_plan(dataset, split, config), dataset.records
    limit = allowed(max_bad, plan.images)
    claim(storage, plan.fingerprint, plan.settings, write=False)
    done = finished_shards(storage, plan, retry=retry)
    found = {one.image_id: one for one in left_out(plan, done)}
    with ThreadPoolExecutor(16) as pool, progress("check", len(records), "images") as advance:
        for record, rejection in zip(records, pool.map(_check, records), strict=True):
            advance()
            if rejection is not None:
                found.setdefault(record.image_id, rejection)
    good = [record for record in records if record.image_id not in found]
    prepare_worker()
    categories = {category.id: category for category in dataset.categories}
    start, sizes = time.monotonic(), []
    for record in good[:: max(1, len(good) // TRIED)][:TRIED]:
        try:
            samples = render_image(record, config, categories, Counter())
            sizes.append(sum(entry.size for entry in pack_shard(samples)[1]))
        except InputError as error:
            found[record.image_id] = Rejection.of(record.image_id, record.file_name, error)
    seconds = (time.monotonic() - start) / max(1, len(sizes))  # an image
    for rejection in [*found.values()][:SHOWN]:
        log.warning("left out: %s, image %s", rejection.message, rejection.image_id)
    if len(found) > SHOWN:
        for code, count in sorted(Counter(one.code for one in found.values()).items()):
            log.warning("left out: %s, %d images", code, count)
    left = sum(len(shard.records) for shard in plan.shards if shard.name not in done)
    total = sum(sizes) * len(good) // max(1, len(sizes))
    missing = total * left // max(1, len(records))
    folder = storage.absolute().local  # where a cache lies or would lie
    while folder is not None and not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = None if folder is None else shutil.disk_usage(folder).free
    if free is not None and free < missing:
        log.warning("%s: %d MB are free, %d MB are needed", storage.url, free >> 20, missing >> 20)
    return {
        "images": plan.images,
        "quarantined": len(found),
        "too_many": len(found) > limit,
        "shards": len(plan.shards),
        "done": len(done),
        "bytes": total,
        "seconds": round(seconds * left / max(1, workers), 3),
        "free_bytes": free,
    }


def _check(record: PanopticRecord) -> Rejection | None:
    """What can be told of an image's files without decoding a pixel."""
    try:
        read_png(record.png, (record.height, record.width))
        check_photo(record)
    except InputError as error:
        return Rejection.of(record.image_id, record.file_name, error)
    return None
