"""Shards: writes one tar of samples with its sidecar, reads samples by offset."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.cache.index import (
    SampleEntry,
    Sidecar,
    Span,
    claimed_by,
    decode_sidecar,
    encode_sidecar,
    read_index,
    read_sidecar,
    size_problem,
)
from panoptic_cache.pipeline.cache.sample import (
    MEMBERS,
    Sample,
    SampleTable,
    decode_sample,
    decode_table,
    encode_sample,
)
from panoptic_cache.pipeline.coco import Rejection

BLOCK = 512
"""Bytes of a tar's block: a header takes one, and payloads are padded to whole blocks."""
END_MARKER = 2 * BLOCK
"""A tar ends with at least as many zero bytes."""


def member_header(name: str, size: int) -> bytes:
    """The tar header of a member, without owner and time, so that it is always the same."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def lay_out(start: int, sizes: Iterable[int]) -> tuple[tuple[Span, ...], int]:
    """Where the members of a sample at `start` lie, given their sizes, and where it ends."""
    spans = []
    for size in sizes:
        spans.append((start + BLOCK, size))
        start += BLOCK + size + -size % BLOCK
    return tuple(spans), start


def pack_shard(samples: Iterable[Sample]) -> tuple[bytes, tuple[SampleEntry, ...]]:
    """A tar of samples and where each one lies; the same samples give the same bytes.

    A generator of samples is consumed one by one, so only one of them is in memory.
    """
    tar = io.BytesIO()
    entries: list[SampleEntry] = []
    for sample in samples:
        start, members = tar.tell(), encode_sample(sample)
        for suffix, data in members.items():
            tar.write(member_header(f"{sample.key}.{suffix}", len(data)))
            tar.write(data)
            tar.write(bytes(-len(data) % BLOCK))
        spans, end = lay_out(start, map(len, members.values()))
        crc32 = zlib.crc32(tar.getbuffer()[start:end])
        entries.append(SampleEntry(sample.key, start, end - start, crc32, spans))
    tar.write(bytes(END_MARKER))
    tar.write(bytes(-tar.tell() % tarfile.RECORDSIZE))
    return tar.getvalue(), tuple(entries)


def write_shard(
    storage: Storage,
    name: str,
    samples: Iterable[Sample],
    *,
    plan: str,
    rejections: Sequence[Rejection],
    repairs: Mapping[str, int],
) -> Sidecar:
    """Writes a tar, then its sidecar; without its sidecar a shard is not finished.

    `samples` come in their final order. `rejections`, the images left out of this shard, and
    `repairs`, counts by code, are read once they are exhausted. InputError where it cannot be
    written, or the folder now belongs to another plan.
    """
    data, entries = pack_shard(samples)
    sidecar = Sidecar(
        name=name,
        fingerprint=plan,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        samples=entries,
        rejections=tuple(rejections),
        repairs={code: count for code, count in sorted(repairs.items()) if count},
    )
    text = encode_sidecar(sidecar)
    # A scheduler may still run this job for a driver that was stopped. It must not overwrite the
    # shards of the next plan.
    if claimed_by(storage) not in {None, plan}:
        where = storage.path(f"{name}.tar")
        raise InputError("the folder belongs to another run now", where, code="plan-changed")
    # An old sidecar must not vouch for the new tar, which may well have the same size. An equal one
    # stays: a worker that a killed driver left behind may be writing the same shard.
    try:
        if storage.read(f"{name}.json") != text:
            storage.remove(f"{name}.json")
    except FileNotFoundError:
        pass
    storage.write(f"{name}.tar", data)
    storage.write(f"{name}.json", text)
    return sidecar


def finished_shard(
    storage: Storage, name: str, plan: str, sizes: Mapping[str, int]
) -> Sidecar | None:
    """The sidecar of a finished, undamaged shard of this plan; None if it has to be rendered."""
    if f"{name}.json" not in sizes:
        return None
    data = storage.read(f"{name}.json")
    try:
        sidecar = decode_sidecar(data, storage.path(f"{name}.json"))
    except InputError:
        return None
    # The index is made from sidecars, so a damaged one must not get into it.
    found = (encode_sidecar(sidecar), sidecar.name, sidecar.fingerprint, sidecar.size)
    return sidecar if found == (data, name, plan, sizes.get(f"{name}.tar")) else None


_OPEN_FILES = 256
"""Tars that a reader keeps open, but no more than a quarter of what a process may."""


class ShardReader:
    """Reads samples of a local cache by position, without scanning tars.

    The size of every shard is checked first. Files are opened when needed, and a reader is pickled
    without them, so each worker process opens its own. Threads must not share a reader. So many
    `readers` of a process share the files that it may open.

    Attributes:
        index: The cache's index.
        keys: Key of each sample, in the order of positions 0..N-1.
    """

    def __init__(self, folder: Path, readers: int = 1) -> None:
        self._folder, self._readers = folder, readers
        storage = Storage(str(folder))
        self.index = read_index(storage)
        sizes = storage.sizes()
        entries: list[SampleEntry] = []
        counts = []
        for shard in self.index.shards:
            if problem := size_problem(shard, sizes):
                remedy = "run panoptic verify --deep; remove the shard and preprocess again"
                raise InputError(problem, folder / f"{shard.name}.tar", remedy, "shard-size")
            samples = read_sidecar(storage, shard).samples
            entries += samples
            counts.append(len(samples))
        self.keys = tuple(entry.key for entry in entries)
        self._shards = np.repeat(np.arange(len(counts)), np.array(counts, np.int64))  # (N,)
        places = [entry.members for entry in entries]
        self._places = np.array(places, np.int64).reshape(-1, len(MEMBERS), 2)
        ends = self._places.sum(2).max(1, initial=0)  # (N,)
        limits = np.array([shard.size for shard in self.index.shards], np.int64)[self._shards]
        if len(outside := np.flatnonzero(ends > limits)):
            what = f"sample {self.keys[outside[0]]} lies outside of its shard"
            raise InputError(what, folder, "run panoptic verify", "sidecar-damaged")
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def members(self, position: int) -> dict[str, bytes]:
        """The members of a sample, by suffix."""
        file = self._file(int(self._shards[position]))
        return {
            suffix: os.pread(file, size, offset)
            for suffix, (offset, size) in zip(MEMBERS, self._places[position].tolist(), strict=True)
        }

    def table(self, position: int) -> SampleTable:
        """The table of a sample, without its photo and maps."""
        offset, size = self._places[position, MEMBERS.index("json")].tolist()
        data = os.pread(self._file(int(self._shards[position])), size, offset)
        return decode_table(data, self.keys[position])

    def sample(self, position: int) -> Sample:
        """A sample, decoded; InputError where it is damaged."""
        classes = len(self.index.categories)
        return decode_sample(self.keys[position], self.members(position), classes)

    def _file(self, number: int) -> int:
        if number not in self._files:
            while len(self._files) >= max(1, open_files() // self._readers):
                os.close(self._files.pop(next(iter(self._files))))
            path = self._folder / f"{self.index.shards[number].name}.tar"
            self._files[number] = os.open(path, os.O_RDONLY)
        return self._files[number]


def open_files() -> int:
    """How many tars a reader keeps open: macOS allows a process 256 files, Linux mostly 1024."""
    try:
        import resource  # noqa: PLC0415 - Windows has none
    except ModuleNotFoundError:
        return 64
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _OPEN_FILES if limit == resource.RLIM_INFINITY else max(1, min(_OPEN_FILES, limit // 4))


def members_of(data: bytes, entry: SampleEntry) -> dict[str, bytes]:
    """The members of a sample by suffix, from the bytes of its tar."""
    return {
        suffix: data[offset : offset + size]
        for suffix, (offset, size) in zip(MEMBERS, entry.members, strict=True)
    }
