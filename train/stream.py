"""The `stream` reader: whole shards in sequence from any fsspec URL, through webdataset.

For caches that no local disk holds. Each rank and loader process takes its own shards, round after
round without end, so that no rank ever waits for another; a buffer mixes the samples. Batches have
the format of the `indexed` reader. What it cannot promise: every sample exactly once an epoch, and
resuming at the very sample.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import fsspec
import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys, tar_file_expander

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.cache.index import ShardEntry, ShardIndex
from panoptic_cache.pipeline.cache.sample import MEMBERS, decode_sample
from panoptic_cache.pipeline.cache.shards import ShardReader
from panoptic_cache.train.augment import Item, draw_augmentation, make_item
from panoptic_cache.train.config import DataConfig
from panoptic_cache.train.data import (
    Batch,
    collate,
    indexed_loader,
    micro_batch_sizes,
    prepare_worker,
)

BUFFER = 256
"""Samples that are mixed; about 40 MB of JPEGs and PNGs a loader process."""


class ShardStream(IterableDataset[Batch]):
    """Endless micro-batches of one rank.

    Args:
        storage: The cache.
        index: Its index.
        config: Of the data.
        seed: Of order and augmentation.
        first: The optimizer step to begin at; another one draws another order.
        rank: This rank.
        world: Ranks.
    """

    def __init__(
        self,
        storage: Storage,
        index: ShardIndex,
        config: DataConfig,
        *,
        seed: int,
        first: int,
        rank: int,
        world: int,
    ) -> None:
        self._storage, self._index, self._config = storage, index, config
        self._seed, self._first, self._rank, self._world = seed, first, rank, world

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        part, parts = self._rank * workers + number, self._world * workers
        sizes, items = micro_batch_sizes(self._config, self._world), self._items(part, parts)
        for turn in count(number, workers):  # the loader takes one of each process in turn
            yield collate(list(islice(items, sizes[turn % len(sizes)])))

    def _items(self, part: int, parts: int) -> Iterator[Item]:
        random = np.random.default_rng([self._seed, self._first, part])
        buffer: list[dict[str, Any]] = []
        for turn, sample in enumerate(self._samples(part, parts)):
            buffer.append(sample)
            if len(buffer) < BUFFER and turn < self._index.samples // parts:
                continue
            members = buffer.pop(int(random.integers(len(buffer))))
            place = (self._first, turn * parts + part)
            augmentation = draw_augmentation(self._config, self._seed, place)
            yield make_item(decode_sample(members["__key__"], members), self._config, augmentation)

    def _samples(self, part: int, parts: int) -> Iterator[dict[str, Any]]:
        """Members by suffix, shard after shard; every round takes the shards in another order."""
        turn = 0
        while True:
            # The same permutation everywhere, so that the parts of a round do not overlap.
            order = np.random.default_rng([self._seed, self._first, turn]).permutation(
                len(self._index.shards)
            )
            for number in order[part::parts]:
                yield from self._shard(self._index.shards[number])
            turn += 1

    def _shard(self, shard: ShardEntry) -> Iterator[dict[str, Any]]:
        url = self._storage.path(f"{shard.name}.tar")
        try:
            with fsspec.open(url, "rb") as stream:
                # Read whole: a cut tar would end without error.
                data = stream.read()
        except OSError as error:
            raise InputError(f"cannot read the shard: {error}", where=url) from None
        problem = ""
        if len(data) != shard.size:
            problem = f"shard has {len(data)} bytes, the index says {shard.size}"
        elif hashlib.sha256(data).hexdigest() != shard.sha256:
            # A damaged header, for one, would end the tar early and without error.
            problem = "shard damaged: its SHA-256 is not the one in the index"
        if problem:
            raise InputError(
                problem,
                where=url,
                remedy="run panoptic verify --deep, it names the samples; then preprocess again",
                code="shard-damaged",
            )
        opened = [{"url": url, "stream": io.BytesIO(data)}]
        for sample in group_by_keys(tar_file_expander(opened)):
            yield {name: sample[name] for name in ("__key__", *MEMBERS)}


def stream_loader(
    storage: Storage,
    index: ShardIndex,
    config: DataConfig,
    *,
    seed: int,
    first: int,
    rank: int = 0,
    world: int = 1,
    pin: bool = False,
) -> DataLoader[Batch]:
    """Micro-batches of one rank without end; see `ShardStream`.

    Raises:
        InputError: Not every loader process gets a shard of its own.
    """
    readers = world * max(1, config.workers)
    if readers > len(index.shards):
        raise InputError(
            f"{len(index.shards)} shards for {readers} readers: {world} ranks with"
            f" {max(1, config.workers)} loader processes",
            where=storage.url,
            remedy="lower data.workers, or render with fewer --samples-per-shard",
        )
    stream = ShardStream(storage, index, config, seed=seed, first=first, rank=rank, world=world)
    return DataLoader(
        stream,
        batch_size=None,  # the stream makes batches
        num_workers=config.workers,
        pin_memory=pin,
        prefetch_factor=4 if config.workers else None,
        worker_init_fn=prepare_worker if config.workers else None,
    )


def make_loader(
    config: DataConfig,
    index: ShardIndex,
    *,
    seed: int,
    steps: range,
    rank: int = 0,
    world: int = 1,
    pin: bool = False,
) -> DataLoader[Batch]:
    """Micro-batches of the given optimizer steps for one rank, by the reader that is configured.

    Raises:
        InputError: The `indexed` reader is asked to read a cache that is not on a local disk.
    """
    storage = Storage(config.cache)
    if config.reader == "stream":
        return stream_loader(
            storage, index, config, seed=seed, first=steps.start, rank=rank, world=world, pin=pin
        )
    if storage.local is None:
        raise InputError(
            "the indexed reader needs a local cache",
            where=config.cache,
            remedy="--set data.reader=stream, or copy it to a local disk",
        )
    reader = ShardReader(storage.local)
    return indexed_loader(reader, config, seed=seed, steps=steps, rank=rank, world=world, pin=pin)
