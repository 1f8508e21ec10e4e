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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import cv2
from distributed import Client, KilledWorker, LocalCluster, as_completed

from pipeline.coco import Category, CocoPanoptic, Rejection
from pipeline.config import RenderConfig
from pipeline.errors import InputError
from pipeline.image import render_image
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
    storage.create()
    with storage.locked():
        claim(storage, plan)
        sizes = storage.sizes()
        done = {
            shard.name: sidecar
            for shard in plan.shards
            if (sidecar := finished_shard(storage, shard.name, plan.fingerprint, sizes))
        }
        todo = [shard for shard in plan.shards if shard.name not in done]
        if strict:
            _check_strictly(done.values())
        if done:
            log.info("%d of %d shards are done already", len(done), len(plan.shards))
        finished = sum(len(shard.records) for shard in plan.shards if shard.name in done)
        with progress("render", len(dataset.records), "images", finished) as advance:
            for sidecar in _run(
                todo, plan, dataset.categories, storage, workers=workers, scheduler=scheduler
            ):
                done[sidecar.name] = sidecar
                if strict:
                    _check_strictly([sidecar])
                advance(len(sidecar.samples) + len(sidecar.rejections))
        sidecars = [done[shard.name] for shard in plan.shards]
        rejections = left_out(plan, sidecars)
        quarantine = encode_quarantine(rejections)
        index = make_index(plan, dataset.categories, sidecars, len(rejections), quarantine)
        storage.write(QUARANTINE_NAME, quarantine)
        storage.write(INDEX_NAME, encode_index(index))
    _report(sidecars, rejections)
    return RenderResult(
        images=images,
        written=index.samples,
        quarantined=len(rejections),
        shards=len(sidecars),
        bytes=sum(sidecar.size for sidecar in sidecars),
        seconds=round(time.monotonic() - start, 3),
        too_many=len(rejections) > limit,
    )


def _run(
    todo: Sequence[ShardPlan],
    plan: Plan,
    categories: tuple[Category, ...],
    storage: Storage,
    *,
    workers: int,
    scheduler: str | None,
) -> Iterator[Sidecar]:
    """Renders shards in any order, with a bounded number under way."""
    if not todo:
        return
    arguments = (plan.config, plan.fingerprint, categories, storage)
    if workers == 0 and scheduler is None:
        for shard in todo:
            yield render_shard(shard, *arguments)
        return
    with connect(workers, scheduler) as client:
        # Each task carries its own slice of the annotations. The window keeps what lies in the
        # scheduler's memory independent of the number of images.
        window = 2 * max(1, sum(client.nthreads().values()))
        waiting = iter(todo)
        futures = as_completed()

        def submit() -> None:
            for shard in waiting:
                futures.add(client.submit(render_shard, shard, *arguments, pure=False))
                return

        for _ in range(window):
            submit()
        for future in futures:
            try:
                yield future.result()
            except KilledWorker as error:
                raise InputError(
                    f"its worker died again and again, most likely out of memory: {error}",
                    remedy="give fewer workers, or smaller shards by --samples-per-shard",
                    code="worker-killed",
                ) from None
            future.release()
            submit()


@contextmanager
def connect(workers: int, scheduler: str | None) -> Iterator[Client]:
    """A client of an own cluster of `workers` processes, or of the scheduler at an address.

    Raises:
        InputError: No scheduler answers there, or it has no workers.
    """
    if scheduler is not None:
        try:
            client = Client(scheduler, timeout="20s")
        except (OSError, ValueError) as error:
            raise InputError(
                f"no Dask scheduler answers: {error}",
                where=scheduler,
                remedy="start dask-scheduler, or use --workers",
            ) from None
        with client:
            try:
                client.wait_for_workers(1, timeout=120)
            except TimeoutError:
                raise InputError(
                    "the Dask scheduler has no workers", where=scheduler, remedy="start dask worker"
                ) from None
            yield client
        return
    with (
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            dashboard_address=None,
            silence_logs=logging.ERROR,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def render_shard(
    shard: ShardPlan,
    config: RenderConfig,
    plan: str,
    categories: tuple[Category, ...],
    storage: Storage,
) -> Sidecar:
    """Renders and writes one shard: a Dask task. One bad image costs one sample."""
    cv2.setNumThreads(1)  # the workers are the parallelism
    by_id = {category.id: category for category in categories}
    samples: list[Sample] = []
    rejections: list[Rejection] = []
    repairs: Counter[str] = Counter()
    for record in shard.records:
        try:
            samples.append(render_image(record, config, by_id, repairs))
        except InputError as error:
            rejections.append(Rejection.of(record.image_id, record.file_name, error))
    return write_shard(
        storage, shard.name, samples, plan=plan, rejections=rejections, repairs=repairs
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
    sidecars: Sequence[Sidecar],
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
        samples=sum(len(sidecar.samples) for sidecar in sidecars),
        quarantined=quarantined,
        quarantine_sha256=hashlib.sha256(quarantine).hexdigest(),
        shards=tuple(
            ShardEntry(
                name=sidecar.name,
                samples=len(sidecar.samples),
                size=sidecar.size,
                sha256=sidecar.sha256,
                sidecar_sha256=hashlib.sha256(encode_sidecar(sidecar)).hexdigest(),
            )
            for sidecar in sidecars
        ),
    )


def left_out(plan: Plan, sidecars: Sequence[Sidecar]) -> tuple[Rejection, ...]:
    """The images left out, before the work and in it, by image id."""
    found = [*plan.rejections, *(r for sidecar in sidecars for r in sidecar.rejections)]
    found.sort(key=lambda rejection: (str(rejection.image_id).zfill(12), rejection.code))
    return tuple(found)


def encode_quarantine(rejections: Sequence[Rejection]) -> bytes:
    """The bytes of `quarantine.jsonl`: a JSON line for each image left out."""
    return "".join(f"{json.dumps(asdict(rejection))}\n" for rejection in rejections).encode()


def _check_strictly(sidecars: Iterable[Sidecar]) -> None:
    """Raises InputError where an image was left out or mended, by this run or an earlier one."""
    for sidecar in sidecars:
        if sidecar.rejections:
            raise InputError(sidecar.rejections[0].message, where=sidecar.name, code="strict")
        for code, count in sidecar.repairs.items():
            raise InputError(f"{code} in {count} places", where=sidecar.name, code="strict")


def _report(sidecars: Sequence[Sidecar], rejections: Sequence[Rejection]) -> None:
    repairs: Counter[str] = Counter()
    for sidecar in sidecars:
        repairs.update(sidecar.repairs)
    for code, count in sorted(repairs.items()):
        if count:
            log.warning("mended: %s, %d times", code, count)
    for code, count in sorted(Counter(r.code for r in rejections).items()):
        log.warning("left out: %s, %d images, see %s", code, count, QUARANTINE_NAME)
