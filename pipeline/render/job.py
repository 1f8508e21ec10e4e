"""One shard on one worker: the Dask job, its input and its result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.cache.index import ShardEntry, Sidecar
from panoptic_cache.pipeline.cache.sample import Sample
from panoptic_cache.pipeline.cache.shards import write_shard
from panoptic_cache.pipeline.coco import Category, PanopticRecord, Rejection
from panoptic_cache.pipeline.render.cluster import prepare_worker
from panoptic_cache.pipeline.render.image import render_image
from panoptic_cache.pipeline.render.plan import RenderConfig, ShardPlan


@dataclass(frozen=True, slots=True)
class RenderJob:
    """What the jobs of all shards have in common."""

    config: RenderConfig  # What decides the bytes
    plan: str  # The plan's fingerprint
    categories: tuple[Category, ...]  # By label
    storage: Storage  # The cache's folder
    strict: bool  # Every warning aborts
    tools: str  # See `tools`; a worker with others would write other bytes


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """What the driver keeps of a shard: little, so that its memory stays small."""

    entry: ShardEntry  # The shard's line in the index
    rejections: tuple[Rejection, ...]  # Images of it that were left out
    repairs: Mapping[str, int]  # Counts by code

    @classmethod
    def of(cls, sidecar: Sidecar) -> FinishedShard:
        """From a sidecar on disk."""
        return cls(sidecar.entry(), sidecar.rejections, sidecar.repairs)


def tools() -> str:
    """Versions of the libraries that decide the bytes of pictures."""
    return f"OpenCV {cv2.__version__}, simplejpeg {simplejpeg.__version__}, NumPy {np.__version__}"


def render_shard(shard: ShardPlan, job: RenderJob) -> FinishedShard:
    """Renders and writes one shard: a Dask job. A bad image costs one sample.

    Raises:
        InputError: It cannot be written, a file has disappeared, this worker would write other
            bytes than the driver, or, with `strict`, anything is wrong with an image.
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
    """Raises InputError if a file that the plan has seen is gone.

    The image is not at fault: the disk was unmounted, or this worker does not share it.
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
