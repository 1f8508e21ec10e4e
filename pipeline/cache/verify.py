"""Checks that a cache is what was rendered: its sizes and sidecars, or every byte and every target.

The index holds the SHA-256 of each tar and sidecar, and a digest of itself. The plain check reads
everything but the tars. The deep check reads them too and names the damaged samples. All problems
are reported, not only the first.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from msgspec import Struct, structs

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.base.terminal import progress
from panoptic_cache.pipeline.cache.index import (
    INDEX_NAME,
    PLAN_NAME,
    QUARANTINE_NAME,
    ShardEntry,
    ShardIndex,
    Sidecar,
    decode_sidecar,
    encode_index,
    encode_plan,
    read_index,
    read_sidecar,
    size_problem,
)
from panoptic_cache.pipeline.cache.sample import MEMBERS, Sample, check_sample, decode_sample
from panoptic_cache.pipeline.cache.shards import (
    BLOCK,
    END_MARKER,
    lay_out,
    member_header,
    members_of,
)
from panoptic_cache.pipeline.coco import longer_keys, sample_key
from panoptic_cache.pipeline.photo import decode_photo
from panoptic_cache.pipeline.tiles import tile_key


class Problem(Struct, frozen=True, omit_defaults=True):
    """One thing that is wrong with a shard, or with a file that belongs to no shard."""

    shard: str  # The name of the shard or of the file
    problem: str  # What is wrong
    sample: str | None = None  # Key of the sample, where the problem is one sample's

    def __str__(self) -> str:
        sample = f", sample {self.sample}" if self.sample is not None else ""
        return f"{self.shard}{sample}: {self.problem}"


class VerifyReport(Struct, frozen=True):
    """What `verify --json` prints."""

    ok: bool
    shards: int  # Shards checked
    samples: int  # Samples they should hold
    problems: list[Problem]  # Of the folder first, then by shard


def verify(storage: Storage, *, deep: bool = False) -> VerifyReport:
    """Checks a cache with a thread for each core; a thread holds one shard in memory.

    A deep check reads the tars too: it hashes each one, decodes every sample and computes its
    targets anew. InputError where there is no such folder.
    """
    if storage.local is not None and not storage.local.is_dir():
        raise InputError("no such folder", where=storage.url, remedy="give a cache's folder")
    index: ShardIndex | None = None
    try:
        index = read_index(storage)
        shards = index.shards
        files = {f"{shard.name}.{suffix}" for shard in shards for suffix in ("tar", "json")}
        files |= {INDEX_NAME, PLAN_NAME, QUARANTINE_NAME}
        sizes = storage.sizes(files)
        problems = [Problem(name, what) for name, what in _check_folder(storage, index, sizes)]
        # A README does no harm, but a stray tar would be read with `*.tar`.
        strays = [
            name for name in sizes.keys() - files if name.endswith((".tar", ".json", ".jsonl"))
        ]
        problems += [Problem(name, "the index knows no such file") for name in sorted(strays)]
    except InputError as error:
        problems, sizes = [Problem(INDEX_NAME, error.what)], storage.sizes()
        # Without an index, check the tars against their sidecars.
        shards = tuple(_self_described(storage, sizes))
    names_by_sha256 = {shard.sha256: shard.name for shard in shards}

    def check(shard: ShardEntry) -> tuple[list[Problem], list[str]]:
        found: list[Problem] = []
        sidecar: Sidecar | None = None
        try:
            sidecar = read_sidecar(storage, shard)
            found += _check_sidecar(sidecar, shard, index)
        except InputError as error:
            found.append(Problem(shard.name, error.what))
        if problem := size_problem(shard, sizes):
            found.append(Problem(shard.name, problem))
        if deep and f"{shard.name}.tar" in sizes:
            try:
                data = storage.read(f"{shard.name}.tar", shard.size)
                found += _check_tar(data, shard, sidecar, index, names_by_sha256)
            except OSError as error:
                found.append(Problem(shard.name, f"shard unreadable: {error}"))
        return found, [entry.key for entry in sidecar.samples] if sidecar else []

    keys: Counter[str] = Counter()
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        progress("verify", len(shards), "shards") as advance,
    ):
        for found, keys_of_shard in pool.map(check, shards):
            problems += found
            keys.update(keys_of_shard)
            advance()
    repeated = [key for key, count in keys.items() if count > 1]
    problems += [Problem(INDEX_NAME, "sample is there more than once", key) for key in repeated]
    samples = sum(shard.samples for shard in shards)
    return VerifyReport(not problems, len(shards), samples, problems)


def _check_folder(
    storage: Storage, index: ShardIndex, sizes: Mapping[str, int]
) -> Iterator[tuple[str, str]]:
    """The files that belong to no shard, and what is wrong with them."""
    read: dict[str, bytes] = {}
    for name in (INDEX_NAME, PLAN_NAME, QUARANTINE_NAME):
        with suppress(OSError):  # what cannot be read fails its check
            read[name] = storage.read(name)
    if read.get(INDEX_NAME) != encode_index(index):
        yield INDEX_NAME, "index was edited: its contents are the same, not its form"
    if sum(shard.samples for shard in index.shards) != index.samples:
        yield INDEX_NAME, "the shards' samples do not add up to the total"
    plan = encode_plan(index.fingerprint, {"split": index.split, **index.settings})
    if PLAN_NAME not in sizes:
        yield PLAN_NAME, "plan missing"
    elif read.get(PLAN_NAME) != plan:
        yield PLAN_NAME, "plan is not the one of the index"
    quarantine = read.get(QUARANTINE_NAME, b"")
    if QUARANTINE_NAME not in sizes:
        yield QUARANTINE_NAME, "list of images left out is missing"
    elif hashlib.sha256(quarantine).hexdigest() != index.quarantine_sha256:
        yield QUARANTINE_NAME, "list of images left out was edited or damaged"
    elif quarantine.count(b"\n") != index.quarantined:
        yield QUARANTINE_NAME, f"the index counts {index.quarantined} images"


def _self_described(storage: Storage, sizes: Mapping[str, int]) -> Iterator[ShardEntry]:
    """Entries for an index that is missing, from the sidecars."""
    for file in sorted(sizes.keys() - {INDEX_NAME, PLAN_NAME}):
        name, _, suffix = file.rpartition(".")
        if suffix == "json":
            try:
                sidecar = decode_sidecar(storage.read(file), file)
                yield structs.replace(sidecar.entry(), name=name)
            except (InputError, OSError):
                yield ShardEntry(name, 0, sizes.get(f"{name}.tar", 0), "", "")


def _check_sidecar(
    sidecar: Sidecar, shard: ShardEntry, index: ShardIndex | None
) -> Iterator[Problem]:
    said = (sidecar.name, len(sidecar.samples), sidecar.size, sidecar.sha256)
    other_plan = index is not None and sidecar.fingerprint != index.fingerprint
    if said != (shard.name, shard.samples, shard.size, shard.sha256) or other_plan:
        yield Problem(shard.name, "sidecar and index disagree")
    end = 0
    for entry in sidecar.samples:
        wanted = lay_out(end, (size for _, size in entry.members))
        if entry.offset != end or wanted != (entry.members, entry.offset + entry.size):
            yield Problem(shard.name, "its place in the sidecar is impossible", entry.key)
        end = entry.offset + entry.size
    if end + END_MARKER > sidecar.size:
        yield Problem(shard.name, "the sidecar leaves no room for the tar's end marker")


def _check_tar(
    data: bytes,
    shard: ShardEntry,
    sidecar: Sidecar | None,
    index: ShardIndex | None,
    names_by_sha256: Mapping[str, str],
) -> Iterator[Problem]:
    """Checks every byte of a tar against its hash, and every sample against itself."""
    digest = hashlib.sha256(data).hexdigest()
    owner = names_by_sha256.get(digest)
    if digest != shard.sha256:
        held = f"holds the bytes of {owner}" if owner else "has other bytes than were written"
        yield Problem(shard.name, f"shard {held} (SHA-256 differs)")
    if sidecar is None or (owner and digest != shard.sha256):
        return
    for entry in sidecar.samples:
        span = memoryview(data)[entry.offset : entry.offset + entry.size]
        if len(span) < entry.size:
            yield Problem(shard.name, "sample is cut off" if span else "sample is gone", entry.key)
        elif zlib.crc32(span) != entry.crc32:
            yield Problem(shard.name, "sample has other bytes than were written", entry.key)
        else:
            try:
                _check_content(decode_sample(entry.key, members_of(data, entry)), index)
            except InputError as error:
                yield Problem(shard.name, f"{error.where}: {error.what}", entry.key)
    end = max((entry.offset + entry.size for entry in sidecar.samples), default=0)
    if len(data) != sidecar.size or any(data[end:]):
        yield Problem(shard.name, "the tar's end marker is damaged")
    try:
        same = all(
            data[offset - BLOCK : offset] == member_header(f"{entry.key}.{suffix}", size)
            for entry in sidecar.samples
            for suffix, (offset, size) in zip(MEMBERS, entry.members, strict=True)
        )
    except ValueError:  # no header holds such a key
        same = False
    if digest == shard.sha256 and not same:
        yield Problem(shard.name, "tar headers and sidecar disagree")


def _check_content(sample: Sample, index: ShardIndex | None) -> None:
    """Raises InputError unless photo, table and maps agree with one another and the categories."""
    check_sample(sample)
    image = sample.image_id, sample.file_name
    # With an id that is a number, the name of the file is no part of the key.
    keys = {sample_key(*image), *longer_keys(*image)[: 1 + isinstance(sample.image_id, str)]}
    if sample.tile is not None:
        keys = {tile_key(key, *sample.tile) for key in keys}
    if sample.key not in keys:
        raise InputError("key and image id disagree", where=sample.key)
    photo, maps = decode_photo(sample.photo, sample.key).shape[:2], sample.segment_map.shape
    if photo != maps:
        raise InputError(f"photo is {photo}, the maps are {maps}", where=sample.key)
    categories = index.categories if index is not None else ()
    known = {(category.id, category.label, category.isthing) for category in categories}
    for segment in sample.segments if known else ():
        if (segment.category_id, segment.label, segment.isthing) not in known:
            what = f"segment {segment.id} does not match the index's categories"
            raise InputError(what, where=sample.key)
