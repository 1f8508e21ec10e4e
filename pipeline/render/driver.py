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
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
from panoptic_cache.pipeline.render.job import FinishedShard, RenderJob, render_shard, tools
from panoptic_cache.pipeline.render.plan import Plan, RenderConfig, allowed, make_plan

INPUTS_NAME = "inputs.jsonl"
"""Until there is an index: a line for each shard with its `ShardPlan.inputs`."""
NOTE_SECONDS = 2.0
"""Between two writes of it. A shard that a kill leaves out is rendered again."""
UNKNOWN = "unknown"
"""In its place where an earlier version began a cache, or it was finished once."""

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
    limit = 0 if strict else allowed(max_bad, plan.images)
    if len(plan.rejections) > limit:
        first, bad = plan.rejections[0], len(plan.rejections)
        raise InputError(
            f"{bad} of {plan.images} images are bad, {limit} are allowed; the first is"
            f" {first.image_id}: {first.message}",
            where=split,
            remedy="mend them, or raise --max-bad",
            code="max-bad",
        )
    storage = storage.absolute()
    files = storage.sizes()
    ended = INDEX_NAME in files and INPUTS_NAME not in files  # no kill came in between
    done = finished_shards(storage, plan, retry=retry) if ended else {}
    if ended and _is_whole(plan, done, storage):
        log.info("%s: nothing to do, the cache is finished", storage.url)
    else:
        storage.create()
        with storage.locked():
            claim(storage, plan.fingerprint, plan.settings)
            done = finished_shards(storage, plan, retry=retry)
            if strict:
                _check_strictly(done.values())
            if done:
                log.info("%d of %d shards are done already", len(done), len(plan.shards))
            job = RenderJob(config, plan.fingerprint, plan.categories, storage, strict, tools())
            if len(done) < len(plan.shards):
                _render_rest(plan, job, done, workers, scheduler)
            _finish(plan, done, storage)
    if strict:
        _check_strictly(done.values())
    rejections = left_out(plan, done)
    _report(plan, done, rejections)
    return RenderResult(
        images=plan.images,
        written=sum(shard.entry.samples for shard in done.values()),
        quarantined=len(rejections),
        shards=len(done),
        bytes=sum(shard.entry.size for shard in done.values()),
        seconds=round(time.monotonic() - start, 3),
        too_many=len(rejections) > limit,
    )


def finished_shards(
    storage: Storage, plan: Plan, *, retry: bool = False
) -> dict[str, FinishedShard]:
    """The shards that an earlier run finished of inputs that have not changed since, by name.

    With `retry`, only the complete ones. Without notes, all inputs count as unchanged.
    """
    sizes = storage.sizes()
    notes = _read_notes(storage) if INPUTS_NAME in sizes else None
    found = [
        (shard, FinishedShard.of(sidecar, (notes or {}).get(shard.name, UNKNOWN)))
        for shard in plan.shards
        if (sidecar := finished_shard(storage, shard.name, plan.fingerprint, sizes))
        and not (retry and sidecar.rejections)
    ]
    done = {shard.name: finished for shard, finished in found}
    if notes is None:
        return done
    with ThreadPoolExecutor(16) as pool:  # on a network disk, each answer takes its time
        now = pool.map(lambda pair: pair[0].inputs(), found)
        for (shard, finished), inputs in zip(found, now, strict=True):
            if shard.name not in notes or finished.inputs not in {inputs, UNKNOWN}:
                del done[shard.name]
    if changed := len(found) - len(done):
        log.warning("%d shards are rendered again: their photos or PNGs have changed", changed)
    return done


def _read_notes(storage: Storage) -> dict[str, str]:
    """`ShardPlan.inputs` by shard; damaged lines are dropped."""
    notes = {}
    for line in storage.read(INPUTS_NAME).decode(errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            notes[str(row["shard"])] = str(row["inputs"])
    return notes


def _render_rest(
    plan: Plan, job: RenderJob, done: dict[str, FinishedShard], workers: int, scheduler: str | None
) -> None:
    """Renders the shards that are not `done`, in any order, and adds each.

    No process of ours writes after that. What workers of a scheduler still write, `write_shard`
    holds to the plan.
    """
    sizes = {shard.name: len(shard.records) for shard in plan.shards}
    todo = [shard for shard in plan.shards if shard.name not in done]
    noted = time.monotonic()

    def write_notes() -> None:
        rows = ({"shard": name, "inputs": shard.inputs} for name, shard in done.items())
        job.storage.write(INPUTS_NAME, "".join(f"{json.dumps(row)}\n" for row in rows).encode())

    def note(shard: FinishedShard) -> None:
        nonlocal noted
        done[shard.entry.name] = shard
        if time.monotonic() - noted > NOTE_SECONDS:
            write_notes()
            noted = time.monotonic()
        advance(sizes[shard.entry.name])

    job.storage.remove(INDEX_NAME)  # an index says that the cache is finished
    write_notes()
    finished = sum(sizes[name] for name in done)
    with progress("render", sum(sizes.values()), "images", finished) as advance:
        try:
            # Imported here: Dask takes longer than rendering some images.
            if scheduler is not None:
                from panoptic_cache.pipeline.render.workers import run_on  # noqa: PLC0415

                run_on(scheduler, render_shard, todo, job, note=note)
            elif workers > 0:
                from panoptic_cache.pipeline.render.workers import run_here  # noqa: PLC0415

                run_here(render_shard, todo, job, workers=workers, note=note)
            else:
                for shard in todo:
                    note(render_shard(shard, job))
        except BaseException as error:
            with suppress(InputError):  # the disk may be full
                write_notes()
            if isinstance(error, Interrupted):
                error.advice = f"{len(done)} of {len(sizes)} shards are done, run the same command"
                error.advice += " to go on"
            raise


def _finish(plan: Plan, done: dict[str, FinishedShard], storage: Storage) -> None:
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
    for name, data in _last_files(plan, done).items():
        storage.write(name, data)
    storage.remove(INPUTS_NAME)


def _is_whole(plan: Plan, done: dict[str, FinishedShard], storage: Storage) -> bool:
    """Whether nothing is to be written, so that a disk may be read-only."""
    if len(done) < len(plan.shards) or claimed_by(storage) != plan.fingerprint:
        return False
    try:
        files = _last_files(plan, done)
        return all(storage.read(name) == data for name, data in files.items())
    except OSError:
        return False


def _last_files(plan: Plan, done: dict[str, FinishedShard]) -> dict[str, bytes]:
    """`quarantine.jsonl` and the index of finished shards."""
    shards, rejections = [done[shard.name].entry for shard in plan.shards], left_out(plan, done)
    quarantine = "".join(f"{json.dumps(asdict(one))}\n" for one in rejections).encode()
    index = ShardIndex(
        format_version=FORMAT_VERSION,
        split=plan.split,
        fingerprint=plan.fingerprint,
        settings=plan.config.settings(),
        categories=plan.categories,
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
        wrong = [f"image {each.image_id}: {each.message}" for each in shard.rejections]
        wrong += [f"{code} in {count} places" for code, count in shard.repairs.items()]
        if wrong:
            raise InputError(wrong[0], shard.entry.name, code="strict")


def _report(plan: Plan, done: dict[str, FinishedShard], rejections: tuple[Rejection, ...]) -> None:
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
        log.warning("mended: %s, %d times", code, count)
    for code, count in sorted(Counter(each.code for each in rejections).items()):
        log.warning("left out: %s, %d images, see %s", code, count, QUARANTINE_NAME)
    if len(rejections) > len(plan.rejections):
        log.info("pictures that are mended come in with --retry")
    if plan.rejections:
        log.info("files that were missing and annotations, once mended, need a new cache")
