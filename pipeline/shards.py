"""Shards: tars of samples with sidecars, and the index that vouches for them.

A tar alone proves nothing: cut at a sample boundary it reads back without error and with fewer
samples. So each shard has a sidecar that knows every byte, and the index, written last, knows
every shard and sidecar. FORMAT.md is the description for people.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.coco import Category, Rejection
from pipeline.config import build_config, fingerprint
from pipeline.errors import InputError
from pipeline.sample import FORMAT_VERSION, MEMBERS, Sample, decode_sample, encode_sample
from pipeline.storage import Storage

INDEX_NAME = "index.json"
QUARANTINE_NAME = "quarantine.jsonl"
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class SampleEntry:
    """Where a sample lies in its shard.

    Attributes:
        key: The sample's key.
        offset: Of its first tar header, bytes.
        size: Bytes up to the next sample, headers and padding included.
        crc32: Of those bytes: names the sample when the shard's hash is wrong.
        members: Payload (offset, size) of each member, in the order of `MEMBERS`.
    """

    key: str
    offset: int
    size: int
    crc32: int
    members: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Sidecar:
    """Everything known of one shard; written right after its tar.

    Attributes:
        name: The shard's name, without `.tar`.
        fingerprint: Of the plan it belongs to.
        size: Bytes of the tar.
        sha256: Of the tar.
        samples: In the order of the tar.
        rejections: Images planned into this shard that were left out.
        repairs: How often each kind of repair was made, by code.
    """

    name: str
    fingerprint: str
    size: int
    sha256: str
    samples: tuple[SampleEntry, ...]
    rejections: tuple[Rejection, ...]
    repairs: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """A shard in the index."""

    name: str
    samples: int
    size: int
    sha256: str
    sidecar_sha256: str


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The contents page of a cache.

    Attributes:
        format_version: See `FORMAT_VERSION`.
        split: The rendered split.
        fingerprint: Of settings and input; shards of another one do not belong here.
        settings: The render configuration as plain values.
        categories: By label.
        samples: Samples in all shards.
        quarantined: Images left out.
        quarantine_sha256: Of `quarantine.jsonl`, which lists them.
        shards: By name.
    """

    format_version: int
    split: str
    fingerprint: str
    settings: Mapping[str, Any]
    categories: tuple[Category, ...]
    samples: int
    quarantined: int
    quarantine_sha256: str
    shards: tuple[ShardEntry, ...]


def shard_name(split: str, number: int) -> str:
    """`{split}-{number:05d}`."""
    return f"{split}-{number:05d}"


def pack_shard(samples: Iterable[Sample]) -> tuple[bytes, tuple[SampleEntry, ...]]:
    """A tar of samples, byte for byte the same for the same samples, and where each one lies.

    Samples are taken one by one: of a generator's, only one is in memory at a time.
    """
    buffer = io.BytesIO()
    entries: list[SampleEntry] = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            start = buffer.tell()
            places: list[tuple[int, int]] = []
            for suffix, data in encode_sample(sample).items():
                info = tarfile.TarInfo(f"{sample.key}.{suffix}")
                info.size, info.mode = len(data), 0o644
                places.append((buffer.tell() + _BLOCK, len(data)))
                tar.addfile(info, io.BytesIO(data))
            span = buffer.getbuffer()[start : buffer.tell()]
            entries.append(
                SampleEntry(sample.key, start, len(span), zlib.crc32(span), tuple(places))
            )
            span.release()
    return buffer.getvalue(), tuple(entries)


def write_shard(
    storage: Storage,
    name: str,
    samples: Iterable[Sample],
    *,
    plan: str,
    rejections: Sequence[Rejection],
    repairs: Mapping[str, int],
) -> Sidecar:
    """Writes a tar, then its sidecar; a shard without sidecar is not done.

    Args:
        storage: The cache's folder.
        name: See `shard_name`.
        samples: In their final order.
        plan: The plan's fingerprint.
        rejections: What was left out of this shard; read when the samples are exhausted.
        repairs: Counts by code; read likewise.
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
    # Another sidecar must not vouch for the new tar: sizes are multiples of 10 KiB. The same one
    # may stay: a driver that was killed can have left a worker that writes these bytes, too.
    try:
        if storage.read(f"{name}.json") != text:
            storage.remove(f"{name}.json")
    except FileNotFoundError:
        pass
    storage.write(f"{name}.tar", data)
    storage.write(f"{name}.json", text)
    return sidecar


def encode_sidecar(sidecar: Sidecar) -> bytes:
    """Canonical JSON with a digest of its contents and a line for each sample."""
    values = asdict(sidecar)
    digest = fingerprint(values)
    samples = ",\n  ".join(_compact(row) for row in values.pop("samples"))
    head = _compact({**values, "digest": digest})
    return f'{head[:-1]},"samples":[\n  {samples}\n]}}\n'.encode()


def decode_sidecar(data: bytes, where: str) -> Sidecar:
    """The inverse of `encode_sidecar`; InputError where it is none. Checks no digest."""
    try:
        values = json.loads(data)
        del values["digest"]
        return Sidecar(
            **{
                **values,
                "samples": tuple(_entry(row) for row in values["samples"]),
                "rejections": tuple(Rejection(**row) for row in values["rejections"]),
            }
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"not a sidecar: {error}",
            where=where,
            remedy="remove the shard and its sidecar and run preprocess again",
            code="sidecar-damaged",
        ) from None


def _entry(row: Mapping[str, Any]) -> SampleEntry:
    members = tuple((offset, size) for offset, size in row["members"])
    if len(members) != len(MEMBERS):
        raise ValueError(f"{len(members)} members in {row['key']}, not {len(MEMBERS)}")
    return SampleEntry(**{**row, "members": members})


def _compact(values: object) -> str:
    return json.dumps(values, separators=(",", ":"))


def finished_shard(
    storage: Storage, name: str, plan: str, sizes: Mapping[str, int]
) -> Sidecar | None:
    """The sidecar of a shard that is done: whole, right plan, right size. Else None."""
    if f"{name}.json" not in sizes:
        return None
    data = storage.read(f"{name}.json")
    try:
        sidecar = decode_sidecar(data, storage.path(f"{name}.json"))
    except InputError:
        return None  # rendered again, which replaces it
    # Else the index, which is made of sidecars, would vouch for a damaged one.
    if encode_sidecar(sidecar) != data or sidecar.name != name:
        return None
    if sidecar.fingerprint != plan or sizes.get(f"{name}.tar") != sidecar.size:
        return None
    return sidecar


def encode_index(index: ShardIndex) -> bytes:
    """The bytes of `index.json`: canonical JSON with a digest of its own contents."""
    values = asdict(index)
    values["digest"] = fingerprint(values)
    return json.dumps(values, indent=1).encode() + b"\n"


def read_index(storage: Storage) -> ShardIndex:
    """Reads and checks `index.json`.

    Raises:
        InputError: No finished cache, edited, damaged, or of another format version.
    """
    where = storage.path(INDEX_NAME)
    try:
        values = json.loads(storage.read(INDEX_NAME))
        version, digest = values["format_version"], values.pop("digest")
    except FileNotFoundError:
        raise InputError(
            "no index: no cache, or one that is not finished",
            where=where,
            remedy="run panoptic preprocess to make or finish it",
            code="index-missing",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"index damaged: {error}", where=where, code="index-damaged") from None
    if version != FORMAT_VERSION:
        raise InputError(
            f"cache format {version}, this program reads {FORMAT_VERSION}",
            where=where,
            remedy="render it again",
            code="format-version",
        )
    if digest != fingerprint(values):
        raise InputError(
            "index was edited or damaged",
            where=where,
            remedy="run panoptic preprocess again: it rewrites the index from the sidecars",
            code="index-damaged",
        )
    return build_config(ShardIndex, values, where=where)


def read_sidecar(storage: Storage, shard: ShardEntry) -> Sidecar:
    """The sidecar that the index vouches for; InputError where it is missing or another."""
    where = storage.path(f"{shard.name}.json")
    try:
        data = storage.read(f"{shard.name}.json")
    except FileNotFoundError:
        raise InputError("sidecar missing", where=where, code="sidecar-missing") from None
    except OSError as error:
        raise InputError(
            f"sidecar unreadable: {error}", where=where, code="sidecar-damaged"
        ) from None
    if hashlib.sha256(data).hexdigest() != shard.sidecar_sha256:
        raise InputError(
            "sidecar is not the one the index names",
            where=where,
            remedy="remove it and run panoptic preprocess again",
            code="sidecar-damaged",
        )
    return decode_sidecar(data, where)


_OPEN_FILES = 256
"""Tars that a reader holds open; the usual limit of a process is 1024 files."""


class ShardReader:
    """Reads samples of a local cache by position, without scanning tars.

    Every shard's size is checked against the index before its first read. Files are opened when
    first needed and a reader pickles without them, so each worker process opens its own; threads
    must not share a reader.

    Attributes:
        index: The cache's index.
        keys: Key of each sample, in the order of positions 0..N-1.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        storage = Storage(str(folder))
        self.index = read_index(storage)
        sizes = storage.sizes()
        shards: list[int] = []
        places: list[tuple[tuple[int, int], ...]] = []
        keys: list[str] = []
        for number, shard in enumerate(self.index.shards):
            problem = size_problem(shard, sizes)
            if problem:
                raise InputError(
                    problem,
                    where=folder / f"{shard.name}.tar",
                    remedy="run panoptic verify; remove the shard and preprocess again",
                    code="shard-size",
                )
            sidecar = read_sidecar(storage, shard)
            shards.extend([number] * len(sidecar.samples))
            places.extend(entry.members for entry in sidecar.samples)
            keys.extend(entry.key for entry in sidecar.samples)
        self.keys = tuple(keys)
        self._shards = np.array(shards, np.int32)
        self._places = np.array(places, np.int64).reshape(-1, len(MEMBERS), 2)
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

    def sample(self, position: int) -> Sample:
        """A sample, decoded; InputError where it is damaged."""
        return decode_sample(self.keys[position], self.members(position))

    def _file(self, number: int) -> int:
        if number not in self._files:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            path = self._folder / f"{self.index.shards[number].name}.tar"
            self._files[number] = os.open(path, os.O_RDONLY)
        return self._files[number]


def size_problem(shard: ShardEntry, sizes: Mapping[str, int]) -> str | None:
    """What the sizes on disk say against a shard, if anything."""
    found = sizes.get(f"{shard.name}.tar")
    if found is None:
        return "shard missing"
    if found != shard.size:
        return f"shard has {found} bytes, the index says {shard.size}"
    return None


def iterate_samples(storage: Storage, shard: ShardEntry) -> Iterator[Sample]:
    """All samples of one shard, local or remote, read whole."""
    data = storage.read(f"{shard.name}.tar")
    for entry in read_sidecar(storage, shard).samples:
        yield decode_sample(entry.key, members_of(data, entry))


def members_of(data: bytes, entry: SampleEntry) -> dict[str, bytes]:
    """The members of a sample of a tar in memory, by suffix."""
    return {
        suffix: data[offset : offset + size]
        for suffix, (offset, size) in zip(MEMBERS, entry.members, strict=True)
    }
