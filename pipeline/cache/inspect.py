"""A look into a cache: what its index says, what lies in one tar, and one sample of either.

A tar is read without its cache, so a shard that was copied elsewhere can be inspected too.
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
    """A finished cache: its folder or URL, and its index."""

    place: str
    index: ShardIndex

    def to_json(self) -> dict[str, Any]:
        """What `inspect --json` prints."""
        index = self.index
        things = sum(category.isthing for category in index.categories)
        return {
            "place": self.place,
            "split": index.split,
            "format_version": index.format_version,
            "fingerprint": index.fingerprint,
            "settings": dict(index.settings),
            "shards": len(index.shards),
            "samples": index.samples,
            "quarantined": index.quarantined,
            "bytes": sum(shard.size for shard in index.shards),
            "categories": len(index.categories),
            "things": things,
            "stuff": len(index.categories) - things,
        }

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of each line of a table."""
        values = self.to_json()
        size, samples = values["bytes"], values["samples"]
        settings = ", ".join(f"{k} {v}" for k, v in values["settings"].items() if v is not None)
        each = readable(size // max(samples, 1))
        return [
            ("split", self.index.split),
            ("samples", f"{samples:,}, and {self.index.quarantined:,} images left out"),
            ("shards", f"{values['shards']:,}, {readable(size)}, {each} a sample"),
            (
                "categories",
                f"{values['categories']}: {values['things']} things, {values['stuff']} stuff",
            ),
            ("settings", settings),
            (
                "format",
                f"version {self.index.format_version}, fingerprint {self.index.fingerprint[:16]}",
            ),
        ]


@dataclass(frozen=True, slots=True)
class SampleRow:
    """A sample of a shard: its size in pixels and bytes, and its segments in all and by kind."""

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
        problem: What its sidecar says against it; see `panoptic verify`.
        rejections: Images left out of it, according to the sidecar.
    """

    place: str
    bytes: int
    samples: tuple[SampleRow, ...]
    problem: str
    rejections: int

    COLUMNS = ("key", "height", "width", "bytes", "segments", "things", "stuff", "crowd")

    def to_json(self) -> dict[str, Any]:
        """What `inspect --json` prints."""
        return asdict(self)

    def rows(self) -> list[tuple[str, ...]]:
        """A line for each sample, in the order of `COLUMNS`."""
        return [
            (row.key, *(f"{getattr(row, name):,}" for name in self.COLUMNS[1:]))
            for row in self.samples
        ]


def describe(place: str) -> CacheSummary | ShardSummary:
    """Describes a cache's folder or URL by its index alone, or a tar by its samples.

    Raises:
        InputError: It is neither, or a sample of the tar has no segment table.
    """
    if not is_tar(place):
        return CacheSummary(place, _read_index(Storage(place)))
    path = Path(place)
    rows = [_row(key, members) for key, members in _read_tar(path)]
    size, problem, rejections = path.stat().st_size, "no sidecar", 0
    beside = path.with_suffix(".json")
    if beside.is_file():
        try:
            sidecar = decode_sidecar(beside.read_bytes(), str(beside))
            rejections = len(sidecar.rejections)
            same_keys = [entry.key for entry in sidecar.samples] == [row.key for row in rows]
            same = same_keys and sidecar.size == size
            problem = "" if same else "the sidecar describes another tar"
        except InputError as error:
            problem = error.what
    return ShardSummary(place, size, tuple(rows), problem, rejections)


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
        return _read_index(Storage(place)).categories
    folder = Path(place).parent
    return read_index(Storage(str(folder))).categories if (folder / INDEX_NAME).is_file() else ()


def is_tar(place: str) -> bool:
    """A local file, which can only be meant as a shard."""
    return "://" not in place and (Path(place).is_file() or place.endswith(".tar"))


def _read_index(storage: Storage) -> ShardIndex:
    if storage.local is not None and not storage.local.is_dir():
        raise InputError(
            "neither a cache nor a shard",
            where=storage.local,
            remedy="give the folder of a cache or a .tar in it",
            code="place-missing",
        )
    return read_index(storage)


def _read_cache(
    storage: Storage, wanted: set[str] | None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Keys of a cache, with the members of those that are wanted; None wants all."""
    sizes = storage.sizes()
    for shard in _read_index(storage).shards:
        for entry in read_sidecar(storage, shard).samples:
            members: dict[str, bytes] = {}
            if wanted is None or entry.key in wanted:
                if problem := size_problem(shard, sizes):
                    raise InputError(
                        problem,
                        where=storage.path(f"{shard.name}.tar"),
                        remedy="run panoptic verify --deep",
                    )
                members = members_of(storage.read(f"{shard.name}.tar"), entry)
            yield entry.key, members


def _read_tar(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members by suffix of each sample, in the order of the tar."""
    try:
        with tarfile.open(path, "r:") as tar:
            files = ((info.name.partition("."), tar.extractfile(info)) for info in tar)
            members = ((key, suffix, file.read()) for (key, _, suffix), file in files if file)
            for key, group in groupby(members, key=itemgetter(0)):
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


def _row(key: str, members: Mapping[str, bytes]) -> SampleRow:
    if "json" not in members:
        raise InputError("sample lacks json", where=key, code="member-missing")
    table = decode_table(members["json"], key)
    kinds = Counter(
        "crowd" if segment.iscrowd else "things" if segment.isthing else "stuff"
        for segment in table.segments
    )
    return SampleRow(
        key,
        table.image_id,
        *table.size,
        bytes=sum(map(len, members.values())),
        segments=len(table.segments),
        **{kind: kinds[kind] for kind in ("things", "stuff", "crowd")},
    )


def readable(count: float) -> str:
    """Bytes in the largest unit that leaves a number of at least 1."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
