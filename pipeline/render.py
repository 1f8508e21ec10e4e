"""The Dask driver: plan, skip what is done, submit a task a shard, collect, write the index last.

A shard depends on its own records only, so the bytes are the same for any number of workers and of
interruptions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
import simplejpeg

from pipeline.cluster import prepare_worker, run_tasks
from pipeline.coco import Category, CocoPanoptic, PanopticRecord, Rejection
from pipeline.config import RenderConfig
from pipeline.errors import InputError
from pipeline.image import render_image
from pipeline.interrupt import Interrupted
from pipeline.plan import Plan, ShardPlan, allowed, claim, make_plan
from pipeline.progress import progress
from pipeline.sample import FORMAT_VERSION, Sample
from pipeline.shards import (
    INDEX_NAME,
    QUARANTINE_NAME,
    ShardEntry,
    ShardIndex,
    Sidecar,
    encode_index,
    encode_sidecar,
    finished_shard,
    pack_shard,
    write_shard,
)
from pipeline.storage import Storage

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RenderResult:
    """The outcome, as `preprocess --json` prints it.

    Attributes:
        images: Annotated images of the split.
        written: Samples in the cache.
        quarantined: Images left out.
        shards: Tars.
        bytes: Of all tars.
        seconds: This run took.
        too_many: More was left out than allowed.
    """

    images: int
    written: int
    quarantined: int
    shards: int
    bytes: int
    seconds: float
    too_many: bool

    def to_json(self) -> dict[str, Any]:
        """The fields that `preprocess --json` prints."""
        return {key: value for key, value in asdict(self).items() if key != "too_many"}


@dataclass(frozen=True, slots=True)
class RenderJob:
    """What every shard's task has in common.

    Attributes:
        config: What decides the bytes.
        plan: The plan's fingerprint.
        categories: By label.
        storage: The cache's folder.
        strict: Every warning aborts.
        tools: See `tools`; a worker with others would write other bytes.
    """

    config: RenderConfig
    plan: str
    categories: tuple[Category, ...]
    storage: Storage
    strict: bool
    tools: str


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """What the driver keeps of a shard: little, so that its memory does not grow with the work.

    Attributes:
        entry: The shard's line in the index.
        rejections: Images of it that were left out.
        repairs: Counts by code.
    """

    entry: ShardEntry
    rejections: tuple[Rejection, ...]
    repairs: Mapping[str, int]

    @classmethod
    def of(cls, sidecar: Sidecar) -> FinishedShard:
        """From a sidecar that is on the disk."""
        entry = ShardEntry(
            name=sidecar.name,
            samples=len(sidecar.samples),
            size=sidecar.size,
            sha256=sidecar.sha256,
            sidecar_sha256=hashlib.sha256(encode_sidecar(sidecar)).hexdigest(),
        )
        return cls(entry, sidecar.rejections, sidecar.repairs)


def tools() -> str:
    """Versions of the libraries that decide the bytes of pictures."""
    return f"OpenCV {cv2.__version__}, simplejpeg {simplejpeg.__version__}, NumPy {np.__version__}"


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
    """Renders a split into a cache, going on where an earlier run stopped.

    Args:
        dataset: The annotated split.
        split: Its name.
        storage: The cache's folder.
        config: What decides the bytes.
        workers: Processes of an own Dask cluster; 0 renders in this process.
        scheduler: Address of a running Dask scheduler, used instead.
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
    check_rejections(plan, images, limit)
    storage = storage.absolute()
    storage.create()
    with storage.locked():
        claim(storage, plan)
        done = finished_shards(storage, plan, retry=retry)
        if strict:
            _check_strictly(done.values())
        if done:
            log.info("%d of %d shards are done already", len(done), len(plan.shards))
        todo = [shard for shard in plan.shards if shard.name not in done]
        if todo:
            storage.remove(INDEX_NAME)  # it says that the cache is finished
        finished = sum(len(shard.records) for shard in plan.shards if shard.name in done)
        job = RenderJob(config, plan.fingerprint, dataset.categories, storage, strict, tools())
        try:
            with (
                progress("render", len(dataset.records), "images", finished) as advance,
                # Closed before the lock is given up: no worker writes after that.
                closing(_run(todo, job, workers, scheduler)) as results,
            ):
                for shard in results:
                    done[shard.entry.name] = shard
                    advance(shard.entry.samples + len(shard.rejections))
        except Interrupted as stop:
            stop.advice = (
                f"{len(done)} of {len(plan.shards)} shards are done, run the same command to go on"
            )
            raise
        shards = [done[shard.name] for shard in plan.shards]
        check_places(storage, shards)
        rejections = left_out(plan, shards)
        quarantine = encode_quarantine(rejections)
        index = make_index(plan, dataset.categories, shards, len(rejections), quarantine)
        storage.write(QUARANTINE_NAME, quarantine)
        storage.write(INDEX_NAME, encode_index(index))
    _report(shards, rejections)
    return RenderResult(
        images=images,
        written=index.samples,
        quarantined=len(rejections),
        shards=len(shards),
        bytes=sum(shard.entry.size for shard in shards),
        seconds=round(time.monotonic() - start, 3),
        too_many=len(rejections) > limit,
    )


def check_rejections(plan: Plan, images: int, limit: int) -> None:
    """Raises InputError where more of all images are left out already than is allowed."""
    if len(plan.rejections) > limit:
        first = plan.rejections[0]
        raise InputError(
            f"{len(plan.rejections)} of {images} images are bad, {limit} are allowed; the first is"
            f" {first.image_id}: {first.message}",
            where=plan.split,
            remedy="mend them, or raise --max-bad",
            code="max-bad",
        )


def finished_shards(
    storage: Storage, plan: Plan, *, retry: bool = False
) -> dict[str, FinishedShard]:
    """The shards that an earlier run finished, by name; with `retry`, only the complete ones."""
    sizes = storage.sizes()
    return {
        shard.name: FinishedShard.of(sidecar)
        for shard in plan.shards
        if (sidecar := finished_shard(storage, shard.name, plan.fingerprint, sizes))
        and not (retry and sidecar.rejections)
    }


def check_places(storage: Storage, shards: Sequence[FinishedShard]) -> None:
    """Raises InputError where a tar or sidecar is not there: workers have disks of their own."""
    sizes = storage.sizes()
    for shard in shards:
        name = shard.entry.name
        if sizes.get(f"{name}.tar") != shard.entry.size or f"{name}.json" not in sizes:
            raise InputError(
                "a worker wrote it, and it is not here",
                where=storage.path(f"{name}.tar"),
                remedy="--out must be a place that all workers share with this process",
                code="not-shared",
            )


def _run(
    todo: Sequence[ShardPlan], job: RenderJob, workers: int, scheduler: str | None
) -> Generator[FinishedShard]:
    """Renders shards in any order."""
    if not todo:
        return
    if workers == 0 and scheduler is None:
        for shard in todo:
            yield render_shard(shard, job)
        return
    yield from run_tasks(render_shard, todo, job, workers=workers, scheduler=scheduler)


def render_shard(shard: ShardPlan, job: RenderJob) -> FinishedShard:
    """Renders and writes one shard: a Dask task. One bad image costs one sample.

    Raises:
        InputError: It cannot be written, a file is there no longer, this worker would write other
            bytes than the driver, or, under `strict`, anything is wrong with an image.
    """
    if job.tools != tools():
        raise InputError(
            f"this worker has {tools()}, the driver {job.tools}",
            where=shard.name,
            remedy="install the same versions everywhere: else bytes depend on who renders",
            code="worker-differs",
        )
    prepare_worker()
    categories = {category.id: category for category in job.categories}
    rejections: list[Rejection] = []
    repairs: Counter[str] = Counter()

    def samples() -> Iterator[Sample]:
        for record in shard.records:
            mended: Counter[str] = Counter()
            try:
                sample = render_image(record, job.config, categories, mended)
                if job.strict:
                    _refuse_repairs(record, mended)
            except InputError as error:
                _check_there(record)
                if job.strict:
                    raise
                rejections.append(Rejection.of(record.image_id, record.file_name, error))
                continue
            finally:
                repairs.update(mended)
            yield sample

    sidecar = write_shard(
        job.storage, shard.name, samples(), plan=job.plan, rejections=rejections, repairs=repairs
    )
    return FinishedShard.of(sidecar)


def _check_there(record: PanopticRecord) -> None:
    """Raises InputError where a file is gone that the plan had seen.

    That is no fault of the image: the disk was unmounted, or this worker does not share it.
    """
    for path in (record.photo, record.png):
        if not path.exists():
            raise InputError(
                "was there when the work was planned, and is not there for this worker",
                where=path,
                remedy="give every worker the dataset under the same path, and go on",
                code="input-gone",
            )


def _refuse_repairs(record: PanopticRecord, repairs: Mapping[str, int]) -> None:
    for code, count in repairs.items():
        if count:
            raise InputError(
                f"image {record.image_id}: {code} in {count} places",
                where=record.png,
                remedy="mend it, or leave out --strict",
                code="strict",
            )


def dry_run(
    dataset: CocoPanoptic, config: RenderConfig, *, workers: int, max_bad: float, tried: int = 8
) -> dict[str, Any]:
    """What rendering would do, found without decoding more than a few images.

    Args:
        dataset: The annotated split.
        config: The settings.
        workers: Processes that would render.
        max_bad: See `render`.
        tried: Images that are rendered, in memory, to tell bytes and time.

    Returns:
        Counts of `images`, `quarantined` and `shards`, whether they are `too_many`, and the
        `bytes` and `seconds` expected.
    """
    records = dataset.records
    by_id = {category.id: category for category in dataset.categories}
    start, sizes = time.monotonic(), []
    for record in records[:: max(1, len(records) // tried)][:tried]:
        try:
            sample = render_image(record, config, by_id, Counter())
        except InputError as error:
            log.warning("%s", error)
            continue
        sizes.append(len(pack_shard([sample])[0]))
    seconds = (time.monotonic() - start) / max(1, len(sizes))
    images = len(records) + len(dataset.rejections)
    for rejection in dataset.rejections:
        log.warning("left out: %s, image %s", rejection.message, rejection.image_id)
    return {
        "images": images,
        "quarantined": len(dataset.rejections),
        "too_many": len(dataset.rejections) > allowed(max_bad, images),
        "shards": -(-len(records) // config.samples_per_shard),
        "bytes": sum(sizes) * len(records) // max(1, len(sizes)),
        "seconds": round(seconds * len(records) / max(1, workers), 1),
    }


def make_index(
    plan: Plan,
    categories: tuple[Category, ...],
    shards: Sequence[FinishedShard],
    quarantined: int,
    quarantine: bytes,
) -> ShardIndex:
    """The index of finished shards and of the quarantine's bytes."""
    return ShardIndex(
        format_version=FORMAT_VERSION,
        split=plan.split,
        fingerprint=plan.fingerprint,
        settings=asdict(plan.config),
        categories=categories,
        samples=sum(shard.entry.samples for shard in shards),
        quarantined=quarantined,
        quarantine_sha256=hashlib.sha256(quarantine).hexdigest(),
        shards=tuple(shard.entry for shard in shards),
    )


def left_out(plan: Plan, shards: Sequence[FinishedShard]) -> tuple[Rejection, ...]:
    """The images left out, before the work and in it, by image id."""
    found = [*plan.rejections, *(r for shard in shards for r in shard.rejections)]
    found.sort(key=lambda rejection: (str(rejection.image_id).zfill(12), rejection.code))
    return tuple(found)


def encode_quarantine(rejections: Sequence[Rejection]) -> bytes:
    """The bytes of `quarantine.jsonl`: a JSON line for each image left out."""
    return "".join(f"{json.dumps(asdict(rejection))}\n" for rejection in rejections).encode()


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


def _report(shards: Sequence[FinishedShard], rejections: Sequence[Rejection]) -> None:
    repairs: Counter[str] = Counter()
    for shard in shards:
        repairs.update(shard.repairs)
    for code, count in sorted(repairs.items()):
        if count:
            log.warning("mended: %s, %d times", code, count)
    for code, count in sorted(Counter(r.code for r in rejections).items()):
        log.warning("left out: %s, %d images, see %s", code, count, QUARANTINE_NAME)
