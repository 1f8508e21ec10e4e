"""The driver: plan, skip finished shards, submit a job for each other one, write the index last.

A shard depends on its own records only. So the bytes are the same for any number of workers and
any number of interruptions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.base.process import Interrupted
from panoptic_cache.pipeline.base.terminal import progress
from panoptic_cache.pipeline.cache.index import (
    INDEX_NAME,
    QUARANTINE_NAME,
    ShardIndex,
    claim,
    claimed_by,
    encode_index,
)
from panoptic_cache.pipeline.cache.sample import FORMAT_VERSION
from panoptic_cache.pipeline.cache.shards import finished_shard
from panoptic_cache.pipeline.coco import CocoPanoptic, Rejection, sort_rejections
from panoptic_cache.pipeline.render.inputs import INPUTS_NAME, noted, unchanged
from panoptic_cache.pipeline.render.job import FinishedShard, RenderJob, render_shard, tools
from panoptic_cache.pipeline.render.plan import Plan, RenderConfig, ShardPlan, allowed, make_plan

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RenderResult:
    """The outcome, as `preprocess --json` prints it."""

    images: int  # Annotated images of the split
    written: int  # Samples in the cache
    quarantined: int  # Images left out
    shards: int  # Tars
    bytes: int  # Of all tars
    seconds: float  # This run took
    too_many: bool  # More was left out than allowed

    def to_json(self) -> dict[str, Any]:
        """All but `too_many`, which is the exit code."""
        return {key: value for key, value in asdict(self).items() if key != "too_many"}


def render(
    dataset: CocoPanoptic,
    split: str,
    storage: Storage,
    config: RenderConfig,
    *,
    workers: int = 1,
    scheduler: str | None = None,
    max_bad: float = 0.01,
    strict: bool = False,
    retry: bool = False,
) -> RenderResult:
    """Renders a split into a cache, or continues where an earlier run stopped.

    Args:
        dataset: The annotated split.
        split: Its name.
        storage: The cache's folder.
        config: What decides the bytes.
        workers: Processes that this run starts; 0 renders in this one.
        scheduler: Address of a running Dask scheduler to use instead.
        max_bad: Images that may be left out, as a fraction (below 1) or a count.
        strict: Every warning aborts.
        retry: Shards from which an image was left out are rendered again.

    Raises:
        InputError: Too many images cannot be tried, the folder holds another plan or is in use, or
            the disk is full.
    """
    start = time.monotonic()
    plan = make_plan(dataset, split, config)
    images = len(dataset.records) + len(dataset.rejections)
    limit = 0 if strict else allowed(max_bad, images)
    if len(plan.rejections) > limit:
        first = plan.rejections[0]
        raise InputError(
            f"{len(plan.rejections)} of {images} images are bad, {limit} are allowed; the first is"
            f" {first.image_id}: {first.message}",
            where=split,
            remedy="mend them, or raise --max-bad",
            code="max-bad",
        )
    storage = storage.absolute()
    if INDEX_NAME in storage.sizes():
        done = finished_shards(storage, plan, retry=retry)
        if _is_whole(plan, dataset, done, storage):
            log.info("%s: nothing to do, the cache is finished", storage.url)
            return _result(plan, dataset, done, start, limit, strict=strict)
    storage.create()
    with storage.locked():
        claim(storage, plan.fingerprint, plan.settings)
        done = finished_shards(storage, plan, retry=retry)
        if strict:
            _check_strictly(done.values())
        if done:
            log.info("%d of %d shards are done already", len(done), len(plan.shards))
        todo = [shard for shard in plan.shards if shard.name not in done]
        if todo:
            storage.remove(INDEX_NAME)  # an index says that the cache is finished
        planned = {shard.name: len(shard.records) for shard in plan.shards}
        finished = sum(planned[name] for name in done)
        job = RenderJob(config, plan.fingerprint, dataset.categories, storage, strict, tools())
        try:
            with (
                progress("render", len(dataset.records), "images", finished) as advance,
                noted(storage, done) as notes,
            ):

                def note(shard: FinishedShard) -> None:
                    done[shard.entry.name] = shard
                    notes.add(shard.entry.name, shard.inputs)
                    advance(planned[shard.entry.name])

                _run(todo, job, workers, scheduler, note)
        except Interrupted as stop:
            stop.advice = (
                f"{len(done)} of {len(plan.shards)} shards are done, run the same command to go on"
            )
            raise
        _finish(plan, dataset, done, storage)
    return _result(plan, dataset, done, start, limit, strict=strict)


def _result(
    plan: Plan,
    dataset: CocoPanoptic,
    done: dict[str, FinishedShard],
    start: float,
    limit: int,
    *,
    strict: bool,
) -> RenderResult:
    if strict:
        _check_strictly(done.values())
    _report(plan, done)
    shards, left = [shard.entry for shard in done.values()], len(left_out(plan, done))
    return RenderResult(
        images=len(dataset.records) + len(dataset.rejections),
        written=sum(shard.samples for shard in shards),
        quarantined=left,
        shards=len(shards),
        bytes=sum(shard.size for shard in shards),
        seconds=round(time.monotonic() - start, 3),
        too_many=left > limit,
    )


def finished_shards(
    storage: Storage, plan: Plan, *, retry: bool = False
) -> dict[str, FinishedShard]:
    """The shards that an earlier run finished, by name; with `retry`, only the complete ones."""
    sizes = storage.sizes()
    done = {
        shard.name: FinishedShard.of(sidecar)
        for shard in plan.shards
        if (sidecar := finished_shard(storage, shard.name, plan.fingerprint, sizes))
        and not (retry and sidecar.rejections)
    }
    same = unchanged(storage, (shard for shard in plan.shards if shard.name in done))
    if len(same) < len(done):
        log.warning(
            "%d shards are rendered again: their photos or PNGs have changed", len(done) - len(same)
        )
    return {name: shard for name, shard in done.items() if name in same}


def _run(
    todo: Sequence[ShardPlan],
    job: RenderJob,
    workers: int,
    scheduler: str | None,
    note: Callable[[FinishedShard], None],
) -> None:
    """Renders shards in any order, and notes each.

    No process of ours writes after that. What workers of a scheduler still write, `write_shard`
    holds to the plan.
    """
    # Imported here: Dask takes longer than rendering some images.
    if todo and scheduler is not None:
        from panoptic_cache.pipeline.render.cluster import run_on  # noqa: PLC0415

        with closing(run_on(scheduler, render_shard, todo, job)) as results:
            for shard in results:
                note(shard)
    elif todo and workers > 0:
        from panoptic_cache.pipeline.render.processes import run_here  # noqa: PLC0415

        run_here(render_shard, todo, job, workers=workers, note=note)
    else:
        for plan in todo:
            note(render_shard(plan, job))


def _finish(
    plan: Plan, dataset: CocoPanoptic, done: dict[str, FinishedShard], storage: Storage
) -> None:
    """Writes `quarantine.jsonl` and the index; InputError where a shard is missing here."""
    sizes = storage.sizes()
    for shard in (one.entry for one in done.values()):
        if sizes.get(f"{shard.name}.tar") != shard.size or f"{shard.name}.json" not in sizes:
            raise InputError(
                "a worker wrote it, and it is not here",
                where=storage.path(f"{shard.name}.tar"),
                remedy="--out must be a place that all workers share with this process",
                code="not-shared",
            )
    for name, data in _last_files(plan, dataset, done).items():
        storage.write(name, data)
    if storage.local is not None:
        storage.remove(INPUTS_NAME)


def _is_whole(
    plan: Plan, dataset: CocoPanoptic, done: dict[str, FinishedShard], storage: Storage
) -> bool:
    """Whether nothing is to be written, so that a disk may be read-only."""
    if len(done) < len(plan.shards) or claimed_by(storage) != plan.fingerprint:
        return False
    try:
        files = _last_files(plan, dataset, done)
        return all(storage.read(name) == data for name, data in files.items())
    except OSError:
        return False


def _last_files(
    plan: Plan, dataset: CocoPanoptic, done: dict[str, FinishedShard]
) -> dict[str, bytes]:
    """`quarantine.jsonl` and the index of finished shards."""
    shards, rejections = [done[shard.name].entry for shard in plan.shards], left_out(plan, done)
    quarantine = "".join(f"{json.dumps(asdict(one))}\n" for one in rejections).encode()
    index = ShardIndex(
        format_version=FORMAT_VERSION,
        split=plan.split,
        fingerprint=plan.fingerprint,
        settings=plan.config.settings(),
        categories=dataset.categories,
        samples=sum(shard.samples for shard in shards),
        quarantined=len(rejections),
        quarantine_sha256=hashlib.sha256(quarantine).hexdigest(),
        shards=tuple(shards),
    )
    return {QUARANTINE_NAME: quarantine, INDEX_NAME: encode_index(index)}


def left_out(plan: Plan, done: dict[str, FinishedShard]) -> tuple[Rejection, ...]:
    """The images left out, before and during the work, in the order of their ids."""
    return sort_rejections([*plan.rejections, *(r for s in done.values() for r in s.rejections)])


def _check_strictly(shards: Iterable[FinishedShard]) -> None:
    """Raises InputError where an earlier run left out or mended an image."""
    for shard in shards:
        for rejection in shard.rejections:
            raise InputError(
                f"image {rejection.image_id}: {rejection.message}",
                where=shard.entry.name,
                code="strict",
            )
        for code, count in shard.repairs.items():
            raise InputError(f"{code} in {count} places", where=shard.entry.name, code="strict")


def _report(plan: Plan, done: dict[str, FinishedShard]) -> None:
    repairs: Counter[str] = Counter()
    for shard in done.values():
        repairs.update(shard.repairs)
    if turned := repairs.pop("photo-orientation", 0):
        log.warning(
            "%d photos have an EXIF orientation other than 1 and are taken as they are stored: if"
            " the annotations are drawn on photos that are turned so, use --upright",
            turned,
        )
    for code, count in sorted(repairs.items()):
        if count:
            log.warning("mended: %s, %d times", code, count)
    for code, count in sorted(Counter(r.code for r in left_out(plan, done)).items()):
        log.warning("left out: %s, %d images, see %s", code, count, QUARANTINE_NAME)
    if any(shard.rejections for shard in done.values()):
        log.info("pictures that are mended come in with --retry")
    if plan.rejections:
        log.info("files that were missing and annotations, once mended, need a new cache")
