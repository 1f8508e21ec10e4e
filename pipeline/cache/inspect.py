"""A look into a cache: what its index says, what is in one tar, and one sample of either.

A tar is read without its cache, so a shard that was copied elsewhere can be inspected too.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage, open_file, read_file
from panoptic_cache.pipeline.base.terminal import plain, table
from panoptic_cache.pipeline.cache.index import (
    INDEX_NAME,
    decode_sidecar,
    read_index,
    read_sidecar,
    size_problem,
)
from panoptic_cache.pipeline.cache.sample import Sample, decode_sample, decode_table
from panoptic_cache.pipeline.cache.shards import BLOCK, members_of
from panoptic_cache.pipeline.coco import Category, sample_key

COUNTS = ("height", "width", "bytes", "segments", "things", "stuff", "crowd")
REMEDY = "give the folder of a cache or a .tar in it; panoptic verify checks a cache"

LARGEST = 1 << 30
"""Bytes of a member that is still read."""
ASIDE = {tarfile.DIRTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME}
"""Members that other programs put beside files; what they say is not needed."""

Members = dict[str, bytes]


def is_tar(place: str) -> bool:
    """Whether a place is a local file, which can only be a shard."""
    return "://" not in place and (Path(place).is_file() or place.endswith(".tar"))


def describe(place: str) -> dict[str, Any]:
    """What `inspect --json` prints about a cache, of which only the index is read, or about a tar.

    The `problem` of a tar says whether its sidecar is missing or disagrees. InputError where a tar
    is not readable or a cache not finished.
    """
    if is_tar(place):
        return _describe_shard(Path(place))
    storage = Storage(place)
    if storage.local is not None and not storage.local.is_dir():
        raise InputError("neither a cache nor a shard", storage.local, REMEDY, "place-missing")
    index = read_index(storage)
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


def summary_table(summary: Mapping[str, Any]) -> str:
    """A described cache or tar as text."""
    if isinstance(summary["samples"], list):
        rows = [[row["key"], *(f"{row[name]:,}" for name in COUNTS)] for row in summary["samples"]]
        return table(("key", *COUNTS), rows, left=1)
    size, settings = summary["bytes"], summary["settings"].items()
    each = readable(size // max(summary["samples"], 1))
    rows = [
        ["split", summary["split"]],
        ["samples", "{samples:,}, and {quarantined:,} images left out".format_map(summary)],
        ["shards", f"{summary['shards']:,}, {readable(size)}, {each} a sample"],
        ["categories", "{categories}: {things} things, {stuff} stuff".format_map(summary)],
        ["settings", ", ".join(f"{name} {value}" for name, value in settings if value is not None)],
        ["format", "version {format_version}, fingerprint {fingerprint:.16}".format_map(summary)],
    ]
    return table(("", summary["place"]), rows, left=2)


def _describe_shard(path: Path) -> dict[str, Any]:
    samples = [_describe_sample(key, members) for key, members in _read_tar(path)]
    size, problem, rejections = path.stat().st_size, "no sidecar", 0
    beside = path.with_suffix(".json")
    if beside.is_file():
        try:
            sidecar = decode_sidecar(read_file(beside), str(beside))
            rejections = len(sidecar.rejections)
            same = [entry.key for entry in sidecar.samples] == [row["key"] for row in samples]
            same = same and sidecar.size == size
            problem = "" if same else "the sidecar describes another tar"
        except InputError as error:
            problem = error.what
        except OSError as error:
            problem = f"sidecar unreadable: {error.strerror}"
    found = {"place": str(path), "bytes": size, "samples": samples}
    return {**found, "problem": problem, "rejections": rejections}


def _describe_sample(key: str, members: Members) -> dict[str, Any]:
    if "json" not in members:
        raise InputError("sample lacks json", where=key, code="member-missing")
    table = decode_table(members["json"], key)
    crowd = sum(segment.iscrowd for segment in table.segments)
    things = sum(segment.isthing and not segment.iscrowd for segment in table.segments)
    return {
        "key": key,
        "image_id": table.image_id,
        "height": table.size[0],
        "width": table.size[1],
        "bytes": sum(map(len, members.values())),
        "segments": len(table.segments),
        "things": things,
        "stuff": len(table.segments) - things - crowd,
        "crowd": crowd,
    }


def find_sample(place: str, key: str | None = None) -> tuple[Sample, tuple[Category, ...]]:
    """A sample of a cache or tar by its key, image id or file name, or the first; with categories.

    A tar apart from its cache has none. InputError where there is no such place or key, or the
    sample is damaged.
    """
    wanted = None if key is None else {key, key.zfill(12), sample_key(key, key)}
    tar = Path(place) if is_tar(place) else None
    folder = Storage(place if tar is None else str(tar.parent))
    others: list[str] = []
    for found, members in _read_cache(folder, wanted) if tar is None else _read_tar(tar):
        if wanted is None or found in wanted:
            alone = tar is not None and not tar.with_name(INDEX_NAME).is_file()
            return decode_sample(found, members), () if alone else read_index(folder).categories
        others.append(found)
    what = "no samples here" if key is None else f"no sample {key}"
    remedy = f"{len(others)} samples here, such as {', '.join(others[:3])}" if others else ""
    raise InputError(what, place, remedy, "sample-missing")


def _read_cache(storage: Storage, wanted: set[str] | None) -> Iterator[tuple[str, Members]]:
    """Key and members of each sample; no members for keys that are not wanted (None wants all)."""
    for shard in read_index(storage).shards:
        for entry in read_sidecar(storage, shard).samples:
            members: Members = {}
            if wanted is None or entry.key in wanted:
                name = f"{shard.name}.tar"
                if problem := size_problem(shard, storage.sizes([name])):
                    raise InputError(problem, storage.path(name), "run panoptic verify --deep")
                members = members_of(storage.read(name, shard.size), entry)
            yield entry.key, members


def _read_tar(path: Path) -> Iterator[tuple[str, Members]]:
    """Key and members by suffix of each sample, in the order of the tar."""
    try:
        with open_file(path) as file:
            members = ((*name.partition(".")[::2], data) for name, data in _tar_members(file))
            for key, group in groupby(members, key=itemgetter(0)):
                yield key, {suffix: data for _, suffix, data in group}
    except FileNotFoundError:
        raise InputError("no such shard", path, REMEDY, "place-missing") from None
    except (tarfile.TarError, OSError, ValueError) as error:
        raise InputError(f"not a readable tar: {error}", path, REMEDY, "shard-damaged") from None


def _tar_members(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each file in a tar; ValueError or TarError where it is no shard.

    Our own walk over the headers: `tarfile` follows links, believes any size and recurses through
    headers of headers.
    """
    while (header := file.read(BLOCK)).strip(b"\0"):
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        if not 0 <= info.size <= LARGEST:
            raise ValueError(f"{plain(info.name)} claims {info.size} bytes")
        data = file.read(info.size + -info.size % BLOCK)[: info.size]
        if len(data) < info.size:
            raise ValueError(f"{plain(info.name)} is cut off")
        if info.type in {tarfile.REGTYPE, tarfile.AREGTYPE}:
            yield info.name.removeprefix("./"), data
        elif info.type not in ASIDE:
            raise ValueError(f"{plain(info.name)} is a link or another thing that is no file")
    if not header:
        raise ValueError("the end is missing")


def readable(count: float) -> str:
    """Bytes in the largest unit in which the number is at least 1."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
