"""The `stream` reader: whole shards in sequence from any fsspec URL, as a webdataset pipeline.

For caches that fit on no local disk. Batches have the format of the `indexed` reader. Each loader
process reads its part of the shards once, shuffles again, and goes on without end, so no rank waits
for another, and all of them get the batches of the same steps. Two things only the `indexed` reader
promises: that all processes are in the same epoch, and that a run resumes at the very sample.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice
from typing import Any, cast

import numpy as np
import webdataset as wds
from torch.utils.data import IterableDataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.cache.index import ShardEntry, ShardIndex
from panoptic_cache.pipeline.cache.sample import decode_sample
from panoptic_cache.train.augment import Item, draw_augmentation, make_item
from panoptic_cache.train.caches import Caches
from panoptic_cache.train.config import DataConfig
from panoptic_cache.train.data import Batch, Share, collate, micro_batch_sizes

Members = dict[str, Any]
"""A sample: its key as `__key__`, and what its members hold, by suffix."""

BUFFER = 256
"""Samples that a loader process mixes; about 40 MB of JPEGs and PNGs."""


def stream_batches(config: DataConfig, caches: Caches, share: Share) -> IterableDataset[Batch]:
    """Micro-batches of one rank; a run that begins at another step reads in another order.

    Raises InputError where not every loader process gets a shard of each cache, or the environment,
    where webdataset looks, names another rank.
    """
    seed, first, world = share.seed, share.steps.start, share.world
    order = wds.utils.make_seed(seed, first)
    # Each round, the shuffles of a cache draw anew, by its next number.
    streams = [
        stream_samples(Storage(path), index, world, config.workers, order + (number << 64))
        for number, (path, index) in enumerate(zip(config.paths, caches.indexes, strict=True))
    ]
    # Else ranks would read the same shards, and nobody would notice.
    rank, ranks, *_ = wds.utils.pytorch_worker_info()
    if (rank, ranks) != (share.rank, world):
        raise InputError(
            f"rank {share.rank} of {world}, but the environment says {rank} of {ranks}",
            where="RANK and WORLD_SIZE",
            remedy="start the ranks with accelerate launch or torchrun",
        )
    sizes, classes = micro_batch_sizes(config, world), len(caches.categories)
    return cast(
        "IterableDataset[Batch]",
        wds.DataPipeline(
            MixedSamples(streams, caches.mix.parts, order),  # Members
            partial(make_items, config=config, classes=classes, seed=seed, first=first),  # Item
            partial(make_batches, sizes=sizes, total=len(share.steps) * len(sizes)),  # Batch
        ),
    )


class MixedSamples(IterableDataset[Members]):
    """Samples of several endless streams; each of them comes from one that is drawn by its part."""

    def __init__(
        self, streams: Sequence[Iterable[Members]], parts: Sequence[int], order: int
    ) -> None:
        self.streams, self.order = streams, order
        self.chances = np.array(parts) / sum(parts)

    def __iter__(self) -> Iterator[Members]:
        rank, _, worker, workers = wds.utils.pytorch_worker_info()
        random = np.random.default_rng([self.order, rank * workers + worker])
        streams = [iter(stream) for stream in self.streams]
        while True:
            yield next(streams[random.choice(len(streams), p=self.chances)])


def stream_samples(
    storage: Storage, index: ShardIndex, world: int, workers: int, order: int
) -> Iterable[Members]:
    """The samples of one cache for this rank and loader process, in rounds without end."""
    shards = {storage.path(f"{shard.name}.tar"): shard for shard in index.shards if shard.samples}
    workers = max(1, workers)
    if world * workers > len(shards):
        raise InputError(
            f"{len(shards)} shards for {world * workers} readers: {world} ranks with {workers}"
            " loader processes",
            where=storage.url,
            remedy="lower data.workers, or render with fewer --samples-per-shard",
        )
    samples = wds.DataPipeline(
        # What flows: {"url": ...} of every shard, in an order that is the same on every rank,
        wds.SimpleShardList([*shards]),
        wds.detshuffle(bufsize=len(shards), initial=len(shards), seed=order),
        # of this rank and this loader process only,
        wds.split_by_node,
        wds.split_by_worker,
        # with "stream", the whole tar in memory, of which nothing is damaged;
        wds.map(partial(open_shard, storage=storage, shards=shards), handler=wds.reraise_exception),
        # {"fname": ..., "data": ...} of every member;
        wds.pipelinefilter(tar_file_expander)(handler=wds.reraise_exception),
        # {"__key__": ..., "jpg": ..., "json": ..., ...} of every sample, mixed.
        wds.pipelinefilter(group_by_keys)(handler=wds.reraise_exception),
        wds.detshuffle(bufsize=BUFFER, initial=BUFFER, seed=order),
    )
    return cast("Iterable[Members]", samples.repeat())


def open_shard(
    source: dict[str, Any], storage: Storage, shards: Mapping[str, ShardEntry]
) -> dict[str, Any]:
    """Reads a tar whole; InputError where that fails or it is not what the index says.

    A reader of a damaged tar may end early without error.
    """
    url = source["url"]
    shard, problem = shards[url], ""
    try:
        data = storage.read(f"{shard.name}.tar", shard.size)
    except OSError as error:
        raise InputError(f"cannot read the shard: {error}", where=url) from None
    if len(data) != shard.size:
        problem = f"shard has {len(data)} bytes, the index says {shard.size}"
    elif hashlib.sha256(data).hexdigest() != shard.sha256:
        problem = "shard damaged: its SHA-256 is not the one in the index"
    if problem:
        raise InputError(
            problem,
            where=url,
            remedy="run panoptic verify --deep, it names the samples; then preprocess again",
            code="shard-damaged",
        )
    return {**source, "stream": io.BytesIO(data)}


def make_items(
    samples: Iterable[Members], config: DataConfig, classes: int, seed: int, first: int
) -> Iterator[Item]:
    """Augments each sample; the draw depends on its number among the samples of all readers.

    Raises InputError where a sample is damaged.
    """
    rank, world, worker, workers = wds.utils.pytorch_worker_info()
    numbers = count(rank * workers + worker, world * workers)
    for number, members in zip(numbers, samples, strict=False):
        sample = decode_sample(members["__key__"], members, classes)
        yield make_item(sample, config, draw_augmentation(config, seed, (first, number)))


def make_batches(items: Iterator[Item], sizes: tuple[int, ...], total: int) -> Iterator[Batch]:
    """Micro-batches in the sizes of a step; the loader takes one from each process in turn."""
    _, _, worker, workers = wds.utils.pytorch_worker_info()
    for turn in range(worker, total, workers):
        yield collate(list(islice(items, sizes[turn % len(sizes)])))
