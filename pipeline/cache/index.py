"""The JSON files that vouch for a cache: its plan, a sidecar for each shard, and the index.

A tar alone proves nothing: cut at a sample boundary it reads back without error and with fewer
samples. A sidecar knows every byte of its tar. The index, written last, knows every tar and
sidecar. The plan, written first, keeps a folder from mixing two plans. FORMAT.md describes every
field.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

from msgspec import Meta, Struct, convert, to_builtins
from msgspec.structs import astuple

from panoptic_cache.pipeline.base.config import decode_json, fingerprint
from panoptic_cache.pipeline.base.errors import InputError
from panoptic_cache.pipeline.base.files import Storage, cannot_read
from panoptic_cache.pipeline.cache.sample import FORMAT_VERSION, MEMBERS
from panoptic_cache.pipeline.coco import Category, Rejection

PLAN_NAME = "plan.json"
INDEX_NAME = "index.json"
QUARANTINE_NAME = "quarantine.jsonl"

Count = Annotated[int, Meta(ge=0, lt=1 << 62)]
Name = Annotated[str, Meta(pattern=r"^[^/\\]+\Z")]
Span = tuple[Count, Count]
"""Offset and size of a member's payload in its tar, bytes."""


class SampleEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """Where a sample and the payloads of its members, in the order of `MEMBERS`, lie in its tar.

    The CRC-32 identifies the damaged sample when the shard's hash is wrong.
    """

    key: str
    offset: Count
    size: Count
    crc32: int
    members: Annotated[tuple[Span, ...], Meta(min_length=len(MEMBERS), max_length=len(MEMBERS))]


class ShardEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """A shard in the index."""

    name: Name
    samples: Count
    size: Count
    sha256: str
    sidecar_sha256: str


class Sidecar(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything known about one shard; written right after its tar."""

    name: Name
    fingerprint: str
    size: Count
    sha256: str
    samples: tuple[SampleEntry, ...]
    rejections: tuple[Rejection, ...]
    repairs: Mapping[str, int]

    def entry(self) -> ShardEntry:
        """The shard's entry in the index."""
        sha256 = hashlib.sha256(encode_sidecar(self)).hexdigest()
        return ShardEntry(self.name, len(self.samples), self.size, self.sha256, sha256)


class _SidecarFile(Sidecar, frozen=True, forbid_unknown_fields=True):
    """What the file of a sidecar holds."""

    digest: str


class ShardIndex(Struct, frozen=True, forbid_unknown_fields=True):
    """The contents of a cache; written last."""

    format_version: int
    split: str
    fingerprint: str
    settings: Mapping[str, Any]
    categories: tuple[Category, ...]
    samples: Count
    quarantined: Count
    quarantine_sha256: str
    shards: tuple[ShardEntry, ...]


class _PlanFile(Struct, frozen=True):
    """What `plan.json` holds."""

    fingerprint: str
    settings: dict[str, Any]


def encode_plan(plan: str, settings: Mapping[str, Any]) -> bytes:
    """The bytes of `plan.json`: a plan's fingerprint, and its settings with the split."""
    return json.dumps({"fingerprint": plan, "settings": settings}, indent=1).encode() + b"\n"


def claim(storage: Storage, plan: str, settings: Mapping[str, Any], *, write: bool = True) -> None:
    """Writes `plan.json` where there is none; InputError where the folder was begun otherwise."""
    where = storage.path(PLAN_NAME)
    try:
        found = decode_json(storage.read(PLAN_NAME), _PlanFile)
    except (FileNotFoundError, NotADirectoryError):
        what = "holds tars but no plan"
    except OSError as error:
        raise cannot_read(error, where) from None
    except ValueError:
        what = "plan damaged"
    else:
        if found.fingerprint == plan:
            return
        changed = [
            f"{name} was {found.settings.get(name)}, now {settings.get(name)}"
            for name in {**settings, **found.settings}
            if found.settings.get(name) != settings.get(name)
        ]
        unseen = "the annotation file, the set of images on the disk or the format changed"
        remedy = "the cache here was begun otherwise: use its settings or another folder"
        raise InputError("; ".join(changed) or unseen, storage.url, remedy, "plan-changed")
    sidecars = [f"{name[:-4]}.json" for name in storage.sizes() if name.endswith(".tar")]
    if any(claimed_by(storage, name) != plan for name in sidecars):
        raise InputError(what, where=where, remedy="use another folder")
    if write:
        storage.write(PLAN_NAME, encode_plan(plan, settings))


def claimed_by(storage: Storage, file: str = PLAN_NAME) -> str | None:
    """The plan's fingerprint as `plan.json` or a shard's sidecar says; None where none says it."""
    try:
        return str(decode_json(storage.read(file), dict)["fingerprint"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def encode_sidecar(sidecar: Sidecar) -> bytes:
    """The bytes of a sidecar: JSON with a digest of its contents and a line for each sample."""
    values = to_builtins(sidecar)
    digest = fingerprint(values)
    compact = partial(json.dumps, separators=(",", ":"))
    samples = ",\n  ".join(map(compact, values.pop("samples")))
    head = compact({**values, "digest": digest})
    return f'{head[:-1]},"samples":[\n  {samples}\n]}}\n'.encode()


def decode_sidecar(data: bytes, where: str) -> Sidecar:
    """The inverse of `encode_sidecar`, digest unchecked; InputError names the wrong field."""
    try:
        *values, _ = astuple(decode_json(data, _SidecarFile))
    except ValueError as error:
        remedy = "remove the shard and its sidecar and run preprocess again"
        raise InputError(f"not a sidecar: {error}", where, remedy, "sidecar-damaged") from None
    return Sidecar(*values)


def encode_index(index: ShardIndex) -> bytes:
    """The bytes of `index.json`: JSON with a digest of its contents."""
    values = to_builtins(index)
    values["digest"] = fingerprint(values)
    return json.dumps(values, indent=1).encode() + b"\n"


def read_index(storage: Storage) -> ShardIndex:
    """Reads and checks `index.json`.

    InputError where the cache is not finished, or the index was edited, is damaged, or has another
    format version.
    """
    where = storage.path(INDEX_NAME)
    try:
        values = decode_json(storage.read(INDEX_NAME), dict)
        version, digest = values["format_version"], values.pop("digest")
        if version == FORMAT_VERSION and digest == fingerprint(values):
            index = convert(values, ShardIndex)
            labels = [category.label for category in index.categories]
            if not labels or labels != [*range(len(labels))]:
                raise ValueError("its categories are not labelled 0, 1, ...")
            return index
    except FileNotFoundError:
        what = "no index: no cache, or one that is not finished"
        remedy = "run panoptic preprocess to make or finish it"
        raise InputError(what, where, remedy, "index-missing") from None
    except OSError as error:
        raise cannot_read(error, where) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"index damaged: {error}", where, code="index-damaged") from None
    if version != FORMAT_VERSION:
        what = f"cache format {version}, this program reads {FORMAT_VERSION}"
        raise InputError(what, where, "render it again", "format-version")
    remedy = "run panoptic preprocess again: it rewrites the index from the sidecars"
    raise InputError("index was edited or damaged", where, remedy, "index-damaged")


def read_sidecar(storage: Storage, shard: ShardEntry) -> Sidecar:
    """The sidecar that the index names; InputError if it is missing or differs."""
    where, code = storage.path(f"{shard.name}.json"), "sidecar-damaged"
    try:
        data = storage.read(f"{shard.name}.json")
    except FileNotFoundError:
        raise InputError("sidecar missing", where, code="sidecar-missing") from None
    except OSError as error:
        raise InputError(f"sidecar unreadable: {error}", where, code=code) from None
    if hashlib.sha256(data).hexdigest() != shard.sidecar_sha256:
        remedy = "remove it and run panoptic preprocess again"
        raise InputError("sidecar is not the one the index names", where, remedy, code)
    return decode_sidecar(data, where)


def size_problem(shard: ShardEntry, sizes: Mapping[str, int]) -> str | None:
    """What is wrong with a shard's size on disk, if anything."""
    found = sizes.get(f"{shard.name}.tar")
    if found is None:
        return "shard missing"
    if found != shard.size:
        return f"shard has {found} bytes, the index says {shard.size}"
    return None
