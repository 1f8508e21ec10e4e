"""A look into a cache: what its index says, what lies in one tar, and one sample of either.

What is returned is plain, for a table on a terminal or for JSON. A tar is read by itself, so a
shard that was copied away from its cache can be looked at, too.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.cache.index import (
    INDEX_NAME,
    ShardIndex,
    decode_sidecar,
    read_index,
    read_sidecar,
    size_problem,
)
from panoptic_cache.pipeline.cache.sample import Sample, decode_sample, decode_table
from panoptic_cache.pipeline.cache.shards import members_of
from panoptic_cache.pipeline.coco import Category, ImageId, sample_key


@dataclass(frozen=True, slots=True)
class CacheSummary:
    """A finished cache, from its index alone.

    Attributes:
        place: Folder or URL.
        split: The rendered split.
        format_version: Of the shards.
        fingerprint: Of settings and input.
        settings: The render configuration.
        shards: Tars.
        samples: In all of them.
        quarantined: Images left out.
        bytes: Of all tars.
        categories: In all.
        things: Categories that have instances.
        stuff: Categories that have none.
    """

    place: str
    split: str
    format_version: int
    fingerprint: str
    settings: dict[str, Any]
    shards: int
    samples: int
    quarantined: int
    bytes: int
    categories: int
    things: int
    stuff: int

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of each line of a table."""
        settings = ", ".join(f"{k} {v}" for k, v in self.settings.items() if v is not None)
        each = self.bytes // max(self.samples, 1)
        return [
            ("split", self.split),
            ("samples", f"{self.samples:,}, and {self.quarantined:,} images left out"),
            ("shards", f"{self.shards:,}, {readable(self.bytes)}, {readable(each)} a sample"),
            ("categories", f"{self.categories}: {self.things} things, {self.stuff} stuff"),
            ("settings", settings),
            ("format", f"version {self.format_version}, fingerprint {self.fingerprint[:16]}"),
        ]


@dataclass(frozen=True, slots=True)
class SampleRow:
    """A sample of a shard; segments are things, stuff or crowd.

    Attributes:
        key: The sample's key.
        image_id: As annotated.
        height: Pixels, as cached.
        width: Pixels, as cached.
        bytes: Of its members.
        segments: All of them.
        things: Instances.
        stuff: Stuff segments.
        crowd: Crowd segments.
    """

    key: str
    image_id: ImageId
    height: int
    width: int
    bytes: int
    segments: int
    things: int
    stuff: int
    crowd: int


@dataclass(frozen=True, slots=True)
class ShardSummary:
    """What lies in one tar.

    Attributes:
        place: Path of the tar.
        bytes: Of the tar.
        samples: In its order.
        problem: What its sidecar says against it; empty without one. See `panoptic verify`.
        rejections: Images left out of it, according to the sidecar.
    """

    place: str
    bytes: int
    samples: tuple[SampleRow, ...]
    problem: str
    rejections: int

    COLUMNS = ("key", "height", "width", "bytes", "segments", "things", "stuff", "crowd")

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    def rows(self) -> list[tuple[str, ...]]:
        """A line for each sample, in the order of `COLUMNS`."""
        return [
            (row.key, *(f"{getattr(row, name):,}" for name in self.COLUMNS[1:]))
            for row in self.samples
        ]


def describe(place: str) -> CacheSummary | ShardSummary:
    """Describes a cache's folder or URL, or a tar.

    Raises:
        InputError: It is neither.
    """
    if is_tar(place):
        return describe_shard(Path(place))
    return describe_cache(Storage(place))


def describe_cache(storage: Storage) -> CacheSummary:
    """What the index says; reads no shard.

    Raises:
        InputError: There is no finished cache.
    """
    index = _index(storage)
    things = sum(category.isthing for category in index.categories)
    return CacheSummary(
        place=storage.url,
        split=index.split,
        format_version=index.format_version,
        fingerprint=index.fingerprint,
        settings=dict(index.settings),
        shards=len(index.shards),
        samples=index.samples,
        quarantined=index.quarantined,
        bytes=sum(shard.size for shard in index.shards),
        categories=len(index.categories),
        things=things,
        stuff=len(index.categories) - things,
    )


def describe_shard(path: Path) -> ShardSummary:
    """The samples of a tar, from the tar itself.

    Raises:
        InputError: No readable tar, or a sample without a segment table.
    """
    rows = [_row(key, members) for key, members in _read_tar(path)]
    problem, rejections = "no sidecar", 0
    beside = path.with_suffix(".json")
    if beside.is_file():
        try:
            sidecar = decode_sidecar(beside.read_bytes(), str(beside))
            rejections = len(sidecar.rejections)
            same = [entry.key for entry in sidecar.samples] == [row.key for row in rows]
            same = same and sidecar.size == path.stat().st_size
            problem = "" if same else "the sidecar describes another tar"
        except InputError as error:
            problem = error.what
    return ShardSummary(str(path), path.stat().st_size, tuple(rows), problem, rejections)


def find_sample(place: str, key: str | None = None) -> Sample:
    """One sample of a cache or of a tar.

    Args:
        place: A cache's folder or URL, or a tar.
        key: Its key, a number as image id, or a file name; the first sample where None.

    Raises:
        InputError: No such place, no such key, or the sample is damaged.
    """
    wanted = None if key is None else {key, key.zfill(12), sample_key(key, key)}
    samples = _read_tar(Path(place)) if is_tar(place) else _read_cache(Storage(place), wanted)
    others: list[str] = []
    for found, members in samples:
        if wanted is None or found in wanted:
            return decode_sample(found, members)
        others.append(found)
    raise InputError(
        "no samples here" if key is None else f"no sample {key}",
        where=place,
        remedy=f"{len(others)} samples here, such as {', '.join(others[:3])}" if others else "",
        code="sample-missing",
    )


def find_categories(place: str) -> tuple[Category, ...]:
    """The categories of a cache, or of the cache that a tar lies in; none for a tar alone."""
    if not is_tar(place):
        return _index(Storage(place)).categories
    folder = Path(place).parent
    if not (folder / INDEX_NAME).is_file():
        return ()
    return read_index(Storage(str(folder))).categories


def is_tar(place: str) -> bool:
    """A local file, which can only be meant as a shard."""
    return "://" not in place and (Path(place).is_file() or place.endswith(".tar"))


def _index(storage: Storage) -> ShardIndex:
    folder = storage.local
    if folder is not None and not folder.is_dir():
        raise InputError(
            "neither a cache nor a shard",
            where=folder,
            remedy="give the folder of a cache or a .tar in it",
            code="place-missing",
        )
    return read_index(storage)


def _read_cache(
    storage: Storage, wanted: set[str] | None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Keys of a cache, with the members of those that are wanted; None wants the first."""
    sizes = storage.sizes()
    for shard in _index(storage).shards:
        sidecar = read_sidecar(storage, shard)
        data = b""
        for entry in sidecar.samples:
            if wanted is not None and entry.key not in wanted:
                yield entry.key, {}
                continue
            if problem := size_problem(shard, sizes):
                raise InputError(
                    problem,
                    where=storage.path(f"{shard.name}.tar"),
                    remedy="run panoptic verify --deep",
                )
            data = data or storage.read(f"{shard.name}.tar")
            yield entry.key, members_of(data, entry)


def _read_tar(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Samples of a tar in its order: key and members by suffix."""
    try:
        with tarfile.open(path, "r:") as tar:
            pairs = ((*info.name.partition(".")[::2], _content(tar, info)) for info in tar)
            for key, group in groupby(pairs, key=itemgetter(0)):
                yield key, {suffix: data for _, suffix, data in group}
    except FileNotFoundError:
        raise InputError(
            "no such shard", where=path, remedy="give a .tar or its folder", code="place-missing"
        ) from None
    except (tarfile.TarError, OSError) as error:
        raise InputError(
            f"not a readable tar: {error}",
            where=path,
            remedy="give the folder of a cache or a .tar in it; panoptic verify checks a cache",
            code="shard-damaged",
        ) from None


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    data = b"" if file is None else file.read()
    if len(data) != info.size:
        raise tarfile.ReadError(f"{info.name} is cut off")
    return data


def _row(key: str, members: Mapping[str, bytes]) -> SampleRow:
    if "json" not in members:
        raise InputError("sample lacks json", where=key, code="member-missing")
    table = decode_table(members["json"], key)
    height, width = table.size
    kinds = Counter(
        "crowd" if segment.iscrowd else "things" if segment.isthing else "stuff"
        for segment in table.segments
    )
    return SampleRow(
        key=key,
        image_id=table.image_id,
        height=height,
        width=width,
        bytes=sum(map(len, members.values())),
        segments=kinds.total(),
        things=kinds["things"],
        stuff=kinds["stuff"],
        crowd=kinds["crowd"],
    )


def readable(count: float) -> str:
    """Bytes in the largest unit that leaves a number of at least 1."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
