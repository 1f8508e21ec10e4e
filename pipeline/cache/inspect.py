"""A look into a cache: what its index says, what is in one tar, and one sample of either.

A tar is read without its cache, so a shard that was copied elsewhere can be inspected too.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
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
from panoptic_cache.pipeline.coco import Category, sample_key

COLUMNS = ("key", "height", "width", "bytes", "segments", "things", "stuff", "crowd")
"""Columns of the table of a shard's samples."""


def describe_cache(place: str) -> dict[str, Any]:
    """What `inspect --json` prints about a cache; reads only its index.

    Raises:
        InputError: There is no finished cache.
    """
    index = _read_index(Storage(place))
    things = sum(category.isthing for category in index.categories)
    return {
        "place": place,
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


def cache_rows(cache: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of each line of the table of a described cache."""
    size, samples = cache["bytes"], cache["samples"]
    each = readable(size // max(samples, 1))
    settings = [f"{name} {value}" for name, value in cache["settings"].items() if value is not None]
    return [
        ("split", cache["split"]),
        ("samples", f"{samples:,}, and {cache['quarantined']:,} images left out"),
        ("shards", f"{cache['shards']:,}, {readable(size)}, {each} a sample"),
        ("categories", "{categories}: {things} things, {stuff} stuff".format_map(cache)),
        ("settings", ", ".join(settings)),
        ("format", "version {format_version}, fingerprint {fingerprint:.16}".format_map(cache)),
    ]


def describe_shard(path: Path) -> dict[str, Any]:
    """What `inspect --json` prints about a tar; reads the tar and the sidecar beside it.

    `problem` says whether the sidecar is missing or disagrees; `panoptic verify` says more.

    Raises:
        InputError: The tar is not readable, or a sample has no segment table.
    """
    samples = [_describe_sample(key, members) for key, members in _read_tar(path)]
    size, problem, rejections = path.stat().st_size, "no sidecar", 0
    beside = path.with_suffix(".json")
    if beside.is_file():
        try:
            sidecar = decode_sidecar(beside.read_bytes(), str(beside))
            rejections = len(sidecar.rejections)
            same_keys = [entry.key for entry in sidecar.samples] == [row["key"] for row in samples]
            same = same_keys and sidecar.size == size
            problem = "" if same else "the sidecar describes another tar"
        except InputError as error:
            problem = error.what
    return {
        "place": str(path),
        "bytes": size,
        "samples": samples,
        "problem": problem,
        "rejections": rejections,
    }


def shard_rows(shard: Mapping[str, Any]) -> list[list[str]]:
    """A line for each sample of a described shard, in the order of `COLUMNS`."""
    return [[row["key"], *(f"{row[name]:,}" for name in COLUMNS[1:])] for row in shard["samples"]]


def _describe_sample(key: str, members: Mapping[str, bytes]) -> dict[str, Any]:
    if "json" not in members:
        raise InputError("sample lacks json", where=key, code="member-missing")
    table = decode_table(members["json"], key)
    height, width = table.size
    crowd = sum(segment.iscrowd for segment in table.segments)
    things = sum(segment.isthing and not segment.iscrowd for segment in table.segments)
    return {
        "key": key,
        "image_id": table.image_id,
        "height": height,
        "width": width,
        "bytes": sum(map(len, members.values())),
        "segments": len(table.segments),
        "things": things,
        "stuff": len(table.segments) - things - crowd,
        "crowd": crowd,
    }


def find_sample(place: str, key: str | None = None) -> Sample:
    """One sample of a cache or of a tar.

    Args:
        place: A cache's folder or URL, or a tar.
        key: Its key, image id or file name; None for the first sample.

    Raises:
        InputError: There is no such place or key, or the sample is damaged.
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
    """Whether a place is a local file, which can only be a shard."""
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
    """Key and members of each sample; no members for keys that are not wanted (None wants all)."""
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


def readable(count: float) -> str:
    """Bytes in the largest unit in which the number is at least 1."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
