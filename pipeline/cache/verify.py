"""Whether a cache is what was rendered: its sizes and sidecars, or every byte and every target.

The index vouches for each tar and sidecar by SHA-256, and for itself by a digest. The plain check
reads everything but the tars; the deep one reads them too, and names the samples that are damaged.
No problem hides another: all of them are reported.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import simplejpeg

from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.base.progress import progress
from panoptic_cache.pipeline.cache.index import (
    INDEX_NAME,
    QUARANTINE_NAME,
    SampleEntry,
    ShardEntry,
    ShardIndex,
    Sidecar,
    decode_sidecar,
    encode_index,
    encode_sidecar,
    read_index,
    read_sidecar,
    size_problem,
)
from panoptic_cache.pipeline.cache.sample import MEMBERS, Sample, check_sample, decode_sample
from panoptic_cache.pipeline.cache.shards import members_of
from panoptic_cache.pipeline.coco import Category, sample_key
from panoptic_cache.pipeline.render.plan import PLAN_NAME, encode_plan

_BLOCK = 512
_END_MARKER = 2 * _BLOCK


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        shard: The shard's name, or the file's where it is none of a shard.
        sample: Key of the sample, where the problem is one sample's.
        problem: What is wrong.
    """

    shard: str
    sample: str | None
    problem: str

    def __str__(self) -> str:
        sample = f", sample {self.sample}" if self.sample is not None else ""
        return f"{self.shard}{sample}: {self.problem}"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was found.

    Attributes:
        shards: Shards checked.
        samples: Samples they should hold.
        problems: Of the folder first, then by shard.
    """

    shards: int
    samples: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """What `verify --json` prints; a problem has a `sample` only where it is one sample's."""
        return {
            "ok": self.ok,
            "shards": self.shards,
            "samples": self.samples,
            "problems": [
                {key: value for key, value in asdict(problem).items() if value is not None}
                for problem in self.problems
            ],
        }


def verify(storage: Storage, *, deep: bool = False, threads: int | None = None) -> VerifyReport:
    """Checks a cache.

    Args:
        storage: The cache's folder.
        deep: Read the tars too: hash each one, decode every sample and compute its targets anew.
        threads: Shards under check at a time, each of them whole in memory; by default a thread
            for each core.

    Raises:
        InputError: There is no such folder.
    """
    if storage.local is not None and not storage.local.is_dir():
        raise InputError("no such folder", where=storage.url, remedy="give a cache's folder")
    sizes = storage.sizes()
    problems: list[Problem] = []
    index: ShardIndex | None = None
    try:
        index = read_index(storage)
        problems += _check_folder(storage, index, sizes)
    except InputError as error:
        problems.append(Problem(INDEX_NAME, None, error.what))
    # Without an index the sidecars vouch for the tars, and by their digests for themselves.
    shards = index.shards if index is not None else tuple(_self_described(storage, sizes))
    categories = {category.id: category for category in index.categories} if index else None
    owners = {shard.sha256: shard.name for shard in shards}

    def check(shard: ShardEntry) -> tuple[list[Problem], list[str]]:
        sidecar, found = _check_sidecar(storage, shard, index.fingerprint if index else None)
        problem = size_problem(shard, sizes)
        if problem:
            found.append(Problem(shard.name, None, problem))
        if deep and f"{shard.name}.tar" in sizes:
            try:
                data = storage.read(f"{shard.name}.tar")
                found += _check_tar(data, shard, sidecar, owners, categories)
            except OSError as error:
                found.append(Problem(shard.name, None, f"shard unreadable: {error}"))
        return found, [entry.key for entry in sidecar.samples] if sidecar else []

    keys: Counter[str] = Counter()
    with (
        ThreadPoolExecutor(threads or os.cpu_count()) as pool,
        progress("verify", len(shards), "shards") as advance,
    ):
        for found, names in pool.map(check, shards):
            problems += found
            keys.update(names)
            advance()
    repeated = [key for key, count in keys.items() if count > 1]
    problems += [Problem(INDEX_NAME, key, "sample is there more than once") for key in repeated]
    return VerifyReport(len(shards), sum(shard.samples for shard in shards), tuple(problems))


def _check_folder(
    storage: Storage, index: ShardIndex, sizes: Mapping[str, int]
) -> Iterator[Problem]:
    """The files that belong to no shard, and those that belong to nothing."""
    if storage.read(INDEX_NAME) != encode_index(index):
        yield Problem(INDEX_NAME, None, "index was edited: its contents are the same, not its form")
    if sum(shard.samples for shard in index.shards) != index.samples:
        yield Problem(INDEX_NAME, None, "the shards' samples do not add up to the total")
    plan = encode_plan(index.fingerprint, {"split": index.split, **index.settings})
    if PLAN_NAME not in sizes:
        yield Problem(PLAN_NAME, None, "plan missing")
    elif _bytes(storage, PLAN_NAME) != plan:
        yield Problem(PLAN_NAME, None, "plan is not the one of the index")
    if QUARANTINE_NAME not in sizes:
        yield Problem(QUARANTINE_NAME, None, "list of images left out is missing")
    else:
        data = _bytes(storage, QUARANTINE_NAME)
        if hashlib.sha256(data).hexdigest() != index.quarantine_sha256:
            yield Problem(QUARANTINE_NAME, None, "list of images left out was edited or damaged")
        elif data.count(b"\n") != index.quarantined:
            yield Problem(QUARANTINE_NAME, None, f"the index counts {index.quarantined} images")
    known = {INDEX_NAME, PLAN_NAME, QUARANTINE_NAME}
    known |= {f"{shard.name}.{suffix}" for shard in index.shards for suffix in ("tar", "json")}
    for name in sorted(sizes.keys() - known):
        # A README does no harm; a tar that no index knows is read by whoever reads `*.tar`.
        if name.endswith((".tar", ".json", ".jsonl")):
            yield Problem(name, None, "the index knows no such file")


def _bytes(storage: Storage, name: str) -> bytes:
    """Of a file, or none where it cannot be read: those are wrong for sure."""
    try:
        return storage.read(name)
    except OSError:
        return b""


def _self_described(storage: Storage, sizes: Mapping[str, int]) -> Iterator[ShardEntry]:
    """Shards as their own sidecars tell them."""
    for file in sorted(sizes):
        name, _, suffix = file.rpartition(".")
        if suffix != "json" or file in {INDEX_NAME, PLAN_NAME}:
            continue
        try:
            sidecar = decode_sidecar(storage.read(file), file)
            digest = hashlib.sha256(encode_sidecar(sidecar)).hexdigest()
            yield ShardEntry(name, len(sidecar.samples), sidecar.size, sidecar.sha256, digest)
        except (InputError, OSError):
            yield ShardEntry(name, 0, sizes.get(f"{name}.tar", 0), "", "")


def _check_sidecar(
    storage: Storage, shard: ShardEntry, plan: str | None
) -> tuple[Sidecar | None, list[Problem]]:
    """The sidecar, if it can be trusted, and what is wrong with it."""
    try:
        sidecar = read_sidecar(storage, shard)
    except InputError as error:
        return None, [Problem(shard.name, None, error.what)]
    said = (sidecar.name, len(sidecar.samples), sidecar.size, sidecar.sha256)
    wanted = (shard.name, shard.samples, shard.size, shard.sha256)
    found = []
    if said != wanted or sidecar.fingerprint != (plan or sidecar.fingerprint):
        found.append(Problem(shard.name, None, "sidecar and index disagree"))
    return sidecar, found + list(_check_spans(sidecar))


def _check_spans(sidecar: Sidecar) -> Iterator[Problem]:
    """Samples and members follow one another without gaps, and leave room for the end marker."""
    end = 0
    for entry in sidecar.samples:
        position = end
        fits = entry.offset == end
        for offset, size in entry.members:
            fits = fits and offset == position + _BLOCK and size >= 0
            position = offset + -(-size // _BLOCK) * _BLOCK
        end = entry.offset + entry.size
        if not fits or position != end:
            yield Problem(sidecar.name, entry.key, "its place in the sidecar is impossible")
    if end + _END_MARKER > sidecar.size:
        yield Problem(sidecar.name, None, "the sidecar leaves no room for the tar's end marker")


def _check_tar(
    data: bytes,
    shard: ShardEntry,
    sidecar: Sidecar | None,
    owners: Mapping[str, str],
    categories: Mapping[int, Category] | None,
) -> Iterator[Problem]:
    """Every byte of a tar against its hash, and every sample against itself."""
    digest = hashlib.sha256(data).hexdigest()
    whole = digest == shard.sha256
    if not whole:
        owner = owners.get(digest)
        held = f"holds the bytes of {owner}" if owner else "has other bytes than were written"
        yield Problem(shard.name, None, f"shard {held} (SHA-256 differs)")
        if owner:
            return
    if sidecar is None:
        return
    for entry in sidecar.samples:
        span = memoryview(data)[entry.offset : entry.offset + entry.size]
        if len(span) < entry.size:
            yield Problem(shard.name, entry.key, "sample is cut off" if span else "sample is gone")
        elif zlib.crc32(span) != entry.crc32:
            yield Problem(shard.name, entry.key, "sample has other bytes than were written")
        else:
            try:
                _check_content(decode_sample(entry.key, members_of(data, entry)), categories)
            except InputError as error:
                yield Problem(shard.name, entry.key, str(error))
    end = max((entry.offset + entry.size for entry in sidecar.samples), default=0)
    if len(data) != sidecar.size or any(data[end:]):
        yield Problem(shard.name, None, "the tar's end marker is damaged")
    if whole:
        yield from _check_headers(data, shard.name, sidecar.samples)


def _check_content(sample: Sample, categories: Mapping[int, Category] | None) -> None:
    """Raises InputError unless photo, table and maps agree with one another and the categories."""
    check_sample(sample)
    if sample_key(sample.image_id, sample.file_name) != sample.key:
        raise InputError("key and image id disagree", where=sample.key)
    try:
        photo = simplejpeg.decode_jpeg(sample.photo, colorspace="RGB")
    except ValueError as error:
        raise InputError(f"photo damaged: {error}", where=sample.key) from None
    if photo.shape[:2] != sample.index.shape:
        raise InputError(
            f"photo is {photo.shape[:2]}, the maps are {sample.index.shape}", where=sample.key
        )
    if categories is None:
        return
    for segment in sample.segments:
        known = categories.get(segment.category_id)
        if known is None or (known.label, known.isthing) != (segment.label, segment.isthing):
            raise InputError(
                f"segment {segment.id} does not match the index's categories", where=sample.key
            )


def _check_headers(data: bytes, name: str, samples: tuple[SampleEntry, ...]) -> Iterator[Problem]:
    """A stock tar reader finds the members that the sidecar lists, where it lists them."""
    wanted = [
        (f"{entry.key}.{suffix}", *place)
        for entry in samples
        for suffix, place in zip(MEMBERS, entry.members, strict=True)
    ]
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            found = [(info.name, info.offset_data, info.size) for info in tar]
    except tarfile.TarError as error:
        yield Problem(name, None, f"no tar: {error}")
        return
    if found != wanted:
        yield Problem(name, None, "tar headers and sidecar disagree")
